"""Machines that attempts keep ending because of: blamed, cordoned for a while if they can be spared."""

from dataclasses import replace

import pytest
from tests.support.builders import EPOCH, JOB, KEYS, Stage, make_spec

from dtrain.coordinator.core.suspicion import HALF_LIFE_S, KEPT_S, blames, score
from dtrain.protocol.cluster import Blame, Cordon, Suspicion
from dtrain.protocol.events import EventReason
from dtrain.protocol.ids import AgentName, Attempt, JobName, Term, Uid
from dtrain.protocol.job import JobPhase
from dtrain.protocol.snapshot import Failure, FailureKind

B = AgentName("b")


def blame(uid: str = "u7", kind: FailureKind = FailureKind.AGENT_LOST, ago_s: float = 0.0) -> Blame:
    return Blame(JobName("other"), Uid(uid), Attempt(1), kind, EPOCH + 1000.0 - ago_s)


def stage_with(*blames: Blame, machines: str = "abcdefgh", **spec: object) -> Stage:
    stage = Stage(make_spec(**spec)).join(*machines)  # type: ignore[arg-type]
    stage.cordon_s = 7200.0
    if blames:
        stage.write(KEYS.suspicion(B), Suspicion(Term(1), B, blames))
    return stage.run()


def suspicion(stage: Stage) -> Suspicion:
    value = stage.cells[KEYS.suspicion(B)].value
    assert isinstance(value, Suspicion)
    return value


def test_a_loss_is_a_blame_written_with_the_end_of_the_attempt() -> None:
    stage = stage_with()
    stage.lose("b")
    decisions = stage.decisions
    stage.decide()
    assert stage.decisions == decisions + 1
    assert stage.status.attempt == 2
    (found,) = suspicion(stage).blames
    assert (found.job, found.attempt, found.kind) == (JOB, 1, FailureKind.AGENT_LOST)
    (write,) = [write for write in stage.last.writes if write.key == KEYS.suspicion(B)]
    assert write.lease_ttl_s == KEPT_S  # type: ignore[union-attr]


def test_enough_blames_cordon_the_machine_for_a_while() -> None:
    stage = stage_with(blame("u7", ago_s=900.0), blame("u8", ago_s=600.0))
    stage.lose("b")
    stage.decide()
    cordon = stage.cells[KEYS.cordon(B)].value
    assert isinstance(cordon, Cordon)
    assert cordon.auto
    assert not cordon.drain
    assert "3 attempts of 3 jobs" in cordon.reason
    assert EventReason.CORDONED in stage.reasons_of_events()
    (write,) = [write for write in stage.last.writes if write.key == KEYS.cordon(B)]
    assert write.lease_ttl_s == 7200.0  # type: ignore[union-attr]


def test_a_machine_without_which_the_job_cannot_be_placed_is_not_cordoned() -> None:
    stage = stage_with(blame("u7", ago_s=900.0), blame("u8", ago_s=600.0), machines="ab")
    stage.lose("b")
    stage.decide()
    assert KEYS.cordon(B) not in stage.cells
    (event,) = [event for event in stage.events if event.reason is EventReason.MACHINE_SUSPECTED]
    assert "could not be placed without it" in event.message


def test_no_more_than_a_share_of_the_fleet_is_cordoned() -> None:
    stage = stage_with(blame("u7", ago_s=900.0), blame("u8", ago_s=600.0))
    stage.cordoned |= {AgentName("g"), AgentName("h")}
    stage.lose("b")
    stage.decide()
    assert KEYS.cordon(B) not in stage.cells
    assert EventReason.MACHINE_SUSPECTED in stage.reasons_of_events()


def test_several_that_go_together_blame_none() -> None:
    stage = stage_with()
    stage.lose("a")
    stage.lose("b")
    stage.decide()
    assert stage.status.attempt == 2
    assert not {KEYS.suspicion(AgentName("a")), KEYS.suspicion(B)} & stage.cells.keys()


def test_one_that_drained_is_not_blamed() -> None:
    stage = stage_with()
    stage.drain("b")
    stage.lose("b")
    stage.decide()
    assert KEYS.suspicion(B) not in stage.cells


def test_without_the_setting_nothing_is_suspected() -> None:
    stage = stage_with()
    stage.cordon_s = 0.0
    stage.lose("b")
    stage.decide()
    assert stage.status.attempt == 2
    assert KEYS.suspicion(B) not in stage.cells


@pytest.mark.parametrize("kind", [FailureKind.SIGNAL, FailureKind.PREPARE])
def test_a_program_that_crashes_everywhere_makes_no_machine_a_bad_one(kind: FailureKind) -> None:
    crashes = [blame("u1", kind, ago_s=100.0 * n) for n in range(9)]
    assert score(crashes, EPOCH + 1000.0) <= 2.0
    assert score([*crashes, blame("u2", FailureKind.SIGNAL)], EPOCH + 1000.0) == pytest.approx(3.0, abs=0.1)


def test_one_loss_told_by_several_jobs_is_one() -> None:
    assert score([blame("u1"), blame("u2", ago_s=1.0)], EPOCH + 1000.0) == pytest.approx(1.0, abs=0.01)


def test_blames_fade() -> None:
    assert score([blame()], EPOCH + 1000.0 + HALF_LIFE_S) == pytest.approx(0.5)
    assert score([blame()], EPOCH + 1000.0 + KEPT_S) == 0.0


@pytest.mark.parametrize(
    ("failure", "speaks"),
    [
        (Failure(FailureKind.UNKILLABLE, ""), True),
        (Failure(FailureKind.SIGNAL, "", signal=9), True),
        (Failure(FailureKind.SIGNAL, "", signal=15), False),
        (Failure(FailureKind.EXIT, "", exit_code=1), False),
        (Failure(FailureKind.EXCEPTION, "ValueError: bad"), False),
        (Failure(FailureKind.EXCEPTION, "RuntimeError: CUDA error: uncorrectable ECC error"), True),
        (Failure(FailureKind.COLLECTIVE, "connection closed by peer"), False),
        (Failure(FailureKind.RESTORE, ""), False),
    ],
)
def test_what_speaks_against_a_machine(failure: Failure, speaks: bool) -> None:
    assert blames(failure) is speaks


def test_an_operators_drain_moves_the_job_and_keeps_the_agent() -> None:
    stage = stage_with(machines="abc", store="memory://x")
    stage.step(5)
    cordon = Cordon(B, "new disk", "ann", drain=True)
    stage.write(KEYS.cordon(B), cordon)
    stage.agents[B] = replace(stage.agents[B], draining_at=stage.now, vacating=cordon)
    stage.decide()
    # The machine stays: it is in no hurry.
    assert stage.opened.hold_s == stage.spec.checkpoint.timeout_s
    assert "b is draining (new disk)" in stage.status.reason
    stage.checkpoint()
    assert stage.phase is JobPhase.STARTING
    assert [member.agent for member in stage.status.members] == ["a", "c"]
    assert stage.status.restarts == ()
