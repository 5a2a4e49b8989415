"""``dtrain version``: of this client, and of the replica that answers."""

import click

from dtrain.cli.options import connected, examples, formatted, settings


@click.command(
    short_help="Show the versions of this client and of the cluster.",
    epilog=examples("dtrain version", "dtrain version --client -o json"),
)
@click.option("--client", "client_only", is_flag=True, help="Do not ask the cluster.")
@formatted("table", "json", "yaml")
@connected
def command(client_only: bool) -> int:
    """Show versions; a cluster that does not answer is no error."""
    import platform
    from importlib.metadata import version

    from dtrain.cli import output

    found: dict[str, object] = {
        "v": 1,
        "kind": "Version",
        "client": version("dtrain"),
        "python": platform.python_version(),
    }
    if not client_only:
        found["server"] = _server()
    if settings().output in ("json", "yaml"):
        output.document(found, settings().output)
        return 0
    click.echo(f"client  {found['client']} (Python {found['python']})")
    if not client_only:
        server = found["server"]
        if isinstance(server, dict) and "version" in server:
            click.echo(
                f"server  {server['version']} (cluster {server['cluster']}, replica {server['replica']})"
            )
        else:
            output.say("server  no cluster answers")
    return 0


def _server() -> dict[str, str] | None:
    from dtrain.cli import context
    from dtrain.protocol.errors import DtrainError

    try:
        addresses = context.addresses(settings())
        if not addresses:
            return None
        from dtrain.cli.client import closing

        with closing(context.client(settings(), addresses, timeout_s=2.0)) as client:
            info = client.info()
    except DtrainError:
        return None
    return {
        "version": info.version,
        "cluster": info.cluster,
        "replica": info.replica,
        "address": info.address,
    }
