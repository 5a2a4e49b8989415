"""``dtrain suspend``: a job gives its machines back, and can go on later."""

import click

from dtrain.cli.options import SECONDS, complete_job, connected, examples, formatted, settings


@click.command(
    short_help="Take a checkpoint of a job, stop it, and free its machines.",
    epilog=examples("dtrain suspend digits", "dtrain suspend digits --wait --timeout 5m"),
)
@click.argument("job", shell_complete=complete_job)
@click.option("--wait", is_flag=True, help="Return only when its machines are free.")
@click.option("--timeout", type=SECONDS, default="10m", show_default=True, help="Longest --wait.")
@formatted("table", "json", "name")
@connected
def command(job: str, wait: bool, timeout: float) -> int:
    """Suspend JOB: all its ranks save one step together and end. ``dtrain resume`` lets it go on.

    A job that waits for machines stops waiting. With --wait the exit code is 5 where the job
    ended before it was suspended.
    """
    from dtrain.cli import context, exits, output, reading, waiting
    from dtrain.cli.client import closing
    from dtrain.cli.identity import whoami
    from dtrain.protocol.job import JobPhase

    told = "suspend accepted"
    code = exits.OK
    with closing(context.connect(settings())) as client:
        name = reading.name(client, job)
        revision = client.set_intent(name, wanted="suspend", by=whoami())
        if wait:
            found = waiting.until(
                client,
                name,
                lambda job: job.finished or job.phase is JobPhase.SUSPENDED,
                what="its suspension",
                timeout_s=timeout,
            )
            told = found.status.reason if found.status and not found.finished else f"ended as {found.phase}"
            code = exits.CONFLICT if found.finished else exits.OK
    if settings().output == "json":
        output.document({"v": 1, "kind": "Suspended", "name": name, "revision": revision}, "json")
    elif settings().output == "name":
        click.echo(f"job/{name}")
    else:
        click.echo(f"{name}: {told}")
    return code
