"""Saves and restores at every number of ranks, for real: run by ``test_resharding``, four processes of it.

Each process is one rank. For every way to shard, the first A of them save and the
first B restore what A saved; all ranks compare what they hold with the values that
a full gather of the saved state gave. Nothing but the transport is missing: bytes
go from the arena through the leader's merge into a ``Source`` without agents.
"""

import gzip
import itertools
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.unit.trainer import pipeline
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from dtrain.agent import rank_manifest as rank_manifests
from dtrain.coordinator.core.manifest import merge
from dtrain.protocol import codec
from dtrain.protocol.checkpoint import CHUNK_BYTES, BlobEntry, Manifest, OpenRecord, RankManifest
from dtrain.protocol.errors import Refused
from dtrain.protocol.ids import Attempt, Rank, Seq, Step, Term
from dtrain.protocol.ranklink import Begin, Sealed
from dtrain.trainer.checkpoint import restore, state
from dtrain.trainer.checkpoint.arena import Arena
from dtrain.trainer.checkpoint.reading import by_chunk
from dtrain.trainer.checkpoint.saver import Saver
from dtrain.trainer.checkpoint.source import Range, chunks_of

WORLD = 4


class BytesSource:
    """A ``Source`` over blobs in memory that counts what was asked for."""

    def __init__(self, manifest: Manifest, blobs: list[memoryview], *, fills: bool = False) -> None:
        self.manifest = manifest
        self.filler = self if fills else None
        self._blobs = blobs
        self.wants: list[list[Range]] = []

    def expect(self, ranges: Any) -> None:
        self.want(ranges)

    def fill(self, parts: Any) -> None:
        for pieces in by_chunk(self.manifest, parts).values():
            for piece in pieces:
                piece.memory[:] = b"\xff" * len(piece.memory)  # none of it may stay
        for part in parts:
            part.memory[:] = self._blobs[part.blob][part.offset : part.offset + len(part.memory)]

    def want(self, ranges: Any) -> None:
        self.wants.append(list(ranges))
        for one in ranges:
            chunks_of(self.manifest, one)

    def is_still_good(self) -> bool:
        return True

    def view(self, blob: int, offset: int, length: int) -> memoryview:
        assert any(
            r.blob == blob and r.offset <= offset and offset + length <= r.offset + r.length
            for r in self.wants[-1]
        ), "not what was wanted"
        return self._blobs[blob][offset : offset + length]


class Net(torch.nn.Module):
    """Rows that do not divide evenly, a tied part with fewer rows than ranks, buffers, one of them 0-d."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.up = torch.nn.Linear(6, 10)
        self.down = torch.nn.Linear(10, 6)
        self.odd = torch.nn.Linear(6, 5)
        self.two = torch.nn.Linear(5, 2)
        self.tied = torch.nn.Linear(5, 2)
        self.tied.weight = self.two.weight
        self.scale = torch.nn.Parameter(torch.rand(1))
        self.norm = torch.nn.BatchNorm1d(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.odd(self.norm(self.down(torch.relu(self.up(x))))))
        return (self.two(x) + self.tied(x)) * self.scale


@dataclass(frozen=True)
class Way:
    """A way to lay the same training out over ranks."""

    name: str
    ranks: int
    build: Callable[[int], Net]


def ways(meshes: Mapping[str, DeviceMesh]) -> Iterator[Way]:
    yield Way("plain-1", 1, Net)
    for size in (2, 3, 4):
        yield Way(f"replicated-{size}", size, Net)
    for size in (1, 2, 3, 4):
        yield Way(f"fsdp-{size}", size, lambda seed, size=size: sharded(seed, meshes[str(size)]))  # type: ignore[misc]
    for shape in ("2x2", "1x4", "4x1"):
        yield Way(f"hsdp-{shape}", 4, lambda seed, shape=shape: sharded(seed, meshes[shape]))  # type: ignore[misc]
    yield Way(
        "fsdp+tp-2x2", 4, lambda seed: sharded(tensor_parallel(seed, meshes["2x2"]["y"]), meshes["2x2"]["x"])
    )
    yield Way("ddp+tp-2x2", 4, lambda seed: tensor_parallel(seed, meshes["2x2"]["y"]))
    yield Way("tp-3", 3, lambda seed: tensor_parallel(seed, meshes["3"]))


def sharded(seed: int | Net, mesh: DeviceMesh) -> Net:
    net = Net(seed) if isinstance(seed, int) else seed
    fully_shard(net.odd, mesh=mesh)
    fully_shard(net, mesh=mesh)
    return net


def tensor_parallel(seed: int, mesh: DeviceMesh) -> Net:
    net = Net(seed)
    parallelize_module(net, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return net


class Training:
    """What a script would track."""

    def __init__(self, way: Way, seed: int) -> None:
        self.net = way.build(seed)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=0.1)
        self.extra: dict[str, Any] = {"count": 3, "loss": torch.tensor(0.5)}
        self._places = {
            name: local(distribute_tensor(numbered(p), p.device_mesh, p.placements, src_data_rank=None))
            for name, p in self.net.state_dict().items()
            if isinstance(p, DTensor)
        }
        """Which elements this rank holds of what is sharded, as torch itself cuts them."""

    def tracked(self) -> dict[str, Any]:
        return {"net": self.net, "optimizer": self.optimizer, "extra": self.extra}

    def fake_step(self, seed: int) -> None:
        """One step of the optimizer, with gradients that no mesh changes."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.net.named_parameters():
            gradient = torch.randn(parameter.shape, generator=generator)
            if isinstance(parameter, DTensor):
                gradient = DTensor.from_local(
                    self._cut(name, gradient), parameter.device_mesh, parameter.placements, run_check=False,
                    shape=parameter.shape, stride=parameter.stride(),
                )  # fmt: skip
            parameter.grad = gradient
        self.optimizer.step()
        self.net.norm.running_mean += 0.25

    def forget(self) -> None:
        """Be as a script is that has just started, with other weights."""
        with torch.no_grad():
            for tensor in self.net.state_dict().values():
                local(tensor).fill_(99)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=9.0)
        self.extra = {"count": 0}

    def whole(self) -> dict[str, torch.Tensor]:
        """Everything, gathered."""
        with torch.no_grad():
            return {
                # Cloned: of a mesh of one the full tensor is the part itself, which trains on.
                name: (value.full_tensor() if isinstance(value, DTensor) else value).clone()
                for name, value in self._all()
            }

    def _all(self) -> Iterator[tuple[str, Any]]:
        yield from ((f"net.{key}", value) for key, value in self.net.state_dict().items())
        names = [name for name, _ in self.net.named_parameters()]
        for index, part in self.optimizer.state_dict()["state"].items():
            yield from ((f"optimizer.{names[index]}.{key}", value) for key, value in part.items())
        yield "loss", self.extra["loss"]

    def compare(self, expected: Mapping[str, torch.Tensor], what: str) -> None:
        """Every element that this rank holds is the one that was gathered."""
        found = dict(self._all())
        assert expected.keys() == found.keys(), f"{what}: {expected.keys() ^ found.keys()}"
        for name, value in found.items():
            wanted = expected[name]
            if isinstance(value, DTensor):
                assert value.shape == wanted.shape, f"{what}: {name}"
                key = name.partition(".")[2]
                wanted = self._cut(key if name.startswith("net.") else key.rpartition(".")[0], wanted)
            assert local(value).dtype == wanted.dtype, f"{what}: {name}"
            assert torch.equal(local(value), wanted), (
                f"{what}: {name} came back as {local(value)}, not as {wanted}"
            )

    def _cut(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        return whole.flatten()[self._places[name]]


def numbered(like: torch.Tensor) -> torch.Tensor:
    return torch.arange(like.numel()).view(like.shape)


def local(value: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return value.to_local() if isinstance(value, DTensor) else value


# Saving and restoring ----------------------------------------------------------------


def save(way: Way, training: Training, rank: int) -> tuple[Manifest, list[memoryview]]:
    return seal_and_merge(training.tracked(), rank, way.ranks)


def seal_and_merge(tracked: Mapping[str, Any], rank: int, world: int) -> tuple[Manifest, list[memoryview]]:
    """What agents and the leader would make of the state of the first ranks; everyone gets the result."""
    mine: list[Any] = [None]
    if rank < world:
        arena = Arena(os.memfd_create("arena"))
        sealed = Saver(tracked, rank, world, arena).seal(Begin(Seq(1), "n", Step(7)))
        memory = bytes(memoryview(arena.memory)[: sealed.index_offset + sealed.index_bytes])
        mine = [(sealed, memory)]
    every: list[Any] = [None] * WORLD
    dist.all_gather_object(every, mine[0])
    parts, blobs = [], []
    for number, (sealed, memory) in enumerate(every[:world]):
        parts.append(rank_manifest(sealed, memory, number, world))
        blobs.append(memoryview(memory)[: sealed.size_bytes])
    record = OpenRecord(Term(1), pipeline.UID, Seq(1), Attempt(1), Step(7), "n", world, 60.0)
    manifest = merge(
        cluster=pipeline.CLUSTER, job=pipeline.JOB, uid=pipeline.UID, record=record, parts=parts, parent=None,
        created="",
    )  # fmt: skip
    text = codec.canonical(codec.to_json(manifest))
    return codec.decode(Manifest, text, bytes_max=1 << 28), blobs


def rank_manifest(sealed: Sealed, memory: bytes, rank: int, world: int) -> RankManifest:
    text = memory[sealed.index_offset : sealed.index_offset + sealed.index_bytes]
    digests = ("00",) * -(-sealed.size_bytes // CHUNK_BYTES)
    blob = BlobEntry(f"{rank}.st", Rank(rank), sealed.size_bytes, "00", digests)
    head = RankManifest(
        1, pipeline.CLUSTER, pipeline.JOB, pipeline.UID, sealed.seq, Attempt(1), sealed.nonce, sealed.step,
        Rank(rank), world, (blob,), {}, {},
    )  # fmt: skip
    data = gzip.decompress(rank_manifests.encode(head, bytes(text)))
    return codec.decode(RankManifest, data, bytes_max=1 << 28)


def matrix(rank: int, every: list[Way]) -> int:
    pairs = 0
    forgetful = {way.name: Training(way, 99) for way in every if rank < way.ranks}
    for saved in every:
        before = Training(saved, 1) if rank < saved.ranks else None
        expected = None
        if before is not None:
            before.fake_step(2)
            expected = before.whole()
        manifest, blobs = save(saved, before or Training(every[0], 1), rank)
        box = [expected]
        dist.broadcast_object_list(box, 0)
        assert box[0] is not None
        # What is replicated or tied is stored once.
        size = sum(t.nbytes for name, t in box[0].items() if name not in ("loss", "net.tied.weight"))
        assert stored_bytes(manifest) == size, saved.name
        for number, loaded in enumerate(every):
            if rank < loaded.ranks:
                after = forgetful[loaded.name]
                after.forget()
                # Both ways to get bytes in turns, so that each pair of layouts has been through one of them
                # and each layout through both.
                source = BytesSource(manifest, blobs, fills=(pairs + number) % 2 == 0)
                # Generators of other ranks than there were: what they become is another test's matter.
                restore.load(source, after.tracked(), rank, loaded.ranks)
                assert len(source.wants) == 1
                after.compare(box[0], f"{saved.name} -> {loaded.name}")
                assert after.extra["count"] == 3
                if loaded.name == saved.name and before is not None:
                    # And it trains on: the optimizer takes what it was given.
                    after.fake_step(3)
                    before.fake_step(3)
                    after.compare(before.whole(), f"{saved.name} trained on")
            pairs += 1
    return pairs


def differing(rank: int, every: Mapping[str, Way]) -> None:
    """Ranks whose values have drifted apart are refused, by name."""
    for name, spoil, told in (
        (
            "replicated-3",
            lambda t: t.net.odd.weight[1],
            "tensor net.odd.weight differs between rank 0 and ranks 2",
        ),
        ("hsdp-2x2", lambda t: t.net.up.weight.to_local(), "tensor net.up.weight#"),
        ("replicated-3", lambda t: t.extra["loss"], "tensor extra.loss differs between rank 0 and ranks 2"),
    ):
        way = every[name]
        training = Training(way, 1) if rank < way.ranks else Training(every["plain-1"], 1)
        if rank == 2:
            with torch.no_grad():
                spoil(training).add_(1)
        try:
            save(way, training, rank)
        except Refused as error:
            refused = error.message
        else:
            refused = ""
        assert told in refused, f"{name}: rank 2 holds other values, and it was said: {refused!r}"


class Average:
    """An object of a user's own whose state is made of DTensors, as averaged weights are."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> Any:
        return {"list": [self.value], "n": 1}

    def load_state_dict(self, state: Any) -> None:
        (self.value,) = state["list"]


ODD = {
    "zero": torch.tensor(3.5),
    "nothing": torch.empty(0, 4),
    "columns": torch.arange(21, dtype=torch.float32).view(3, 7),
    "complex": torch.complex(torch.arange(10.0).view(5, 2), -torch.arange(10.0).view(5, 2)),
    "bf16": torch.arange(33, dtype=torch.bfloat16).view(11, 3),
    "bool": torch.tensor([True, False, True]),
}


def odd_ones(rank: int, meshes: Mapping[str, DeviceMesh]) -> None:
    """Any dtype and placement, tracked by itself, in a dict and in a user's object; on to another mesh."""

    def spread(mesh: str, placements: list[Any]) -> dict[str, Any]:
        def one(tensor: torch.Tensor) -> Any:
            # Dimensions that a tensor lacks cannot be cut.
            able = [
                p if isinstance(p, Replicate) or p.dim < tensor.dim() else Replicate() for p in placements
            ]
            return distribute_tensor(tensor.clone(), meshes[mesh], able)

        made: dict[str, Any] = {name: one(tensor) for name, tensor in ODD.items()}
        return {**made, "dict": {"in": [one(ODD["columns"])]}, "user": Average(one(ODD["columns"]))}

    def values(tracked: dict[str, Any]) -> dict[str, torch.Tensor]:
        plain = {name: tracked[name].full_tensor() for name in ODD}
        inner = {"dict": tracked["dict"]["in"][0], "user": tracked["user"].value}
        assert all(isinstance(value, DTensor) for value in inner.values())
        return {**plain, **{name: value.full_tensor() for name, value in inner.items()}}

    layouts: list[tuple[str, list[Any]]] = [
        ("2x2", [Shard(0), Shard(1)]),
        ("2x2", [Shard(1), Shard(1)]),
        ("4", [Shard(0)]),
        ("2x2", [Replicate(), Shard(0)]),
    ]
    for mesh, placements in layouts:
        manifest, blobs = seal_and_merge(spread(mesh, placements), rank, WORLD)
        for (other, other_placements), fills in itertools.product(layouts, (True, False)):
            blank = spread(other, other_placements)
            with torch.no_grad():
                for tensor in (*(blank[name] for name in ODD), blank["dict"]["in"][0], blank["user"].value):
                    local(tensor).zero_()
            restore.load(BytesSource(manifest, blobs, fills=fills), blank, rank, WORLD)
            expected = {**ODD, "dict": ODD["columns"], "user": ODD["columns"]}
            for name, tensor in values(blank).items():
                assert tensor.dtype == expected[name].dtype
                assert torch.equal(tensor, expected[name]), f"{name}: {mesh} -> {other}"


def refusals(rank: int, meshes: Mapping[str, DeviceMesh]) -> None:
    """What cannot be saved is refused with its path."""
    mesh = meshes["4"]
    partial = DTensor.from_local(torch.ones(2), mesh, [Partial()], run_check=False)
    # Torch would cut ten rows into 3, 3, 3 and 1.
    strange = DTensor.from_local(
        torch.ones((2, 2, 2, 4)[rank], 2), mesh, [Shard(0)], run_check=False, shape=torch.Size((10, 2)),
        stride=(2, 1),
    )  # fmt: skip
    for value, told in ((partial, "cannot save x.sum: it is P"), (strange, "cannot save x.sum: its part on")):
        with pytest.raises(Refused, match=told):
            state.capture({"x": {"sum": value}}, {}, rank)


def stored_bytes(manifest: Manifest) -> int:
    """Of the module and its optimizer."""
    entries = [e for name, e in manifest.tensors.items() if name.startswith(("net.", "optimizer."))]
    return sum(chunk.len for entry in entries for chunk in entry.chunks)


def reads_only_its_part(rank: int, every: Mapping[str, Way]) -> None:
    """A rank of four asks for about a quarter of what is sharded."""
    way = every["fsdp-4"]
    training = Training(way, 1)
    training.fake_step(2)
    manifest, blobs = save(way, training, rank)
    source = BytesSource(manifest, blobs)
    restore.load(source, Training(way, 5).tracked(), rank, way.ranks)
    sharded_bytes = stored_bytes(manifest)
    wanted = sum(r.length for r in source.wants[0] if r.blob != rank)
    own = sum(r.length for r in source.wants[0] if r.blob == rank)
    assert wanted < sharded_bytes / 4 < own + wanted, (wanted, own, sharded_bytes)


def main(rank: int, port: int, report: Path) -> None:
    torch.set_num_threads(1)
    logging.getLogger("dtrain.trainer").setLevel(logging.ERROR)
    store = dist.TCPStore("127.0.0.1", port, WORLD, is_master=False)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    meshes = {str(n): DeviceMesh("cpu", torch.arange(n)) for n in (1, 2, 3, 4)}
    for x, y in ((2, 2), (1, 4), (4, 1)):
        meshes[f"{x}x{y}"] = DeviceMesh("cpu", torch.arange(4).view(x, y), mesh_dim_names=("x", "y"))
    every = list(ways(meshes))
    named = {way.name: way for way in every}
    done: dict[str, Any] = {}
    try:
        odd_ones(rank, meshes)
        refusals(rank, meshes)
        differing(rank, named)
        reads_only_its_part(rank, named)
        done["pairs"] = matrix(rank, every)
    except BaseException:  # noqa: BLE001
        done["error"] = traceback.format_exc()
    report.write_text(json.dumps(done))
    # Without destroying groups: another rank may have failed and never come.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
