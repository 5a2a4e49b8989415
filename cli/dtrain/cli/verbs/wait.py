"""``dtrain wait``: until something has happened to a job."""

import click

from dtrain.cli.options import SECONDS, complete_job, connected, examples, formatted, settings


@click.command(
    short_help="Wait until a job has finished, runs, or got somewhere.",
    epilog=examples(
        "dtrain wait digits --timeout 10m",
        "dtrain wait digits --for checkpoint=3",
        "dtrain wait digits --for step=500",
    ),
)
@click.argument("job", shell_complete=complete_job)
@click.option(
    "--for",
    "goal",
    default="finished",
    metavar="WHAT",
    help="finished (any end; default), running, checkpoint=SEQ or step=N (at least).",
)
@click.option("--timeout", type=SECONDS, help="Give up after this long, with exit code 6 (default: never).")
@formatted("table", "json", "yaml", "name")
@connected
def command(job: str, goal: str, timeout: float | None) -> int:
    """Wait for something to happen to JOB.

    Exit code: 0, or 20 (failed), 21 (cancelled), 22 (restart budget spent) where
    the job ended so, 6 when the time is up.
    """
    from dtrain.cli import context, output, reading, terminal, waiting
    from dtrain.cli.client import closing
    from dtrain.cli.render import sentences

    wanted = waiting.parse(goal)
    with closing(context.connect(settings())) as client:
        name = reading.name(client, job)
        found = waiting.until(
            client,
            name,
            lambda job: wanted.answer(job) is not waiting.Answer.NOT_YET,
            what=str(wanted),
            timeout_s=timeout,
        )
    code = waiting.exit_code(wanted, found)
    if settings().output in ("json", "yaml"):
        output.document(found.as_json(), settings().output)
    elif settings().output == "name":
        click.echo(f"job/{name}")
    else:
        click.echo(terminal.text(sentences.job_change(found)))
    if code and wanted.what != "finished":
        output.say(f"{name} ended as {found.phase} before {wanted}")
    return code
