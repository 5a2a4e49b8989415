"""``dtrain drain``: empty a machine without losing a step."""

import click

from dtrain.cli import confirming
from dtrain.cli.options import SECONDS, complete_agent, connected, examples, formatted, settings


@click.command(
    short_help="Empty a machine without losing a step.",
    epilog=examples("dtrain drain gpu-02 --reason 'new disk' --wait --yes", "dtrain uncordon gpu-02"),
)
@click.argument("agent", shell_complete=complete_agent)
@click.option(
    "--for", "for_s", type=SECONDS, default="0", metavar="DURATION", help="Lifted by itself after that."
)
@click.option("--reason", default="", help="Shown by get and describe.")
@confirming.option
@click.option("--wait", is_flag=True, help="Return only when no rank runs there.")
@click.option("--timeout", type=SECONDS, default="10m", show_default=True, help="Longest --wait.")
@formatted("table", "json", "name")
@connected
def command(*, agent: str, for_s: float, reason: str, yes: bool, wait: bool, timeout: float) -> int:
    """Move what runs on AGENT elsewhere, from a checkpoint taken now, and keep new ranks off it.

    The agent stays up; 'dtrain uncordon' lets ranks on it again. A job that finds no other machine waits.
    """
    from dtrain.cli import context, cordoning, output
    from dtrain.cli.client import closing

    with closing(context.connect(settings())) as client:
        name = cordoning.name(client, agent)
        confirming.confirm(f"Drain {name}? What runs there moves, or waits for another machine", yes=yes)
        record = cordoning.put(client, agent, reason=reason, for_s=for_s, drain=True)
        if wait:
            cordoning.await_empty(client, record.agent, timeout_s=timeout)
    if settings().output == "json":
        output.document(cordoning.document(record, "Draining"), "json")
    elif settings().output == "name":
        click.echo(f"agent/{record.agent}")
    else:
        click.echo(f"{record.agent}: drained" if wait else f"{record.agent}: draining")
    return 0
