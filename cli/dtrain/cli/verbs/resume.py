"""``dtrain resume``: a suspended job waits for machines again."""

import click

from dtrain.cli.options import SECONDS, complete_job, connected, examples, formatted, settings


@click.command(
    short_help="Let a suspended job go on where it was.",
    epilog=examples("dtrain resume digits", "dtrain resume digits --wait --timeout 1h"),
)
@click.argument("job", shell_complete=complete_job)
@click.option("--wait", is_flag=True, help="Return only when its ranks train again, or it has ended.")
@click.option("--timeout", type=SECONDS, default="10m", show_default=True, help="Longest --wait.")
@formatted("table", "json", "name")
@connected
def command(job: str, wait: bool, timeout: float) -> int:
    """Resume JOB: it joins the queue, and begins from its newest checkpoint.

    A job that is not suspended is left as it is. With --wait the exit code is that of the job where it ended.
    """
    from dtrain.cli import context, exits, output, reading, waiting
    from dtrain.cli.client import closing
    from dtrain.cli.identity import whoami

    code = exits.OK
    with closing(context.connect(settings())) as client:
        name = reading.name(client, job)
        revision = client.set_intent(name, wanted="run", by=whoami())
        if wait:
            goal = waiting.Goal("running")
            found = waiting.until(
                client,
                name,
                lambda job: goal.answer(job) is not waiting.Answer.NOT_YET,
                what="its next attempt",
                timeout_s=timeout,
            )
            code = found.exit_code if found.finished else exits.OK
            told = found.status.reason if found.status else ""
        else:
            told = "resume accepted"
    if settings().output == "json":
        output.document({"v": 1, "kind": "Resumed", "name": name, "revision": revision}, "json")
    elif settings().output == "name":
        click.echo(f"job/{name}")
    else:
        click.echo(f"{name}: {told}")
    return code
