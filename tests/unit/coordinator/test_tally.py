"""What is counted in a job's status rises with what it counts, whoever leads."""

from tests.support.builders import JOB, KEYS, Stage, make_spec

from dtrain.coordinator.core.tally import Cause
from dtrain.protocol.job import TERMINAL_PHASES, Intent, JobPhase
from dtrain.protocol.snapshot import FailureKind


def running(**spec: object) -> Stage:
    spec = {"store": "s3://b", "every_steps": 10, **spec}
    return Stage(make_spec(**spec)).join("a", "b").run()  # type: ignore[arg-type]


def with_open() -> Stage:
    stage = running()
    stage.step(8)
    stage.decide()
    return stage


def again(stage: Stage) -> None:
    """All members end their ranks, and the next attempt begins."""
    for _ in range(10):
        if stage.phase is JobPhase.STARTING:
            return
        stage.decide()
        stage.after(5.0)
    raise AssertionError(stage.said)


def test_the_first_attempt_and_one_after_a_failure_are_told_apart() -> None:
    stage = running()
    assert stage.status.tally.attempts == {"first": 1}
    stage.fail("a", kind=FailureKind.SIGNAL)
    again(stage)
    assert stage.status.attempt == 2
    assert stage.status.tally.attempts == {"first": 1, "signal": 1}


def test_a_new_leader_goes_on_where_the_former_one_was() -> None:
    stage = running()
    stage.fail("a")
    again(stage)
    before = stage.status.tally
    stage.change_leader()
    stage.until_quiet()
    assert stage.status.tally == before
    stage.run()
    stage.fail("b")
    again(stage)
    assert stage.status.tally.attempts == {"first": 1, "exit": 2}


def test_a_commit_counts_once_with_its_bytes() -> None:
    stage = with_open()
    record = stage.checkpoint()
    assert (stage.status.tally.commits, stage.status.tally.committed_bytes) == (1, record.bytes)
    stage.until_quiet()
    assert stage.status.tally.commits == 1


def test_a_checkpoint_that_fails_is_counted_by_its_cause() -> None:
    def cause(stage: Stage) -> dict[str, int]:
        stage.decide()
        assert not stage.of("open"), stage.said
        assert stage.status.tally.commits == 0
        return dict(stage.status.tally.aborts)

    late = with_open()
    late.problem("a", late=True)
    assert cause(late) == {Cause.LATE: 1}
    rank = with_open()
    rank.problem("a")
    assert cause(rank) == {Cause.RANK: 1}
    refused = with_open()
    refused.accept()
    refused.durable()
    refused.verify(ok=False, problem="it does not fit")
    assert cause(refused) == {Cause.VERIFY: 1}
    timeout = with_open()
    timeout.accept()
    timeout.after(timeout.opened.timeout_s + 1.0)
    assert cause(timeout) == {Cause.TIMEOUT: 1}


def test_a_name_used_again_begins_to_count_anew_with_a_first_attempt() -> None:
    stage = running()
    stage.exit_all()
    for _ in range(10):
        stage.decide()
        stage.after(10.0)
    assert stage.phase in TERMINAL_PHASES, stage.said
    former = stage.status.attempt
    stage.spec = make_spec(uid="u2", store="s3://b", every_steps=10)
    stage.write(KEYS.spec(JOB), stage.spec)
    stage.write(KEYS.intent(JOB), Intent(stage.spec.uid))
    stage.workers.clear()
    again(stage)
    assert stage.status.attempt == former + 1
    assert stage.status.tally.attempts == {"first": 1}
