"""The agent's decision: ``step(state, event, now) -> (state, Decision)``.

Each event changes what is known (``commands``, ``launchers``, ``ranks``,
``transfers``); ``advance`` then does what is due for the job. What must be
durable and what must be published is found by comparing before and after, so
that no handler can forget it.
"""

import dataclasses
from typing import assert_never

from dtrain.agent.core import (
    advance,
    commands,
    draining,
    hangs,
    health,
    isolation,
    launchers,
    packages,
    ranks,
    transfers,
)
from dtrain.agent.core.decisions import (
    Action,
    Answer,
    Decision,
    DeleteSnapshot,
    ForgetJob,
    JournalCoordinators,
    JournalJob,
    JournalOver,
    JournalTerm,
    JournalWrite,
    PublishHealth,
    WriteSnapshot,
)
from dtrain.agent.core.events import (
    CommandArrived,
    Consulted,
    CoordinatorsRead,
    DrainAsked,
    EtcdWentBack,
    Event,
    LauncherReported,
    LauncherStarted,
    ProcessesProbed,
    RankConnected,
    RankDisconnected,
    RankReported,
    RanksLookedAt,
    SessionRenewed,
    SessionSeen,
    ShutDown,
    StacksCollected,
    StacksShown,
    Tick,
    TransferReported,
)
from dtrain.agent.core.snapshots import is_progress, snapshot_of
from dtrain.agent.core.state import AgentState, durable_view
from dtrain.protocol.ids import JobName


def step(state: AgentState, event: Event, now: float, wall: float = 0.0) -> tuple[AgentState, Decision]:
    """Return the state after ``event`` and what must be done, in order.

    ``now`` is monotonic; ``wall`` (epoch seconds) only stamps failures for people.
    """
    before = state
    out: list[Action] = []
    answer: Answer | None = None
    republish: frozenset[JobName] = frozenset()
    match event:
        case CommandArrived():
            state, answer = commands.take(state, event, now, out)
            if answer.accepted:
                republish = frozenset({event.command.header.job})
                state = draining.heard(state, event.command, now)
        case EtcdWentBack(term, known):
            if known == state.term:
                state = dataclasses.replace(state, refused_term=term)
        case LauncherStarted():
            state = launchers.started(state, event)
        case LauncherReported():
            state = launchers.reported(state, event, now, wall, out)
        case ProcessesProbed():
            state = launchers.probed(state, event, now, wall)
        case RanksLookedAt():
            state = hangs.looked_at(state, event, now)
        case StacksCollected():
            state = hangs.collected(state, event, wall)
        case StacksShown():
            state = hangs.shown(state, event, wall)
        case TransferReported():
            state = transfers.reported(state, event.report, now, wall, out)
        case RankConnected():
            state = ranks.connected(state, event, out)
        case RankReported():
            state = ranks.reported(state, event, now, wall, out)
        case RankDisconnected():
            state = ranks.disconnected(state, event)
        case SessionRenewed():
            state = dataclasses.replace(state, generation=event.generation, incarnation=event.incarnation)
            republish = frozenset(state.jobs)
        case SessionSeen():
            state = dataclasses.replace(state, link=isolation.observe(state.link, event, now))
            state = isolation.rejoined(before, state, now)
        case CoordinatorsRead():
            state = dataclasses.replace(state, coordinators=isolation.bounded(event.addresses))
        case Consulted():
            state = isolation.heard(state, event, now, out)
        case ShutDown():
            state = commands.shut_down(state, event, now, out)
        case DrainAsked():
            state = draining.begin(state, event, now, out)
        case Tick():
            pass
        case _:
            assert_never(event)
    state = isolation.excuse(before, state)
    for name in tuple(state.jobs):
        state = advance.advance(state, state.jobs[name], isinstance(event, Tick), now, out)
    for name in sorted(before.jobs.keys() - state.jobs.keys()):
        packages.release(before.jobs[name], out)
    state = draining.advance(state, now)
    if (problem := health.problem(state)) != health.problem(before):
        # Before the snapshots: whoever learns from one that an attempt is over must not place the next here.
        out.append(PublishHealth(problem))
    out.extend(_snapshots(before, state, republish))
    return state, Decision(_journal(before, state), tuple(out), answer, advance.wake_at(state, now))


def _journal(before: AgentState, after: AgentState) -> tuple[JournalWrite, ...]:
    writes: list[JournalWrite] = []
    if after.term != before.term:
        writes.append(JournalTerm(after.term))
    if after.coordinators != before.coordinators:
        writes.append(JournalCoordinators(after.coordinators))
    for name, job in after.jobs.items():
        old = before.jobs.get(name)
        known = before.seen.get(name, ())
        ids = tuple(i for i in after.seen.get(name, ())[-1:] if i not in known)
        if ids or old is None or (old is not job and durable_view(old) != durable_view(job)):
            writes.append(JournalJob(durable_view(job), ids))
    for name, job in before.jobs.items():
        if name not in after.jobs:
            writes += [JournalOver(job.uid, after.over[job.uid]), ForgetJob(name)]
    return tuple(writes)


def _snapshots(before: AgentState, after: AgentState, republish: frozenset[JobName]) -> list[Action]:
    actions: list[Action] = []
    for name, job in after.jobs.items():
        old = before.jobs.get(name)
        if old is job and name not in republish:
            continue
        was = snapshot_of(before, old) if old is not None else None
        snapshot = snapshot_of(after, job)
        if name in republish or was != snapshot:
            urgent = name in republish or not is_progress(was, snapshot)
            actions.append(WriteSnapshot(name, snapshot, urgent))
    actions.extend(DeleteSnapshot(name) for name in before.jobs if name not in after.jobs)
    return actions
