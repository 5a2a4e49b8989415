"""``dtrain checkpoints`` against a replica over real gRPC: what is asked, what is said, exit codes."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from tests.unit.cli.fakes import JOB, KEYS, TERM, FakeReplica, commit, event, item, running_job, serving

from dtrain.cli.main import run
from dtrain.cli.progress import Progress
from dtrain.protocol import codec
from dtrain.protocol.checkpoint import Order, OrderKind
from dtrain.protocol.errors import Conflict, ErrorCode
from dtrain.protocol.events import EventReason
from dtrain.protocol.ids import Uid
from dtrain.protocol.pb import coordinator_pb2 as pb

Out = pytest.CaptureFixture[str]


@dataclass
class Replica(FakeReplica):
    """Takes pins and requests; ``answer`` is what the records are once a request has been answered."""

    asked: list[Any] = field(default_factory=list)
    answer: list[Any] = field(default_factory=list)
    tidy: bool = False

    def PinCheckpoint(  # noqa: N802
        self, request: pb.PinCheckpointRequest, context: grpc.ServicerContext
    ) -> pb.PinCheckpointReply:
        self._enter("PinCheckpoint", context)
        self.asked.append(request)
        return pb.PinCheckpointReply(
            record=codec.encode(commit(request.seq or 4, 40)), store="", revision=self.revision
        )

    def UnpinCheckpoint(  # noqa: N802
        self, request: pb.UnpinCheckpointRequest, context: grpc.ServicerContext
    ) -> pb.UnpinCheckpointReply:
        self._enter("UnpinCheckpoint", context)
        self.asked.append(request)
        return pb.UnpinCheckpointReply(removed=request.holder != "nobody", revision=self.revision)

    def DeleteCheckpoint(  # noqa: N802
        self, request: pb.DeleteCheckpointRequest, context: grpc.ServicerContext
    ) -> pb.OrderReply:
        return self._ordered("DeleteCheckpoint", request, context)

    def CollectGarbage(  # noqa: N802
        self, request: pb.CollectGarbageRequest, context: grpc.ServicerContext
    ) -> pb.OrderReply:
        return self._ordered("CollectGarbage", request, context)

    def ReviewGarbage(  # noqa: N802
        self, request: pb.ReviewGarbageRequest, context: grpc.ServicerContext
    ) -> pb.ReviewGarbageReply:
        self._enter("ReviewGarbage", context)
        if self.tidy:
            return pb.ReviewGarbageReply(revision=self.revision)
        items = [
            pb.GarbageItem(kind="checkpoint", seq=3, what="step 30", deleted=True, why="old", bytes=7),
            pb.GarbageItem(kind="checkpoint", seq=4, what="step 40", deleted=False, why="the newest"),
            pb.GarbageItem(kind="upload", what="c1/digits/u1/x?upload=1", deleted=True, why="abandoned"),
        ]
        return pb.ReviewGarbageReply(items=items, revision=self.revision, problem="etcd went back")

    def _ordered(self, name: str, request: Any, context: grpc.ServicerContext) -> pb.OrderReply:
        self._enter(name, context)
        self.asked.append(request)
        order = Order(Uid("u1"), OrderKind.DELETE)
        self.update([*self.items, item(KEYS.order(JOB, request.request_id), order)])
        revision = self.revision
        self.update(self.answer)
        return pb.OrderReply(order=request.request_id, revision=revision)


@pytest.fixture
def replica() -> Replica:
    return Replica(items=running_job())


@pytest.fixture
def address(replica: Replica, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[str]:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    with serving(replica) as found:
        monkeypatch.setenv("DTRAIN_COORDINATORS", found)
        yield found


@pytest.mark.usefixtures("address")
class TestVerbs:
    """Each with a replica that answers."""

    def test_the_list_is_that_of_get(self, capsys: Out) -> None:
        assert run(["checkpoints", "list", "digits", "-o", "json"]) == 0
        listed = json.loads(capsys.readouterr().out)
        assert run(["get", "checkpoints", "digits", "-o", "json"]) == 0
        assert json.loads(capsys.readouterr().out) == listed
        newest = listed["items"][2]
        assert (newest["seq"], newest["state"], newest["latest"]) == (4, "Committed", True)
        assert [pin["holder"] for pin in newest["pins"]] == ["reader"]
        assert newest["verified"]["term"] == TERM
        assert listed["items"][1]["bad"]["blob"] == "blob-x"

    def test_a_pin_is_an_operators_and_has_no_end(self, replica: Replica, capsys: Out) -> None:
        assert run(["checkpoints", "pin", "digits", "4", "--holder", "paper", "--why", "table 2"]) == 0
        (asked,) = replica.asked
        assert (asked.job, asked.seq, asked.holder, asked.ttl_s, asked.why) == (
            "digits",
            4,
            "paper",
            0,
            "table 2",
        )
        assert "until it is unpinned" in capsys.readouterr().out
        assert run(["checkpoints", "unpin", "digits", "4", "--all", "-o", "json"]) == 0
        assert json.loads(capsys.readouterr().out)["removed"] is True
        assert replica.asked[-1].holder == "*"
        assert run(["checkpoints", "unpin", "digits", "4", "--holder", "nobody"]) == 0
        assert "had no such pin" in capsys.readouterr().out

    def test_nothing_is_deleted_without_a_yes(self, replica: Replica, capsys: Out) -> None:
        for words in (["delete", "digits", "3"], ["gc", "digits"]):
            assert run(["checkpoints", *words]) == 2
            assert "--yes" in capsys.readouterr().err
        assert not replica.asked

    def test_a_deletion_is_waited_for(self, replica: Replica, capsys: Out) -> None:
        gone = [one for one in running_job() if "checkpoints/00000000000000000003" not in one.key]
        replica.answer = gone
        assert run(["checkpoints", "delete", "digits", "3", "--yes"]) == 0
        assert "is deleted" in capsys.readouterr().out
        assert replica.asked[0].seq == 3

    def test_what_the_leader_refuses_is_told_with_its_reason(self, replica: Replica, capsys: Out) -> None:
        told = event(9, EventReason.USER_REQUESTED, "it is pinned", 0, object="checkpoint/3")
        replica.answer = [*running_job(), item(KEYS.event(JOB, 9), told)]
        assert run(["checkpoints", "delete", "digits", "3", "--yes"]) == 5
        assert "it is pinned" in capsys.readouterr().err

    def test_what_a_replica_refuses_at_once_keeps_its_exit_code(self, replica: Replica, capsys: Out) -> None:
        def refuse() -> Any:
            if replica.calls[-1] == "DeleteCheckpoint":
                return Conflict(ErrorCode.CONFLICT, "it is the newest", fix="take a newer one")
            return None

        replica.refuse = refuse
        assert run(["checkpoints", "delete", "digits", "4", "--yes"]) == 5
        told = capsys.readouterr().err
        assert "it is the newest" in told
        assert "take a newer one" in told

    def test_a_dry_run_shows_what_goes_and_wide_what_stays(self, replica: Replica, capsys: Out) -> None:
        assert run(["checkpoints", "gc", "digits", "--dry-run"]) == 0
        out = capsys.readouterr()
        assert "old" in out.out
        assert "the newest" not in out.out
        assert "etcd went back" in out.err
        assert run(["checkpoints", "gc", "digits", "--dry-run", "-o", "wide"]) == 0
        assert "keep" in capsys.readouterr().out
        assert run(["checkpoints", "gc", "digits", "--dry-run", "-o", "json"]) == 0
        items = json.loads(capsys.readouterr().out)["items"]
        assert [(one["seq"], one["deleted"]) for one in items] == [(3, True), (4, False), (0, True)]
        assert not replica.asked

    def test_a_dry_run_that_finds_nothing_says_so(self, replica: Replica, capsys: Out) -> None:
        replica.tidy = True
        assert run(["checkpoints", "gc", "digits", "--dry-run"]) == 0
        assert capsys.readouterr().err == "nothing of digits would be deleted\n"

    def test_a_collection_tells_what_the_leader_found(self, replica: Replica, capsys: Out) -> None:
        told = event(9, EventReason.GARBAGE_COLLECTED, "2 orphaned objects were deleted", 0)
        replica.answer = [*running_job(), item(KEYS.event(JOB, 9), told)]
        assert run(["checkpoints", "gc", "digits", "--yes"]) == 0
        assert "2 orphaned objects" in capsys.readouterr().out

    def test_reading_pins_and_lets_go_even_where_there_is_no_store(
        self, replica: Replica, capsys: Out
    ) -> None:
        assert run(["checkpoints", "verify", "digits"]) == 4
        assert "no store" in capsys.readouterr().err
        pinned, unpinned = replica.asked
        assert (pinned.seq, pinned.ttl_s > 0) == (0, True)
        assert (unpinned.seq, unpinned.holder) == (4, pinned.holder)


def test_progress_says_rate_and_time_left() -> None:
    line = Progress("checkpoint 7").line(250_000_000, 1_000_000_000, 2.0)
    assert line == "checkpoint 7: 250.0 MB of 1.0 GB (25 %), 125.0 MB/s, 6s left"
    assert "left" not in Progress("x").line(5, 5, 1.0)
