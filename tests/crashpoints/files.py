"""SIGKILL before, in and after each system call that changes a directory store.

Four pieces of work, each by the product's own code in a forked process: *upload* (both ranks' parts of
checkpoint 2), *merge* (the leader verifies it and writes the manifest), *collect* (a retired checkpoint 1 is
deleted) and *sweep* (the leftovers of an aborted checkpoint 2 are). A clean run tells the system calls; then
one process dies at each of them. After each death the work is done once more, by whoever has that office
now, and all comes to rest. None of them writes to etcd, which therefore lives on in the parent's model.
"""

import hashlib
import json
import os
import shutil
import signal
import struct
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dtrain.agent.transfer_upload import Uploader
from dtrain.agent.transferring import TransferReport, Upload, Uploaded
from dtrain.coordinator.core.decisions import CollectGarbage, SweepOrphans, VerifyCheckpoint
from dtrain.coordinator.core.manifest import merge
from dtrain.coordinator.core.views import Verdict
from dtrain.coordinator.results import Collected, Swept, Verified
from dtrain.coordinator.work import Stores, Worker
from dtrain.protocol import codec
from dtrain.protocol.checkpoint import CommitRecord, Garbage, Latest, OpenRecord
from dtrain.protocol.ids import Attempt, ClusterName, JobName, Rank, Seq, Step, Term, Uid
from dtrain.protocol.job import JobPhase, JobStatus
from dtrain.protocol.keys import Keys
from dtrain.protocol.ranklink import Sealed
from dtrain.protocol.snapshot import DurablePart
from dtrain.runtime.clock import SystemClock
from dtrain.storage.blobs.local import INCOMING, LocalBlobs
from dtrain.storage.etcd.memory import MemoryEtcd
from dtrain.storage.etcd.port import Delete, Put, Txn
from tests.crashpoints.ports import unreadable

CLUSTER, JOB, UID = ClusterName("c1"), JobName("digits"), Uid("u1")
WORLD = 2
NONCES = {1: "a" * 16, 2: "b" * 16}
DEATHS = ("before", "in", "after")
"""``in``: a write that got half of its bytes into the file."""

# What may be killed ------------------------------------------------------------------

_WATCHED = ("open", "write", "fsync", "link", "mkdir", "unlink", "rmdir", "rename", "replace")


class Killer:
    """Stands at the system calls of this process; ``at`` is the number of the one it dies at."""

    def __init__(self, at: int | None, how: str) -> None:
        self.calls: list[str] = []
        self._at = at
        self._how = how

    def arm(self) -> None:
        """From now on; there is no way back, so only in a process of one's own."""
        for name in _WATCHED:
            setattr(os, name, self._watched(name, getattr(os, name)))

    def _watched(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if name == "open" and not args[1] & os.O_CREAT:
                return real(*args, **options)
            number = len(self.calls)
            self.calls.append("")
            if number == self._at and self._how == "before":
                _die()
            if number == self._at and self._how == "in":
                real(args[0], bytes(args[1])[: len(args[1]) // 2])
                _die()
            result = real(*args, **options)
            # One that fails, as mkdir of what is there, stays without a name: it changes nothing.
            self.calls[number] = f"{name} {_short(args[0])}"
            if number == self._at:
                _die()
            return result

        return call


def _short(what: Any) -> str:
    return "data" if isinstance(what, int) else os.fspath(what).rpartition("/")[2][:12]


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60.0)


def in_a_process(work: Callable[[], None], at: int | None = None, how: str = "before") -> list[str] | None:
    """Do ``work`` in a forked process that dies at one system call; return its calls, None if it died."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(read_end)
            killer = Killer(at, how)
            real_write = os.write
            killer.arm()
            work()
            real_write(write_end, json.dumps(killer.calls).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return None
    assert os.WEXITSTATUS(status) == 0, "the work failed; its error is on stderr"
    calls: list[str] = json.loads(said)
    return calls


# The cluster -------------------------------------------------------------------------


class Site:
    """A directory store, the records in a model of etcd, and the product's code between them."""

    def __init__(self, root: Path) -> None:
        root.mkdir()
        self.root = root
        self.store = LocalBlobs(root)
        self.etcd = MemoryEtcd(lambda: 0.0)
        self.keys = Keys(CLUSTER)
        self.worker = Worker(self.etcd, Stores(lambda _uri: LocalBlobs(root)), merge, SystemClock())
        status = JobStatus(
            term=Term(1), uid=UID, phase=JobPhase.RUNNING, attempt=Attempt(1), seq_last=Seq(2), store=self.uri
        )
        self.put(self.keys.status(JOB), status)

    @property
    def uri(self) -> str:
        return self.store.uri

    def put(self, key: str, value: Any) -> None:
        self.etcd.txn(Txn(success=(Put(key, codec.encode(value)),)))

    def drop(self, key: str) -> None:
        self.etcd.txn(Txn(success=(Delete(key),)))

    def record(self, seq: int) -> OpenRecord:
        return OpenRecord(
            Term(1), UID, Seq(seq), Attempt(1), Step(10 * seq), NONCES[seq], WORLD, timeout_s=60.0
        )

    def open(self, seq: int) -> None:
        self.put(self.keys.open(JOB, Seq(seq)), self.record(seq))

    def upload(self, seq: int) -> list[DurablePart]:
        """What the transfer processes of both ranks do."""
        reports: list[TransferReport] = []
        uploader = Uploader(lambda _uri: LocalBlobs(self.root), reports.append)
        for rank in range(WORLD):
            fd = os.memfd_create("sealed")
            try:
                uploader.run(upload_order(seq, rank, fd, self.uri))
            finally:
                os.close(fd)
        return [report.part for report in reports if isinstance(report, Uploaded)]

    def verify(self, seq: int, parts: Sequence[DurablePart]) -> Verdict:
        work = VerifyCheckpoint(CLUSTER, JOB, UID, self.uri, self.record(seq), tuple(parts), None)
        result = self.worker.run(work)
        assert isinstance(result, Verified), result
        assert result.verdict.ok, result.verdict.problem
        return result.verdict

    def commit(self, seq: int, verdict: Verdict) -> None:
        record = CommitRecord(
            Term(1),
            UID,
            Seq(seq),
            Step(10 * seq),
            Attempt(1),
            NONCES[seq],
            WORLD,
            verdict.size_bytes,
            verdict.manifest,
            verdict.manifest_bytes,
            verdict.digest,
        )
        self.put(self.keys.checkpoint(JOB, Seq(seq)), record)
        self.put(self.keys.latest(JOB), Latest(Term(1), Seq(seq), Step(10 * seq)))
        self.drop(self.keys.open(JOB, Seq(seq)))

    def retire(self, seq: int) -> None:
        record = self.commits()[seq]
        self.put(self.keys.garbage(JOB, Seq(seq)), Garbage(Term(1), Seq(seq), record.manifest, record.digest))
        self.drop(self.keys.checkpoint(JOB, Seq(seq)))

    def collect(self, seq: int) -> None:
        (kv,) = self.etcd.range(self.keys.garbage(JOB, Seq(seq))).items
        result = self.worker.run(CollectGarbage(JOB, self.uri, codec.decode(Garbage, kv.value)))
        assert isinstance(result, Collected), result
        assert not result.problem, result.problem

    def sweep(self) -> None:
        result = self.worker.run(SweepOrphans(CLUSTER, JOB, UID, self.uri))
        assert isinstance(result, Swept), result
        assert not result.problem, result.problem

    # Looking.

    def commits(self) -> dict[int, CommitRecord]:
        folder = self.keys.checkpoint(JOB, Seq(1)).rpartition("/")[0] + "/"
        found = self.etcd.range(folder, folder[:-1] + "0").items
        return {int(one.seq): one for one in (codec.decode(CommitRecord, kv.value) for kv in found)}

    def problems(self) -> Iterator[str]:
        """What is committed and cannot be read."""
        for seq, record in self.commits().items():
            problem = unreadable(self.store, replace(record, uid=UID))
            if problem:
                yield f"checkpoint {seq} is committed and {problem}"

    def leftovers(self) -> Iterator[str]:
        """What is there although no record names it."""
        for seq, record in self.commits().items():
            folder = f"{seq:020d}/{record.attempt:06d}-{record.nonce}/"
            found = [info.key for info in self.store.list(f"{CLUSTER}/{JOB}/") if folder in info.key]
            if len(found) != 2 * WORLD:
                yield f"checkpoint {seq} has {sorted(found)}"
        named = {record.manifest for record in self.commits().values()}
        folders = [f"/blobs/{seq:020d}/" for seq in self.commits()]
        for info in self.store.list(f"{CLUSTER}/{JOB}/"):
            if info.key not in named and not any(folder in info.key for folder in folders):
                yield f"{info.key} is left over"
        for path in self.root.rglob("*"):
            inside = path.is_relative_to(self.root / INCOMING) and path != self.root / INCOMING
            if inside or (path.is_dir() and path.name != INCOMING and not any(path.iterdir())):
                yield f"{path.relative_to(self.root)} is left over"


def upload_order(seq: int, rank: int, fd: int, uri: str) -> Upload:
    """A sealed snapshot of one rank in ``fd``, as its saver leaves it, without torch."""
    rows = hashlib.sha256(f"{seq}/{rank}".encode()).digest() * 300
    table = {"w": {"dtype": "U8", "shape": [len(rows)], "data_offsets": [0, len(rows)]}}
    header = codec.dumps(table)
    header += b" " * (-(8 + len(header)) % 64)
    blob = struct.pack("<Q", len(header)) + header + rows
    chunk = {"o": [rank * len(rows)], "s": [len(rows)], "b": 0, "off": 8 + len(header), "len": len(rows)}
    value = {"step": 10 * seq}
    index = codec.dumps(
        {
            "layout": "same",
            "objects": {"progress": {"value": value, "crc": f"{zlib.crc32(codec.canonical(value)):08x}"}},
            "tensors": {"w": {"dtype": "U8", "shape": [WORLD * len(rows)], "chunks": [chunk]}},
        }
    )
    os.pwrite(fd, blob + index, 0)
    path = f"/proc/{os.getpid()}/fd/{fd}"
    sealed = Sealed(Seq(seq), NONCES[seq], Step(10 * seq), path, 0, len(blob), len(blob), len(index))
    return Upload(CLUSTER, JOB, UID, uri, Attempt(1), Rank(rank), WORLD, sealed.step, sealed)


# The pieces of work ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Piece:
    """``prepare`` until the work may begin; ``work``, in which the process dies; ``after``, to rest."""

    prepare: Callable[[Site], Any]
    work: Callable[[Site, Any], None]
    after: Callable[[Site, Any], None]
    committed: tuple[int, ...]
    """Checkpoints that are there in the end."""


def _first(site: Site) -> None:
    site.open(1)
    site.commit(1, site.verify(1, site.upload(1)))


def _prepare_upload(site: Site) -> None:
    _first(site)
    site.open(2)


def _uploaded_again(site: Site, _: Any) -> None:
    """The agent starts its transfer process again, which knows nothing of the first one's files."""
    site.commit(2, site.verify(2, site.upload(2)))
    site.sweep()


def _aborted(site: Site, _: Any) -> None:
    """The machine is gone: the checkpoint is aborted."""
    site.drop(site.keys.open(JOB, Seq(2)))
    site.sweep()


def _prepare_merge(site: Site) -> list[DurablePart]:
    _prepare_upload(site)
    return site.upload(2)


def _merged_again(site: Site, parts: list[DurablePart]) -> None:
    site.commit(2, site.verify(2, parts))
    site.sweep()


def _prepare_collect(site: Site) -> None:
    _first(site)
    site.open(2)
    site.commit(2, site.verify(2, site.upload(2)))
    site.retire(1)


def _collected(site: Site, _: Any) -> None:
    site.collect(1)
    site.drop(site.keys.garbage(JOB, Seq(1)))
    site.sweep()


def _prepare_sweep(site: Site) -> None:
    """Checkpoint 2 is aborted: rank 0's part was durable, and a writer died in the middle of rank 1's."""
    _prepare_upload(site)
    site.upload(2)
    upload = site.root / INCOMING / ("c" * 16)
    key = next(info.key for info in site.store.list(f"{CLUSTER}/{JOB}/{UID}/blobs/{2:020d}/"))
    (upload / key).parent.mkdir(parents=True)
    (upload / key).write_bytes(b"half")
    site.drop(site.keys.open(JOB, Seq(2)))


PIECES: dict[str, Piece] = {
    "upload": Piece(_prepare_upload, lambda site, _: _drop(site.upload(2)), _uploaded_again, (1, 2)),
    "upload, aborted": Piece(_prepare_upload, lambda site, _: _drop(site.upload(2)), _aborted, (1,)),
    "merge": Piece(_prepare_merge, lambda site, parts: _drop(site.verify(2, parts)), _merged_again, (1, 2)),
    "merge, aborted": Piece(_prepare_merge, lambda site, parts: _drop(site.verify(2, parts)), _aborted, (1,)),
    "collect": Piece(_prepare_collect, lambda site, _: site.collect(1), _collected, (2,)),
    "sweep": Piece(_prepare_sweep, lambda site, _: site.sweep(), lambda site, _: site.sweep(), (1,)),
}


def _drop(_: Any) -> None:
    """What it answered dies with the process."""


@dataclass(frozen=True, slots=True)
class Tally:
    """Of one piece: the system calls that changed something, the deaths died, and what was wrong after."""

    calls: tuple[str, ...]
    deaths: int
    problems: tuple[str, ...]


def play(piece: Piece, folder: Path, *, every: int = 1) -> Tally:
    """Die at every ``every``-th system call of a piece of work, in each way."""
    calls: tuple[str, ...] = ()
    deaths, problems = 0, []
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        site = Site(Path(temporary) / "clean")
        context = piece.prepare(site)
        found = in_a_process(lambda: piece.work(site, context))
        assert found is not None
        calls = tuple(found)
        shutil.rmtree(site.root)
        for number in [number for number, call in enumerate(calls) if call][::every]:
            for how in DEATHS:
                if how == "in" and not calls[number].startswith("write"):
                    continue
                site = Site(Path(temporary) / "site")
                context = piece.prepare(site)
                said = _one(site, piece, context, number, how)
                problems += [f"{how} call {number} ({calls[number]}): {what}" for what in said]
                deaths += 1
                shutil.rmtree(site.root)
    return Tally(tuple(call for call in calls if call), deaths, tuple(problems))


def _one(site: Site, piece: Piece, context: Any, number: int, how: str) -> list[str]:
    if in_a_process(lambda: piece.work(site, context), number, how) is not None:
        return ["it lived on"]
    at_once = list(site.problems())
    piece.after(site, context)
    there = tuple(sorted(site.commits()))
    wrong = [] if there == piece.committed else [f"checkpoints {there} are there, not {piece.committed}"]
    return [*at_once, *site.problems(), *site.leftovers(), *wrong]
