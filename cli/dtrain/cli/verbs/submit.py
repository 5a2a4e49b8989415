"""``dtrain submit``: hand a job file to the cluster."""

from pathlib import Path

import click

from dtrain.cli.options import connected, examples, formatted, settings


def _show_schema(context: click.Context, _option: click.Parameter, asked: bool) -> None:
    if asked:
        import json

        from dtrain.cli import jobschema

        click.echo(json.dumps(jobschema.json_schema(), indent=2))
        context.exit()


@click.command(
    short_help="Submit a job file.",
    epilog=examples(
        "dtrain submit job.yaml --follow",
        "dtrain submit job.yaml --set name=digits-2 --set nnodes=2:4",
        "dtrain submit job.yaml --from-checkpoint exported-folder",
        "dtrain submit job.yaml --working-dir . --dry-run",
    ),
)
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--follow", is_flag=True, help="Show its logs until it ends; the exit code is the job's.")
@click.option("--dry-run", is_flag=True, help="Check everything, change nothing, show what would differ.")
@click.option("--set", "changes", multiple=True, metavar="A.B=C", help="Change one setting; repeatable.")
@click.option(
    "--working-dir",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    metavar="DIR",
    help="Pack this folder and start the ranks in it, instead of the file's working_dir.",
)
@click.option("--request-id", help="Submitting again with the same id changes nothing (default: random).")
@click.option(
    "--from-checkpoint",
    type=click.Path(path_type=Path, exists=True),
    metavar="PATH",
    help="Have it wait, and import what it begins from: as 'dtrain checkpoints import' does.",
)
@click.option("--weights-only", is_flag=True, help="Of --from-checkpoint: what PATH lacks begins fresh.")
@click.option(
    "--schema",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_schema,
    help="Print the JSON Schema of job files, for editors, and exit.",
)
@formatted("table", "json", "yaml", "name")
@connected
def command(
    *,
    file: Path,
    follow: bool,
    dry_run: bool,
    changes: tuple[str, ...],
    working_dir: Path | None,
    request_id: str | None,
    from_checkpoint: Path | None,
    weights_only: bool,
) -> int:
    """Submit the job that FILE describes, through any replica, leader or not."""
    from dtrain.cli import context, jobfile, output, submitting
    from dtrain.cli.client import closing

    if from_checkpoint is not None:
        changes = (*changes, "checkpoint.await_import=true")
    elif weights_only:
        raise click.UsageError("--weights-only is of --from-checkpoint")
    if working_dir is not None:
        changes = (*changes, *jobfile.packing(working_dir))
    job = jobfile.read(file, changes)
    for warning in job.warnings:
        output.say(f"warning: {warning}")
    found = context.addresses(settings()) if dry_run else None
    if found == ():
        output.say("no cluster is configured: only the file was checked")
        submitting.show_spec(job.spec, settings().output, pack=job.pack)
        return 0
    with closing(context.connect(settings())) as client:
        if dry_run:
            return submitting.dry_run(client, job.spec, settings().output, pack=job.pack)
        if from_checkpoint is None:
            accepted = submitting.submit(client, job.spec, request_id, settings().output, pack=job.pack)
        else:
            from dtrain.cli import importing

            # Read before anything is submitted: a job that waits for what cannot be read is of no use.
            with importing.prepared(from_checkpoint.absolute(), partial=weights_only) as ready:
                accepted = submitting.submit(client, job.spec, request_id, settings().output, pack=job.pack)
                done = importing.prepared_into(client, accepted.name, ready)
            output.say(f"checkpoint {done.seq} of step {done.step} is imported: the job begins from it")
        if not follow:
            return 0
        return submitting.follow(client, accepted, ranks=lambda _: [0], prefix=False)
