"""How far checkpoints are on their way to the store and back, as the transfer process tells. For people.

Nothing is decided from it. What was told never becomes less: a try that begins anew, or a
transfer process that starts again, is behind for a while, and then ahead.
"""

import dataclasses
from collections.abc import Iterator, Mapping

from dtrain.agent.core.state import AgentState, Course, JobState
from dtrain.agent.transferring import Moved
from dtrain.protocol.ids import Rank, Seq, Step
from dtrain.protocol.snapshot import TRANSFERS_MAX, Transfer, TransferKind

RATE_S = 10.0
"""The rate is that of so many last seconds: chunks arrive several at once."""

RATE_S_MIN = 0.5
"""Shortest time that says something about a rate."""

MARKS_MAX = 16


def moved(state: AgentState, report: Moved, now: float) -> AgentState:
    """Take in how far transfers are."""
    for job in state.jobs.values():
        courses = tuple(_courses(job, report, now))
        if courses != job.courses:
            state = state.with_job(dataclasses.replace(job, courses=courses))
    return state


def transfers(job: JobState) -> tuple[Transfer, ...]:
    """What the job's snapshot shows of them."""
    found = []
    for course in job.courses:
        step = _step(job, course)
        if step is None:
            continue
        done, total = _restored(job, course) if course.fetch else _saved(job, course)
        over = total and done >= total
        kind = TransferKind.RESTORE if course.fetch else TransferKind.SAVE
        found.append(Transfer(kind, course.seq, step, done, total, 0.0 if over else _rate(course)))
    return tuple(found[-TRANSFERS_MAX:])


def _courses(job: JobState, report: Moved, now: float) -> Iterator[Course]:
    known = {(course.seq, course.fetch): course for course in job.courses}
    for saving in job.saving[1 - TRANSFERS_MAX :]:
        told = {
            part.rank: part.done_bytes
            for part in report.parts
            if (part.job, part.uid, part.seq) == (job.name, job.uid, saving.seq)
        }
        course = known.get((saving.seq, "")) or (Course(saving.seq) if told else None)
        if course is None:
            continue
        ranks = course.parts.keys() | told.keys()
        parts = {rank: max(told.get(rank, 0), course.parts.get(rank, 0)) for rank in ranks}
        course = dataclasses.replace(course, parts=parts)
        yield _marked(course, *_saved(job, course), now)
    for fetch in report.fetches:
        if fetch.id != job.restore.id or job.start is None or job.start.restore is None:
            continue
        course = known.pop((job.start.restore.seq, fetch.id), Course(job.start.restore.seq, fetch.id))
        asked = all(rank.asked is not None for rank in job.ranks)
        yield _marked(course, fetch.done_bytes, fetch.total_bytes if asked else 0, now)
    # What is told no more has come as far as it could.
    yield from (course for (_, fetch_id), course in known.items() if fetch_id and fetch_id == job.restore.id)


def _marked(course: Course, done: int, total: int, now: float) -> Course:
    done = max(done, course.done_bytes)
    since = [mark for mark in course.marks if now - mark[0] <= RATE_S]
    marks = (*since, (now, done))[-MARKS_MAX:]
    return dataclasses.replace(course, done_bytes=done, total_bytes=total, marks=marks)


def _saved(job: JobState, course: Course) -> tuple[int, int]:
    """Bytes of all local ranks' parts that the store has, and all of them; 0: not known yet."""
    sizes = _sizes(job, course.seq)
    durable = {part.rank: part.size_bytes for part in job.durable if part.seq == course.seq}
    done = 0
    for rank in course.parts.keys() | durable.keys():
        done += durable.get(rank, min(course.parts.get(rank, 0), sizes.get(rank, course.parts.get(rank, 0))))
    known = all(rank.rank in sizes for rank in job.ranks)
    return max(done, course.done_bytes), sum(sizes.values()) if known else 0


def _sizes(job: JobState, seq: Seq) -> Mapping[Rank, int]:
    sizes = {part.rank: part.size_bytes for part in job.durable if part.seq == seq}
    sealed = ((rank.rank, rank.sealed) for rank in job.ranks if rank.sealed is not None)
    return sizes | {rank: one.size_bytes for rank, one in sealed if one.seq == seq}


def _restored(job: JobState, course: Course) -> tuple[int, int]:
    """Bytes at hand for the local ranks, and all that they need; 0: not all of them have said so yet."""
    done = max(course.done_bytes, sum(job.restore.tiers.values()))
    if job.restore.released and all(rank.restored for rank in job.ranks):
        return max(done, course.total_bytes), max(done, course.total_bytes)
    return done, max(done, course.total_bytes) if course.total_bytes else 0


def _step(job: JobState, course: Course) -> Step | None:
    """The step of the checkpoint; None: the transfer is over."""
    if not course.fetch:
        return next((saving.step for saving in job.saving if saving.seq == course.seq), None)
    point = job.start.restore if job.start is not None else None
    if point is None or course.fetch != job.restore.id or job.stopping is not None or job.failure is not None:
        return None
    # Until the first step: other machines may have more to fetch, and all of it is one restore.
    return None if any(rank.step > point.step for rank in job.ranks) else point.step


def _rate(course: Course) -> float:
    if len(course.marks) < 2:
        return 0.0
    (first_at, first), (last_at, last) = course.marks[0], course.marks[-1]
    return float(round((last - first) / (last_at - first_at))) if last_at - first_at >= RATE_S_MIN else 0.0
