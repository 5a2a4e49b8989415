"""What an agent logs of its own changes: one line each, with the ids that lead to its cause. Pure.

``cause`` is the id of the last command that the agent took on for the job: the leader's log has
it, too, and ``term`` says which leader's.
"""

from collections.abc import Iterator
from typing import Any

from dtrain.agent.core import isolation
from dtrain.agent.core.state import AgentState, JobState

Told = tuple[str, dict[str, Any]]
"""An event's name and its fields."""


def changes(before: AgentState, after: AgentState, now: float) -> Iterator[Told]:
    """Yield one line for each thing that one step has changed and somebody may look for."""
    told = isolation.sentence(before, after, now)
    if told:
        yield "etcd link", {"state": after.link.state.value, "reason": told}
    if after.drain is not None and after.drain.over and after.drain != before.drain:
        yield "drained", {"reason": after.drain.over}
    for name, job in after.jobs.items():
        old = before.jobs.get(name)
        if old is not job:
            yield from _of_job(old, job, _ids(after, job))
    for name in before.jobs.keys() - after.jobs.keys():
        yield "job released", {"job": name, "uid": before.jobs[name].uid}


def _ids(state: AgentState, job: JobState) -> dict[str, Any]:
    commands = state.seen.get(job.name, ())
    ids: dict[str, Any] = {"job": job.name, "attempt": job.attempt, "term": state.term}
    return ids | ({"cause": commands[-1]} if commands else {})


def _of_job(old: JobState | None, job: JobState, ids: dict[str, Any]) -> Iterator[Told]:
    if old is None or (old.phase, old.attempt) != (job.phase, job.attempt):
        fields: dict[str, Any] = {"phase": job.phase.value}
        if job.failure is not None:
            fields |= {"failure": job.failure.kind.value, "reason": job.failure.message}
            fields |= {"rank": job.failure.rank} if job.failure.rank is not None else {}
        yield "phase", ids | fields
    before = () if old is None else old.ranks
    ended = {(one.rank, one.pid) for one in before if one.exit_code is not None}
    for one in job.ranks:
        if one.exit_code is not None and (one.rank, one.pid) not in ended:
            yield "rank ended", ids | {"rank": one.rank, "pid": one.pid, "exit_code": one.exit_code}
    if job.note and (old is None or old.note != job.note):
        yield "job note", ids | {"reason": job.note}
    if job.launcher.warning and (old is None or old.launcher.warning != job.launcher.warning):
        yield "launcher warning", ids | {"warning": job.launcher.warning}
