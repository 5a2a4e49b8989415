"""``dtrain watch``: one job's changes as they happen."""

import click

from dtrain.cli.options import complete_job, connected, examples, formatted, settings


@click.command(
    short_help="Show one job's changes as they happen.",
    epilog=examples(
        "dtrain watch digits",
        "dtrain watch digits -o json | jq -c '[.revision, .key]'",
        "dtrain watch digits --from 1234 -o json",
    ),
)
@click.argument("job", shell_complete=complete_job)
@click.option(
    "--from",
    "after",
    type=click.IntRange(1),
    metavar="REVISION",
    help="Begin with what came after this revision of etcd, to go on where an earlier watch ended.",
)
@formatted("table", "json")
@connected
def command(job: str, after: int | None) -> int:
    """Show what is decided about JOB and what happens to it, until it has ended.

    A table has events, phases and reasons. With -o json, or in a pipe, each change of each record is
    one line with the revision of its transaction: none is left out, none comes twice, and a watch with
    --from goes on behind the last one, on any replica. Progress between checkpoints is no record: how far
    one is on its way to the store or back is shown below the table, and not in a pipe.
    """
    import json
    import sys

    from dtrain.cli import context, output, reading, records, staying, watching
    from dtrain.cli.answers import Reading
    from dtrain.cli.client import closing
    from dtrain.cli.live import Looking
    from dtrain.cli.render import changes

    lines = staying.piped(settings().output or "table")
    revision = after or 0
    with closing(context.connect(settings())) as client:
        name = reading.name(client, job)
        teller = changes.Teller(name)
        with Looking(client, name) as looking:
            try:
                for moment in watching.moments(client, [f"jobs/{name}/"], looking.say, after=revision):
                    revision = moment.revision
                    if lines:
                        for document in changes.documents(name, moment):
                            click.echo(json.dumps(document, ensure_ascii=False))
                        sys.stdout.flush()
                    else:
                        with looking.aside():
                            for line in output.coloured(teller.lines(moment)):
                                click.echo(line)
                    items = tuple(moment.items.values())
                    found = records.group(Reading(items, revision, 0.0, "")).jobs.get(name)
                    gone = found is None and any(change.value is None for change in moment.changes)
                    if gone or (found is not None and found.finished):
                        return 0
                    if not lines:
                        looking.see(found)
            except KeyboardInterrupt:
                looking.say(f"to go on from here: dtrain watch {name} --from {revision}")
                return 130
    return 0
