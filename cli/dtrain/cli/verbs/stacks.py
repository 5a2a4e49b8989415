"""``dtrain stacks``: what a job's ranks do at this moment."""

import click

from dtrain.cli.options import complete_job, connected, examples, formatted, settings


@click.command(
    short_help="Show what a job's ranks do at this moment.",
    epilog=examples("dtrain stacks digits", "dtrain stacks digits --full --rank 3"),
)
@click.argument("job", shell_complete=complete_job)
@click.option("--full", is_flag=True, help="All threads of each rank, not only what it does.")
@click.option("--rank", "ranks", metavar="N,...", help="Only these ranks.")
@formatted("table", "json", "yaml")
@connected
def command(*, job: str, full: bool, ranks: str | None) -> int:
    """Collect the stacks of JOB's ranks, wherever they run; training goes on meanwhile.

    The whole of it is also kept on each machine: dtrain logs JOB --stacks.
    """
    import dataclasses

    from dtrain.cli import context, exits, output, reading
    from dtrain.cli.client import closing
    from dtrain.cli.render.table import Table
    from dtrain.protocol.errors import ErrorCode, NotFound

    wanted = _numbers(ranks)
    with closing(context.connect(settings())) as client:
        found, _ = reading.job(client, job)
        reply = client.stacks(found.name)
    shown = [one for one in reply.ranks if wanted is None or one.rank in wanted]
    if settings().output in ("json", "yaml"):
        value = {
            "v": 1,
            "kind": "JobStacks",
            "job": found.name,
            "ranks": [dataclasses.asdict(one) for one in shown],
            "problems": list(reply.problems),
        }
        output.document(value, settings().output)
    elif full:
        for one in shown:
            click.echo(f"rank {one.rank} on {one.agent}: {one.kind}")
            for line in output.coloured(one.text.splitlines()):
                click.echo(line)
            click.echo()
    elif shown:
        rows = tuple((str(one.rank), one.agent, one.kind, one.where or "-") for one in shown)
        for line in output.coloured(Table(("RANK", "AGENT", "DOES", "WHERE"), rows).lines(output.width())):
            click.echo(line)
    for problem in reply.problems:
        output.say(problem)
    if not shown and not reply.problems:
        which = "no rank runs" if wanted is None else f"none of the ranks {ranks} runs"
        raise NotFound(
            ErrorCode.NOT_FOUND,
            f"{which} in job {found.name} now",
            fix=f"dtrain describe job {found.name} lists its ranks",
        )
    return exits.OK if shown else exits.NOT_FOUND


def _numbers(ranks: str | None) -> set[int] | None:
    if ranks is None:
        return None
    parts = [part.strip() for part in ranks.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() for part in parts):
        raise click.UsageError(f"--rank {ranks}: write numbers such as 0,3")
    return {int(part) for part in parts}
