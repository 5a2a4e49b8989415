"""``dtrain describe``: everything about one job or agent, the answer first."""

import click

from dtrain.cli.options import complete_agent, complete_job, connected, examples, formatted, settings

_KINDS = {"job": "job", "jobs": "job", "agent": "agent", "agents": "agent", "node": "agent"}


def _complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    first: str = next(iter(ctx.params.get("what") or ()), "")
    kind = _KINDS.get(first) or _KINDS.get(incomplete.partition("/")[0])
    found = complete_agent if kind == "agent" else complete_job
    kinds = [] if first else [one for one in ("job", "agent") if one.startswith(incomplete)]
    return kinds + found(ctx, param, incomplete)


@click.command(
    short_help="Everything about one job or agent, the answer first.",
    epilog=examples("dtrain describe job digits", "dtrain describe agent gpu-02"),
)
@click.argument("what", nargs=-1, required=True, metavar="[job|agent] NAME", shell_complete=_complete)
@click.option("--all", "whole", is_flag=True, help="All that failed with a rank, and all events.")
@click.option("--uid", default="", help="An earlier submission of a job's name: see 'dtrain archive'.")
@formatted("table", "json", "yaml")
@connected
def command(*, what: tuple[str, ...], whole: bool, uid: str) -> None:
    """Describe one job or agent: state, root cause, checkpoints, ranks, conditions, events.

    NAME alone means a job; job/NAME and unique beginnings are fine, too.
    """
    import contextlib
    import time

    from dtrain.cli import archived, context, output, reading
    from dtrain.cli.client import closing
    from dtrain.cli.records import Agent, Job
    from dtrain.cli.render import describe, lists
    from dtrain.protocol.errors import DtrainError

    kind, name = _target(what)
    found: Job | Agent
    with closing(context.connect(settings())) as client:
        found, cluster = archived.job(client, name, uid) if kind == "job" else reading.agent(client, name)
        problems: dict[str, tuple[str, ...]] = {}
        # What was asked for is known; that a replica does not say how it is must not hide it.
        with contextlib.suppress(DtrainError):
            info = client.info()
            problems[info.replica] = info.problems
    wanted, now = settings().output, time.time()
    if wanted in ("json", "yaml"):
        document = found.as_json() if isinstance(found, Agent) else found.as_json(now)
        output.document({**document, "revision": cluster.revision}, wanted)
    else:
        lines = (
            describe.agent(found, now) if isinstance(found, Agent) else describe.job(found, now, whole=whole)
        )
        for line in output.coloured(lines):
            click.echo(line)
    for line in lists.problem_lines(problems):
        output.say(line)
    output.freshness(cluster.age_s)


def _target(what: tuple[str, ...]) -> tuple[str, str]:
    match what:
        case (kind, name) if kind in _KINDS:
            return _KINDS[kind], name
        case (name,) if "/" in name and name.split("/", 1)[0] in _KINDS:
            return _KINDS[name.split("/", 1)[0]], name.split("/", 1)[1]
        case (name,) if name not in _KINDS:
            return "job", name
        case _:
            raise click.UsageError(f"cannot describe {' '.join(what)!r}: write 'job NAME' or 'agent NAME'")
