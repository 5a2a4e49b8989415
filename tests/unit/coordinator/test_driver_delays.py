"""Whatever the order in which a mirror, commits and leaders come: a driver decides from what it has written.

Two rules, as properties. *Reached term*: nothing is decided from a state older than the own
term. *Read your writes*: nothing is decided about a job before the mirror shows the last
write about it, so that a leader never conflicts with itself.
"""

from dataclasses import dataclass, field

from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.unit.coordinator.test_driver import JOB, KEYS, Harness, spec, status

from dtrain.coordinator.core.decisions import Decision, PutRecord
from dtrain.coordinator.core.views import FleetView, JobView, Moment
from dtrain.coordinator.persistence import Committed, Conflict, Deposed
from dtrain.protocol.ids import Step
from dtrain.storage.etcd.mirror import Change
from dtrain.storage.etcd.port import WatchBatch

STEPS = st.lists(
    st.sampled_from(["deliver", "deliver", "perform", "perform", "tick", "touch", "lose", "lead"]),
    max_size=60,
)


@dataclass
class Delayed:
    """A driver whose mirror gets one revision at a time, when it is told to."""

    wrong: list[str] = field(default_factory=list)
    """From which past a decision was made."""
    written: list[int] = field(default_factory=list)
    """Revisions of the own writes that succeeded, in order."""

    def __post_init__(self) -> None:
        self.harness = Harness(self.count)
        self.backlog: list[WatchBatch] = []
        self.harness.put(KEYS.spec(JOB), spec())
        self.lead()

    def count(self, job: JobView, fleet: FleetView, _moment: Moment) -> Decision:
        """One more than what is seen, guarded by its revision: every decision leads to another."""
        seen = job.status
        # Collected, not raised: a plan that raises is quarantined.
        if fleet.term > self.harness.state.revision:
            self.wrong.append("before the own term")
        if self.written and (seen is None or seen.mod_revision < self.written[-1]):
            self.wrong.append("before the own write")
        value = status(fleet.term, step=Step((seen.value.step if seen else 0) + 1))
        return Decision(writes=(PutRecord(KEYS.status(JOB), value, seen.mod_revision if seen else 0),))

    def lead(self) -> None:
        term = self.harness.take_office()
        self.harness.commits.clear()  # of a leadership that is over
        self.harness.driver.on_term(term, self.harness.now)

    def do(self, step: str) -> None:
        harness = self.harness
        harness.now += 0.05
        match step:
            case "deliver":
                batch = harness.watch.poll()
                if batch is not None:
                    changes = harness.state.apply(batch)
                    harness.driver.on_changes(changes, harness.state.revision, harness.now)
            case "perform" if harness.commits:
                outcome = harness.perform()
                if isinstance(outcome, Committed):
                    self.written.append(outcome.revision)
                # Nobody else writes the status: a conflict would be one with itself.
                assert not isinstance(outcome, Conflict)
                assert not isinstance(outcome, Deposed) or harness.driver.term is None
            case "tick":
                harness.driver.on_heard(harness.now, harness.now)
                harness.driver.on_tick(harness.now)
            case "touch":
                harness.put(KEYS.intent(JOB), spec())
            case "lose" if harness.commits:
                harness.etcd.lose = ["after"]
                self.do("perform")
                harness.etcd.lose = []
            case "lead":
                self.lead()


@given(STEPS)
@example(["touch", "lead", "lead", "lead", "lead", "lead"])
@settings(max_examples=80, deadline=None)
def test_a_driver_decides_from_its_own_term_and_its_own_writes(steps: list[str]) -> None:
    world = Delayed()
    for step in steps:
        world.do(step)
    assert not world.wrong
    # And it comes to rest nowhere: once everything arrives, it goes on.
    before = len(world.written)
    # A change of leader is two revisions, and each comes by itself.
    for _ in range(12 + 2 * len(steps)):
        world.do("deliver")
        world.do("tick")
        world.do("perform")
    assert len(world.written) > before
    final = world.harness.status()
    assert final is not None
    assert final.step == len(world.written)


def test_the_property_notices_a_driver_that_does_not_wait_for_its_writes() -> None:
    world = Delayed()
    while not world.harness.commits:
        world.do("deliver")
    world.do("perform")
    world.harness.driver._tracks[JOB].reach = 0
    world.do("touch")
    world.harness.driver._dirty[JOB] = None
    world.do("tick")
    assert world.wrong == ["before the own write"]


def test_the_property_notices_a_driver_that_does_not_wait_for_its_term() -> None:
    world = Delayed()
    driver = world.harness.driver
    assert not driver.leads
    driver._took_office_at = 0.0
    driver.world.apply([Change(KEYS.spec(JOB), None, world.harness.etcd.range(KEYS.spec(JOB)).items[0])], 0.0)
    world.do("tick")
    assert world.wrong == ["before the own term"]
