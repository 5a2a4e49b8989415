"""``dtrain up``: a whole cluster on this machine, until Ctrl-C."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dtrain.cli.options import debugging, examples

if TYPE_CHECKING:
    from dtrain.local.cluster import LocalCluster

TEST_QUOTA_BYTES = 192 * 1024 * 1024


@click.command(
    short_help="Run a whole cluster on this machine, until Ctrl-C.",
    epilog=examples(
        "dtrain up",
        "dtrain up --test --etcd-members 3",
        "dtrain up --agents 4 --slots 8 --store dir --folder ./cluster",
    ),
)
@click.option("--agents", type=click.IntRange(1, 64), default=2, show_default=True, help="Agents.")
@click.option("--slots", type=click.IntRange(1, 1024), default=2, show_default=True, help="Ranks per agent.")
@click.option("--coordinators", type=click.IntRange(1, 9), default=3, show_default=True, help="Replicas.")
@click.option(
    "--store", type=click.Choice(["s3", "dir"]), default="s3", show_default=True, help="Kind of store."
)
@click.option(
    "--folder",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where everything lives (default: ~/.local/state/dtrain/NAME).",
)
@click.option("--name", default="local", show_default=True, help="Name of the cluster.")
@click.option("--port", type=click.IntRange(0, 65000), default=0, help="First coordinator's port (0: any).")
@click.option("--ttl", type=click.IntRange(5, 60), default=5, show_default=True, help="Lease TTL in seconds.")
@click.option("--etcd-members", type=click.Choice(["1", "3", "5"]), default="1", show_default=True)
@click.option("--dashboard/--no-dashboard", default=True, show_default=True, help="Pages for browsers.")
@click.option(
    "--dashboard-port", type=click.IntRange(0, 65000), default=0, help="First dashboard's port (0: any)."
)
@click.option("--test", is_flag=True, help="A test cluster: 'dtrain chaos' may break it.")
@debugging
def command(
    *,
    agents: int,
    slots: int,
    coordinators: int,
    store: str,
    folder: Path | None,
    name: str,
    port: int,
    ttl: int,
    etcd_members: str,
    dashboard: bool,
    dashboard_port: int,
    test: bool,
) -> int:
    """Start etcd, a store, coordinators and agents, and make them the current cluster.

    Ctrl-C stops all of it; a second one at once. Data stay in the folder.
    """
    from dtrain.cli import context, localstore, output
    from dtrain.cli.foreground import Foreground
    from dtrain.local.cluster import LocalCluster

    cluster = LocalCluster(
        folder or _default_folder(name),
        coordinators=coordinators,
        agents=agents,
        slots=slots,
        store=store,
        ttl_s=ttl,
        etcd_members=int(etcd_members),
        name=name,
        port=port,
        faults=test,
        # Small enough to be filled, and compacted, so that it is not filled by itself.
        etcd_quota_bytes=TEST_QUOTA_BYTES if test else 0,
        auto_compaction="1h" if test else "",
        dashboards=dashboard,
        dashboard_port=dashboard_port,
    )
    known = None
    with Foreground(lambda: cluster.stop(clean=False)) as foreground:
        try:
            cluster.start(lambda part: output.say(f"  {part}"))
            known = context.known_here(
                cluster.name,
                cluster.addresses,
                cluster.endpoints,
                cluster.folder,
                etcdctl=cluster.etcdctl,
            )
            localstore.write_down(cluster.folder, cluster.store_uri, cluster.store_env)
            context.remember(known)
            _explain(cluster, test=test)
            foreground.wait()
        except foreground.Interrupted:
            output.say("stopping")
        finally:
            if known is not None:
                context.forget(known)
            cluster.stop()
    return 0


def _default_folder(name: str) -> Path:
    import os

    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "dtrain" / name


def _explain(cluster: "LocalCluster", *, test: bool) -> None:
    from dtrain.cli import output

    if cluster.warning:
        output.say(f"warning: {cluster.warning}")
    click.echo(f"cluster {cluster.name} is ready: {len(cluster.coordinators)} coordinators, ", nl=False)
    click.echo(f"{len(cluster.agents)} agents; folder {cluster.folder}")
    if cluster.dashboards:
        click.echo(f"dashboard {next(iter(cluster.dashboards.values()))} ", nl=False)
        click.echo(f"(to change things there: cat {cluster.dashboard_token})")
    click.echo("in another terminal:")
    for line in (
        "dtrain submit job.yaml --follow",
        "dtrain get jobs --watch",
        *(["dtrain chaos --count 20"] if test else []),
        f"dtrain etcdctl watch --prefix {cluster.keys.root}",
    ):
        click.echo(f"  {line}")
    click.echo("Ctrl-C stops everything")
    sys.stdout.flush()
