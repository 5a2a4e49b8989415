"""What an agent keeps of what ranks report, and how little of it."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain.agent.core.ring import Ring
from dtrain.agent.core.state import AgentState, JobState, LocalRank, Machine
from dtrain.agent.series import ATTEMPTS_MAX, JOBS_MAX, NAMES_MAX, POINTS, Series
from dtrain.protocol.ids import (
    AgentName,
    Attempt,
    ClusterName,
    Incarnation,
    JobName,
    Rank,
    Seq,
    Step,
    Term,
    Uid,
)
from dtrain.protocol.ranklink import Sealed
from dtrain.protocol.snapshot import DurablePart, Timing, WorkerPhase


@given(st.integers(1, 3000), st.sampled_from([2, 4, 16, 100]))
def test_a_ring_never_outgrows_its_room_and_reaches_from_first_to_last(count: int, room: int) -> None:
    ring = Ring(room)
    for index in range(count):
        ring.add(float(index), index, float(index))
    points = ring.points(10**6)
    assert len(points) <= room
    assert points[-1][:2] == (count - 1, count - 1)
    assert points[0][0] <= ring.stride
    assert [at for at, _, _ in points] == sorted(at for at, _, _ in points)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=500))
def test_thinning_keeps_every_value_within_what_was_put_in(values: list[float]) -> None:
    ring = Ring(8)
    for index, value in enumerate(values):
        ring.add(float(index), index, value)
    for _, _, value in ring.points(5):
        assert min(values) - 1e-6 <= value <= max(values) + 1e-6
    assert len(ring.points(5)) <= 5


class Bench:
    """An agent's states in a row, and the clock they come by."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.series = Series(lambda: 1e9 + self.now)
        machine = Machine(
            cluster=ClusterName("c"), agent=AgentName("a"), host="h", rank_socket="", run_dir="", log_dir="",
            env={}, working_dir="/", life="l", orphan_grace_s=1.0,
        )  # fmt: skip
        self.state = AgentState(machine, Incarnation("l"), Term(1), {}, {})

    def report(self, job: str = "j", *, attempt: int = 1, after_s: float = 1.0, **rank: object) -> None:
        self.now += after_s
        known = self.state.jobs.get(JobName(job))
        if known is None or known.attempt != attempt:
            known = JobState(JobName(job), Uid(f"u-{job}"), Attempt(attempt), WorkerPhase.TRAINING)
        local = replace(
            known.ranks[0]
            if known.ranks
            else LocalRank(Rank(0), 0, phase=WorkerPhase.TRAINING, connection=1),
            **rank,
        )
        self.see(replace(known, ranks=(local,)))

    def see(self, job: JobState) -> None:
        before = self.state
        self.state = replace(before, jobs={**before.jobs, job.name: job})
        self.series.see(before, self.state, self.now)

    def curve(self, name: str, job: str = "j", attempt: int = 1) -> list[tuple[float, int, float]]:
        found = self.series.read(job, f"u-{job}", 1000)
        return [p for curve in found if (curve.name, curve.attempt) == (name, attempt) for p in curve.points]


def test_loss_step_time_and_throughput_follow_the_reports() -> None:
    bench = Bench()
    for step in (10, 20, 40):
        bench.report(step=Step(step), metrics={"loss": 1.0 / step}, timing=Timing(step_s=0.25))
    assert [point[1:] for point in bench.curve("loss")] == [(10, 0.1), (20, 0.05), (40, 0.025)]
    assert [point[2] for point in bench.curve("step_s")] == [0.25] * 3
    assert [point[1:] for point in bench.curve("throughput")] == [(20, 10.0), (40, 20.0)]
    assert bench.curve("loss")[0][0] == 1e9 + 1001.0


def test_reports_that_come_fast_are_taken_at_a_bounded_pace() -> None:
    bench = Bench()
    for step in range(1, 101):
        bench.report(step=Step(step), metrics={"loss": 1.0}, after_s=0.05)
    assert len(bench.curve("loss")) <= 11


def test_stalls_and_uploads_are_kept_once_each() -> None:
    bench = Bench()
    bench.report(step=Step(5))
    sealed = Sealed(Seq(3), "n", Step(5), "/p", 0, 1, 0, 1)
    bench.report(step=Step(5), sealed=sealed, metrics={"checkpoint_stall_s": 0.02}, after_s=0.1)
    bench.report(step=Step(6), sealed=sealed, metrics={"checkpoint_stall_s": 0.02}, after_s=2.0)
    job = bench.state.jobs[JobName("j")]
    part = DurablePart(Seq(3), Attempt(1), Step(5), Rank(0), "n", "m", "d", 10)
    bench.now += 1.0
    bench.see(replace(job, durable=(part,)))
    bench.report(step=Step(7))
    assert [point[2] for point in bench.curve("stall_s")] == [0.02]
    assert [point[1:] for point in bench.curve("upload_s")] == [(5, pytest.approx(3.0))]
    assert not bench.curve("checkpoint_stall_s")


def test_attempts_are_kept_apart_and_the_oldest_go() -> None:
    bench = Bench()
    for attempt in range(1, ATTEMPTS_MAX + 4):
        bench.report(attempt=attempt, step=Step(attempt), metrics={"loss": float(attempt)})
    assert not bench.curve("loss", attempt=3)
    assert [point[2] for point in bench.curve("loss", attempt=4)] == [4.0]


def test_nothing_grows_without_a_bound() -> None:
    bench = Bench()
    bench.report(step=Step(1), metrics={f"m{index}": 1.0 for index in range(100)})
    assert len(bench.series.read("j", "u-j", 10)) == NAMES_MAX
    for index in range(JOBS_MAX + 5):
        bench.report(f"k{index}", step=Step(1), metrics={"loss": 1.0})
    assert not bench.series.read("j", "u-j", 10)
    for step in range(2, 3 * POINTS):
        bench.report("k9", step=Step(step), metrics={"loss": 1.0})
    assert len(bench.curve("loss", "k9")) <= POINTS


def test_a_rank_that_restores_an_older_step_draws_no_throughput_backwards() -> None:
    bench = Bench()
    bench.report(step=Step(50), metrics={"loss": 1.0})
    bench.report(step=Step(40), metrics={"loss": 2.0})
    bench.report(step=Step(60), metrics={"loss": 0.5})
    assert all(point[2] > 0 for point in bench.curve("throughput"))
    assert [point[2] for point in bench.curve("loss")] == [1.0, 0.5]


def test_a_submission_does_not_see_the_curves_of_a_former_one_of_its_name() -> None:
    bench = Bench()
    bench.report(step=Step(1), metrics={"loss": 1.0})
    assert bench.series.read("j", "another-uid", 10) == []
