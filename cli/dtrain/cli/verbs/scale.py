"""``dtrain scale``: change how many machines a job may have, while it runs."""

import click

from dtrain.cli.options import SECONDS, complete_job, connected, examples, formatted, settings


@click.command(
    short_help="Change how many machines a job may have.",
    epilog=examples("dtrain scale digits --nnodes 4", "dtrain scale digits --nnodes 2:8 --wait"),
)
@click.argument("job", shell_complete=complete_job)
@click.option("--nnodes", required=True, metavar="MIN:MAX", help="Machines, or fewest and most of them.")
@click.option("--wait", is_flag=True, help="Return only when it runs on as many.")
@click.option("--timeout", type=SECONDS, default="10m", show_default=True, help="Longest --wait.")
@formatted("table", "json", "name")
@connected
def command(job: str, nnodes: str, wait: bool, timeout: float) -> int:
    """Set the bounds of JOB: it shrinks or grows at a checkpoint, and no step is done twice.

    It grows when there are machines for it. What the job file says holds again with the
    next submission.
    """
    from dtrain.cli import context, output, reading, torchflags, waiting
    from dtrain.cli.client import closing
    from dtrain.cli.identity import whoami
    from dtrain.cli.records import Job
    from dtrain.protocol.job import JobPhase

    low, high = torchflags.check_nodes(nnodes)

    def done(job: Job) -> bool:
        now = len(job.status.members) if job.status else 0
        return job.finished or (job.phase is JobPhase.RUNNING and low <= now <= high)

    with closing(context.connect(settings())) as client:
        name = reading.name(client, job)
        revision = client.set_intent(name, by=whoami(), nnodes=(low, high))
        text = f"{name}: may have {nnodes} machine{'' if high == 1 else 's'} from now on"
        if wait:
            found = waiting.until(client, name, done, what="the change of its size", timeout_s=timeout)
            text = f"{name}: {found.phase} on {len(found.status.members) if found.status else 0} machines"
    if settings().output == "json":
        document = {"v": 1, "kind": "Scaled", "name": name, "nnodes": [low, high], "revision": revision}
        output.document(document, "json")
    elif settings().output == "name":
        click.echo(f"job/{name}")
    else:
        click.echo(text)
    return 0
