"""How long a rank may stand still, what does not count, and who gets more time."""

import dataclasses
from typing import Any

import pytest

from dtrain.agent.core import hangs
from dtrain.agent.core.decisions import CollectStacks, Decision, LookAtRanks, WriteSnapshot
from dtrain.agent.core.events import Event, RankLook, RanksLookedAt, SessionSeen, StacksCollected, StacksShown
from dtrain.agent.launching import LauncherState
from dtrain.protocol.commands import DumpStacks
from dtrain.protocol.ids import Attempt, Rank, Uid
from dtrain.protocol.job import HangPolicy
from dtrain.protocol.snapshot import Stack, StackKind, WorkerPhase

from .core_builder import JOB, LAUNCHER, Table, sealed

STEP_S = 0.5


class Watched(Table):
    """Looks are answered as soon as they are asked for; time passes in small steps."""

    urgent = False

    def __init__(self, **more: Any) -> None:
        super().__init__(nproc=2)
        self.policy = HangPolicy(**more)
        self.at = 0
        self.states: dict[int, str] = {}
        self.waits: dict[int, float] = {}
        self.asleep = False

    def spec(self, uid: str = "u1", **more: Any) -> Any:
        return super().spec(uid, hang=self.policy, **more)

    def steps(self, count: int = 10, *, step_s: float = STEP_S, rank: int | None = None, **more: Any) -> None:
        """Both ranks complete steps of ``step_s``."""
        for _ in range(count):
            self.pass_time(step_s)
            self.at += 1
            for one in (0, 1) if rank is None else (rank,):
                self.rank_report(self.connections - 1 + one, at=self.at, **more)

    def feed(self, event: Event) -> Decision:
        decision = super().feed(event)
        self.urgent = any(write.urgent for write in self.wanted(WriteSnapshot)) or self.urgent
        return decision

    def pass_time(self, seconds: float) -> None:
        self.urgent = False
        end = self.now + seconds
        while self.now < end:
            moment = end if self.last.wake_at is None else min(end, max(self.now, self.last.wake_at))
            self.now = moment if moment > self.now else min(end, self.now + 0.05)
            self.tick()
            for order in self.wanted(LookAtRanks):
                looks = tuple(
                    RankLook(rank, self.states.get(rank, "S"), self.waits.get(rank, 0.0))
                    for rank in order.processes
                )
                self.feed(RanksLookedAt(order.job, order.uid, order.attempt, looks))

    def stalled(self) -> list[int]:
        return [stall.rank for stall in self.snapshot.stalls]

    def stacks(self, *stacks: Stack) -> None:
        """The leader asks, and this is what comes of it."""
        number = f"stacks-{self.now}"
        self.command(DumpStacks(self.head(self.job.attempt, number), "why"))
        (order,) = self.wanted(CollectStacks)
        assert list(order.processes) == [0, 1]
        self.feed(StacksCollected(JOB, Uid("u1"), Attempt(self.job.attempt), order.dump, stacks))


def training(**policy: Any) -> Watched:
    table = Watched(**policy)
    table.training()
    table.steps()
    return table


def deadline(table: Watched, rank: int = 0) -> float:
    return hangs.deadline_s(table.job, table.job.ranks[rank])


def test_a_rank_is_over_its_deadline_after_three_steps_and_a_little() -> None:
    table = training()
    assert deadline(table) == pytest.approx(3 * STEP_S + hangs.SLACK_S)
    table.pass_time(deadline(table) - 0.1)
    assert table.stalled() == []
    table.pass_time(0.3)
    assert table.stalled() == [0, 1]
    assert table.urgent


def test_news_of_a_rank_take_its_stall_back() -> None:
    table = training()
    table.pass_time(10)
    assert table.stalled() == [0, 1]
    table.steps(1, rank=0, step_s=0.1)
    assert 0 not in table.stalled()


@pytest.mark.parametrize(
    "more",
    [
        {"section": "evaluate"},
        {"save_at": 10},
        {"wants_durable": 1},
        {"last_step": 10},
        {"phase": WorkerPhase.CHECKPOINTING},
    ],
    ids=str,
)
def test_a_rank_that_says_why_it_stands_still_has_no_deadline(more: dict[str, Any]) -> None:
    table = training()
    for rank in (1, 2):
        table.rank_report(rank, at=table.at, **more)
    table.pass_time(1000)
    assert table.stalled() == []


def test_beats_of_a_script_restart_the_clock() -> None:
    table = training()
    for beat in range(1, 20):
        table.pass_time(2.0)
        table.rank_report(1, at=table.at, beats=beat)
    assert 0 not in table.stalled()


def test_a_rank_that_copies_its_state_or_holds_at_a_checkpoint_has_no_deadline() -> None:
    table = training()
    table.command(table.begin(1, at=table.at))
    table.pass_time(100)
    assert table.stalled() == []


@pytest.mark.parametrize(("hold_s", "found"), [(600.0, []), (0.0, [0, 1])])
def test_behind_what_it_has_sealed_only_a_rank_that_holds_is_excused(hold_s: float, found: list[int]) -> None:
    table = training()
    table.command(dataclasses.replace(table.begin(1, at=table.at), hold_s=hold_s))
    for rank in (1, 2):
        table.rank_report(rank, at=table.at, sealed=sealed(step_=table.at))
    table.pass_time(20)
    assert table.stalled() == found


def test_a_checkpoint_that_is_still_to_come_excuses_nobody() -> None:
    table = training()
    table.command(table.begin(1, at=table.at + 1))
    table.pass_time(5)
    assert table.stalled() == [0, 1]


def test_time_spent_waiting_for_a_cpu_does_not_count() -> None:
    table = training()
    table.waits = {0: 10.0}
    table.pass_time(60)
    assert table.stalled() == [1]


@pytest.mark.parametrize(("state", "found"), [("T", True), ("t", False), ("S", True), ("", False)])
def test_a_stopped_rank_counts_and_a_traced_one_does_not(state: str, found: bool) -> None:
    table = training()
    table.states = {0: state}
    table.pass_time(30)
    assert (0 in table.stalled()) is found


def test_a_disk_may_take_a_minute() -> None:
    table = training()
    table.states = {0: "D"}
    table.pass_time(hangs.DISK_S_MAX)
    assert table.stalled() == [1]
    table.pass_time(10)
    assert table.stalled() == [0, 1]


def test_a_machine_that_slept_has_seen_nothing() -> None:
    table = training()
    table.now += 3600.0
    table.tick()
    for order in table.wanted(LookAtRanks):
        looks = tuple(RankLook(rank, "S") for rank in order.processes)
        table.feed(RanksLookedAt(order.job, order.uid, order.attempt, looks))
    assert table.stalled() == []
    # What its ranks did meanwhile is no measure either.
    before = deadline(table)
    table.rank_report(1, at=table.at + 5000)
    assert deadline(table) == pytest.approx(before)


def test_a_machine_that_is_cut_off_from_etcd_says_nothing_and_counts_nothing() -> None:
    table = training()
    table.feed(SessionSeen(7, 10.0, 0.0))
    table.pass_time(5)
    assert table.stalled() == []
    table.feed(SessionSeen(8, 10.0, table.now + 10))
    assert table.stalled() == []
    table.pass_time(1)
    assert table.stalled() == []


def test_nor_does_it_repeat_what_it_said_before_it_was_cut_off() -> None:
    table = training()
    table.pass_time(10)
    assert table.stalled() == [0, 1]
    table.feed(SessionSeen(7, 10.0, 0.0))
    assert table.stalled() == []


def test_the_longest_standstill_that_ended_well_is_remembered() -> None:
    table = training()
    table.steps(1, step_s=3.0)
    assert deadline(table) == pytest.approx(2 * 3.0)
    table.training(attempt=2)
    assert table.job.habit.longest_s == pytest.approx(3.0)


def test_beats_within_a_step_do_not_make_it_look_shorter() -> None:
    table = Watched()
    table.training()
    for step in range(1, 8):
        for beat in (1, 2):
            table.pass_time(2.0)
            for rank in (1, 2):
                table.rank_report(rank, at=step - 1, beats=2 * step + beat)
        table.pass_time(0.5)
        for rank in (1, 2):
            table.rank_report(rank, at=step, beats=2 * step + 2)
    assert deadline(table) == pytest.approx(3 * 4.5 + hangs.SLACK_S)
    assert table.job.habit.longest_s == pytest.approx(4.5)


def test_a_section_teaches_nothing() -> None:
    table = training()
    for rank in (1, 2):
        table.rank_report(rank, at=table.at, section="evaluate", beats=1)
    table.pass_time(100)
    table.steps(1, beats=2)
    assert table.job.habit.longest_s == pytest.approx(STEP_S)


def test_the_first_step_has_its_own_deadline() -> None:
    startup_s = hangs.UNMEASURED_S + 60.0
    table = Watched(startup_s=startup_s)
    table.training()
    table.pass_time(startup_s - 1)
    assert table.stalled() == []
    table.pass_time(2)
    assert table.stalled() == [0, 1]


def test_reading_the_checkpoint_may_take_as_long_as_it_takes() -> None:
    table = Watched(startup_s=20.0)
    table.training()
    for rank in (1, 2):
        table.rank_report(rank, WorkerPhase.RESTORING, wants_restore=True)
    table.pass_time(60)
    assert table.stalled() == []


def test_a_few_steps_are_no_measure() -> None:
    table = Watched()
    table.training()
    table.steps(2)
    table.pass_time(hangs.UNMEASURED_S - 1)
    assert table.stalled() == []


def test_many_fast_steps_in_few_reports_are_one() -> None:
    table = Watched()
    table.training()
    for at in (14, 28):
        table.pass_time(0.5)
        for rank in (1, 2):
            table.rank_report(rank, at=at)
    assert deadline(table) == pytest.approx(3 * 0.5 / 14 + hangs.SLACK_S)


def test_a_script_without_the_sdk_has_no_deadline() -> None:
    table = Watched(startup_s=10.0)
    table.forked()
    table.pass_time(1000)
    assert table.stalled() == []


def test_the_job_file_may_set_the_deadline_or_want_none() -> None:
    table = training(timeout_s=60.0)
    table.pass_time(59)
    assert table.stalled() == []
    table.pass_time(2)
    assert table.stalled() == [0, 1]
    table = training(enabled=False)
    table.pass_time(10_000)
    assert table.stalled() == []


def found(rank: int, kind: StackKind = StackKind.CODE, where: str = "f (x.py:1)", **more: Any) -> Stack:
    return Stack(Rank(rank), kind, where, "", **more)


def test_stacks_are_shown_with_the_step_and_dropped_with_the_next_one() -> None:
    table = training()
    table.pass_time(10)
    table.stacks(found(0), found(1))
    assert [(one.rank, one.step) for one in table.snapshot.stacks] == [(0, table.at), (1, table.at)]
    table.steps(1)
    assert table.snapshot.stacks == ()


def test_stacks_of_the_same_standstill_are_collected_again_after_a_beat() -> None:
    table = training()
    order = DumpStacks(table.head(1, "stacks.1.ab"), "why")
    table.pass_time(10)
    table.command(order)
    table.command(order)
    assert table.wanted(CollectStacks) == []  # repeated while it is under way
    table.rank_report(table.connections - 1, at=table.at, beats=1)
    table.feed(StacksCollected(JOB, Uid("u1"), Attempt(1), order.header.id, (found(0), found(1))))
    assert table.snapshot.stacks == ()  # they are of before it
    table.pass_time(10)
    assert table.stalled() == [0, 1]
    table.command(DumpStacks(table.head(1, "stacks.1.cd"), "another one"))
    table.wanted(CollectStacks)
    told = table.snapshot.command
    table.command(order)
    assert table.snapshot.command == told  # to whoever counts, it was obeyed before
    assert [one.dump for one in table.wanted(CollectStacks)] == [order.header.id]
    table.feed(StacksCollected(JOB, Uid("u1"), Attempt(1), order.header.id, (found(0), found(1))))
    assert len(table.snapshot.stacks) == 2


def test_a_rank_that_is_at_work_gets_more_time_once() -> None:
    table = training()
    table.pass_time(10)
    table.stacks(found(0, moving=True), found(1))
    assert table.stalled() == [1]
    table.pass_time(hangs.BUSY_S)
    assert table.stalled() == [0, 1]
    table.stacks(found(0, moving=True), found(1))
    assert table.stalled() == [0, 1]


def test_a_rank_that_stands_where_the_last_attempt_was_ended_gets_more_time() -> None:
    table = training()
    table.pass_time(10)
    table.stacks(found(0), found(1, StackKind.COLLECTIVE))
    counted_s = table.job.ranks[0].watch.counted_s
    table.at = 0
    table.training(attempt=2)
    table.steps()
    table.pass_time(10)
    table.stacks(found(0), found(1, StackKind.COLLECTIVE))
    assert table.stalled() == [1]
    table.pass_time(hangs.AGAIN * counted_s)
    assert table.stalled() == [0, 1]


def test_another_place_or_a_later_step_gets_no_more_than_usual() -> None:
    table = training()
    table.pass_time(10)
    table.stacks(found(0), found(1))
    table.at = 0
    table.training(attempt=2)
    table.steps()
    table.pass_time(10)
    table.stacks(found(0, where="g (y.py:2)"), found(1, StackKind.DATA))
    assert table.stalled() == [0, 1]


def test_how_often_stacks_were_collected_is_shown_until_the_next_attempt() -> None:
    table = training()
    table.pass_time(10)
    table.stacks(found(0), found(1))
    assert (table.snapshot.dumps, table.snapshot.dumped_at) == (1, 5.0)
    table.steps(1, step_s=0.1)
    assert table.snapshot.stacks == ()
    table.feed(StacksShown(JOB, Uid("u1"), Attempt(table.job.attempt)))
    assert table.snapshot.dumps == 2
    table.feed(StacksShown(JOB, Uid("u1"), Attempt(table.job.attempt + 1)))
    assert table.snapshot.dumps == 2


def adopted(table: Watched) -> Watched:
    """The agent was restarted, and its ranks have told it where they stand."""
    table.restart()
    table.report(LauncherState(LAUNCHER, True, table.live()))
    for rank in (0, 1):
        table.rank_report(table.hello(rank), at=table.at)
    return table


def test_ranks_that_hang_when_their_agent_is_restarted_are_over_their_deadline_soon() -> None:
    table = adopted(training())
    assert deadline(table) == pytest.approx(3 * STEP_S + hangs.SLACK_S)
    table.pass_time(deadline(table) + 1.0)
    assert table.stalled() == [0, 1]


def test_a_restarted_agent_remembers_a_long_standstill_that_ended_well() -> None:
    table = training()
    table.steps(1, step_s=3.0)
    assert deadline(adopted(table)) == pytest.approx(2 * 4.0)


def test_a_rank_that_had_made_no_step_before_its_agent_was_restarted_may_take_its_time() -> None:
    table = Watched(startup_s=120.0)
    table.training()
    assert deadline(adopted(table)) == 120.0


def test_what_a_restarted_agent_must_know_of_steps_is_seldom_written_down() -> None:
    table = training()
    written = 0
    for number in range(60):
        table.steps(1, step_s=0.3 + 0.003 * number)
        written += len(table.journal())
    assert written == 0
    table.steps(40, step_s=1.5)
    assert deadline(adopted(table)) == pytest.approx(3 * 2.0 + hangs.SLACK_S)
