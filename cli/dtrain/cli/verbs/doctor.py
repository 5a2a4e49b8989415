"""``dtrain doctor``: looks at everything that jobs depend on."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dtrain.cli.options import connected, examples, formatted, settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dtrain.cli.doctor.findings import Finding

SCOPES = ("etcd", "store", "coordinators", "agents", "machine", "job")


@click.command(
    short_help="Check etcd, store, cluster and machine, and say what to do.",
    epilog=examples(
        "dtrain doctor",
        "dtrain doctor --store s3://bucket/prefix --only store",
        "dtrain doctor --job job.yaml -o json",
    ),
)
@click.option("--only", multiple=True, type=click.Choice(SCOPES), help="Look at this only; repeatable.")
@click.option("--skip", multiple=True, type=click.Choice(SCOPES), help="Do not look at this; repeatable.")
@click.option("--store", "store_uri", metavar="URI", help="Store to try (default: the cluster's).")
@click.option(
    "--job",
    "job_file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="A job file to look at, with its modules to preload.",
)
@click.option("--data-dir", type=click.Path(path_type=Path, file_okay=False), help="Of the agent here.")
@click.option(
    "--ttl", type=click.IntRange(2, 600), default=10, help="Seconds that leases last.  [default: 10]"
)
@click.option("--config", "show_config", is_flag=True, help="Show where each setting comes from, and exit.")
@click.option("-q", "--quiet", is_flag=True, help="Only what is wrong.")
@formatted("table", "json", "yaml")
@partial(connected, etcd=True)
def command(
    *,
    only: tuple[str, ...],
    skip: tuple[str, ...],
    store_uri: str | None,
    job_file: Path | None,
    data_dir: Path | None,
    ttl: int,
    show_config: bool,
    quiet: bool,
) -> int:
    """Look at everything that jobs depend on: each finding with what was measured and what to do.

    Writes a few leases to etcd and a few blobs to the store, and takes them away again. Without a
    cluster it looks at this machine, and at --store and --job. Exit code 0: nothing failed; 8: something did.
    """
    from dtrain.cli import exits, output
    from dtrain.cli.doctor import reporting, running, scoping

    if show_config:
        output.document(reporting.configuration(settings()), settings().output)
        return 0
    wanted = [scope for scope in SCOPES if scope in (only or SCOPES) and scope not in skip]
    checks = scoping.checks(
        settings(), wanted, store_uri=store_uri or "", job_file=job_file, data_dir=data_dir, ttl_s=float(ttl)
    )
    shown = settings().output == "table"

    def said(found: "Sequence[Finding]") -> None:
        if shown:
            for line in reporting.lines(found, quiet=quiet):
                click.echo(line)

    found = running.run(checks, said)
    if shown:
        click.echo(reporting.summary(found))
    else:
        output.document(reporting.document(found), settings().output)
    return exits.CHECK_FAILED if any(one.level == "fail" for one in found) else exits.OK
