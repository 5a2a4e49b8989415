"""What is looked at, as lines of a terminal. Pure: ``now`` and ``at`` are arguments."""

import datetime
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from dtrain.cli import terminal
from dtrain.cli.durations import show_s
from dtrain.cli.records import Job
from dtrain.cli.render import describe, lists, moving
from dtrain.cli.render.table import UNKNOWN, Table, When, ago
from dtrain.cli.top.seen import Seen
from dtrain.cli.top.text import cut
from dtrain.cli.top.view import VIEWS, Look, Page, Sort, Target, View, settled
from dtrain.protocol import wording
from dtrain.protocol.events import EventType
from dtrain.protocol.rows import AgentRow, JobRow

NAME_MAX = 28
"""Cells of a job's name where the terminal is narrower than ``WIDE``."""

WIDE = 120
EVENTS_MAX = 6
EVENTS_ONCE = 10
LATE_S = 3.0
"""Rows are read every second; ones older than this are said to be so."""

_JOBS = ("NAME", "PHASE", "STEP", "PROG", "STEPS/S", "RANKS", "ETA", "REASON")

HELP = (
    "Keys",
    "",
    "  1 2 3 4, Tab     jobs, agents, events, replicas",
    "  up down, k j     move the selection, or a page by a line",
    "  PgUp PgDn Space  a screenful up or down; Home End: first, last",
    "  left right       move the text sideways where it is wider than the terminal",
    "  Enter            open the job or agent; again, or Esc: back to the list",
    "  /                filter: rows that contain the text in any column; Enter keeps it, Esc clears it",
    "  s, r             jobs: sort by another column; the other way round",
    "  q, Ctrl-C        leave; nothing that runs is touched",
    "",
    "STEPS/S is one by the median of what recent steps took. '0 (34s)': no step has been seen for so long.",
    "Ages and steps are read every second, from any replica; records as they change.",
)


@dataclass(frozen=True, slots=True)
class Line:
    """A line and how it looks: "", "bold", "dim", "selected", or a colour of ``word``."""

    text: str
    style: str = ""
    word: str = ""
    """Only its first occurrence has the colour; "": the whole line."""


@dataclass(frozen=True, slots=True)
class Row:
    """A line of a list."""

    target: Target
    cells: tuple[str, ...]
    detail: str
    """All there is to say in a line, when it is selected."""
    colour: str = ""
    word: str = ""


@dataclass(frozen=True, slots=True)
class _List:
    headings: tuple[str, ...]
    rows: tuple[Row, ...]
    nothing: str


@dataclass(frozen=True, slots=True)
class Frame:
    """What is on the screen, and what keys need to know of it."""

    lines: tuple[Line, ...]
    look: Look
    """Settled: the one that this shows."""
    targets: tuple[Target, ...]
    height: int
    """Of the list or page."""


def frame(look: Look, seen: Seen, size: tuple[int, int], *, now: float, at: float) -> Frame:
    """Draw ``look`` for a terminal of so many columns and lines; ``at``: the feed's clock."""
    width, height = size
    head = _head(seen, now, at)
    wide = width >= WIDE
    if look.help or look.page is not None:
        page = [Line(text) for text in (HELP if look.help else _page(look, seen, now))]
        body = max(1, height - len(head) - 2)
        look = settled(look, (), body, len(page))
        shown = page[look.top : look.top + body]
        shown = [Line(cut(terminal.text(line.text), width, left=look.left), line.style) for line in shown]
        title = Line("" if look.page is None else f"{look.page.kind} {look.page.name}", "bold")
        lines = [*head, title, *shown, *[Line("")] * (body - len(shown)), _keys(look)]
        return Frame(_fitting(lines, width, height), look, (), body)
    listed = _listed(look, seen, now, at, wide)
    targets = tuple(row.target for row in listed.rows)
    events = _recent(seen, now, min(EVENTS_MAX, (height - 10) // 3)) if look.view is View.JOBS else []
    body = max(1, height - len(head) - len(events) - 3)
    look = settled(look, targets, body, 0)
    table = Table(listed.headings, tuple(row.cells for row in listed.rows)).lines()
    heading, texts = table[0], table[1:]
    rows = [
        Line(cut(texts[place], width, left=look.left).ljust(width), "selected")
        if place == look.index
        else Line(cut(texts[place], width, left=look.left), row.colour, row.word)
        for place, row in enumerate(listed.rows)
        if look.top <= place < look.top + body
    ]
    if not rows:
        rows = [Line(listed.nothing if not look.filter else f"nothing contains {look.filter!r}", "dim")]
    detail = listed.rows[look.index].detail if listed.rows else ""
    lines = [
        *head,
        Line(cut(heading, width, left=look.left), "bold"),
        *rows,
        *[Line("")] * (body - len(rows)),
        *events,
        Line(detail),
        _keys(look),
    ]
    return Frame(_fitting(lines, width, height), look, targets, body)


def plain(look: Look, seen: Seen, now: float) -> list[str]:
    """One frame for a pipe: everything that is selected, not cut."""
    listed = _listed(look, seen, now, seen.read_at, wide=True)
    lines = [line.text for line in _head(seen, now, seen.read_at) if line.text]
    table = Table(listed.headings, tuple(row.cells for row in listed.rows)).lines()
    lines += ["", *(table if listed.rows else [listed.nothing])]
    agents = lists.agents(sorted(seen.agents, key=_troubled_first), When(now))
    lines += ["", *(agents.lines() if agents.rows else ["no agents"])]
    if events := _recent(seen, now, EVENTS_ONCE):
        lines += ["", *(line.text for line in events)]
    return lines


def _fitting(lines: Iterable[Line], width: int, height: int) -> tuple[Line, ...]:
    """No line beyond the terminal's edge; the last one has the keys even where there is room for few."""
    made = [Line(cut(terminal.text(line.text), width), line.style, line.word) for line in lines]
    return tuple(made if len(made) <= height else [*made[: height - 1], made[-1]][:height])


def _head(seen: Seen, now: float, at: float) -> list[Line]:
    """Who leads, how many of what there are, and what is wrong: always three lines."""
    known = seen.coordinators
    time = datetime.datetime.fromtimestamp(now, datetime.UTC).strftime("%H:%M:%S UTC")
    count = len(known.replicas)
    silent = [name for name, age_s in sorted(seen.mirror_ages_s.items()) if age_s is None]
    silent = [name for name in silent if name in known.replicas]
    leader = f"leader {known.leader.replica} (term {known.term})" if known.leader else "no leader"
    replicas = wording.count(count, "replica")
    replicas += f", {', '.join(silent)} silent" if silent else ""
    cluster = f"cluster {seen.name}   " if seen.name else ""
    title = Line(f"dtrain top   {cluster}{leader}   {replicas}   {time}", "bold")
    phases = Counter(str(row.phase) for row in seen.jobs)
    states = Counter(row.status for row in seen.agents)
    busy, slots = (sum(row.busy for row in seen.agents), sum(row.slots for row in seen.agents))
    counts = f"jobs {len(seen.jobs)}{_counted(phases)}   agents {len(seen.agents)}{_counted(states)}"
    return [title, Line(f"{counts}   slots {busy}/{slots} busy"), _trouble(seen, at)]


def _counted(found: Counter[str]) -> str:
    told = ", ".join(f"{count} {what}" for what, count in sorted(found.items()))
    return f" ({told})" if told else ""


def _trouble(seen: Seen, at: float) -> Line:
    """The worst of what is wrong."""
    late_s = at - seen.read_at
    if seen.trouble and late_s > LATE_S:
        return Line(f"{show_s(late_s)} old: {seen.trouble}; trying again", "red")
    if late_s > 2 * LATE_S:
        return Line(f"{show_s(late_s)} old: no answer yet", "red")
    if stale := lists.stale_line(seen.age_s):
        return Line(stale, "red")
    if seen.coordinators.leader is None:
        return Line("there is no leader at the moment; training goes on, and jobs can be submitted", "yellow")
    found = lists.problem_lines(seen.problems)
    more = f" (and {len(found) - 1} more: dtrain get coordinators)" if len(found) > 1 else ""
    return Line(found[0] + more, "yellow") if found else Line("")


def _keys(look: Look) -> Line:
    if look.typing:
        return Line(f"filter: {look.filter}_   Enter: keep   Esc: clear", "bold")
    if look.help:
        return Line("any key: back", "dim")
    if look.page is not None:
        return Line("Esc back   arrows, PgUp, PgDn move   ? help   q quit", "dim")
    shown = " ".join(
        f"[{view}]" if view is look.view else f"{place} {view}" for place, view in enumerate(VIEWS, 1)
    )
    filtered = f"/ {look.filter!r}" if look.filter else "/ filter"
    sort = f"  s {look.sort}{' (r)' if look.backwards else ''}" if look.view is View.JOBS else ""
    # In order of what is missed most where the terminal is narrow.
    return Line(f"{shown}  q quit  ? help  Enter  {filtered}{sort}", "dim")


# Lists ------------------------------------------------------------------------------------


def _listed(look: Look, seen: Seen, now: float, at: float, wide: bool) -> _List:
    match look.view:
        case View.JOBS:
            found = _jobs(look, seen, now, at, wide)
        case View.AGENTS:
            found = _agents(seen, now)
        case View.EVENTS:
            found = _events(seen, now)
        case View.REPLICAS:
            found = _replicas(seen, now)
    wanted = look.filter.casefold()
    rows = tuple(row for row in found.rows if wanted in "\t".join((*row.cells, row.detail)).casefold())
    return _List(found.headings, rows, found.nothing)


def _jobs(look: Look, seen: Seen, now: float, at: float, wide: bool) -> _List:
    rows = []
    for row in ordered(seen.jobs, look.sort, backwards=look.backwards):
        name = row.name if wide else cut(row.name, NAME_MAX)
        stalled_s = seen.stalled_s(row, at)
        ranks = str(row.world_size) if row.finished else f"{row.ranks}/{row.world_size}"
        cells = (
            name,
            str(row.phase),
            str(row.step),
            lists.progress(row),
            f"0 ({show_s(stalled_s)})" if stalled_s else rate(row),
            ranks,
            UNKNOWN if row.eta_s is None else show_s(row.eta_s),
            "; ".join((*map(moving.short, row.moving), row.reason)),
        )
        colour = "yellow" if stalled_s else lists.PHASE_COLOURS.get(row.phase, "")
        word = "" if stalled_s else str(row.phase)
        opens = Target(row.name, Page("job", row.name))
        rows.append(Row(opens, cells, _job_detail(row, now), colour, word))
    return _List(_JOBS, tuple(rows), "no jobs")


def rate(row: JobRow) -> str:
    """Steps per second, with three digits."""
    if not row.step_s:
        return UNKNOWN
    return f"{1 / row.step_s:.0f}" if row.step_s < 0.01 else f"{1 / row.step_s:.3g}"


def ordered(rows: Iterable[JobRow], sort: Sort, *, backwards: bool = False) -> list[JobRow]:
    """Jobs in an order; numbers and ages begin with the largest, and what ended last comes first."""
    keys: dict[Sort, Callable[[JobRow], float | str]] = {
        Sort.NAME: lambda row: row.name,
        Sort.PHASE: lambda row: str(row.phase),
        Sort.STEP: lambda row: -row.step,
        Sort.RATE: lambda row: -(1 / row.step_s) if row.step_s else 0.0,
        Sort.AGE: lambda row: row.submitted_at,
    }
    # By name first: sorting is stable, so that equal rows never change places from look to look.
    found = sorted(rows, key=lambda row: row.name)
    if sort is Sort.ACTIVE:
        ended = sorted((row for row in found if row.finished), key=lambda row: row.finished_at, reverse=True)
        found = [*(row for row in found if not row.finished), *ended]
    else:
        found.sort(key=keys[sort])
    return found[::-1] if backwards else found


def _job_detail(row: JobRow, now: float) -> str:
    parts = [f"{row.name}: {row.reason}" if row.reason else row.name]
    parts += map(moving.line, row.moving)
    if row.attempt:
        parts.append(f"attempt {row.attempt}")
    if row.latest_seq:
        parts.append(f"checkpoint {row.latest_seq} (step {row.latest_step})")
    if row.goodput is not None:
        parts.append(f"goodput {100 * row.goodput:.1f}%")
    if row.submitted_at:
        parts.append(f"submitted {ago(row.submitted_at, now)} ago")
    return "   ".join(parts)


def _troubled_first(row: AgentRow) -> tuple[bool, str]:
    return row.status == "Ready", row.name


def _agents(seen: Seen, now: float) -> _List:
    found = sorted(seen.agents, key=_troubled_first)
    table = lists.agents(found, When(now))
    colours = {"Lost": "red", "Blocked": "red", "Cordoned": "yellow", "Draining": "yellow"}
    rows = tuple(
        Row(
            Target(row.name, Page("agent", row.name)),
            cells,
            f"{row.name}: {row.reason or row.status}",
            colours.get(row.status, ""),
            row.status,
        )
        for row, cells in zip(found, table.rows, strict=True)
    )
    return _List(table.headings, rows, "no agents")


def _events(seen: Seen, now: float) -> _List:
    rows = []
    headings: tuple[str, ...] = ()
    for job, event in seen.events:
        table = lists.events([(job, event)], When(now))
        headings, cells = table.headings, table.rows[0]
        colour = "yellow" if event.type is EventType.WARNING else ""
        detail = f"{event.last or event.first}  {event.message}"
        rows.append(
            Row(Target(f"{job}/{event.seq}", Page("job", job)), cells, detail, colour, str(event.type))
        )
    return _List(headings or lists.events([], When(now)).headings, tuple(rows), "no events")


def _replicas(seen: Seen, now: float) -> _List:
    table = lists.coordinators(seen.coordinators, seen.mirror_ages_s, When(now))
    told = {name: "; ".join(problems) for name, problems in seen.problems.items() if problems}
    rows = tuple(
        Row(Target(cells[0]), (*cells, told.get(cells[0], "")), told.get(cells[0], ""), "green", "leader")
        for cells in table.rows
    )
    return _List((*table.headings, "PROBLEM"), rows, "no replicas")


def _recent(seen: Seen, now: float, count: int) -> list[Line]:
    """The newest events, the very newest last; [] where there is no room."""
    if count < 2 or not seen.events:
        return []
    when = When(now)
    lines = [
        Line(
            f"{when(event.last or event.first):>7} ago  {job}  {event.reason}: {event.message}",
            "yellow" if event.type is EventType.WARNING else "",
            str(event.reason),
        )
        for job, event in reversed(seen.events[:count])
    ]
    return [Line("Recent events", "bold"), *lines]


def _page(look: Look, seen: Seen, now: float) -> Sequence[str]:
    if seen.gone:
        return ["it is no more"]
    found = seen.opened
    if look.page is None or found is None or found.name != look.page.name:
        return ["reading ..."]
    return describe.job(found, now) if isinstance(found, Job) else describe.agent(found, now)
