"""``dtrain cordon``: keep new ranks off a machine."""

import click

from dtrain.cli.options import SECONDS, complete_agent, connected, examples, formatted, settings


@click.command(
    short_help="Keep new ranks off a machine.",
    epilog=examples("dtrain cordon gpu-02 --reason 'fan is loud'", "dtrain cordon gpu-02 --for 2h"),
)
@click.argument("agent", shell_complete=complete_agent)
@click.option(
    "--for", "for_s", type=SECONDS, default="0", metavar="DURATION", help="Lifted by itself after that."
)
@click.option("--reason", default="", help="Shown by get and describe.")
@formatted("table", "json", "name")
@connected
def command(agent: str, for_s: float, reason: str) -> int:
    """Keep new ranks off AGENT, until it is lifted. What runs there goes on; see 'dtrain drain'."""
    from dtrain.cli import context, cordoning, output
    from dtrain.cli.client import closing

    with closing(context.connect(settings())) as client:
        record = cordoning.put(client, agent, reason=reason, for_s=for_s, drain=False)
    if settings().output == "json":
        output.document(cordoning.document(record, "Cordoned"), "json")
    elif settings().output == "name":
        click.echo(f"agent/{record.agent}")
    else:
        click.echo(f"{record.agent}: cordoned" + (f" until {record.until}" if record.until else ""))
    return 0
