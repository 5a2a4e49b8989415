"""What an agent counts, read off its states: each thing once, whatever events bring it about."""

from typing import Any

from dtrain.agent import metrics
from dtrain.agent.core.decisions import Decision
from dtrain.agent.core.events import Event
from dtrain.agent.measures import KEPT_S, STALL_METRIC, Measures
from dtrain.agent.transfer_use import Teller, take
from dtrain.agent.transferring import Uploaded
from dtrain.protocol.ids import AgentName
from dtrain.protocol.snapshot import WorkerPhase
from dtrain.runtime.clock import SystemClock
from dtrain.runtime.metrics import Distribution, Metric
from dtrain.storage.blobs.memory import MemoryBlobs
from dtrain.storage.blobs.metered import MeteredBlobs, StoreMeter
from dtrain.storage.checkpoints.metrics import STAGE_SECONDS

from .core_builder import JOB, RESTORE, Table, part, sealed


class Measured(Table):
    """A machine whose states are seen as the driver shows them."""

    def __init__(self, **settings: Any) -> None:
        self.measures = Measures(AgentName("node-a"))
        super().__init__(**settings)

    def feed(self, event: Event) -> Decision:
        before = self.state
        decision = super().feed(event)
        self.measures.see(before, self.state, self.now)
        return decision

    def of(self, metric: Metric) -> dict[tuple[str, ...], Any]:
        return dict(self.measures.samples(self.state.restored, self.now)[metric])

    def stage(self, name: str) -> Distribution:
        found = self.of(STAGE_SECONDS)[name,]
        assert isinstance(found, Distribution)
        return found


def test_a_rank_that_crashes_and_those_stopped_because_of_it_are_told_apart() -> None:
    table = Measured().training()
    table.ended(1, -9)
    table.ended(0, -15)
    assert table.of(metrics.EXITS) == {
        (JOB, "node-a", "signal"): 1.0,
        (JOB, "node-a", "stopped"): 1.0,
    }


def test_ranks_that_end_well_are_done() -> None:
    table = Measured().training()
    table.ended(0, 0)
    table.ended(1, 0)
    table.tick()
    assert table.of(metrics.EXITS) == {(JOB, "node-a", "done"): 2.0}


def test_steps_are_counted_for_rank_0_as_they_are_reported() -> None:
    table = Measured().training()
    table.rank_report(1, at=10)
    table.now += 2.0
    table.rank_report(1, at=14)
    table.rank_report(2, at=14)
    (found,) = table.of(metrics.STEP_SECONDS).values()
    assert (sum(found.counts), found.total) == (4, 2.0)


def test_a_snapshot_an_upload_and_what_they_cost() -> None:
    table = Measured().training()
    table.command(table.begin())
    table.rank_report(1, at=10, sealed=sealed(), metrics={STALL_METRIC: 0.25})
    table.rank_report(2, at=10, sealed=sealed(), metrics={STALL_METRIC: 0.5})
    # Said again: the same snapshot.
    table.rank_report(1, at=11, sealed=sealed(), metrics={STALL_METRIC: 0.25})
    assert table.stage("snapshot").total == 0.75
    assert table.of(metrics.STALL) == {(JOB,): 0.25}
    table.now += 4.0
    table.transfer(Uploaded(JOB, part(0)))
    table.transfer(Uploaded(JOB, part(0)))
    assert (sum(table.stage("upload").counts), table.stage("upload").total) == (1, 4.0)
    assert table.of(metrics.BYTES)["upload",] == 64.0


def test_a_restore_lasts_until_the_rank_trains() -> None:
    table = Measured(nproc=1).forked(restore=RESTORE)
    connection = table.hello(0)
    table.rank_report(connection, WorkerPhase.RESTORING, wants_restore=True)
    table.now += 3.0
    table.rank_report(connection, WorkerPhase.RESTORING, wants_restore=True)
    table.rank_report(connection, WorkerPhase.TRAINING, at=70)
    assert (sum(table.stage("restore").counts), table.stage("restore").total) == (1, 3.0)


def test_a_job_that_has_left_is_shown_until_somebody_must_have_seen_it() -> None:
    table = Measured().training()
    table.ended(1, -9)
    before = table.state
    table.state = before.without_job(JOB)
    table.measures.see(before, table.state, table.now)
    table.now += KEPT_S
    assert table.of(metrics.EXITS)
    table.now += 1.0
    assert not table.of(metrics.EXITS)


def test_what_the_transfer_process_asks_of_stores_arrives_once() -> None:
    theirs, ours = StoreMeter(), StoreMeter()
    store, teller = MeteredBlobs(MemoryBlobs("x"), theirs, SystemClock()), Teller(theirs)
    assert teller.news() is None
    store.delete("a")
    theirs.retries.add("put", "DT-2001")
    for _ in range(3):
        if (use := teller.news()) is not None:
            take(ours, use)
    store.delete("b")
    use = teller.news()
    assert use is not None
    take(ours, use)
    found = ours.seconds.read()["delete",]
    assert isinstance(found, Distribution)
    assert sum(found.counts) == 2
    assert ours.retries.read() == {("put", "DT-2001"): 1.0}
