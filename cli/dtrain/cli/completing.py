"""Names for shell completion: live ones, quickly, or none."""

import contextlib
import threading

import click

from dtrain.cli.globals import Settings

BUDGET_S = 0.3
"""Somebody is typing. What takes longer, in whatever it is stuck, is given up."""


def names(prefix: str, incomplete: str, ctx: click.Context) -> list[str]:
    """Return names under ``prefix`` that begin as typed; [] if the cluster does not answer in time.

    Of ``job/NAME`` the part before the name is kept, as that is what stands on the line.
    """
    found_settings = ctx.find_root().obj
    settings = found_settings if isinstance(found_settings, Settings) else Settings()
    kind, slash, begun = incomplete.rpartition("/")
    found: list[str] = []

    def look_up() -> None:
        # A shell must never show an error while someone types.
        with contextlib.suppress(BaseException):
            found.extend(_names(prefix, settings))

    # Not cancelled but left behind: the process ends with the list.
    thread = threading.Thread(target=look_up, daemon=True)
    thread.start()
    thread.join(BUDGET_S)
    return sorted(f"{kind}{slash}{name}" for name in set(found) if name.startswith(begun))


def _names(prefix: str, settings: Settings) -> list[str]:
    from dtrain.cli import context
    from dtrain.cli.client import Client

    addresses = context.addresses(settings)
    if not addresses:
        return []
    client = Client(addresses, timeout_s=BUDGET_S, tls=context.tls_of(settings))
    return [item.key.split("/")[1] for item in client.read(prefix).items]
