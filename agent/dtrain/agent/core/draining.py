"""Told to end, an agent waits until its jobs have moved elsewhere, but never for what cannot come.

It goes on as before and says in its node record that it drains: the leader
takes a checkpoint of each job with ranks here, ends the attempt and begins the
next one on other machines. The wait is over when no ranks are left here, when
the grace is, or when nobody can be expected to move them: the machine is cut off
from etcd, or no leader has shown itself for a share of the grace. What is then
left here is ended with the agent.

If it is the machine that goes, at the end of the grace, nothing is won by giving up
before: a leader may be found, or etcd be reached, until then.
"""

import dataclasses

from dtrain.agent.core.decisions import Action, PublishDraining
from dtrain.agent.core.events import DrainAsked
from dtrain.agent.core.state import AgentState, Drain, JobState, LauncherStatus, LinkState
from dtrain.protocol.commands import BeginCheckpoint, Command, Stop
from dtrain.protocol.snapshot import Draining, WorkerPhase

ANSWER_SHARE = 1 / 3
"""Of the grace: how long no leader may show itself before it is not waited for any more."""

ANSWER_S_LEAST = 5.0
"""A leader whose machine is busy takes seconds; the grace itself is never exceeded."""


def begin(state: AgentState, event: DrainAsked, now: float, out: list[Action]) -> AgentState:
    """Start to drain; asked again, only less time, or more of a hurry, than before changes anything."""
    until, known = event.at + event.grace_s, state.drain
    if known is None:
        drain = Drain(until, event.grace_s, heard_at=now, since=event.since, stays=event.stays)
    elif known.over:
        return state
    elif until >= known.until:
        if event.stays or not known.stays:
            return state
        return dataclasses.replace(state, drain=dataclasses.replace(known, stays=False, heard_at=now))
    else:
        # Graces count from the first wish on: the leader has seen that one. Its silence counts anew, as the
        # share of a shorter grace may have passed already.
        grace_s = max(0.0, known.grace_s - (known.until - until))
        stays = known.stays and event.stays
        drain = dataclasses.replace(known, until=until, grace_s=grace_s, heard_at=now, stays=stays)
    out.append(PublishDraining(Draining(event.reason, drain.since, drain.grace_s)))
    return dataclasses.replace(state, drain=drain)


def heard(state: AgentState, command: Command, now: float) -> AgentState:
    """A leader has ordered something: it lives, and may have answered just this wish."""
    if state.drain is None:
        return state
    answer = isinstance(command, Stop) or (isinstance(command, BeginCheckpoint) and command.hold_s > 0)
    drain = dataclasses.replace(state.drain, heard_at=now, answered=state.drain.answered or answer)
    return dataclasses.replace(state, drain=drain)


def refusal(state: AgentState, job: JobState | None, attempt: int) -> str:
    """Why an attempt is not prepared here, "" if it may be: what is here may go on, nothing new begins."""
    if state.drain is None or (job is not None and attempt <= job.attempt):
        return ""
    return "this agent is draining"


def advance(state: AgentState, now: float) -> AgentState:
    """Decide whether the wait is over."""
    drain = state.drain
    if drain is None or drain.over:
        return state
    if _is_uploading(state):
        # Whoever leads has nothing to order until it is done, here and elsewhere.
        drain = dataclasses.replace(drain, heard_at=now)
    over = _over(state, drain, now)
    if over:
        drain = dataclasses.replace(drain, over=over)
    return state if drain == state.drain else dataclasses.replace(state, drain=drain)


def wake_at(state: AgentState) -> list[float]:
    """When ``advance`` may decide by time alone."""
    drain = state.drain
    if drain is None or drain.over:
        return []
    return [drain.until] if drain.answered or drain.stays else [drain.until, _answer_due(drain)]


def _over(state: AgentState, drain: Drain, now: float) -> str:
    if not any(has_ranks(job) for job in state.jobs.values()):
        return "no ranks are left here"
    if now >= drain.until:
        return f"the drain grace of {drain.grace_s:g} s is over"
    if drain.stays:
        return ""
    if state.link.state is LinkState.ISOLATED:
        return "etcd cannot be reached, so nobody can move the ranks that are left here"
    if not drain.answered and now >= _answer_due(drain):
        return f"no coordinator has answered within {_patience_s(drain):g} s"
    return ""


def _answer_due(drain: Drain) -> float:
    return drain.heard_at + _patience_s(drain)


def _patience_s(drain: Drain) -> float:
    return max(ANSWER_S_LEAST, ANSWER_SHARE * drain.grace_s)


def has_ranks(job: JobState) -> bool:
    """Whether something of the job runs here, or is about to."""
    if job.launcher.status is LauncherStatus.GONE or job.phase is WorkerPhase.DONE:
        return False
    return (
        job.alive
        or job.stopping is not None
        or job.phase
        in (
            WorkerPhase.STARTING,
            WorkerPhase.READY,
            WorkerPhase.RESTORING,
            WorkerPhase.TRAINING,
        )
    )


def _is_uploading(state: AgentState) -> bool:
    return any(
        rank.sealed is not None
        and any(one.seq == rank.sealed.seq for one in job.saving)
        and not any((part.seq, part.rank) == (rank.sealed.seq, rank.rank) for part in job.durable)
        and not any((one.seq, one.rank) == (rank.sealed.seq, rank.rank) for one in job.problems)
        for job in state.jobs.values()
        for rank in job.ranks
    )
