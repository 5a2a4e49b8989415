"""``dtrain uncordon``: let ranks on a machine again."""

import click

from dtrain.cli.options import complete_agent, connected, examples, formatted, settings


@click.command(
    short_help="Let ranks on a machine again.",
    epilog=examples("dtrain uncordon gpu-02", "dtrain uncordon gpu-02 -o json"),
)
@click.argument("agent", shell_complete=complete_agent)
@formatted("table", "json", "name")
@connected
def command(agent: str) -> int:
    """Lift the cordon of AGENT, and forget what spoke against the machine."""
    from dtrain.cli import context, cordoning, output
    from dtrain.cli.client import closing

    with closing(context.connect(settings())) as client:
        name, removed = cordoning.lift(client, agent)
    if settings().output == "json":
        output.document({"v": 1, "kind": "Uncordoned", "name": name, "removed": removed}, "json")
    elif settings().output == "name":
        click.echo(f"agent/{name}")
    else:
        click.echo(f"{name}: uncordoned" if removed else f"{name}: was not cordoned")
    return 0
