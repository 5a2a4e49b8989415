"""What an agent keeps of what ranks report, and how little of it."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain.agent.core.ring import Ring
from dtrain.agent.core.state import AgentState, JobState, LocalRank, Machine
from dtrain.agent.logs import RankLogs
from dtrain.agent.series import ATTEMPTS_MAX, JOBS_MAX, NAMES_MAX, POINTS, Series
from dtrain.protocol import curves
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
        self.kept: list[bytes] = []
        self.series = Series(lambda: 1e9 + self.now, lambda *asked: self.kept.append(asked[-1]))
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
    assert [point[1:] for point in bench.curve("throughput")] == [(40, 20.0)]
    assert bench.curve("loss")[0][0] == 1e9 + 1001.0


def test_joining_and_the_first_step_are_no_throughput() -> None:
    """From a rank's joining to its first report there is a warm-up, and work that is no step."""
    bench = Bench()
    bench.report(step=Step(400))
    bench.report(step=Step(401), after_s=30.0)
    for step in (411, 421):
        bench.report(step=Step(step), after_s=1.0)
    assert [point[1:] for point in bench.curve("throughput")] == [(411, 10.0), (421, 10.0)]


def test_a_restarted_agent_goes_on_from_what_was_written_down(tmp_path: Path) -> None:
    logs, bench = RankLogs(tmp_path), Bench()
    bench.series = Series(lambda: 1e9 + bench.now, logs.keep, logs.kept)
    logs.prepare(JobName("j"), Uid("u-j"), Attempt(1), Rank(0), ranks=1, store="")
    for step in range(1, 102):
        bench.report(step=Step(step), metrics={"loss": 1.0 / step})
    bench.series = Series(lambda: 1e9 + bench.now, logs.keep, logs.kept)
    for step in range(102, 141):
        bench.report(step=Step(step), metrics={"loss": 1.0 / step})
    bench.report(step=Step(140), exit_code=0)
    steps = [step for _, step, _ in bench.curve("loss")]
    assert steps == sorted(set(steps))
    assert (steps[0], steps[-1]) == (1, 140)
    archived = logs.kept(JobName("j"), Uid("u-j"), Attempt(1), curves.ARCHIVED_NAME, 1 << 20)
    (loss,) = [curve for curve in curves.newest(archived) if curve.name == "loss"]
    assert (loss.points[0][1], loss.points[-1][1]) == (1, 140)


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


def test_what_is_known_is_written_down_at_the_end_of_an_attempt_and_before() -> None:
    bench = Bench()
    for step in range(1, 301):
        bench.report(step=Step(step), metrics={"loss": 1.0 / step})
    before = len(bench.kept)
    assert 4 <= before <= 10
    bench.report(step=Step(301), exit_code=0)
    bench.report(step=Step(301), metrics={"loss": 0.1})
    assert len(bench.kept) == before + 1
    found = {curve.name: curve for curve in curves.newest(b"".join(bench.kept))}
    assert found["loss"].points == tuple(
        (at, step, pytest.approx(value, rel=1e-5)) for at, step, value in bench.curve("loss")
    )


def test_only_the_machine_of_rank_0_writes_down() -> None:
    bench = Bench()
    for step in range(1, 200):
        bench.report(step=Step(step), metrics={"loss": 1.0}, rank=Rank(4))
    assert bench.curve("loss")
    assert bench.kept == []


def test_a_full_disk_ends_nothing() -> None:
    bench = Bench()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    bench.series = Series(lambda: 1e9, full)
    for step in range(1, 200):
        bench.report(step=Step(step), metrics={"loss": 1.0})
    assert bench.curve("loss")


def test_a_line_that_was_cut_or_is_of_a_newer_version_is_passed_over() -> None:
    whole = curves.encode([curves.Curve("loss", Attempt(1), Rank(0), ((1.0, 2, 3.0),))])
    good = curves.newest(whole)
    assert good[0].points == ((1.0, 2, 3.0),)
    assert curves.newest(whole + whole[:20]) == good
    assert curves.newest(whole[-30:] + whole) == good
    assert curves.newest(whole + b'{"v":2}\n') == good
    assert curves.newest(whole + b'{"v":1,"curves":[{"name":"x"}]}\n') == good
    assert curves.newest(b"") == []
    assert curves.newest(whole[:-1]) == []


def test_the_largest_line_can_be_read_again() -> None:
    points = tuple((1.7e9 + index + 0.123, 10**9 + index, -1.23456e-300) for index in range(POINTS))
    line = curves.encode([curves.Curve("n" * 64, Attempt(9**9), Rank(0), points)] * NAMES_MAX)
    assert len(line) <= curves.LINE_BYTES_MAX
    assert len(curves.newest(line)) == NAMES_MAX


def test_a_submission_does_not_see_the_curves_of_a_former_one_of_its_name() -> None:
    bench = Bench()
    bench.report(step=Step(1), metrics={"loss": 1.0})
    assert bench.series.read("j", "another-uid", 10) == []
