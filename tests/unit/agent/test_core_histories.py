"""Whatever comes, in whatever order: no history breaks an invariant."""

import dataclasses
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain.agent.core.decisions import EnsureLauncher, JournalJob, LauncherOrder, WriteSnapshot
from dtrain.agent.core.events import (
    LauncherStarted,
    ProcessesProbed,
    RankDisconnected,
    SessionRenewed,
    ShutDown,
)
from dtrain.agent.core.state import JobState, durable_view
from dtrain.agent.launching import (
    Cleared,
    Forked,
    LauncherEnded,
    LauncherReady,
    LauncherState,
    Quit,
    SignalRanks,
    StoreReady,
)
from dtrain.agent.transferring import Fetched, FetchFailed, TransferEnded, Uploaded, UploadFailed
from dtrain.protocol import codec
from dtrain.protocol.ids import Attempt, Incarnation, Rank, Seq, Uid
from dtrain.protocol.ranklink import RestorePlan
from dtrain.protocol.snapshot import WorkerPhase

from .core_builder import JOB, LAUNCHER, RESTORE, Table, part, sealed

attempts = st.integers(1, 3)
uids = st.sampled_from(["u1", "u2"])
ranks = st.integers(0, 1)
seqs = st.integers(1, 2)

steps = st.one_of(
    st.tuples(st.just("prepare"), attempts, uids),
    st.tuples(st.just("prepared"), attempts, uids),
    st.tuples(st.just("start"), attempts, st.booleans()),
    st.tuples(st.just("stop"), attempts, st.booleans()),
    st.tuples(st.sampled_from(["begin", "abort", "confirm"]), attempts, seqs),
    st.tuples(st.sampled_from(["cleared", "store", "forked", "ended"]), attempts, ranks),
    st.tuples(st.sampled_from(["ready", "state", "gone"]), uids, st.booleans()),
    st.tuples(st.just("hello"), attempts, ranks),
    st.tuples(st.sampled_from(["train", "restoring", "seal", "bye"]), st.integers(1, 6), seqs),
    st.tuples(st.sampled_from(["uploaded", "failed"]), ranks, seqs),
    st.tuples(st.sampled_from(["fetched", "unfetched", "transfer"]), attempts, ranks),
    st.tuples(st.just("tick"), st.sampled_from([0, 1, 20, 400]), ranks),
    st.tuples(st.sampled_from(["restart", "session", "probed", "shut"]), ranks, ranks),
)


def play(table: Table, what: str, a: Any, b: Any) -> None:
    header = {"uid": "u1"}
    match what:
        case "prepare":
            table.command(table.prepare(a, uid=b))
        case "prepared":
            table.prepared(a, uid=b)
        case "start":
            table.command(table.start(a, RESTORE if b else None))
        case "stop":
            table.command(table.stop(a, release=b))
        case "begin":
            table.command(table.begin(b, attempt=a))
        case "abort":
            table.command(table.abort(b, attempt=a))
        case "confirm":
            table.command(table.confirm(b))
        case "cleared":
            table.report(Cleared(Attempt(a), stuck=(9,) if b else ()))
        case "store":
            table.report(StoreReady(Attempt(a), 29500 if b else 0))
        case "forked":
            table.report(Forked(Attempt(a), table.live(a)))
        case "ended":
            table.ended(b, 0 if a == 1 else -9, attempt=a)
        case "ready":
            table.report(LauncherReady(), uid=a)
        case "state":
            table.report(LauncherState(LAUNCHER, b, table.live(1) if b else ()), uid=a)
        case "gone":
            table.report(LauncherEnded(1 if b else None), uid=a)
        case "hello":
            table.hello(b, attempt=a)
        case "train":
            table.rank_report(a, at=5, last_step=9)
        case "restoring":
            table.rank_report(a, WorkerPhase.RESTORING, wants_restore=True)
        case "seal":
            table.rank_report(a, sealed=sealed(b))
        case "bye":
            table.feed(RankDisconnected(a))
        case "uploaded":
            table.transfer(Uploaded(JOB, part(a, seq=b)))
        case "failed":
            table.transfer(UploadFailed(JOB, Seq(b), Rank(a), "no"))
        case "fetched":
            table.transfer(Fetched(f"{JOB}-{header['uid']}-{a}-7", RestorePlan(Seq(7))))
        case "unfetched":
            table.transfer(FetchFailed(f"{JOB}-{header['uid']}-{a}-7", "no"))
        case "transfer":
            table.transfer(TransferEnded(1))
        case "tick":
            table.tick(a)
        case "restart":
            table.restart()
        case "session":
            table.feed(SessionRenewed(2, Incarnation("again")))
        case "probed":
            left = table.job.leftovers if JOB in table.state.jobs else ()
            table.feed(ProcessesProbed(JOB, Uid("u1"), left if a else ()))
        case "shut":
            table.feed(ShutDown(5.0))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(steps, max_size=40))
def test_no_history_breaks_an_invariant(history: list[tuple[str, Any, Any]]) -> None:
    table = Table()
    remembered: dict[str, JobState] = {}
    for what, a, b in history:
        before = table.state
        play(table, what, a, b)
        if what in ("restart", "prepared"):
            remembered = {name: durable_view(job) for name, job in table.state.jobs.items()}
            continue
        if table.wanted(EnsureLauncher):
            ensured = table.wanted(EnsureLauncher)[0]
            remembered |= {write.job.name: write.job for write in table.journal()}
            table.feed(LauncherStarted(JOB, ensured.uid, LAUNCHER))
        _journal_is_faithful(table, remembered)
        _effects_are_sound(table)
        assert table.state.term >= before.term


def _journal_is_faithful(table: Table, remembered: dict[str, JobState]) -> None:
    """What was written, and only that, is what a restart would find."""
    for write in table.last.journal:
        if isinstance(write, JournalJob):
            remembered[write.job.name] = write.job
    for name in list(remembered):
        if name not in table.state.jobs:
            del remembered[name]
    for name, job in table.state.jobs.items():
        assert remembered[name] == durable_view(job)
        assert codec.decode(JobState, codec.encode(durable_view(job))) == durable_view(job)


def _effects_are_sound(table: Table) -> None:
    for write in table.wanted(WriteSnapshot):
        codec.encode(write.snapshot)
        if write.snapshot.phase is WorkerPhase.READY:
            assert table.job.cleared
    for action in table.wanted(LauncherOrder):
        if isinstance(action.order, SignalRanks):
            assert action.order.attempt == table.job.attempt
        if isinstance(action.order, Quit) and JOB in table.state.jobs:
            departing = {one.uid for one in table.job.departing}
            assert action.uid in departing or table.job.stopping is not None
    assert dataclasses.is_dataclass(table.last)
