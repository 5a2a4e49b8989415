"""Lists that stay: in place on a terminal, one object for each change anywhere else.

What goes into a pipe is exact: every transaction that touches an object of the list
is one object with its revision, none is left out and none comes twice, whichever
replicas are lost meanwhile. It holds what the leader and operators write; what
changes with every step is for the terminal alone.
"""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from dtrain.cli import checkpointing, listing, output, records, terminal, watching
from dtrain.cli.answers import Reading
from dtrain.cli.client import Client
from dtrain.cli.records import Cluster, Job
from dtrain.cli.render import checkpoints as checkpoint_tables
from dtrain.cli.render import lists
from dtrain.cli.render.table import Table, When
from dtrain.cli.selecting import Selection
from dtrain.cli.watching import RETRY_S, Moment
from dtrain.protocol import codec
from dtrain.protocol.errors import DtrainError, OutcomeUnknown, Unavailable
from dtrain.protocol.events import EventRecord
from dtrain.protocol.rows import AgentRow, JobRow

if TYPE_CHECKING:
    from rich.live import Live

T = TypeVar("T")
R = TypeVar("R", JobRow, AgentRow)
Json = dict[str, Any]

REDRAW_S = 1.0
"""Steps and ages on a terminal are looked at this often."""

_FLEETING = {"STEP", "PROGRESS", "ETA", "GOODPUT", "AGE", "SINCE", "MIRROR-AGE"}
"""Columns that change all the time."""


def piped(wanted: str) -> bool:
    """Whether objects are written, not a table that changes in place."""
    return not sys.stdout.isatty() or wanted in ("json", "yaml", "name")


def jobs(client: Client, chosen: Selection, wanted: str) -> None:
    """``get jobs --watch``."""
    if not piped(wanted):
        wide = wanted == "wide"
        _redraw(
            lambda **how: listing.jobs(client, **how),
            lambda found: lists.jobs(_fitting(chosen, found.rows), When(time.time()), wide=wide),
        )
    told: set[str] = set()
    for moment in watching.moments(client, ["jobs/"], output.say):
        for name in filter(chosen.may_be, _touched(moment, "jobs/")):
            job = _cluster(moment, f"jobs/{name}/").jobs.get(name)
            if _concerns(told, name, fits=job is not None and chosen.fits(job.row(time.time()))):
                _write(None if job is None else job.as_json(), "Job", name, moment, wanted)


def agents(client: Client, chosen: Selection, wanted: str) -> None:
    """``get agents --watch``."""
    if not piped(wanted):
        wide = wanted == "wide"
        _redraw(
            lambda **how: listing.agents(client, **how),
            lambda found: lists.agents(_fitting(chosen, found.rows), When(time.time()), wide=wide),
        )
    told: set[str] = set()
    for moment in watching.moments(client, ["agents/", "cordons/"], output.say):
        for name in filter(chosen.may_be, _touched(moment, "agents/", "cordons/")):
            agent = _cluster(moment, f"agents/{name}/node", f"cordons/{name}").agents.get(name)
            if _concerns(told, name, fits=agent is not None and chosen.fits(agent.row)):
                _write(None if agent is None else agent.as_json(), "Agent", name, moment, wanted)


def coordinators(client: Client, wanted: str) -> None:
    """``get coordinators --watch``."""
    told: dict[str, Json] = {}
    screen = None if piped(wanted) else _Screen()
    for moment in watching.moments(client, ["coordinators/", "leader"], output.say):
        cluster = _cluster(moment, "")
        if screen is not None:
            screen.show(lists.coordinators(cluster, {}, When(time.time()), wide=wanted == "wide"))
            continue
        _tell(
            told,
            {name: one.as_json() for name, one in cluster.replicas.items()},
            "Coordinator",
            moment,
            wanted,
        )


def checkpoints(client: Client, name: str, wanted: str) -> None:
    """``get checkpoints --watch``; ``name`` is the full one."""
    told: dict[str, Json] = {}
    screen = None if piped(wanted) else _Screen()
    for moment in watching.moments(client, [f"jobs/{name}/"], output.say):
        job = _cluster(moment, "").jobs.get(name, Job(name))
        if screen is not None:
            screen.show(checkpoint_tables.checkpoints(job, When(time.time()), wide=wanted == "wide"))
            continue
        found = {
            str(line.seq): checkpointing.document(job, line)
            for line in checkpoint_tables.checkpoint_lines(job)
        }
        _tell(told, found, "Checkpoint", moment, wanted)


def events(
    client: Client, name: str, wanted: str, *, fits: Callable[[EventRecord, float], bool] | None = None
) -> None:
    """``get events --watch``; ``name`` "": of all jobs. On a terminal they follow each other.

    ``fits``: which of them, given the time.
    """
    for moment in watching.moments(client, [f"jobs/{name}/events/" if name else "jobs/"], output.say):
        for job, event, document in _events(moment):
            if fits is not None and not fits(event, time.time()):
                continue
            if piped(wanted):
                whole = {"v": 1, "kind": "Event", "job": job, **document}
                _write(whole, "Event", f"{job}/{event.seq}", moment, wanted)
                continue
            table = lists.events([(job, event)], When(time.time(), iso=True), wide=wanted == "wide")
            for line in output.coloured(table.lines()[1:]):
                click.echo(line)


class _Screen:
    """A table in place, until the verb ends; on a dumb terminal each row again when it says something new."""

    def __init__(self) -> None:
        self._told: set[tuple[str, ...]] = set()
        self._live: Live | None = None
        if terminal.moves(sys.stdout):
            from rich import live

            self._live = click.get_current_context().with_resource(live.Live(auto_refresh=False))

    def show(self, table: Table) -> None:
        lines = output.coloured(table.lines(output.width()))
        if self._live is None:
            self._add(table, lines)
            return
        from rich.text import Text

        self._live.update(Text.from_ansi("\n".join(lines)), refresh=True)

    def _add(self, table: Table, lines: Sequence[str]) -> None:
        """Nothing can be taken back there: what changes with every step would fill it."""
        lasting = [place for place, heading in enumerate(table.headings) if heading not in _FLEETING]
        rows = {
            tuple(row[place] for place in lasting): line
            for row, line in zip(table.rows, lines[1:], strict=True)
        }
        fresh = [line for row, line in rows.items() if row not in self._told]
        if fresh and not self._told:
            click.echo(lines[0])
        for line in fresh:
            click.echo(line)
        self._told = set(rows)
        sys.stdout.flush()


def _redraw(read: Callable[..., listing.Listed[T]], show: Callable[[listing.Listed[T]], Table]) -> None:
    """Never returns."""
    screen, revision, lost = _Screen(), 0, False
    while True:
        try:
            found = read(after_revision=revision, wait_s=REDRAW_S if revision else 0.0)
        except (Unavailable, OutcomeUnknown) as error:
            if not revision:
                raise
            if not lost:
                output.say(f"{error.message}; trying again")
            lost = True
            time.sleep(RETRY_S)
            continue
        lost = False
        revision = found.revision
        screen.show(show(found))


def _fitting(chosen: Selection, rows: Iterable[R]) -> list[R]:
    """Those that are meant; a name that means none yet may come to mean one."""
    return [row for row in rows if chosen.may_be(row.name) and chosen.fits(row)]


def _concerns(told: set[str], name: str, *, fits: bool) -> bool:
    """Whether a change is to be told: of what is selected, and once of what is so no more."""
    known = name in told
    (told.add if fits else told.discard)(name)
    return fits or known


def _touched(moment: Moment, *prefixes: str) -> list[str]:
    """Names right below the prefixes whose records have changed, events apart; at first all."""
    keys = moment.items if moment.listed and not moment.changes else [one.key for one in moment.changes]
    found = dict.fromkeys(
        key.split("/")[1] for key in keys if key.startswith(prefixes) and "/events/" not in key
    )
    return list(found)


def _events(moment: Moment) -> Iterator[tuple[str, EventRecord, Json]]:
    """Events that came or were counted again, oldest first; at first all there are."""
    at_first = moment.listed and not moment.changes
    values: Iterable[tuple[str, bytes | None]] = (
        ((item.key, item.value) for item in moment.items.values())
        if at_first
        else ((change.key, change.value) for change in moment.changes)
    )
    found = []
    for key, value in values:
        if value is not None and "/events/" in key:
            with contextlib.suppress(DtrainError):
                found.append((key.split("/")[1], codec.decode(EventRecord, value), json.loads(value)))
    yield from sorted(found, key=lambda one: (one[1].last or one[1].first, one[0], one[1].seq))


def _cluster(moment: Moment, *beginnings: str) -> Cluster:
    """What the records say whose keys begin so; events have a watch of their own."""
    chosen = tuple(
        item for key, item in moment.items.items() if key.startswith(beginnings) and "/events/" not in key
    )
    return records.group(Reading(chosen, moment.revision, moment.age_s, ""))


def _tell(told: dict[str, Json], now: Mapping[str, Json], kind: str, moment: Moment, wanted: str) -> None:
    """Write those that are not as they were told."""
    for name, document in now.items():
        if told.get(name) != document:
            told[name] = document
            _write(document, kind, name, moment, wanted)
    for name in [name for name in told if name not in now]:
        del told[name]
        _write(None, kind, name, moment, wanted)


def _write(document: Json | None, kind: str, name: str, moment: Moment, wanted: str) -> None:
    if document is None:
        document = {"v": 1, "kind": f"{kind}Gone", "name": name}
    if wanted == "name":
        click.echo(f"{kind.lower()}/{name}")
    elif wanted == "yaml":
        click.echo("---")
        output.document({**document, "revision": moment.revision}, wanted)
    else:
        click.echo(json.dumps({**document, "revision": moment.revision}, ensure_ascii=False))
    sys.stdout.flush()
