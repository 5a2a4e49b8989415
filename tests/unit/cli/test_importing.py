"""``dtrain checkpoints import`` against a replica over real gRPC: a leader that opens, commits or refuses."""

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from safetensors.torch import save_file
from tests.unit.cli.fakes import JOB, KEYS, TERM, FakeReplica, event, item, serving, spec, status

from dtrain.cli.main import run
from dtrain.protocol import codec
from dtrain.protocol.checkpoint import CommitRecord, OpenRecord, Order, OrderKind, RankManifest
from dtrain.protocol.events import EventReason
from dtrain.protocol.ids import Attempt, Seq, Step, Uid
from dtrain.protocol.job import JobPhase, JobSpec
from dtrain.protocol.pb import coordinator_pb2 as pb
from dtrain.protocol.snapshot import DurablePart

Out = pytest.CaptureFixture[str]


@dataclass
class Replica(FakeReplica):
    """Opens a checkpoint for a request; ``commits``: and commits what is reported."""

    store: str = ""
    opens: bool = True
    commits: bool = True
    asked: list[Any] = field(default_factory=list)

    def waiting(self, *more: Any) -> list[Any]:
        record = status(JobPhase.QUEUED, store=self.store, attempt=Attempt(0), members=())
        return [item(KEYS.spec(JOB), spec()), item(KEYS.status(JOB), record), *more]

    def ImportCheckpoint(  # noqa: N802
        self, request: pb.ImportCheckpointRequest, context: grpc.ServicerContext
    ) -> pb.ImportCheckpointReply:
        self._enter("ImportCheckpoint", context)
        self.asked.append(request)
        order = item(KEYS.order(JOB, request.request_id), Order(Uid("u1"), OrderKind.IMPORT))
        opened = OpenRecord(
            TERM,
            Uid("u1"),
            Seq(1),
            Attempt(0),
            Step(request.step),
            "00ff",
            1,
            60.0,
            imported=request.request_id,
        )
        if request.withdraw:
            self.update(self.waiting())
        elif not self.opens:
            told = event(1, EventReason.USER_REQUESTED, "no store", 0, object=f"import/{request.request_id}")
            self.update(self.waiting(item(KEYS.event(JOB, 1), told)))
        elif not request.part:
            self.update(self.waiting(order, item(KEYS.open(JOB, Seq(1)), opened)))
        elif self.commits:
            part = codec.decode(DurablePart, request.part)
            record = CommitRecord(
                TERM, Uid("u1"), Seq(1), part.step, part.attempt, part.nonce, 1, 9, part.manifest, 9, "d" * 64
            )
            self.update(self.waiting(item(KEYS.checkpoint(JOB, Seq(1)), record)))
        else:
            told = event(1, EventReason.CHECKPOINT_ABORTED, "a hole in it", 0, object="checkpoint/1")
            self.update(self.waiting(item(KEYS.event(JOB, 1), told)))
        return pb.ImportCheckpointReply(order=request.request_id, lease=7, revision=self.revision)


@pytest.fixture
def replica(tmp_path: Path) -> Replica:
    made = Replica(store=(tmp_path / "store").as_uri())
    (tmp_path / "store").mkdir()
    made.update(made.waiting())
    return made


@pytest.fixture(autouse=True)
def address(replica: Replica, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    with serving(replica) as found:
        monkeypatch.setenv("DTRAIN_COORDINATORS", found)
        yield found


@pytest.fixture
def weights(tmp_path: Path) -> str:
    save_file({"w": torch.ones(3), "b": torch.zeros(2)}, tmp_path / "w.safetensors")
    return str(tmp_path / "w.safetensors")


def test_what_is_written_is_reported_and_its_commit_awaited(
    replica: Replica, weights: str, tmp_path: Path, capsys: Out
) -> None:
    words = ["checkpoints", "import", "digits", weights, "--weights-only", "--step", "40", "-o", "json"]
    assert run(words) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["seq"], told["step"], told["names"], told["tensors"]) == (1, 40, ["model"], 2)
    begun, reported = replica.asked
    assert (begun.lease, begun.step, begun.part, reported.lease) == (0, 40, b"", 7)
    assert begun.request_id == reported.request_id
    part = codec.decode(DurablePart, reported.part)
    packed = (tmp_path / "store" / part.manifest).read_bytes()
    manifest = codec.decode(RankManifest, gzip.decompress(packed))
    assert (manifest.step, manifest.nonce, sorted(manifest.tensors)) == (40, "00ff", ["model.b", "model.w"])


def test_what_the_leader_finds_wrong_is_told(replica: Replica, weights: str, capsys: Out) -> None:
    replica.commits = False
    assert run(["checkpoints", "import", "digits", weights, "--weights-only"]) == 5
    assert "nothing was imported into digits: a hole in it" in capsys.readouterr().err
    assert replica.asked[-1].withdraw
    replica.opens = False
    assert run(["checkpoints", "import", "digits", weights, "--weights-only"]) == 5
    assert "no store" in capsys.readouterr().err


def test_what_cannot_be_imported_asks_nobody(replica: Replica, weights: str, capsys: Out) -> None:
    assert run(["checkpoints", "import", "digits", weights]) == 2
    assert "--weights-only" in capsys.readouterr().err
    assert run(["checkpoints", "import", "digits", weights, "--weights-only", "--format", "torch"]) == 2
    assert "is safetensors, not torch" in capsys.readouterr().err
    assert run(["checkpoints", "import", "digits", weights, "--map", "x"]) == 2
    assert "OLD=NEW" in capsys.readouterr().err
    assert run(["checkpoints", "import", "digits", weights, "--weights-only", "--dry-run"]) == 0
    assert "model.w" in capsys.readouterr().out
    assert not replica.asked


def test_a_store_that_is_not_there_takes_the_request_back(
    replica: Replica, weights: str, capsys: Out
) -> None:
    words = ["checkpoints", "import", "digits", weights, "--weights-only", "--store", "nonsense://x"]
    assert run(words) != 0
    assert "--store" in capsys.readouterr().err
    assert replica.asked[-1].withdraw


def test_a_job_is_submitted_to_wait_for_what_was_read_before(
    replica: Replica, weights: str, tmp_path: Path, capsys: Out
) -> None:
    (tmp_path / "train.py").write_text("")
    (tmp_path / "job.yaml").write_text("name: digits\nscript: train.py\n")
    words = ["submit", str(tmp_path / "job.yaml"), "--from-checkpoint", weights]
    assert run(words) == 2
    assert "--weights-only" in capsys.readouterr().err
    assert "Submit" not in replica.calls
    assert run([*words, "--weights-only"]) == 0
    assert "checkpoint 1 of step 0 is imported" in capsys.readouterr().err
    assert codec.decode(JobSpec, next(iter(replica.submitted.values()))).checkpoint.await_import
    assert run(["submit", str(tmp_path / "job.yaml"), "--weights-only"]) == 2
