"""``dtrain cancel``: end a job for good."""

import click

from dtrain.cli import confirming
from dtrain.cli.options import SECONDS, complete_job, connected, examples, formatted, settings


@click.command(
    short_help="End a job for good.",
    epilog=examples("dtrain cancel digits", "dtrain cancel digits --yes --wait"),
)
@click.argument("job", shell_complete=complete_job)
@confirming.option
@click.option("--wait", is_flag=True, help="Return only when it has ended.")
@click.option("--timeout", type=SECONDS, default="10m", show_default=True, help="Longest --wait.")
@formatted("table", "json", "name")
@connected
def command(job: str, yes: bool, wait: bool, timeout: float) -> int:
    """Cancel JOB: its ranks are stopped, its committed checkpoints stay."""
    from dtrain.cli import context, output, reading, waiting
    from dtrain.cli.client import closing
    from dtrain.cli.identity import whoami

    with closing(context.connect(settings())) as client:
        name = reading.name(client, job)
        confirming.confirm(f"Cancel {name}? That cannot be undone; its checkpoints stay", yes=yes)
        revision = client.set_intent(name, wanted="cancel", by=whoami())
        if wait:
            waiting.until(client, name, lambda job: job.finished, what="its end", timeout_s=timeout)
    if settings().output == "json":
        output.document({"v": 1, "kind": "Cancelled", "name": name, "revision": revision}, "json")
    elif settings().output == "name":
        click.echo(f"job/{name}")
    else:
        click.echo(f"{name}: cancelled" if wait else f"{name}: cancel accepted")
    return 0
