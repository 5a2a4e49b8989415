"""``dtrain chaos``: breaks a test cluster at random and measures how it recovers."""

from typing import TYPE_CHECKING

import click

from dtrain.cli.options import SECONDS, connected, examples, formatted, settings

if TYPE_CHECKING:
    from dtrain.cli.chaosing import Meant
    from dtrain.local.chaos_plan import Settings
    from dtrain.local.faults import Kind


@click.command(
    short_help="Break a test cluster at random, and measure how it recovers.",
    epilog=examples(
        "dtrain chaos --count 20",
        "dtrain chaos --kinds kill,cut --targets agent,leader --for 10m --seed 7",
        "dtrain chaos --targets a1,etcd-0 --every 20s --hold 15s",
        "dtrain chaos --dry-run --seed 7",
        "dtrain chaos --mark --endpoints http://etcd-1:2379 --cluster staging",
    ),
)
@click.option(
    "--kinds",
    default="kill,freeze,cut,slow,fill,preempt",
    show_default=True,
    help="What is done, comma-separated.",
)
@click.option(
    "--targets",
    default="",
    help="To what, comma-separated: rank, launcher, agent, agent-guardian, machine, coordinator, leader, "
    "coordinator-guardian, etcd, or names such as a1, c2, etcd-0 (default: everything).",
)
@click.option("--every", type=SECONDS, default="5s", show_default=True, help="Mean pause between faults.")
@click.option("--hold", type=SECONDS, help="How long a fault lasts (default: random, 0.5 to 8 s).")
@click.option("--count", type=click.IntRange(1), help="Stop after so many faults (default: 20).")
@click.option("--for", "duration", type=SECONDS, help="Stop after so long.")
@click.option("--seed", type=click.IntRange(0), help="Draw the same faults again (default: a new one).")
@click.option(
    "--hasty",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    help="Share of faults whose recovery is not awaited before the next.",
)
@click.option(
    "--patience",
    type=SECONDS,
    default="3m",
    show_default=True,
    help="Longest recovery; beyond, chaos gives up.",
)
@click.option("--dry-run", is_flag=True, help="Print what would come, and do nothing.")
@click.option("--mark", is_flag=True, help="Mark an idle cluster as a test cluster, and do nothing else.")
@click.option("--unmark", is_flag=True, help="Take the mark away, and do nothing else.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask before --mark or --unmark.")
@formatted("table", "json")
@connected
def command(
    *,
    kinds: str,
    targets: str,
    every: float,
    hold: float | None,
    count: int | None,
    duration: float | None,
    seed: int | None,
    hasty: float,
    patience: float,
    dry_run: bool,
    mark: bool,
    unmark: bool,
    yes: bool,
) -> int:
    """Kill, freeze, cut off, slow down and fill parts of a test cluster, and watch it recover.

    Works on clusters of 'dtrain up --test', and on others that were marked while they were idle. A
    fault counts as recovered from when there is a leader, every job that trained does new steps on
    all its ranks, and everything is registered again. Meanwhile etcd's history is audited. Ctrl-C
    heals what is broken and reports. Exit code 0: all recovered and no promise broken; 8: not so.
    """
    from dtrain.cli import chaosing, exits, output
    from dtrain.local.chaos_plan import Settings

    meant = chaosing.find(settings())
    if mark and unmark:
        raise click.UsageError("--mark and --unmark at the same time")
    if mark or unmark:
        return _mark(meant, mark=mark, yes=yes)
    low_high = (0.5, 8.0) if hold is None else (hold, hold)
    chosen = Settings(
        seed=_seed() if seed is None else seed,
        kinds=_kinds(kinds),
        targets=tuple(dict.fromkeys(word.strip() for word in targets.split(",") if word.strip())),
        every_s=every,
        hold_s=low_high,
        wait=1.0 - hasty,
        count=count if count is not None else 1_000_000_000 if duration is not None else 20,
        for_s=float("inf") if duration is None else duration,
        patience_s=patience,
    )
    if dry_run:
        return _dry_run(meant, chosen)
    output.say(f"seed {chosen.seed}; Ctrl-C heals what is broken and reports")
    report = chaosing.run(meant, chosen, output.say)
    if settings().output == "json":
        output.document(report.to_json(), "json")
    else:
        for line in report.lines():
            click.echo(line)
    if not report.ok:
        return exits.CHECK_FAILED
    return exits.OK


def _mark(meant: "Meant", *, mark: bool, yes: bool) -> int:
    from dtrain.cli import chaosing, confirming

    name = meant.keys.cluster
    if mark:
        confirming.confirm(f"Mark cluster {name}? Whoever reaches its etcd may then break it", yes=yes)
        chaosing.mark(meant)
        click.echo(f"{name}: marked as a test cluster")
    else:
        click.echo(f"{name}: {'is no test cluster any more' if chaosing.unmark(meant) else 'was not marked'}")
    return 0


def _dry_run(meant: "Meant", chosen: "Settings") -> int:
    import itertools

    from dtrain.cli import chaosing, output
    from dtrain.local.chaos_plan import draws, possible

    found = chaosing.check(meant)
    count = min(chosen.count, 1000)
    if chosen.for_s < float("inf"):
        count = min(count, max(1, int(chosen.for_s / max(chosen.every_s, 0.5))))
    plan = list(itertools.islice(draws(chosen, possible(chosen)), count))
    if settings().output == "json":
        draw_list = [{"number": n, "draw": str(draw)} for n, draw in enumerate(plan, 1)]
        document = {
            "v": 1,
            "kind": "ChaosPlan",
            "seed": chosen.seed,
            "marked_by": found.by,
            "draws": draw_list,
        }
        output.document(document, "json")
        return 0
    click.echo(f"cluster {meant.keys.cluster}, marked by {found.by} at {found.since}; seed {chosen.seed}")
    for number, draw in enumerate(plan, 1):
        click.echo(f"{number:4} {draw}")
    return 0


def _kinds(text: str) -> "tuple[Kind, ...]":
    from dtrain.local.faults import Kind

    known = {kind.value: kind for kind in Kind}
    words = [word.strip() for word in text.split(",") if word.strip()]
    for word in words:
        if word not in known:
            raise click.UsageError(f"{word!r} is no kind of fault; they are {', '.join(known)}")
    return tuple(dict.fromkeys(known[word] for word in words))


def _seed() -> int:
    import random

    return random.SystemRandom().randrange(1_000_000)
