"""Cut off from etcd: how an agent knows, how long its ranks go on, and why they end.

============  ==========================================  =========================================
state         entered when                                training
============  ==========================================  =========================================
ok            renewals work                               goes on
suspect       renewals fail, the deadline is ahead        goes on
isolated      the deadline has passed, and no new lease   goes on while steps complete, for at most
                                                          ``isolation_grace``; nothing is committed
(stopping)    grace over, no steps, or superseded         SIGTERM, SIGKILL later; the arena is kept
============  ==========================================  =========================================

A completed synchronous step proves that every rank on this side lives, and
without a quorum nobody can start a newer attempt. Coordinators, asked over
gRPC, tell an etcd that is down for all from a machine that is cut off alone.
News that an attempt has been left behind is believed at any age: attempts only
count up, so a mirror that is ahead of this agent cannot be wrong about that.
That an attempt is still current changes nothing: the grace is for just that case.
"""

import dataclasses
from typing import TYPE_CHECKING

from dtrain.agent.core.decisions import Action, LauncherOrder
from dtrain.agent.core.failures import MESSAGE_CHARS_MAX
from dtrain.agent.core.launchers import stop_order
from dtrain.agent.core.saving import tell_all
from dtrain.agent.core.state import (
    AgentState,
    EtcdLink,
    JobState,
    LauncherStatus,
    LinkState,
    Pace,
    Scope,
    Stopping,
)
from dtrain.protocol.ids import Attempt, JobName, Uid
from dtrain.protocol.job import JobSpec
from dtrain.protocol.ranklink import StopRank
from dtrain.protocol.snapshot import FailureKind, WorkerPhase
from dtrain.protocol.wording import count

if TYPE_CHECKING:
    from dtrain.agent.core.events import Consulted, SessionSeen, Standing

SUSPECT_SHARE = 0.15
"""Of the TTL, before the deadline: two tries to renew have failed by then."""

GRACE_S_LEAST = 600.0
GRACE_INTERVALS = 2
"""Without an ``isolation_grace`` of its own a job goes on for ten minutes or so many checkpoint
intervals: what an outage of etcd may cost is then never more than what was already at stake."""

SILENCE_S_LEAST, SILENCE_STEPS = 60.0, 10.0
"""Ranks that have not completed a step for so long, or for so many times their longest one, wait
for peers that are gone."""

ANSWER_S = 2.5
"""An answer may be so old when it is looked at."""

STALE_S = 10.0
"""Any etcd that works is heard of within this time, by a mirror or by an agent."""

STOP_SLACK_S = 10.0
ADDRESSES_MAX = 16
ADDRESS_CHARS_MAX = 255


# The machine's link to etcd -------------------------------------------------------------


def observe(link: EtcdLink, seen: "SessionSeen", now: float) -> EtcdLink:
    """Return how the link stands, given what the guardian says of the lease now.

    A lease that etcd has called lost has no deadline. It counts as suspect for a moment:
    normally the guardian has another one within milliseconds.
    """
    margin_s = SUSPECT_SHARE * seen.ttl_s
    if seen.lease and seen.deadline and now < seen.deadline - margin_s:
        return link if link.state is LinkState.OK else EtcdLink()
    if link.state is LinkState.OK:
        return EtcdLink(LinkState.SUSPECT, since=now, entered_at=now, silent_at=now)
    if link.state is LinkState.SUSPECT:
        # Also after a pause that outlasted the deadline: the guardian gets to try once more.
        if now < max(seen.deadline, link.entered_at + margin_s):
            return link
        # Counted from the deadline, which outlives a restart of this process.
        since = seen.deadline if seen.deadline else link.since
        return dataclasses.replace(link, state=LinkState.ISOLATED, since=since, entered_at=now)
    return link


def heard(state: AgentState, event: "Consulted", now: float, out: list[Action]) -> AgentState:
    """Take in what coordinators say; ranks of attempts that have been left behind are ended at once."""
    if state.link.state is LinkState.OK:
        return state
    scope = scope_of(state.link, event, now)
    if scope is not state.link.scope:
        state = dataclasses.replace(state, link=dataclasses.replace(state.link, scope=scope))
    for answer in event.answers:
        for standing in answer.standings:
            job = state.jobs.get(standing.job)
            if job is None or (job.uid, job.attempt) != (standing.uid, standing.asked):
                continue
            why = _superseded(standing)
            if why and _is_stoppable(job):
                state = state.with_job(stop(job, why, now, out))
    return state


def scope_of(link: EtcdLink, event: "Consulted", now: float) -> Scope:
    """Whom etcd fails: a coordinator that has heard of it since this machine has not proves that it works."""
    ages = [answer.etcd_age_s for answer in event.answers]
    silence = now - link.silent_at
    if any(0 <= age < silence - ANSWER_S for age in ages):
        return Scope.ALONE
    if ages and all(age < 0 or age >= max(silence, STALE_S) for age in ages):
        return Scope.ALL
    return Scope.UNKNOWN


def _superseded(standing: "Standing") -> str:
    if standing.attempt < standing.asked:
        return ""  # that mirror is behind: it has not heard of this attempt yet
    if standing.attempt > standing.asked:
        return f"attempt {standing.attempt} has begun elsewhere, coordinators say"
    if not standing.current:
        return "the job is over, coordinators say"
    return "" if standing.member else f"attempt {standing.asked} is over, coordinators say"


def to_ask(state: AgentState) -> tuple[tuple[JobName, Uid, Attempt], ...]:
    """The jobs that coordinators are asked about: those with ranks."""
    return tuple((job.name, job.uid, job.attempt) for job in state.jobs.values() if _is_stoppable(job))


def bounded(addresses: tuple[str, ...]) -> tuple[str, ...]:
    """Coordinators' addresses as they are remembered."""
    fine = sorted({one for one in addresses if one and len(one) <= ADDRESS_CHARS_MAX})
    return tuple(fine[:ADDRESSES_MAX])


# One job's ranks ------------------------------------------------------------------------


def paced(job: JobState, before: int, after: int, now: float) -> JobState:
    """Note that a training rank has got from one step to another."""
    pace = job.pace
    if after <= max(before, pace.step):
        return job
    if not pace.at:
        return dataclasses.replace(job, pace=dataclasses.replace(pace, step=after, at=now))
    steps, seconds = after - pace.step, now - pace.at
    moved = Pace(
        step=after,
        at=now,
        # Of the whole attempt: an evaluation each thousand steps is no sign of lost peers.
        longest_s=max(pace.longest_s, seconds / steps),
        seconds=pace.seconds + seconds,
        steps=pace.steps + steps,
    )
    return dataclasses.replace(job, pace=moved)


def grace_s(spec: JobSpec, pace: Pace) -> float:
    """How long the job's ranks may go on without etcd."""
    if spec.isolation_grace_s > 0:
        return spec.isolation_grace_s
    policy = spec.checkpoint
    intervals = []
    if policy.every_seconds > 0:
        intervals.append(policy.every_seconds)
    if policy.every_steps > 0 and pace.steps:
        intervals.append(policy.every_steps * pace.seconds / pace.steps)
    return max(GRACE_S_LEAST, GRACE_INTERVALS * min(intervals, default=0.0))


def silence_s(job: JobState) -> float | None:
    """How long the ranks may go without a step; None: steps say nothing about them now.

    Ranks that restore complete none, those that announced their end or are held at a step wait for
    the leader, and one that is taking a snapshot holds up the others. A pace that was never measured
    cannot be missed.
    """
    if not job.pace.steps or job.phase is not WorkerPhase.TRAINING:
        return None
    running = [rank for rank in job.ranks if rank.exit_code is None]
    if any(rank.last_step is not None or rank.phase is not WorkerPhase.TRAINING for rank in running):
        return None
    if any(saving.hold_s > 0 and saving.step <= job.pace.step for saving in job.saving):
        return None
    return max(SILENCE_S_LEAST, SILENCE_STEPS * job.pace.longest_s)


def advance(state: AgentState, job: JobState, now: float, out: list[Action]) -> JobState:
    """End the ranks of an isolated machine whose time is over."""
    due = _due(state, job)
    if due is None or now < due[0]:
        return job
    return stop(job, due[1], now, out)


def wake_at(state: AgentState) -> list[float]:
    """When ``advance`` has something to do."""
    return [due[0] for job in state.jobs.values() if (due := _due(state, job)) is not None]


def _due(state: AgentState, job: JobState) -> tuple[float, str] | None:
    link = state.link
    if link.state is not LinkState.ISOLATED or not _is_stoppable(job) or job.prepare is None:
        return None
    grace = grace_s(job.prepare.spec, job.pace)
    # A leader may start ranks here before this machine knows that etcd is back: an isolation
    # that is almost over must not end them at once.
    over = (
        max(link.since, job.started_at) + grace,
        f"etcd could not be reached for {grace:.0f} s (isolation_grace)",
    )
    silence = silence_s(job)
    if silence is None:
        return over
    # Not counted from before: the machine itself may have stood still.
    quiet = max(job.pace.at, link.entered_at) + silence
    text = f"no step was completed for {silence:.0f} s while etcd could not be reached"
    return min(over, (quiet, text))


def _is_stoppable(job: JobState) -> bool:
    return job.alive and job.stopping is None and job.launcher.status is not LauncherStatus.GONE


def stop(job: JobState, why: str, now: float, out: list[Action]) -> JobState:
    """End the ranks, not the launcher: the arena with what they sealed is kept."""
    grace = job.prepare.spec.shutdown_grace_s if job.prepare else 0.0
    tell_all(job, StopRank(why), out)
    out.append(LauncherOrder(job.name, job.uid, stop_order(job, False, grace)))
    stopping = Stopping(release=False, why=why, kill_at=now + grace + STOP_SLACK_S)
    return dataclasses.replace(job, stopping=stopping, kill_at=None, note=f"the ranks were ended: {why}")


def excuse(before: AgentState, after: AgentState) -> AgentState:
    """Call the loss of peers what it most likely is on an isolated machine: the end of their grace.

    All machines of a job count for themselves; the first one to end its ranks takes the others' along.
    """
    if after.link.state is not LinkState.ISOLATED:
        return after
    for name, job in after.jobs.items():
        old, failure = before.jobs.get(name), job.failure
        if failure is None or failure.kind is not FailureKind.COLLECTIVE or old is None or old.failure:
            continue
        message = f"its peers went while etcd could not be reached: {failure.message}"
        excused = dataclasses.replace(failure, kind=FailureKind.ISOLATED, message=message[:MESSAGE_CHARS_MAX])
        after = after.with_job(dataclasses.replace(job, failure=excused))
    return after


# For people -----------------------------------------------------------------------------


def rejoined(before: AgentState, after: AgentState, now: float) -> AgentState:
    """Say in each job that its ranks went on, once a machine that was isolated is back."""
    if before.link.state is not LinkState.ISOLATED or after.link.state is not LinkState.OK:
        return after
    away_s = now - before.link.silent_at
    for job in after.jobs.values():
        if _is_stoppable(job):
            note = f"etcd could not be reached for {away_s:.0f} s; the ranks went on"
            after = after.with_job(dataclasses.replace(job, note=note))
    return after


def sentence(before: AgentState, after: AgentState, now: float) -> str:
    """What has changed between this machine and etcd, "" if nothing has."""
    old, link = before.link, after.link
    if (old.state, old.scope) == (link.state, link.scope):
        return ""
    ranks = sum(1 for job in after.jobs.values() if _is_stoppable(job))
    what = f"the ranks of {count(ranks, 'job')} go on while they complete steps"
    what = what if ranks else "no ranks run here"
    if link.state is LinkState.OK:
        return f"etcd answers again after {now - old.silent_at:.0f} s"
    if link.state is LinkState.SUSPECT:
        return "etcd does not answer; the session still holds for a moment" + _heard(link)
    return f"the session has ended and etcd does not answer; {what}" + _heard(link)


def _heard(link: EtcdLink) -> str:
    match link.scope:
        case Scope.ALONE:
            return "; coordinators reach etcd, so only this machine is cut off"
        case Scope.ALL:
            return "; coordinators cannot reach etcd either"
        case Scope.UNKNOWN:
            return ""
