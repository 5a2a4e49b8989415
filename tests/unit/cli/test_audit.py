"""Where an audit gets its history from: a model etcd, compacted or not, and a file; what the verb says."""

import gzip
import hashlib
import json
from pathlib import Path

import pytest

from dtrain.cli import exits, main
from dtrain.cli.auditblobs import BlobAudit
from dtrain.cli.auditing import Recorded, Recorder, Replay
from dtrain.protocol import codec
from dtrain.protocol.audit import Auditor
from dtrain.protocol.checkpoint import BlobEntry, CommitRecord, Latest, Manifest, Quarantine
from dtrain.protocol.errors import Refused, TimedOut
from dtrain.protocol.ids import Attempt, ClusterName, JobName, Rank, Seq, Step, Term, Uid
from dtrain.protocol.job import JobPhase, JobStatus
from dtrain.protocol.keys import Keys
from dtrain.storage.blobs.digest import crc32c, to_hex
from dtrain.storage.blobs.local import LocalBlobs
from dtrain.storage.blobs.port import PART_BYTES
from dtrain.storage.etcd.memory import MemoryEtcd
from dtrain.storage.etcd.port import Delete, Put, Txn

CLUSTER = ClusterName("c")
KEYS = Keys(CLUSTER)
GOOD = Path(__file__).parents[1] / "protocol" / "data" / "good.jsonl.gz"


class World:
    def __init__(self) -> None:
        self.now = 0.0
        self.etcd = MemoryEtcd(lambda: self.now)
        self.auditor = Auditor(CLUSTER)
        self.replay = Replay(self.etcd, CLUSTER, self.auditor)
        self.term = 0

    def put(self, key: str, value: bytes) -> int:
        return self.etcd.txn(Txn(success=(Put(key, value),))).revision

    def lead(self) -> None:
        self.etcd.txn(Txn(success=(Delete(KEYS.leader),)))
        self.term = self.put(KEYS.leader, b"{}")

    def status(self, attempt: int, job: str = "j") -> int:
        record = JobStatus(Term(self.term), Uid("u"), JobPhase.STARTING, attempt=Attempt(attempt))
        return self.put(KEYS.status(JobName(job)), codec.encode(record))


@pytest.fixture
def world() -> World:
    return World()


def test_a_replay_reads_everything_from_the_first_revision(world: World) -> None:
    world.lead()
    world.status(1)
    world.put("/somebody/else", b"x")
    world.replay.catch_up(5.0)
    assert (world.auditor.terms, world.auditor.attempts, world.auditor.begun_at) == (1, 1, 0)
    assert world.replay.revision == world.etcd.revision
    world.status(3)
    world.replay.catch_up(5.0)
    assert [violation.invariant for violation in world.auditor.violations] == ["I5"]


def test_a_replay_of_a_compacted_history_begins_at_the_oldest_revision(world: World) -> None:
    world.lead()
    world.status(1)
    world.status(5)  # broken, but forgotten
    oldest = world.status(6)
    world.etcd.compact(oldest)
    world.status(7)
    world.replay.catch_up(5.0)
    assert (world.auditor.begun_at, world.auditor.violations) == (oldest, [])
    assert world.auditor.attempts == 1
    world.status(9)
    world.replay.catch_up(5.0)
    assert world.auditor.violations[0].revision == world.etcd.revision


def test_a_replay_overtaken_by_compaction_goes_on_from_a_list(world: World) -> None:
    world.lead()
    world.status(2)
    world.replay.catch_up(5.0)
    world.replay.close()
    world.status(3)
    last = world.status(4)
    world.etcd.compact(last)
    world.status(5)
    world.replay.catch_up(5.0)
    assert world.replay.gaps == 1
    assert world.auditor.begun_at == last
    assert [str(v) for v in world.auditor.violations] == ["revision 3: I5: j went from attempt 0 to 2"]


def test_a_cluster_that_is_all_deleted_has_a_history_too(world: World) -> None:
    world.lead()
    world.etcd.txn(Txn(success=(Delete(KEYS.leader),)))
    world.put("/somebody/else", b"x")
    world.replay.catch_up(5.0)
    assert world.auditor.terms == 1


def test_a_watch_that_keeps_something_back_is_no_success(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.lead()
    world.replay.catch_up(5.0)
    world.status(1)
    monkeypatch.setattr(world.replay, "step", lambda _timeout_s: False)
    with pytest.raises(TimedOut, match="read up to revision"):
        world.replay.catch_up(0.1)


@pytest.mark.parametrize("name", ["h.jsonl", "h.jsonl.gz"])
def test_a_recording_says_what_the_history_said(world: World, tmp_path: Path, name: str) -> None:
    world.lead()
    world.put(KEYS.spec(JobName("j")), b'{"v":1,"uid":"u","env":{"TOKEN":"hush"}}')
    world.put(KEYS.latest(JobName("j")), b"\xff\xfe")
    oldest = world.status(1)
    world.etcd.compact(oldest)
    world.status(3)
    recorder = Recorder(tmp_path / name, CLUSTER)
    Replay(world.etcd, CLUSTER, world.auditor, recorder).catch_up(5.0)
    recorder.close()
    again, source = Auditor(CLUSTER), Recorded(tmp_path / name)
    source.play(again)
    assert source.whole
    assert again.violations == world.auditor.violations
    assert {violation.invariant for violation in again.violations} == {"I5", "readable"}
    text = (tmp_path / name).read_bytes()
    assert b"hush" not in (gzip.decompress(text) if name.endswith("gz") else text)


@pytest.mark.parametrize("packed", [False, True])
def test_a_recording_that_was_cut_off_is_read_as_far_as_it_goes(tmp_path: Path, packed: bool) -> None:
    data = GOOD.read_bytes() if packed else gzip.decompress(GOOD.read_bytes())
    path = tmp_path / ("cut.jsonl.gz" if packed else "cut.jsonl")
    path.write_bytes(data[: len(data) * 2 // 3])
    source = Recorded(path)
    auditor = Auditor(source.cluster)
    source.play(auditor)
    assert not source.whole
    assert not auditor.violations
    assert auditor.revisions > 20


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "no recorded audit stream"),
        ("[1]\n", "cannot be read"),
        ('{"kind":"AuditStream","v":2,"cluster":"c"}\n', "version 2"),
        ('{"kind":"AuditStream","v":1,"cluster":"c"}\n{"r":1,"e":[{}]}\n', "damaged line"),
        ('{"kind":"AuditStream","v":1,"cluster":"c"}\n{"r":1,"e":[{"k":"x","b":"?"}]}\n', "damaged line"),
    ],
)
def test_what_is_no_recording_is_refused(tmp_path: Path, text: str, what: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    with pytest.raises(Refused, match=what):
        Recorded(path).play(Auditor(CLUSTER))


def test_the_verb_passes_a_good_history(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["audit", "--from", str(GOOD)]) == exits.OK
    assert "2 terms, 3 attempts, 7 commits, 163 snapshots checked: no violation" in capsys.readouterr().out


def test_the_verb_names_a_violation_and_ends_with_its_own_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = gzip.decompress(GOOD.read_bytes()).decode().splitlines()[:-1]
    late = codec.encode(Latest(Term(2), Seq(1), Step(0))).decode()
    key = Keys(ClusterName("good")).latest(JobName("train"))
    lines.append(json.dumps({"r": 100_000, "e": [{"k": key, "v": late}]}))
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join([*lines, '{"end":100000}', ""]))
    assert main.run(["audit", "--from", str(path)]) == exits.CHECK_FAILED
    assert "revision 100000: I1: latest of train was written by term 2" in capsys.readouterr().out
    assert main.run(["audit", "--from", str(path), "-o", "json"]) == exits.CHECK_FAILED
    document = json.loads(capsys.readouterr().out)
    assert not document["clean"]
    assert {violation["invariant"] for violation in document["violations"]} >= {"I1", "I4"}


def test_the_verb_does_not_mix_a_file_with_etcd(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["audit", "--from", str(GOOD), "--follow"]) == exits.USAGE
    assert "need etcd" in capsys.readouterr().err


def test_the_verb_says_how_to_reach_an_etcd(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert main.run(["audit"]) == exits.UNREACHABLE
    assert "--endpoints" in capsys.readouterr().err


# Blobs ---------------------------------------------------------------------------------

DATA = b"0123456789" * 1000


def stored(world: World, root: Path) -> LocalBlobs:
    """A committed checkpoint of one blob, whole."""
    store = LocalBlobs(root)
    crc = crc32c(DATA)
    store.put("blob", [DATA], chunk_crcs=[crc])
    chunks = (to_hex(crc),)
    manifest = Manifest(
        v=1,
        cluster=CLUSTER,
        job=JobName("j"),
        uid=Uid("u"),
        seq=Seq(1),
        attempt=Attempt(1),
        nonce="n",
        step=Step(5),
        world=1,
        chunk_bytes=PART_BYTES,
        crc="crc32c",
        bytes=len(DATA),
        layout="",
        blobs=(BlobEntry("blob", Rank(0), len(DATA), chunks[0], chunks),),
        tensors={},
        objects={},
    )
    packed = gzip.compress(codec.encode(manifest))
    store.put("manifest", [packed], chunk_crcs=[crc32c(packed)])
    commit = CommitRecord(
        Term(1),
        Uid("u"),
        Seq(1),
        Step(5),
        Attempt(1),
        "n",
        1,
        len(DATA),
        "manifest",
        len(packed),
        hashlib.sha256(packed).hexdigest(),
    )
    status = JobStatus(Term(1), Uid("u"), JobPhase.RUNNING, attempt=Attempt(1), store=root.as_uri())
    world.put(KEYS.status(JobName("j")), codec.encode(status))
    world.put(KEYS.checkpoint(JobName("j"), Seq(1)), codec.encode(commit))
    world.put(KEYS.latest(JobName("j")), codec.encode(Latest(Term(1), Seq(1), Step(5))))
    return store


def problems(world: World) -> list[str]:
    return [str(violation) for violation in BlobAudit(world.etcd, CLUSTER, everything=False).check()]


def test_whole_blobs_pass(world: World, tmp_path: Path) -> None:
    stored(world, tmp_path)
    audit = BlobAudit(world.etcd, CLUSTER, everything=True)
    assert list(audit.check()) == []
    assert audit.checkpoints == 1
    assert audit.bytes > len(DATA)


@pytest.mark.parametrize("key", ["blob", "manifest"])
@pytest.mark.parametrize("how", ["damaged", "gone"])
def test_rot_is_a_violation_unless_it_is_known(world: World, tmp_path: Path, key: str, how: str) -> None:
    store = stored(world, tmp_path)
    data = store.get(key)
    store.delete(key)
    if how == "damaged":
        damaged = data[:-1] + bytes([data[-1] ^ 1])
        store.put(key, [damaged], chunk_crcs=[crc32c(damaged)])
    [problem] = problems(world)
    assert "I4: checkpoint 1 of j" in problem
    found = Quarantine(Term(1), Seq(1), "blob", 0, "x", "y")
    world.put(KEYS.bad(JobName("j"), Seq(1)), codec.encode(found))
    assert problems(world) == []
