"""What ``get`` lists: one row for each job, agent, replica or event. Pure."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from dtrain.cli.durations import show_s
from dtrain.cli.render.table import UNKNOWN, Table, When
from dtrain.protocol.phases import JobPhase
from dtrain.protocol.rows import AgentRow, JobRow

if TYPE_CHECKING:
    from dtrain.cli.records import Cluster, Replica
    from dtrain.protocol.events import EventRecord

STALE_S = 10.0
"""Younger than this says nothing about etcd. With its progress interval of 5 s an idle etcd tells its
watchers that nothing is missing up to two intervals after the last event (the first tick after an event
is left out), so that a copy of 5 to 10 s is what a sound cluster has whenever nobody writes: a warning
at 5 s would come and go there all day. A replica's exact age is in ``get coordinators``.
"""

PHASE_COLOURS = {
    JobPhase.RUNNING: "green",
    JobPhase.SUCCEEDED: "green",
    JobPhase.FAILED: "red",
    JobPhase.RECOVERING: "yellow",
    JobPhase.CANCELLING: "yellow",
}
"""Colour of a phase on a terminal."""


def jobs(rows: Iterable[JobRow], when: When, *, wide: bool = False) -> Table:
    """``get jobs``."""
    headings = (
        "NAME", "PHASE", "STEP", "PROGRESS", "ETA", "GOODPUT", "ATTEMPT", "RANKS", "LAST-CKPT", "AGE",
    )  # fmt: skip
    extra = ("UID", "MEMBERS", "RESTARTS", "QUEUE", "PRIORITY")
    lines = []
    for row in rows:
        cells: tuple[str, ...] = (
            row.name,
            str(row.phase),
            str(row.step),
            progress(row),
            UNKNOWN if row.eta_s is None else show_s(row.eta_s),
            UNKNOWN if row.goodput is None else f"{100 * row.goodput:.1f}%",
            str(row.attempt),
            str(row.world_size) if row.finished else f"{row.ranks}/{row.world_size}",
            f"{row.latest_seq} (step {row.latest_step})" if row.latest_seq else UNKNOWN,
            when(row.submitted_at),
        )
        if wide:
            cells += (
                row.uid or UNKNOWN,
                ",".join(row.members) or UNKNOWN,
                restarts(row, when.now),
                str(row.queue) if row.queue else UNKNOWN,
                str(row.priority),
            )
        lines.append((*cells, row.reason))
    return Table((*headings, *(extra if wide else ()), "REASON"), tuple(lines))


def restarts(row: JobRow, now: float) -> str:
    """Restarts that count against the budget, and the budget."""
    if not row.restarts_window_s:
        return UNKNOWN
    start = now - row.restarts_window_s
    return f"{sum(1 for at in row.restarts if at >= start)}/{row.restarts_max}"


def progress(row: JobRow) -> str:
    """How much of the training is done; unknown where the script does not say how many steps it takes."""
    if row.phase is JobPhase.SUCCEEDED:
        return "100%"
    if not row.steps_total:
        return UNKNOWN
    # Never 100 % before it has ended: the last checkpoint is still to come.
    return f"{min(99, 100 * row.step // row.steps_total)}%"


def agents(rows: Iterable[AgentRow], when: When, *, wide: bool = False) -> Table:
    """``get agents``."""
    headings = ("NAME", "STATUS", "SLOTS", "JOBS", "VERSION", "SINCE")
    extra = ("ADDRESS", "HOST", "GPUS", "INCARNATION", "LABELS")
    lines = []
    for row in rows:
        known = row.status != "Lost"
        cells: tuple[str, ...] = (
            row.name,
            row.status,
            f"{row.busy}/{row.slots}" if known else UNKNOWN,
            ",".join(row.jobs) or UNKNOWN,
            row.version or UNKNOWN,
            when(row.since),
        )
        if wide:
            labels = ",".join(f"{name}={value}" for name, value in sorted(row.labels.items()))
            found = (row.address, row.host, str(row.gpus) if known else "", row.incarnation, labels)
            cells += tuple(cell or UNKNOWN for cell in found)
        lines.append((*cells, row.reason))
    return Table((*headings, *(extra if wide else ()), "REASON"), tuple(lines))


def coordinators(
    cluster: "Cluster", ages_s: dict[str, float | None], when: When, *, wide: bool = False
) -> Table:
    """``get coordinators``; ``ages_s`` has the mirror's age by replica, None for no answer."""
    headings = ("NAME", "ROLE", "TERM", "ADDRESS", "VERSION", "MIRROR-AGE", "SINCE")
    rows = []
    for replica in sorted(cluster.replicas.values(), key=lambda replica: replica.name):
        record, mirror_age_s = replica.record, ages_s.get(replica.name)
        row: tuple[str, ...] = (
            replica.name,
            "leader" if replica.term else "standby",
            str(replica.term) if replica.term else UNKNOWN,
            record.address if record else UNKNOWN,
            (record.version if record else "") or UNKNOWN,
            UNKNOWN if mirror_age_s is None else show_s(mirror_age_s),
            when(record.since) if record else UNKNOWN,
        )
        rows.append((*row, *((record.host, str(record.pid)) if record else ("", ""))) if wide else row)
    return Table((*headings, *(("HOST", "PID") if wide else ())), tuple(rows))


def events(found: Iterable[tuple[str, "EventRecord"]], when: When, *, wide: bool = False) -> Table:
    """``get events``, oldest first; pairs of job name and event."""
    rows = []
    for job, event in sorted(found, key=lambda pair: (pair[1].last or pair[1].first, pair[0], pair[1].seq)):
        about = f"job/{job}" + (f" {event.object}" if event.object else "")
        row = (
            when(event.last or event.first),
            str(event.type),
            str(event.reason),
            about,
            str(event.count),
        )
        rows.append((*row, *((str(event.attempt), str(event.term)) if wide else ()), event.message))
    extra = ("ATTEMPT", "TERM") if wide else ()
    return Table(("TIME", "TYPE", "REASON", "OBJECT", "COUNT", *extra, "MESSAGE"), tuple(rows))


def problem_lines(found: dict[str, tuple[str, ...]]) -> list[str]:
    """What replicas say is wrong, by replica; what several say is one line."""
    by_sentence: dict[str, list[str]] = {}
    for name in sorted(found):
        for sentence in found[name]:
            by_sentence.setdefault(sentence, []).append(name)
    return [f"PROBLEM ({', '.join(names)}): {sentence}" for sentence, names in by_sentence.items()]


def stale_line(mirror_age_s: float) -> str:
    """The warning that reads carry when the replica's mirror is old; "" when it is not."""
    return f"mirror is {show_s(mirror_age_s)} old: etcd unreachable" if mirror_age_s > STALE_S else ""


def replica_of(cluster: "Cluster", address: str) -> "Replica | None":
    """The replica that serves at ``address``."""
    return next(
        (
            replica
            for replica in cluster.replicas.values()
            if replica.record and replica.record.address == address
        ),
        None,
    )


def names(kind: str, found: Sequence[str]) -> list[str]:
    """Lines of ``-o name``."""
    return [f"{kind}/{name}" for name in found]
