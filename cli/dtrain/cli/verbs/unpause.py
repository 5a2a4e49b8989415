"""``dtrain unpause``: ranks that are held at a step go on."""

import click

from dtrain.cli.options import SECONDS, complete_job, connected, examples, formatted


@click.command(
    short_help="Let a paused job go on.",
    epilog=examples("dtrain unpause digits", "dtrain unpause digits --wait"),
)
@click.argument("job", shell_complete=complete_job)
@click.option("--wait", is_flag=True, help="Return only when its ranks have been let go.")
@click.option("--timeout", type=SECONDS, default="10m", show_default=True, help="Longest --wait.")
@formatted("table", "json", "name")
@connected
def command(job: str, wait: bool, timeout: float) -> int:
    """Unpause JOB: its ranks go on with the step after the one that they were held at.

    A job that is not paused is left as it is.
    """
    from dtrain.cli import pausing

    return pausing.ask(job, "unpause", wait_s=timeout if wait else None)
