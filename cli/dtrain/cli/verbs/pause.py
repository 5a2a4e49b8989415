"""``dtrain pause``: a job stands still at one step and gives nothing back."""

import click

from dtrain.cli.options import SECONDS, complete_job, connected, examples, formatted


@click.command(
    short_help="Hold all ranks of a job at one step; it keeps its machines.",
    epilog=examples("dtrain pause digits --wait", "dtrain unpause digits"),
)
@click.argument("job", shell_complete=complete_job)
@click.option("--wait", is_flag=True, help="Return only when its ranks are held.")
@click.option("--timeout", type=SECONDS, default="10m", show_default=True, help="Longest --wait.")
@formatted("table", "json", "name")
@connected
def command(job: str, wait: bool, timeout: float) -> int:
    """Pause JOB: its ranks save one step together and stand still there, processes and memory included.

    'dtrain unpause' lets them go on at the next step; after seven days they do by themselves. A job
    that waits for machines is paused once it trains. To free its machines, use 'dtrain suspend'.
    With --wait the exit code is 5 where the job ended before, or cannot be paused.
    """
    from dtrain.cli import pausing

    return pausing.ask(job, "pause", wait_s=timeout if wait else None)
