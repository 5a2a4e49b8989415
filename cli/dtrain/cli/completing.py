"""Names for shell completion: live ones, quickly, or none."""

import contextlib
import threading
import time

import click

from dtrain.cli.globals import Settings

BUDGET_S = 0.3
"""Somebody is typing. An answer that takes longer is given up, wherever it is stuck."""

IMPORT_S_MAX = 2.0


def names(prefix: str, incomplete: str, ctx: click.Context) -> list[str]:
    """Return names under ``prefix`` that begin as typed; [] if the cluster does not answer in time.

    Of ``job/NAME`` the part before the name is kept, as that is what stands on the line.
    """
    found_settings = ctx.find_root().obj
    settings = found_settings if isinstance(found_settings, Settings) else Settings()
    kind, slash, begun = incomplete.rpartition("/")
    found: list[str] = []
    addressed, imported = threading.Event(), threading.Event()

    def look_up() -> None:
        # A shell must never show an error while someone types.
        with contextlib.suppress(BaseException):
            addresses = _addresses(settings)
            addressed.set()
            if addresses:
                found.extend(_names(prefix, settings, addresses, imported))

    # Not cancelled but left behind: the process ends with the list.
    thread = threading.Thread(target=look_up, daemon=True)
    thread.start()
    # The budget is for others' answers; what this machine imports takes as long as it takes.
    if _happens(addressed, thread, BUDGET_S) and _happens(imported, thread, IMPORT_S_MAX):
        thread.join(BUDGET_S)
    return sorted(f"{kind}{slash}{name}" for name in set(found) if name.startswith(begun))


def _happens(event: threading.Event, thread: threading.Thread, limit_s: float) -> bool:
    deadline = time.monotonic() + limit_s
    while not event.wait(0.01):
        if not thread.is_alive() or time.monotonic() > deadline:
            return event.is_set()
    return True


def _addresses(settings: Settings) -> tuple[str, ...]:
    from dtrain.cli import context

    return context.addresses(settings)


def _names(
    prefix: str, settings: Settings, addresses: tuple[str, ...], imported: threading.Event
) -> list[str]:
    from dtrain.cli import context
    from dtrain.cli.client import Client

    imported.set()
    client = Client(addresses, timeout_s=BUDGET_S, tls=context.tls_of(settings))
    return [item.key.split("/")[1] for item in client.read(prefix).items]
