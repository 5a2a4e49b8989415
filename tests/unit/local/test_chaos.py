"""What chaos draws, whom it hits, and what it calls recovered: values, without a cluster."""

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest

from dtrain.local import chaos as engine
from dtrain.local.chaos import Chaos
from dtrain.local.chaos_plan import Draw, Settings, aim, draws, possible
from dtrain.local.chaos_report import Report, Struck, quantile
from dtrain.local.faults import WEIGHTS, Fault, Kind, Part
from dtrain.local.sight import JobSight, RankSight, Sight, away, failed, missing
from dtrain.protocol.cluster import ReplicaRecord
from dtrain.protocol.errors import ErrorCode, NotFound, Refused, Unavailable
from dtrain.protocol.ids import AgentName, Incarnation, ReplicaId
from dtrain.protocol.job import JobPhase
from dtrain.protocol.snapshot import NodeRecord


def job(step: int = 100, *, attempt: int = 1, base: int = 0, **more: object) -> JobSight:
    ranks = {number: RankSight(f"a{number + 1}", 4000 + number, step, busy=True) for number in range(2)}
    made = JobSight("u1", JobPhase.RUNNING, attempt, 2, base, ("a1", "a2"), ranks)
    return replace(made, **more)  # type: ignore[arg-type]


def sight(*, leader: str = "c1", term: int = 5, away: tuple[str, ...] = (), **jobs: JobSight) -> Sight:
    replicas = {name: ReplicaRecord(ReplicaId(name), "x") for name in ("c1", "c2") if name not in away}
    agents = {
        name: NodeRecord(AgentName(name), Incarnation("i"), "x", "x", 2)
        for name in ("a1", "a2", "a3")
        if name not in away
    }
    return Sight(leader, term, replicas, agents, jobs or {"j": job()})


def draw(kind: Kind, part: Part, pick: float = 0.0) -> Draw:
    return Draw(kind, part, pick, 1.0, "to etcd", 0.1234, True, 0.0)


# What is drawn.


def test_the_same_seed_draws_the_same_and_another_seed_does_not() -> None:
    def first(seed: int) -> list[Draw]:
        chosen = Settings(seed)
        return list(itertools.islice(draws(chosen, possible(chosen)), 50))

    assert first(1) == first(1)
    assert first(1) != first(2)


def test_every_kind_of_fault_is_drawn_sooner_or_later() -> None:
    chosen = Settings(3)
    drawn = {(one.kind, one.part) for one in itertools.islice(draws(chosen, possible(chosen)), 2000)}
    assert drawn == set(WEIGHTS)


def test_kinds_and_targets_narrow_what_is_drawn() -> None:
    assert set(possible(Settings(1, kinds=(Kind.CUT,), targets=("leader",)))) == {(Kind.CUT, Part.LEADER)}
    by_name = possible(Settings(1, targets=("etcd-0",)))
    assert {part for _, part in by_name} == {Part.ETCD}
    assert {part for _, part in possible(Settings(1, targets=("c2",)))} == {
        Part.COORDINATOR,
        Part.COORDINATOR_GUARDIAN,
        Part.LEADER,
    }


@pytest.mark.parametrize(
    "wrong",
    [
        {"targets": ("everything",)},
        {"kinds": (Kind.FILL,), "targets": ("agent",)},
        {"hold_s": (0.0, 1.0)},
        {"hold_s": (0.5, 500.0)},
        {"every_s": -1.0},
    ],
)
def test_settings_that_cannot_be_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(Refused):
        Settings(1, **wrong)  # type: ignore[arg-type]


# Whom it hits.


def test_a_notice_hits_a_machine_that_trains_and_has_to_be_followed_up() -> None:
    chosen = Settings(1)
    fault = aim(draw(Kind.PREEMPT, Part.MACHINE, 0.9), sight(), (), chosen)
    assert fault == Fault(Kind.PREEMPT, Part.MACHINE, "a2", pick=900)
    assert fault.lasts
    assert str(fault) == "take machine a2 away, with a notice before"


def test_a_fault_names_who_is_there_at_that_moment() -> None:
    chosen, now = Settings(1), sight()
    assert aim(draw(Kind.KILL, Part.RANK, 0.9), now, (), chosen) == Fault(
        Kind.KILL, Part.RANK, "a2", job="j", rank=1, pid=4001
    )
    cut = aim(draw(Kind.CUT, Part.LEADER), now, (), chosen)
    assert cut is not None
    assert (cut.name, cut.way, cut.delay_s) == ("c1", "to etcd", 0.0)
    slow = aim(draw(Kind.SLOW, Part.AGENT), now, (), chosen)
    assert slow is not None
    assert (slow.name, slow.way, slow.delay_s) == ("a1", "", 0.123)
    assert aim(draw(Kind.KILL, Part.ETCD), now, (), chosen) is None
    assert aim(draw(Kind.FREEZE, Part.LEADER), sight(leader=""), (), chosen) is None


def test_machines_that_train_are_preferred_and_names_are_kept_to() -> None:
    hit = {
        str(found.name)
        for pick in (0.0, 0.3, 0.6, 0.99)
        if (found := aim(draw(Kind.KILL, Part.MACHINE, pick), sight(), (), Settings(1)))
    }
    assert hit == {"a1", "a2"}
    only = Settings(1, targets=("a2",))
    for pick in (0.0, 0.9):
        found = aim(draw(Kind.KILL, Part.AGENT, pick), sight(), (), only)
        assert found is not None
        assert found.name == "a2"
    assert aim(draw(Kind.KILL, Part.LEADER), sight(), (), Settings(1, targets=("c2",))) is None


# What is recovered.


def moved(step: int, **more: object) -> Sight:
    return sight(j=job(step, **more))


@pytest.mark.parametrize(
    ("now", "why"),
    [
        (moved(102), ""),
        (moved(101), "no step since"),  # that step may have been done before the fault
        (sight(leader="", j=job(200)), "no leader"),
        (moved(200, phase=JobPhase.RECOVERING, reason="rank 1 was killed"), "rank 1 was killed"),
        (moved(40, attempt=2, base=40), "no step since"),
        (moved(41, attempt=2, base=40), ""),
        (moved(200, ranks={0: RankSight("a1", 1, 200, busy=True)}), "j is RUNNING"),
        (moved(200, ranks={n: RankSight("a1", 1, 200, busy=n == 0) for n in (0, 1)}), "j is RUNNING"),
        (moved(100, phase=JobPhase.SUCCEEDED), ""),
        (moved(3, uid="u2", phase=JobPhase.STARTING), ""),
        (sight(other=job()), "the status of j is gone"),
    ],
)
def test_recovered_means_a_leader_and_new_steps_on_every_rank(now: Sight, why: str) -> None:
    found = missing(sight(), now)
    assert (found == "") == (why == ""), found
    assert why in found


def test_a_job_that_did_not_train_before_is_not_waited_for() -> None:
    assert missing(sight(j=job(phase=JobPhase.STARTING)), moved(0, phase=JobPhase.QUEUED)) == ""


def test_a_job_that_an_earlier_fault_interrupted_is_waited_for() -> None:
    interrupted = sight(j=job(phase=JobPhase.RECOVERING, ranks={}, trained=True))
    assert "j is QUEUED" in missing(interrupted, moved(0, phase=JobPhase.QUEUED, attempt=2))
    assert missing(interrupted, moved(5, attempt=2)) == ""


def test_whole_means_that_everybody_is_registered() -> None:
    expected = sight().daemons
    assert away(expected, sight()) == ""
    assert away(expected, sight(away=("a3", "c2"))) == "not registered: a3, c2"


def test_a_job_that_failed_is_told_once() -> None:
    gone = sight(j=job(phase=JobPhase.FAILED, reason="budget spent"))
    assert failed(sight(), gone) == ["j FAILED: budget spent"]
    assert failed(gone, gone) == []


# The report.


def test_quantiles_are_of_values_that_were_measured() -> None:
    assert quantile([1.0, 2.0, 3.0, 10.0], 0.5) == 2.5
    assert quantile([1.0, 2.0, 3.0, 10.0], 0.9) == 10.0
    assert quantile([7.0], 0.9) == 7.0


def struck(whole_s: float | None) -> Struck:
    return Struck(1, "kill rank", "kill rank 0", 0.0, works_s=1.0, whole_s=whole_s)


def test_a_report_is_good_only_if_all_recovered_and_no_promise_was_broken() -> None:
    assert Report(1, [struck(2.0)]).ok
    assert not Report(1, [struck(None)]).ok
    assert not Report(1, [struck(2.0)], problems=["it burns"]).ok
    assert not Report(1, [struck(2.0)], violations=["I1"]).ok
    told = Report(1, [struck(2.0), struck(None)]).to_json()
    (row,) = told["faults"]
    assert (row["count"], row["recovered"], row["works_s"]["max"]) == (2, 1, 1.0)
    assert any("VIOLATIONS" in line for line in Report(1, violations=["I1"]).lines())


# The engine.


class Board:
    """Eyes and breaker at once: a cluster that recovers as soon as it is healed, if it does."""

    def __init__(self, *, recovers: bool = True) -> None:
        self.recovers = recovers
        self.step = 100
        self.broken: list[Fault] = []
        self.log: list[str] = []
        self.on_strike: Callable[[Fault], None] = lambda _fault: None

    def look(self, jobs: object = None) -> Sight:
        if self.recovers and not self.broken:
            self.step += 5
        return moved(self.step)

    def cannot(self, kind: Kind, part: Part) -> str:
        return "it is glued" if part is Part.MACHINE else ""

    def strike(self, fault: Fault) -> None:
        self.on_strike(fault)
        self.log.append("strike")
        if fault.lasts:
            self.broken.append(fault)

    def heal(self, fault: Fault) -> None:
        self.log.append("heal")
        if fault in self.broken:
            self.broken.remove(fault)

    def close(self) -> None:
        self.broken.clear()


LOOKS = 3
"""Few, as a busy machine may see no more while the fault is held."""


class Moving(Board):
    """Trains all the time, and after some looks elsewhere than on the machine that is to go."""

    def __init__(self) -> None:
        super().__init__()
        self.looks = 0

    def look(self, jobs: object = None) -> Sight:
        self.step += 5
        if self.broken:
            self.looks += 1
        return moved(self.step, agents=("a3",) if self.looks > LOOKS or not self.broken else ("a1", "a2"))

    def cannot(self, kind: Kind, part: Part) -> str:
        return ""


def started(board: Board, **more: object) -> Chaos:
    given: dict[str, object] = {"every_s": 0.0, "hold_s": (0.05, 0.1), "patience_s": 0.6}
    chaos = Chaos(Settings(1, **(given | more)), board, board)  # type: ignore[arg-type]
    chaos.begin()
    return chaos


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "POLL_S", 0.005)


def test_a_machine_that_is_to_go_has_not_been_replaced_while_its_ranks_go_on() -> None:
    board = Moving()
    chaos = started(board, kinds=(Kind.PREEMPT,), hold_s=(0.5, 0.5), patience_s=20.0)
    chaos.storm(count=1)
    assert chaos.calm()
    (struck_one,) = chaos.report().struck
    assert struck_one.works_s is not None
    assert board.looks > LOOKS


def test_each_fault_that_lasts_is_healed_and_measured() -> None:
    board = Board()
    chaos = started(board, kinds=(Kind.FREEZE,), targets=("agent",))
    chaos.storm(count=3)
    assert chaos.calm()
    report = chaos.report()
    assert report.ok
    assert board.log == ["strike", "heal"] * 3
    assert all(one.works_s is not None and one.works_s > 0.04 for one in report.struck)


def test_what_does_not_recover_ends_the_storm_and_fails_the_report() -> None:
    board = Board(recovers=False)
    chaos = started(board, kinds=(Kind.KILL,), targets=("rank",))
    chaos.storm(count=5)
    assert chaos.gave_up
    assert not chaos.calm()
    report = chaos.report()
    assert not report.ok
    assert len(report.struck) == 1
    assert "not recovered" in report.problems[0]


def test_a_signal_in_the_middle_of_a_fault_leaves_it_to_be_healed() -> None:
    class Signal(BaseException):
        pass

    def interrupt(fault: Fault) -> None:
        board.broken.append(fault)
        raise Signal

    board = Board()
    board.on_strike = interrupt
    chaos = started(board, kinds=(Kind.CUT,), targets=("agent",))
    with pytest.raises(Signal):
        chaos.storm(count=1)
    assert chaos.calm()
    assert board.broken == []


def test_what_is_gone_already_is_not_counted_as_hit() -> None:
    def missed(fault: Fault) -> None:
        board.on_strike = lambda _fault: None
        raise NotFound(ErrorCode.NOT_FOUND, "it has just ended")

    board = Board()
    board.on_strike = missed
    chaos = started(board, kinds=(Kind.KILL,), targets=("rank",))
    chaos.storm(count=1)
    chaos.calm()
    assert len(chaos.report().struck) == 1
    assert chaos.report().ok


def test_faults_that_are_not_possible_here_are_left_out_with_the_reason() -> None:
    assert started(Board()).refused == ("it is glued",)
    with pytest.raises(Refused, match="none of these faults is possible") as caught:
        started(Board(), targets=("machine",))
    assert "it is glued" in caught.value.cause


def test_a_cluster_that_does_not_work_is_not_blamed_on_chaos() -> None:
    board = Board()
    board.look = lambda jobs=None: sight(leader="")  # type: ignore[method-assign]
    with pytest.raises(Unavailable, match="has no leader"):
        started(board)


def test_no_second_member_of_etcd_is_broken_at_the_same_time() -> None:
    board = Board()
    given: dict[str, object] = {"every_s": 0.0, "hold_s": (0.1, 0.1), "patience_s": 2.0, "wait": 0.0}
    chosen = Settings(1, targets=("etcd",), **given)  # type: ignore[arg-type]
    chaos = Chaos(chosen, board, board, members=("etcd-0", "etcd-1"))  # type: ignore[arg-type]
    most = 0

    def watch(fault: Fault) -> None:
        nonlocal most
        most = max(most, len(board.broken))

    board.on_strike = watch
    chaos.begin()
    chaos.storm(count=4)
    chaos.calm()
    assert most == 0
    assert len(chaos.report().struck) == 4
