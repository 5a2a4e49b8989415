"""``dtrain get``: lists."""

import time

import click

from dtrain.cli.options import (
    SECONDS,
    complete_agent,
    complete_job,
    connected,
    examples,
    formatted,
    selected,
    settings,
    timed,
    watched,
)

MEANT = {
    "nodes": "agents",
    "machines": "agents",
    "workers": "agents",
    "leader": "coordinators",
    "replicas": "coordinators",
    "snapshots": "checkpoints",
    "history": "events",
}
"""Words of other tools, and the list they mean here."""


class Lists(click.Group):
    """Knows its lists by their singular, too, and what else people call them."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, known = args[0], self.list_commands(ctx)
        if f"{name}s" in known:
            args = [f"{name}s", *args[1:]]
        elif name not in known and not name.startswith("-"):
            import difflib

            near = difflib.get_close_matches(name, [*known, *MEANT], n=1, cutoff=0.6)
            meant = MEANT.get(name) or (MEANT.get(near[0], near[0]) if near else "")
            told = f"did you mean 'dtrain get {meant}'?" if meant else f"there are {', '.join(known)}"
            raise click.UsageError(f"there is no list of {name!r}; {told}", ctx)
        return super().resolve_command(ctx, args)


@click.group(
    cls=Lists,
    short_help="List jobs, agents, coordinators, checkpoints or events.",
    epilog=examples("dtrain get jobs --watch", "dtrain get checkpoints digits -o json"),
)
def command() -> None:
    """List records as any replica's mirror has them."""


@command.command(
    "jobs",
    epilog=examples(
        "dtrain get jobs -o wide",
        "dtrain get jobs --phase active -l team=vision",
        "dtrain get jobs 'sweep-*' -w",
    ),
)
@click.argument("names", nargs=-1, shell_complete=complete_job)
@click.option("--phase", "phases", multiple=True, metavar="PHASE,...", help="Also: active, finished.")
@selected
@watched
@timed
@formatted()
@connected
def jobs(
    *, names: tuple[str, ...], phases: tuple[str, ...], labels: tuple[str, ...], watch: bool, iso: bool
) -> None:
    """List jobs: phase, newest step, attempt, ranks that run, newest checkpoint, reason.

    NAME may be the unique beginning of one, job/NAME, or a beginning and * for all that begin so.
    """
    from dtrain.cli import context, listing, output, selecting
    from dtrain.cli.client import closing
    from dtrain.cli.render import lists
    from dtrain.cli.render.table import When

    chosen = selecting.Selection(names, selecting.phases(phases), selecting.labels(labels))
    now = time.time()
    with closing(context.connect(settings())) as client:
        if watch:
            from dtrain.cli import staying

            staying.jobs(client, chosen, settings().output)
            return
        found = listing.jobs(client)
        rows = chosen.choose(found.rows, "job")
        revision, items = found.revision, []
        if settings().output in ("json", "yaml"):
            from dtrain.cli import reading

            cluster = reading.some(client, [row.name for row in rows], history=False)
            revision = cluster.revision
            items = [job.as_json(now) for job in cluster.jobs.values()]
    output.listing(
        "Job",
        items,
        lists.jobs(rows, When(now, iso), wide=settings().output == "wide"),
        [row.name for row in rows],
        output=settings().output,
        revision=revision,
        single=chosen.single,
    )
    output.unreadable(found.unreadable, "job")
    output.freshness(found.age_s)


@command.command(
    "agents", epilog=examples("dtrain get agents", "dtrain get agents --status lost,blocked -o name")
)
@click.argument("names", nargs=-1, shell_complete=complete_agent)
@click.option("--status", "states", multiple=True, metavar="STATUS,...", help="Such as ready or lost.")
@selected
@watched
@timed
@formatted()
@connected
def agents(
    *, names: tuple[str, ...], states: tuple[str, ...], labels: tuple[str, ...], watch: bool, iso: bool
) -> None:
    """List machines: whether they are ready, slots in use, their jobs."""
    from dtrain.cli import context, listing, output, selecting
    from dtrain.cli.client import closing
    from dtrain.cli.render import lists
    from dtrain.cli.render.table import When

    chosen = selecting.Selection(names, selecting.states(states), selecting.labels(labels))
    with closing(context.connect(settings())) as client:
        if watch:
            from dtrain.cli import staying

            staying.agents(client, chosen, settings().output)
            return
        found = listing.agents(client)
        rows = chosen.choose(found.rows, "agent")
        revision, items = found.revision, []
        if settings().output in ("json", "yaml"):
            from dtrain.cli import records

            cluster = records.group(client.read("agents/"), client.read("cordons/"))
            revision = cluster.revision
            items = [cluster.agents[row.name].as_json() for row in rows if row.name in cluster.agents]
    output.listing(
        "Agent",
        items,
        lists.agents(rows, When(time.time(), iso), wide=settings().output == "wide"),
        [row.name for row in rows],
        output=settings().output,
        revision=revision,
        single=chosen.single,
    )
    output.unreadable(found.unreadable, "agent")
    output.freshness(found.age_s)


@command.command("coordinators", epilog=examples("dtrain get coordinators", "dtrain get coordinators -w"))
@watched
@timed
@formatted()
@connected
def coordinators(*, watch: bool, iso: bool) -> None:
    """List replicas: which one leads, since when, how old their mirrors are, what is wrong."""
    from dtrain.cli import context, output, reading
    from dtrain.cli.answers import ReplicaInfo
    from dtrain.cli.client import closing
    from dtrain.cli.render import lists
    from dtrain.cli.render.table import When

    with closing(context.connect(settings())) as client:
        if watch:
            from dtrain.cli import staying

            staying.coordinators(client, settings().output)
            return
        cluster = reading.coordinators(client)
    addresses = [replica.record.address for replica in cluster.replicas.values() if replica.record]
    ages_s: dict[str, float | None] = {}
    problems: dict[str, tuple[str, ...]] = {}
    if addresses:
        with closing(context.client(settings(), addresses, timeout_s=5.0)) as each:
            for address, answer in each.info_each().items():
                replica = lists.replica_of(cluster, address)
                if replica is not None:
                    age_s = answer.mirror_age_s if isinstance(answer, ReplicaInfo) else None
                    ages_s[replica.name] = age_s
                    replica.raw["mirror_age_s"] = age_s
                    if isinstance(answer, ReplicaInfo):
                        problems[replica.name] = answer.problems
                        replica.raw["problems"] = list(answer.problems)
                        replica.raw["etcd_version"] = answer.etcd_version
    wanted = settings().output
    output.listing(
        "Coordinator",
        [replica.as_json() for replica in cluster.replicas.values()],
        lists.coordinators(cluster, ages_s, When(time.time(), iso), wide=wanted == "wide"),
        list(cluster.replicas),
        output=wanted,
        revision=cluster.revision,
    )
    for line in lists.problem_lines(problems):
        output.say(line)
    if cluster.leader is None:
        output.say("there is no leader at the moment; training goes on, and jobs can be submitted")
    output.freshness(cluster.age_s)


@command.command(
    "checkpoints", epilog=examples("dtrain get checkpoints digits", "dtrain get checkpoints digits -o json")
)
@click.argument("job", shell_complete=complete_job)
@watched
@timed
@formatted()
@connected
def checkpoints(*, job: str, watch: bool, iso: bool) -> None:
    """List a job's checkpoints: committed, open, bad, being deleted; * marks the newest."""
    from dtrain.cli import checkpointing, context
    from dtrain.cli.client import closing

    with closing(context.connect(settings())) as client:
        if watch:
            from dtrain.cli import reading, staying

            staying.checkpoints(client, reading.name(client, job), settings().output)
            return
        checkpointing.listing(client, job, settings().output, iso=iso)


@command.command(
    "events",
    epilog=examples(
        "dtrain get events digits",
        "dtrain get events digits --since 1h --type Warning",
        "dtrain get events -w",
    ),
)
@click.argument("job", required=False, shell_complete=complete_job)
@click.option("--type", "types", multiple=True, metavar="TYPE,...", help="Normal, Warning, or reasons.")
@click.option("--since", type=SECONDS, metavar="AGE", help="Only what is not older, such as 10m.")
@click.option("--uid", default="", help="Of an earlier submission of JOB: see 'dtrain archive'.")
@watched
@timed
@formatted()
@connected
def events(
    *, job: str | None, types: tuple[str, ...], since: float | None, uid: str, watch: bool, iso: bool
) -> None:
    """List what happened, oldest first: to one job, or to all."""
    from dtrain.cli import context, eventing, reading
    from dtrain.cli.client import closing

    wanted = eventing.Wanted(job, types, since, uid)
    with closing(context.connect(settings())) as client:
        if watch:
            from dtrain.cli import staying

            name = reading.name(client, job) if job else ""
            staying.events(client, name, settings().output, fits=wanted.fits)
            return
        eventing.listing(client, wanted, iso=iso, form=settings().output)
