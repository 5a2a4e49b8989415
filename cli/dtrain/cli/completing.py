"""Names for shell completion: live ones, quickly, or none."""

import click

from dtrain.cli.globals import Settings


def names(prefix: str, incomplete: str, ctx: click.Context) -> list[str]:
    """Return names under ``prefix`` that begin as typed; [] if the cluster does not answer in time."""
    try:
        from dtrain.cli import context
        from dtrain.cli.client import Client

        found_settings = ctx.find_root().obj
        settings = found_settings if isinstance(found_settings, Settings) else Settings()
        addresses = context.addresses(settings)
        if not addresses:
            return []
        client = Client(addresses, timeout_s=0.3, tls=context.tls_of(settings))
        found = {item.key.split("/")[1] for item in client.read(prefix).items}
        client.close()
    except Exception:  # noqa: BLE001 - a shell must never show an error while someone types
        return []
    return sorted(name for name in found if name.startswith(incomplete))
