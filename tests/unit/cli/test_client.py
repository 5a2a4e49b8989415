"""The client over two real servers: failover, retries, errors."""

import time
from collections.abc import Iterator

import grpc
import pytest
from tests.unit.cli.fakes import FakeReplica, running_job, serving

from dtrain.cli import calling
from dtrain.cli.client import Client, closing
from dtrain.protocol import errors
from dtrain.protocol.errors import DtrainError, ErrorCode

Two = tuple[FakeReplica, FakeReplica, Client]


@pytest.fixture
def two() -> Iterator[Two]:
    first, second = FakeReplica(items=running_job()), FakeReplica(items=running_job())
    with (
        serving(first) as one,
        serving(second) as other,
        closing(Client([one, other], timeout_s=2.0)) as client,
    ):
        # Which one is asked first is random; here it is the first.
        client._current = 0
        yield first, second, client


@pytest.mark.parametrize(
    "problem",
    [
        grpc.StatusCode.UNAVAILABLE,
        errors.Unavailable(ErrorCode.ETCD_UNAVAILABLE, "no etcd"),
        errors.OutcomeUnknown(ErrorCode.ETCD_OUTCOME_UNKNOWN, "who knows"),
        errors.LeadershipLost(ErrorCode.LEADERSHIP_LOST, "not any more"),
    ],
)
def test_a_replica_that_cannot_answer_is_passed_over(
    two: Two, problem: DtrainError | grpc.StatusCode
) -> None:
    first, second, client = two
    first.refuse = lambda: problem
    assert len(client.read("jobs/").items) == 12
    assert (first.calls, second.calls) == (["Read"], ["Read"])
    # It stays with the one that answered.
    client.read("jobs/")
    assert first.calls == ["Read"]


def test_a_replica_that_asks_the_store_first_is_given_the_time(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calling, "TRY_S_MAX", 0.2)
    first, second, client = two
    first.refuse = lambda: time.sleep(0.5)
    assert client.submit(b"{}", "q1").created
    assert (first.calls, second.calls) == (["Submit"], [])


@pytest.mark.parametrize(
    ("problem", "kind"),
    [
        (errors.Refused(ErrorCode.BAD_JOB_FILE, "bad", fix="mend it"), errors.Refused),
        (errors.NotFound(ErrorCode.NOT_FOUND, "gone", fix="mend it"), errors.NotFound),
        (errors.Conflict(ErrorCode.ALREADY_EXISTS, "there", fix="mend it"), errors.Conflict),
    ],
)
def test_a_refusal_comes_back_as_what_it_was_and_is_not_retried(
    two: Two, problem: DtrainError, kind: type[DtrainError]
) -> None:
    first, second, client = two
    first.refuse = lambda: problem
    with pytest.raises(kind) as caught:
        client.submit(b"{}", "r1")
    assert (caught.value.code, caught.value.message, caught.value.fix) == (
        problem.code,
        problem.message,
        "mend it",
    )
    assert second.calls == []


def test_a_repeated_submission_carries_the_same_request_id(two: Two) -> None:
    first, second, client = two
    tries = iter([errors.OutcomeUnknown(ErrorCode.ETCD_OUTCOME_UNKNOWN, "who knows")])
    first.refuse = lambda: next(tries, None)
    assert client.submit(b'{"name":"a"}', "r1").created
    assert list(second.submitted) == ["r1"]
    assert not client.submit(b'{"name":"a"}', "r1").created


def test_when_nobody_answers_the_error_names_everybody_within_the_deadline() -> None:
    with (
        closing(Client(["127.0.0.1:1", "127.0.0.1:2"], timeout_s=0.5)) as client,
        pytest.raises(errors.Unavailable) as caught,
    ):
        client.read("jobs/")
    assert caught.value.code is ErrorCode.COORDINATOR_UNAVAILABLE
    assert "127.0.0.1:1, 127.0.0.1:2" in caught.value.message
    assert "dtrain up" in caught.value.fix


def test_a_dead_cluster_is_told_of_soon_whatever_an_answer_may_take() -> None:
    begun = time.monotonic()
    with closing(Client(["127.0.0.1:1", "127.0.0.1:2"])) as client, pytest.raises(errors.Unavailable):
        client.submit(b"{}", "r1")
    assert time.monotonic() - begun < 4.0


def test_a_thread_that_asks_a_closed_client_hears_of_it_as_of_any_trouble(two: Two) -> None:
    _, _, client = two
    client.close()
    with pytest.raises(errors.Unavailable, match="the connection is closed"):
        client.read("jobs/")


def test_the_last_problem_is_told_when_all_replicas_lack_etcd(two: Two) -> None:
    first, second, client = two
    client._timeout_s = 0.3
    for replica in (first, second):
        replica.refuse = lambda: errors.Unavailable(ErrorCode.ETCD_UNAVAILABLE, "no etcd")
    with pytest.raises(errors.Unavailable) as caught:
        client.read("jobs/")
    assert caught.value.code is ErrorCode.ETCD_UNAVAILABLE


def test_a_mirror_that_lags_is_not_read_after_a_newer_one(two: Two) -> None:
    first, second, client = two
    first.revision, second.revision = 20, 15
    assert client.read("jobs/").revision == 20
    tries = iter([grpc.StatusCode.UNAVAILABLE])
    first.refuse = lambda: next(tries, None)
    # The second is asked, is behind, and the first is asked again.
    assert client.read("jobs/").revision == 20
    assert "Read" in second.calls


def test_a_wait_ends_with_the_change(two: Two) -> None:
    first, _, client = two
    import threading

    threading.Timer(0.2, lambda: first.update([])).start()
    reading = client.read("jobs/", after_revision=9, wait_s=10)
    assert (reading.revision, reading.items) == (10, ())


def test_a_newer_servers_unknown_code_is_still_told(two: Two) -> None:
    first, _, client = two

    class Newer(DtrainError):
        pass

    problem = Newer(ErrorCode.BUG, "from the future")
    problem.code = "DT-4999"  # type: ignore[assignment]
    first.refuse = lambda: problem
    with pytest.raises(DtrainError, match="from the future"):
        client.read("jobs/")
