"""Committed checkpoints read back: damage is named, exports hold what was committed."""

import gzip
import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from dtrain.protocol import codec
from dtrain.protocol.checkpoint import CHUNK_BYTES, BlobEntry, ChunkEntry, Manifest, ObjectEntry, TensorEntry
from dtrain.protocol.errors import Conflict, DtrainError, ErrorCode, NotFound, Refused, Unavailable
from dtrain.protocol.ids import Attempt, ClusterName, JobName, Rank, Seq, Step, Uid
from dtrain.storage.blobs import digest
from dtrain.storage.blobs.memory import MemoryBlobs
from dtrain.storage.checkpoints import verifying
from dtrain.storage.checkpoints.exporting import Format, export
from dtrain.storage.checkpoints.reading import DamageFound, read_manifest

ROOT = "c1/job/u1"
KEY = f"{ROOT}/manifests/m.json.gz"
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64", torch.uint8: "U8"}


class Made:
    """A checkpoint in a store: tensors cut as a test asks, spread over ranks' blobs."""

    def __init__(self, uri: str = "made") -> None:
        self.store = MemoryBlobs(uri)
        self._data: dict[int, bytearray] = {}
        self._tensors: dict[str, TensorEntry] = {}
        self.objects: dict[str, ObjectEntry] = {}
        self.manifest: Manifest
        self.digest = ""

    def add(self, name: str, value: torch.Tensor, cuts: list[tuple[int, Any]]) -> None:
        """Store ``value``; ``cuts`` are (blob, slices) that tile it."""
        chunks = []
        for blob, cut in cuts:
            where = cut if isinstance(cut, tuple) else (cut,)
            where = (*where, *(slice(None) for _ in range(value.dim() - len(where))))
            bounds = [part.indices(size) for part, size in zip(where, value.shape, strict=True)]
            part = value[where].contiguous() if value.dim() else value
            data = self._data.setdefault(blob, bytearray(b"head"))
            offset = len(data)
            data += part.reshape(-1).view(torch.uint8).numpy().tobytes()
            origin, size = tuple(b[0] for b in bounds), tuple(part.shape)
            chunks.append(ChunkEntry(origin, size, blob, offset, len(data) - offset))
        self._tensors[name] = TensorEntry(_DTYPES[value.dtype], tuple(value.shape), tuple(chunks))

    def commit(self) -> "Made":
        blobs = []
        for number in range(len(self._data)):
            data = bytes(self._data[number])
            parts = [data[start : start + CHUNK_BYTES] for start in range(0, len(data), CHUNK_BYTES)]
            crcs = [digest.crc32c(part) for part in parts]
            key = f"{ROOT}/blobs/{number}.st"
            info = self.store.put(key, parts, chunk_crcs=crcs)
            chunks = tuple(digest.to_hex(crc) for crc in crcs)
            blobs.append(BlobEntry(key, Rank(number), len(data), info.crc32c, chunks))
        self.manifest = Manifest(
            1,
            ClusterName("c1"),
            JobName("job"),
            Uid("u1"),
            Seq(4),
            Attempt(1),
            "n",
            Step(40),
            len(blobs),
            CHUNK_BYTES,
            "crc32c",
            sum(blob.bytes for blob in blobs),
            "layout",
            tuple(blobs),
            self._tensors,
            self.objects,
        )
        self.write(KEY, gzip.compress(codec.canonical(codec.to_json(self.manifest)), mtime=0))
        self.digest = hashlib.sha256(self.store.get(KEY)).hexdigest()
        return self

    def write(self, key: str, data: bytes) -> None:
        """Replace whatever is there, as rot does."""
        self.store.delete(key)
        parts = [data[start : start + CHUNK_BYTES] for start in range(0, len(data), CHUNK_BYTES)]
        self.store.put(key, parts, chunk_crcs=[digest.crc32c(part) for part in parts])

    def change(self, blob: int, change: Callable[[bytearray], Any]) -> None:
        key = self.manifest.blobs[blob].key
        data = bytearray(self.store.get(key))
        change(data)
        self.write(key, bytes(data))

    def verify(self, **more: Any) -> verifying.Report:
        return verifying.verify(self.store, KEY, self.digest, **more)


W = torch.arange(24, dtype=torch.float32).reshape(4, 6)
B = torch.tensor(3.5, dtype=torch.bfloat16)


@pytest.fixture
def made() -> Made:
    made = Made()
    made.add("model.w", W, [(0, (slice(0, 4), slice(0, 2))), (1, (slice(0, 4), slice(2, 6)))])
    made.add("model.rows", W, [(1, slice(2, 4)), (0, slice(0, 2))])
    made.add("model.b", B, [(0, ())])
    made.add("model.none", torch.empty(0, 3), [])
    made.add("rng/0.state", torch.arange(9, dtype=torch.uint8), [(0, slice(None))])
    model = {"$ordered": []}
    for name in ("w", "rows", "b", "none"):
        model["$ordered"] += [name, {"$tensor": f"model.{name}"}]
    made.objects = {
        "model": ObjectEntry(model, "x"),
        "optimizer": ObjectEntry(
            {"$dict": ["lr", 0.5, "again", {"$tensor": "model.w"}, 7, {"$tuple": [1]}]}, "x"
        ),
        "rng/0": ObjectEntry({"state": {"$tensor": "rng/0.state"}}, "x"),
    }
    return made.commit()


def test_a_whole_checkpoint_has_no_damage_and_says_how_far_it_is(made: Made) -> None:
    told: list[tuple[int, int]] = []
    report = made.verify(on_progress=lambda done, total: told.append((done, total)))
    assert (report.damages, report.bytes, report.blobs) == ((), made.manifest.bytes, 2)
    assert told[-1] == (made.manifest.bytes, made.manifest.bytes)
    assert verifying.verify_heads(made.store, KEY, made.digest) is None


def test_a_flipped_bit_is_named_with_tensors_rank_blob_and_chunk(made: Made) -> None:
    def flip(data: bytearray) -> None:
        data[6] ^= 1

    made.change(1, flip)
    (damage,) = made.verify().damages
    assert (damage.blob, damage.rank, damage.chunk) == (made.manifest.blobs[1].key, 1, 0)
    assert damage.tensors == ("model.rows", "model.w")
    assert damage.expected == made.manifest.blobs[1].chunks[0] != damage.found
    assert verifying.verify_chunk(made.store, KEY, made.digest, damage.blob, 0) == damage
    assert verifying.verify_chunk(made.store, KEY, made.digest, made.manifest.blobs[0].key, 0) is None


@pytest.mark.parametrize(
    ("change", "found"), [(lambda data: data.pop(), "short"), (lambda data: data.clear(), "short")]
)
def test_a_blob_that_was_cut_is_damaged(made: Made, change: Callable[[bytearray], Any], found: str) -> None:
    made.change(0, change)
    assert [damage.found for damage in made.verify().damages] == [found]
    seen = verifying.verify_heads(made.store, KEY, made.digest)
    assert seen is not None
    assert "bytes long" in seen.found


def test_a_missing_blob_and_swapped_ones_are_damaged(made: Made) -> None:
    first, second = (blob.key for blob in made.manifest.blobs)
    data = made.store.get(first), made.store.get(second)
    made.write(first, data[1])
    made.write(second, data[0])
    assert len(made.verify().damages) == 2
    made.store.delete(first)
    assert made.verify().damages[0].found == "missing"


def test_a_manifest_of_another_checkpoint_is_damage(made: Made) -> None:
    other = gzip.compress(codec.canonical(codec.to_json(replace(made.manifest, step=Step(41)))), mtime=0)
    made.write(KEY, other)
    (damage,) = made.verify().damages
    assert (damage.blob, damage.expected, damage.rank) == (KEY, made.digest, None)
    with pytest.raises(DamageFound, match="the manifest"):
        read_manifest(made.store, KEY, made.digest)


def test_an_empty_store_is_no_damage(made: Made) -> None:
    for info in list(made.store.list("")):
        made.store.delete(info.key)
    for look in (made.verify, lambda: verifying.verify_heads(made.store, KEY, made.digest)):
        with pytest.raises(Unavailable, match="holds nothing"):
            look()


def test_what_reads_right_the_second_time_is_no_damage(made: Made) -> None:
    key = made.manifest.blobs[0].key
    inner, seen = made.store.get, []

    def get(asked: str, *, offset: int = 0, length: int | None = None) -> bytes:
        data = inner(asked, offset=offset, length=length)
        seen.append(asked)
        return bytes(len(data)) if asked == key and seen.count(key) == 1 else data

    made.store.get = get  # type: ignore[method-assign]
    assert made.verify().damages == ()
    assert seen.count(key) == 2


def test_reading_can_be_stopped_and_slowed(made: Made) -> None:
    with pytest.raises(verifying.Stopped):
        made.verify(stopped=lambda: True)
    waits: list[float] = []
    now = [0.0]

    def pause(seconds: float) -> None:
        waits.append(seconds)
        now[0] += seconds

    pace = verifying.Pace(CHUNK_BYTES / 2, monotonic=lambda: now[0], pause=pause)
    made.verify(pace=pace)
    assert waits == [2.0]


def test_damage_in_a_large_blob_names_only_what_lies_in_its_chunk() -> None:
    made = Made("large")
    value = torch.frombuffer(bytearray(random.Random(1).randbytes(CHUNK_BYTES)), dtype=torch.uint8)
    for name in ("a", "b", "c"):
        made.add(name, value, [(0, slice(None))])
    made.commit()

    def flip(data: bytearray) -> None:
        data[2 * CHUNK_BYTES + 5] ^= 0x80

    made.change(0, flip)
    (damage,) = made.verify().damages
    assert (damage.chunk, damage.tensors) == (2, ("b", "c"))


# Exports --------------------------------------------------------------------------


def test_safetensors_in_one_file_and_in_several(made: Made, tmp_path: Path) -> None:
    one = tmp_path / "one.safetensors"
    done = export(made.store, made.manifest, one, Format.SAFETENSORS)
    found = load_file(one)
    assert sorted(found) == ["model.b", "model.none", "model.rows", "model.w"]
    assert (done.tensors, done.bytes) == (4, 2 * 96 + 2)
    for name, wanted in {"w": W, "rows": W, "b": B, "none": torch.empty(0, 3)}.items():
        assert torch.equal(found[f"model.{name}"], wanted), name
    export(made.store, made.manifest, tmp_path / "many", Format.SAFETENSORS, shard_bytes=100)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert sorted(index["weight_map"]) == sorted(found)
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / "many" / file)[name], found[name])
    about = json.loads((tmp_path / "many" / "checkpoint.json").read_text())
    assert (about["step"], sorted(about["objects"])) == (40, ["model", "optimizer"])


def test_only_what_is_named_is_exported(made: Made, tmp_path: Path) -> None:
    export(made.store, made.manifest, tmp_path / "o.safetensors", Format.SAFETENSORS, only=["optimizer"])
    assert sorted(load_file(tmp_path / "o.safetensors")) == ["model.w"]
    with pytest.raises(NotFound, match="loader"):
        export(made.store, made.manifest, tmp_path / "x", Format.SAFETENSORS, only=["loader"])


def test_torch_reads_its_own_formats_without_trusting_them(made: Made, tmp_path: Path) -> None:
    export(made.store, made.manifest, tmp_path / "state.pt", Format.TORCH)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert list(state["model"]) == ["w", "rows", "b", "none"]
    assert torch.equal(state["model"]["w"], W)
    assert torch.equal(state["model"]["b"], B)
    assert (state["optimizer"]["lr"], state["optimizer"][7]) == (0.5, (1,))
    assert state["dtrain"]["seq"] == 4
    export(made.store, made.manifest, tmp_path / "dcp", Format.DCP)
    loaded = {"model": {"w": torch.zeros(4, 6), "rows": torch.zeros(4, 6)}}
    dcp.load(loaded, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert torch.equal(loaded["model"]["w"], W)
    assert torch.equal(loaded["model"]["rows"], W)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dcp", "state.pt"]


@pytest.mark.parametrize("kind", list(Format))
def test_a_damaged_checkpoint_leaves_nothing_of_an_export(made: Made, tmp_path: Path, kind: Format) -> None:
    made.change(1, lambda data: data.pop())
    with pytest.raises(DamageFound) as found:
        export(made.store, made.manifest, tmp_path / "out.safetensors", kind)
    assert found.value.code is ErrorCode.BLOB_CORRUPT
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_never_overwritten(made: Made, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(Conflict, match="exists already"):
        export(made.store, made.manifest, tmp_path / "out", Format.TORCH)
    with pytest.raises(Refused, match="cannot write"):
        export(made.store, made.manifest, tmp_path / "out" / "deeper", Format.TORCH)
    assert (tmp_path / "out").read_text() == "mine"


def test_a_form_of_a_newer_release_can_still_be_exported_as_tensors(made: Made, tmp_path: Path) -> None:
    made.objects["extra"] = ObjectEntry({"$novel": [1]}, "x")
    made.store.delete(KEY)
    for blob in made.manifest.blobs:
        made.store.delete(blob.key)
    made.commit()
    with pytest.raises(DtrainError, match="novel"):
        export(made.store, made.manifest, tmp_path / "state.pt", Format.TORCH)
    export(made.store, made.manifest, tmp_path / "all.safetensors", Format.SAFETENSORS)
    assert len(load_file(tmp_path / "all.safetensors")) == 4
