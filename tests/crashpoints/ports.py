"""The processes of a job die at their calls to etcd and to the store, one call after the other.

A clean run is recorded: who called what. Then the job runs once for each call and each of *before* and
*after*: there the caller dies, as by SIGKILL, before the call has any effect or after its effect and before
its answer. Its guardian starts it again, or another replica takes over, and the job runs to its end.
"""

import contextlib
import json
import os
import re
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dtrain.agent.transfer_fetch import Fetcher
from dtrain.agent.transfer_upload import Uploader
from dtrain.agent.transferring import (
    CancelUpload,
    Fetch,
    Fetched,
    TransferOrder,
    TransferReport,
    Upload,
    UploadFailed,
)
from dtrain.protocol import codec
from dtrain.protocol.checkpoint import CommitRecord, OpenRecord
from dtrain.protocol.errors import DtrainError
from dtrain.protocol.ids import JobName, Seq
from dtrain.protocol.job import JobPhase
from dtrain.protocol.ranklink import Sealed
from dtrain.storage.blobs.local import LocalBlobs
from dtrain.storage.blobs.port import BlobInfo, BlobStore
from dtrain.storage.etcd.port import Delete, Put, RangeResult, Txn, TxnResult, prefix_end
from tests.scenarios.script import Script, ScriptError
from tests.scenarios.stage import Coordinator, Stage, StageAgent, StageMachine
from tests.sim.machine import Machine, _Transfers
from tests.sim.process import SimClock
from tests.sim.training import WEIGHT_BYTES
from tests.sim.transfer import HEAD_BYTES, TENSOR, SimTransfer

JOB = JobName("digits")
KEEP = 2
SUBMIT = f"submit {JOB} nnodes=2 nproc=1 every_steps=10 steps=35 keep={KEEP} restarts=50"
STORIES: dict[str, tuple[str, ...]] = {
    "train": (),
    # The first open checkpoint is settled and the next attempt restores.
    "rank lost": ("until open 2", "until durable 2", "crash rank 1"),
    # One rank's part is durable, the other's never: aborted, and the sweep takes the first.
    "machine lost": ("until open 2", "wait for a part of 2", "power off a2"),
}
"""What happens to the job besides the death at a call."""

CALM_S = 60.0
"""After the job is over: collecting and sweeping come to rest."""

WORKER_REBOOT_S = 1.0


class Crash(BaseException):
    """The process is killed here; no ``except Exception`` of it gets to run."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call over a port: which process, which operation, on what."""

    owner: str
    operation: str
    what: str

    def __str__(self) -> str:
        return f"{self.owner}: {self.operation} {self.what}"


class Edges:
    """Counts the calls over the ports, and kills the caller at one of them."""

    def __init__(self, at: int | None = None, *, after: bool = False) -> None:
        self.calls: list[Call] = []
        self.died: Call | None = None
        self._at = at
        self._after = after

    def cross(self, owner: str, operation: str, what: str, call: Callable[[], Any]) -> Any:
        """Make a call that may be the last of its process."""
        here = len(self.calls) == self._at
        self.calls.append(Call(owner, operation, _plain(what)))
        if here and not self._after:
            self._die()
        result = call()
        if here:
            self._die()
        return result

    def _die(self) -> None:
        self.died = self.calls[-1]
        raise Crash


def _plain(what: str) -> str:
    """Without the parts that are drawn anew in every run."""
    return re.sub(r"[0-9a-f]{16}|-[0-9a-f]{8}\.json", "*", what)


class EdgeStore:
    """A store as one process reaches it."""

    def __init__(self, edges: Edges, owner: str, inner: BlobStore) -> None:
        self._edges = edges
        self._owner = owner
        self._inner = inner

    @property
    def uri(self) -> str:
        return self._inner.uri

    def put(self, key: str, parts: Sequence[bytes | memoryview], *, chunk_crcs: Sequence[int]) -> BlobInfo:
        def call() -> BlobInfo:
            return self._inner.put(key, parts, chunk_crcs=chunk_crcs)

        info: BlobInfo = self._edges.cross(self._owner, "put", key, call)
        return info

    def get(self, key: str, *, offset: int = 0, length: int | None = None) -> bytes:
        def call() -> bytes:
            return self._inner.get(key, offset=offset, length=length)

        data: bytes = self._edges.cross(self._owner, "get", key, call)
        return data

    def head(self, key: str) -> BlobInfo:
        info: BlobInfo = self._edges.cross(self._owner, "head", key, lambda: self._inner.head(key))
        return info

    def list(self, prefix: str) -> Iterator[BlobInfo]:
        found = self._edges.cross(self._owner, "list", prefix, lambda: list(self._inner.list(prefix)))
        return iter(found)

    def list_unfinished(self, prefix: str) -> Iterator[str]:
        def call() -> Any:
            return list(self._inner.list_unfinished(prefix))

        return iter(self._edges.cross(self._owner, "list_unfinished", prefix, call))

    def discard_unfinished(self, token: str) -> None:
        self._edges.cross(self._owner, "discard", token, lambda: self._inner.discard_unfinished(token))

    def delete(self, key: str) -> None:
        self._edges.cross(self._owner, "delete", key, lambda: self._inner.delete(key))

    def close(self) -> None:
        self._inner.close()

    def wait_s(self) -> float:
        return 0.0

    def __getattr__(self, name: str) -> Any:
        """Whatever else the port has."""
        inner = getattr(self._inner, name)

        def call(key: str, *more: Any, **options: Any) -> Any:
            return self._edges.cross(self._owner, name, key, lambda: inner(key, *more, **options))

        return call


class EdgeEtcd:
    """etcd as one process reaches it."""

    def __init__(self, edges: Edges, owner: str, inner: Any) -> None:
        self._edges = edges
        self._owner = owner
        self._inner = inner

    def txn(self, txn: Txn, *, deadline_s: float = 5.0) -> TxnResult:
        def call() -> TxnResult:
            found: TxnResult = self._inner.txn(txn, deadline_s=deadline_s)
            return found

        writes = [_verb(one) for one in txn.success if isinstance(one, Put | Delete)]
        operation, what = ("txn", " ".join(writes)) if writes else ("read", "records")
        result: TxnResult = self._edges.cross(self._owner, operation, what, call)
        return result

    def range(self, key: str, range_end: str | None = None, **how: Any) -> RangeResult:
        def call() -> RangeResult:
            found: RangeResult = self._inner.range(key, range_end, **how)
            return found

        result: RangeResult = self._edges.cross(self._owner, "range", key, call)
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def _verb(one: Put | Delete) -> str:
    return f"{'put' if isinstance(one, Put) else 'delete'} {one.key.split('/', 3)[-1]}"


class StageStore(LocalBlobs):
    """A directory store that the simulation's checks can look into."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.fault: Any = None

    @property
    def _blobs(self) -> dict[str, None]:
        return dict.fromkeys(info.key for info in self.list(""))


class Theatre(Stage):
    """The scenarios' stage over a directory store, its processes on edges."""

    def __init__(self, root: Path, edges: Edges) -> None:
        super().__init__()
        self.edges = edges
        self.store: Any = StageStore(root)
        for coordinator in self.coordinators.values():
            _attach(coordinator, edges)


def _attach(coordinator: Coordinator, edges: Edges) -> None:
    """Each life of a replica talks over edges, and ends where they say."""
    boot = coordinator.boot

    def arm() -> None:
        owner = "leader"
        inner: Any = coordinator.committer._etcd
        etcd: Any = EdgeEtcd(edges, owner, inner)
        coordinator.committer._etcd = etcd
        coordinator.worker._etcd = etcd
        store: Any = EdgeStore(edges, owner, coordinator.stage.store)
        coordinator.worker._stores._open = lambda _uri: store
        _mortal(coordinator.process, coordinator.crash)

    def again() -> None:
        boot()
        arm()

    coordinator.boot = again  # type: ignore[method-assign]
    coordinator.stage.stores = _stores_of_its_own(coordinator)
    arm()


def _stores_of_its_own(coordinator: Coordinator) -> Any:
    from dtrain.coordinator.work import Stores

    coordinator.worker._stores = Stores()
    return Stores()


def _mortal(process: Any, end: Callable[[], None]) -> None:
    post = process.post

    def guarded(call: Callable[[], None]) -> None:
        try:
            post(call)
        except Crash:
            end()

    process.post = guarded


class TheatreMachine(StageMachine):
    """Its agents' lives talk over edges; its transfer process runs the product's uploader."""

    def start_agent(self) -> None:
        if self.powered and self.agent is None:
            self.agent = StageAgent(self, self._session, SimClock(self.scheduler, 0.0, 1.0))
            edges: Edges = self.cluster.edges
            etcd: Any = EdgeEtcd(edges, "agent", self.agent.access)
            self.agent.access = etcd
            self.agent.reporter._etcd = etcd
            self.agent.transfers = Transfers(self.agent)
            _mortal(self.agent.process, self.crash_agent)

    def power_off(self) -> None:
        if self.agent is not None:
            self.end_agent()
        Machine.power_off(self)

    def crash_agent(self) -> None:
        if self.agent is not None:
            self.end_agent()
            self.scheduler.after(WORKER_REBOOT_S, self.start_agent)


class Transfers(_Transfers):
    """Starts the transfer process below."""

    def send(self, order: TransferOrder) -> None:
        if self._transfer is None and not self._ended:
            self._transfer = Transfer(self._agent.machine, self._emit, self.crash)
        super().send(order)


class Transfer(SimTransfer):
    """The transfer process: the product's uploader on memory that the simulation's rank has sealed."""

    def __init__(
        self, machine: Machine, emit: Callable[[TransferReport], None], end: Callable[[], None]
    ) -> None:
        super().__init__(machine, emit)
        cluster: Any = machine.cluster
        self.store: Any = EdgeStore(cluster.edges, "transfer", cluster.store)
        self._end = end
        self._uploader = Uploader(lambda _uri: self.store, self._report, deadline_s=5.0)

    def order(self, order: TransferOrder) -> None:
        if isinstance(order, CancelUpload):
            self._uploader.cancel(order)
        super().order(order)

    def _later(self, delay_s: float, call: Callable[[], None]) -> None:
        def guarded() -> None:
            try:
                call()
            except Crash:
                self._end()

        super()._later(delay_s, guarded)

    def _upload(self, order: Upload, nonce: str, tries: int, written: list[str]) -> None:
        seq, data = order.sealed.seq, self.machine.sealed_at(order.sealed.path)
        if data is None:
            self._report(UploadFailed(order.job, seq, order.rank, "the sealed snapshot is gone"))
            return
        fd = os.memfd_create("sealed")
        try:
            self._uploader.run(replace(order, sealed=_as_arena(order, data, fd)))
        except DtrainError as error:
            self._report(UploadFailed(order.job, seq, order.rank, error.message))
        finally:
            os.close(fd)


def _as_arena(order: Upload, data: bytes, fd: int) -> Sealed:
    """The bytes that a trainer's saver would have left in the arena."""
    sealed = order.sealed
    of = (order.uid, sealed.seq, order.attempt, sealed.step)
    head = json.dumps(dict(zip(("uid", "seq", "attempt", "step"), of, strict=True)))
    blob = head.encode().ljust(HEAD_BYTES) + data
    chunk = {"o": [sealed.offset], "s": [len(data)], "b": 0, "off": HEAD_BYTES, "len": len(data)}
    value = {"step": int(sealed.step)}
    index = {
        "layout": "sim",
        "objects": {"progress": {"value": value, "crc": f"{zlib.crc32(codec.canonical(value)):08x}"}},
        "tensors": {TENSOR: {"dtype": "U8", "shape": [WEIGHT_BYTES], "chunks": [chunk]}},
    }
    text = codec.dumps(index)
    os.write(fd, blob + text)
    return replace(
        sealed,
        path=f"/proc/self/fd/{fd}",
        offset=0,
        size_bytes=len(blob),
        index_offset=len(blob),
        index_bytes=len(text),
    )


# One run ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Outcome:
    """``problems`` empty: everything that was claimed holds."""

    calls: tuple[Call, ...]
    died: Call | None
    commits: int
    problems: tuple[str, ...]
    opened: tuple[OpenRecord, ...] = ()
    """Every intent that there was, in order."""


def run(root: Path, at: int | None = None, *, after: bool = False, story: str = "train") -> Outcome:
    """Play the job, with a death at one call, to its end and to rest."""
    root.mkdir()
    edges = Edges(at, after=after)
    stage = Theatre(root, edges)
    for name in ("a1", "a2", "a3"):
        stage.machines[name] = TheatreMachine(stage, name, 1)
    stage.run(0.1)
    script = Script(stage)
    problems: list[str] = []
    try:
        script.run(SUBMIT)
        for line in STORIES[story]:
            _perturb(stage, script, line)
        script.run(f"until {JOB} over")
        stage.run(CALM_S)
    except AssertionError as error:
        problems.append(f"the simulation's checks: {error}")
    problems += _at_rest(stage)
    commits = len(stage.checks.history(JOB).commits)
    opened = {record.seq: record for record in _intents(stage)}
    return Outcome(tuple(edges.calls), edges.died, commits, tuple(problems), tuple(opened.values()))


def _intents(stage: Theatre) -> Iterator[OpenRecord]:
    for _, events in stage.etcd.log_from(1):
        for event in events:
            place = stage.keys.parse(event.kv.key)
            if place is not None and place.kind == "open" and event.kind != "delete":
                yield codec.decode(OpenRecord, event.kv.value)


def _perturb(stage: Theatre, script: Script, line: str) -> None:
    """One line of a story; a death may have made it pointless."""
    if line.startswith("wait for a part"):
        folder = f"/blobs/{int(line.rsplit(maxsplit=1)[-1]):020d}/"
        stage.run(5.0, lambda: any(folder in key and key.endswith(".gz") for key in stage.store._blobs))
        return
    with contextlib.suppress(ScriptError):
        script.run(line)


def _at_rest(stage: Theatre) -> Iterator[str]:
    history = stage.checks.history(JOB)
    if history.status is None or history.status.phase is not JobPhase.SUCCEEDED:
        yield f"the job is {history.status and history.status.phase}"
        return
    live = {kv.key: kv for kv in stage.etcd.range(stage.keys.root, prefix_end(stage.keys.root)).items}
    places = [(stage.keys.parse(key), kv) for key, kv in live.items()]
    for place, kv in places:
        if place is None or place.kind in ("open", "garbage", "pin", "bad"):
            yield f"{kv.key} is left over"
    records = [
        codec.decode(CommitRecord, kv.value) for place, kv in places if place and place.kind == "checkpoint"
    ]
    kept = sorted(int(record.seq) for record in records)
    newest = sorted(history.commits)[-KEEP:]
    if kept != newest:
        yield f"checkpoints {kept} are there, {newest} were to be kept"
    if not records or not max(records, key=lambda record: record.seq).final:
        yield "the last checkpoint is not that of the end"
    named = set()
    for record in records:
        named.add(record.manifest)
        prefix = f"/blobs/{record.seq:020d}/{record.attempt:06d}-{record.nonce}/"
        files = {key for key in stage.store._blobs if prefix in key}
        named |= files
        # The blob and the manifest of each rank, and no other rank's try beside them.
        if len(files) != 2 * record.world_size:
            yield f"checkpoint {record.seq} has the files {sorted(files)}"
        problem = unreadable(stage.store, record)
        if problem:
            yield f"checkpoint {record.seq} is committed and {problem}"
    left = {key for key in stage.store._blobs if key.startswith(f"{stage.name}/{JOB}/")} - named
    yield from (f"{key} is left over in the store" for key in sorted(left))
    yield from (f"the upload {token} is left over" for token in stage.store.list_unfinished(""))


def unreadable(store: BlobStore, record: CommitRecord) -> str:
    """Why an agent could not fetch a committed checkpoint; "" if it can."""
    reports: list[TransferReport] = []
    order = Fetch(
        "look", JOB, record.uid, store.uri, Seq(record.seq), record.step, record.manifest, record.digest
    )
    fetcher = Fetcher(lambda _uri: store, reports.append, deadline_s=2.0)
    with contextlib.suppress(DtrainError):
        fetcher.run(order)
    fetcher.release(order.id)
    return "" if reports and isinstance(reports[0], Fetched) else f"cannot be fetched: {reports}"


CHANGES = ("txn", "put", "delete", "discard")


def points(calls: Sequence[Call]) -> list[int]:
    """The calls of the saves, commits, retirements and collections: from the first open record on."""
    first = next(i for i, call in enumerate(calls) if "/open/" in call.what)
    return list(range(first, len(calls)))


def changing(calls: Sequence[Call], known: Collection[Call] = ()) -> list[int]:
    """Of those, from the second open record on, what changes something and is not an agent's progress.

    ``known``: calls of another story that need not be the last ones again.
    """
    first = next(i for i, call in enumerate(calls) if "/open/*0002" in call.what)
    return [
        i
        for i in range(first, len(calls))
        if calls[i].operation in CHANGES and calls[i].owner != "agent" and calls[i] not in known
    ]
