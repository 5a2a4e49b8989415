"""Restoring a checkpoint whose files are in the page cache: verified by us, unverified by ``dcp.load``.

``python -m benchmarks.checkpoint.restore [--rounds N] [--tensors N]``

Both fill the parameters of the same module in place, from the same disk, in
turns (ours, theirs, ours, theirs), one torch thread each. Ours is the product's
path: the agent's transfer process opens the manifest and verifies each chunk, the
rank demands what it needs, copies it into its parameters and has it verified
again where others could have written. The process runs already, as it does
beside any job that saves; its CPU time is counted in.
"""

import argparse
import gzip
import hashlib
import os
import queue
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import Result, result
from dtrain.agent.launch.preload import provide_checksum
from dtrain.agent.transfer_client import TransferClient
from dtrain.agent.transferring import (
    Demand,
    Fetch,
    Fetched,
    KeptBlob,
    ReleaseFetch,
    Supplied,
    TransferReport,
    Upload,
    Uploaded,
)
from dtrain.coordinator.core.manifest import merge
from dtrain.protocol import codec
from dtrain.protocol.checkpoint import OpenRecord, RankManifest
from dtrain.protocol.ids import Attempt, ClusterName, JobName, Rank, Seq, Step, Term, Uid
from dtrain.protocol.ranklink import Begin, ChunkSpan, Have, Need, RestorePlan
from dtrain.storage.blobs import digest
from dtrain.storage.blobs.local import LocalBlobs
from dtrain.trainer.checkpoint import restore as restoring
from dtrain.trainer.checkpoint.arena import Arena
from dtrain.trainer.checkpoint.saver import Saver
from dtrain.trainer.checkpoint.source import DemandSource

ROUNDS = 7
TENSOR_MIB = 32
TENSORS = 9
SPEED_UP_MIN = 2.5
CLUSTER, JOB, UID = ClusterName("bench"), JobName("bench"), Uid("bench")
TIMEOUT_S = 120.0
_TICKS = os.sysconf("SC_CLK_TCK")


class Ours:
    """A checkpoint in a local folder and the transfer process that restores from it."""

    def __init__(self, root: Path, module: Any) -> None:
        self.store = LocalBlobs(root)
        self._reports: queue.SimpleQueue[TransferReport] = queue.SimpleQueue()
        self._client = TransferClient(self._reports.put)
        self._client.start()
        self._number = 0
        # The name that launchers give theirs: only such memory counts as an arena.
        arena = Arena(os.memfd_create("dtrain-arena-0"))
        sealed = Saver({"model": module}, 0, 1, arena).seal(Begin(Seq(1), "n1", Step(10)))
        self._client.send(
            Upload(CLUSTER, JOB, UID, self.store.uri, Attempt(1), Rank(0), 1, sealed.step, sealed)
        )
        uploaded = self._take(Uploaded)
        self.kept: tuple[KeptBlob, ...] = uploaded.kept
        data = gzip.decompress(self.store.get(uploaded.part.manifest))
        part = codec.decode(RankManifest, data, bytes_max=1 << 28)
        record = OpenRecord(Term(1), UID, Seq(1), Attempt(1), Step(10), "n1", 1, timeout_s=60.0)
        whole = merge(cluster=CLUSTER, job=JOB, uid=UID, record=record, parts=[part], parent=None, created="")
        packed = gzip.compress(codec.canonical(codec.to_json(whole)), mtime=0)
        self._manifest, self._digest = f"{CLUSTER}/manifest.json.gz", hashlib.sha256(packed).hexdigest()
        self.store.put(self._manifest, [packed], chunk_crcs=[digest.crc32c(packed)])

    def load(self, module: Any, *, kept: Sequence[KeptBlob] = (), on_demand: bool = True) -> dict[str, int]:
        """Restore into ``module``; return how many bytes came from where."""
        self._number += 1
        self._id = f"fetch-{self._number}"
        self._client.send(
            Fetch(
                self._id, JOB, UID, self.store.uri, Seq(1), Step(10), self._manifest, self._digest,
                on_demand=on_demand, kept=tuple(kept), ranks=(Rank(0),), world=1,
            )
        )  # fmt: skip
        fetched = self._take(Fetched)
        self._tiers = dict(fetched.tiers)
        source = DemandSource(fetched.plan, self)
        restoring.load(source, {"model": module}, 0, 1)
        self._client.send(ReleaseFetch(self._id))
        return self._tiers

    def ask(
        self,
        token: str,
        chunks: Sequence[ChunkSpan],
        *,
        whole: bool = False,
        again: bool = False,
        unverified: bool = False,
    ) -> Have | None:
        """What the link to the agent does."""
        self._number += 1
        need = Need(token, self._number, tuple(chunks), whole, again, unverified)
        self._client.send(Demand(self._id, Rank(0), need))
        supplied = self._take(Supplied)
        self._tiers = dict(supplied.tiers)
        return supplied.have

    def await_other_plan(self, token: str, at_most_s: float) -> RestorePlan | None:
        """There is none: the transfer process must not end here."""
        raise AssertionError(f"the bytes behind {token} are gone ({at_most_s} s)")

    def cpu_s(self) -> float:
        """CPU time of the transfer process so far."""
        fields = Path(f"/proc/{self._client.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS

    def close(self) -> None:
        self._client.close()

    def _take(self, kind: type[Any]) -> Any:
        report = self._reports.get(timeout=TIMEOUT_S)
        assert isinstance(report, kind), report
        return report


def make_module(tensors: int) -> Any:
    """A module of that many parameters."""
    import torch

    module = torch.nn.Module()
    for number in range(tensors):
        values = torch.randn(TENSOR_MIB * 1024 * 256)
        module.register_parameter(f"p{number}", torch.nn.Parameter(values))
    return module


def measure(rounds: int = ROUNDS, tensors: int = TENSORS) -> list[Result]:
    """Interleave restores; the bar is the ratio of the medians of their times."""
    import torch
    import torch.distributed.checkpoint as dcp

    torch.set_num_threads(1)
    torch.manual_seed(1)
    provide_checksum()  # as the launcher does for its ranks
    saved, fresh = make_module(tensors), make_module(tensors)
    size = tensors * TENSOR_MIB * 1024**2
    wall: dict[str, list[float]] = {}
    cpu: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="dtrain-bench-") as name:
        folder = Path(name)
        (folder / "ours").mkdir()
        ours = Ours(folder / "ours", saved)
        dcp.save({"model": saved.state_dict()}, checkpoint_id=folder / "dcp", no_dist=True)

        def theirs(module: Any) -> None:
            dcp.load({"model": module.state_dict()}, checkpoint_id=folder / "dcp", no_dist=True)

        def near(module: Any) -> None:
            tiers = ours.load(module, kept=ours.kept)
            assert tiers["store"] == 0, tiers

        modes: dict[str, Callable[[Any], object]] = {"store": ours.load, "dcp": theirs, "arena": near}
        try:
            for number in range(rounds + 1):
                for mode, load in modes.items():
                    _spoil(fresh)
                    before, began = time.process_time() + ours.cpu_s(), time.perf_counter()
                    load(fresh)
                    took = time.perf_counter() - began
                    used = time.process_time() + ours.cpu_s() - before
                    _check_same(saved, fresh)
                    if number:  # the first round warms caches and imports
                        wall.setdefault(mode, []).append(took)
                        cpu.setdefault(mode, []).append(used)
        finally:
            ours.close()
    for mode, times in wall.items():
        speed, work = size / statistics.median(times) / 1e9, statistics.median(cpu[mode]) / size * 1e9
        print(f"  {mode:6} {speed:6.2f} GB/s  {work:5.2f} CPU s/GB")
    found = []
    for mode, what in (("store", "folder in page cache"), ("arena", "sealed arena")):
        name = f"verified restore, {what}"
        bar = 1 / SPEED_UP_MIN
        found.append(result(name, "s", wall[mode], wall["dcp"], "dcp.load", ratio_max=bar))
        found.append(result(f"CPU of a {name}", "s", cpu[mode], cpu["dcp"], "dcp.load", ratio_max=1.0))
    return found


def _spoil(module: Any) -> None:
    for parameter in module.parameters():
        parameter.data.zero_()


def _check_same(one: Any, other: Any) -> None:
    import torch

    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs), "the restore brought other values"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint.restore")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--tensors", type=int, default=TENSORS, help=f"of {TENSOR_MIB} MiB each")
    arguments = parser.parse_args()
    from benchmarks import report

    print(report.table(measure(arguments.rounds, arguments.tensors)))


if __name__ == "__main__":
    main()
