"""``dtrain archive``: what the store remembers of jobs that have ended."""

import click

from dtrain.cli.options import complete_job, connected, examples, formatted, settings


@click.command(
    short_help="List what the store remembers of jobs that have ended.",
    epilog=examples("dtrain archive", "dtrain archive digits -o json"),
)
@click.argument("job", required=False, shell_complete=complete_job)
@formatted("table", "json", "yaml", "name")
@connected
def command(job: str | None) -> None:
    """List submissions whose records were archived when they ended, newest first: of JOB, or of all.

    'dtrain describe job NAME --uid UID' and 'dtrain logs NAME --uid UID' show one of them.
    """
    from dtrain.cli import context, output
    from dtrain.cli.client import closing
    from dtrain.cli.render.table import Table

    with closing(context.connect(settings())) as client:
        found, problem = client.archived_jobs((job or "").removeprefix("job/"))
    output.listing(
        "ArchivedJob",
        [
            {
                "v": 1,
                "kind": "ArchivedJob",
                "name": one.job,
                "uid": one.uid,
                "finished": _iso(one.finished),
            }
            for one in found
        ],
        Table(("NAME", "UID", "FINISHED"), tuple((one.job, one.uid, _iso(one.finished)) for one in found)),
        [f"{one.job}/{one.uid}" for one in found],
        output=settings().output,
        revision=0,
        nothing="nothing was archived yet",
    )
    if problem:
        output.say(f"a store could not be asked: {problem}")


def _iso(compact: str) -> str:
    """``20260501T120000Z`` as ``2026-05-01T12:00:00Z``."""
    date, _, time = compact.partition("T")
    return f"{date[:4]}-{date[4:6]}-{date[6:8]}T{time[:2]}:{time[2:4]}:{time[4:]}"
