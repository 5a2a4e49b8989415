"""State from elsewhere: read, named, and written as one rank would have written it."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load, save_file
from tests.unit.storage.test_checkpoints import B, Made, W, made

from dtrain.cli.importing import source
from dtrain.coordinator.core.manifest import merge
from dtrain.protocol import codec
from dtrain.protocol.checkpoint import Manifest, OpenRecord, RankManifest, blob_prefix, job_root
from dtrain.protocol.errors import Refused
from dtrain.protocol.ids import Attempt, ClusterName, JobName, Seq, Step, Term, Uid
from dtrain.storage.blobs.memory import MemoryBlobs
from dtrain.storage.checkpoints import importing, importing_files
from dtrain.storage.checkpoints.exporting import Format, export
from dtrain.storage.checkpoints.importing import Arranged, Contents, arrange, write
from dtrain.storage.checkpoints.importing_files import guess, read
from dtrain.storage.checkpoints.reading import TensorReader

__all__ = ["made"]

CLUSTER, JOB = ClusterName("c1"), JobName("other")
RECORD = OpenRecord(
    Term(3), Uid("u9"), Seq(2), Attempt(0), Step(40), "00ff", world_size=1, timeout_s=60.0, imported="i1"
)


def written(arranged: Arranged) -> tuple[MemoryBlobs, Manifest]:
    """What the leader would make of it."""
    store = MemoryBlobs(f"written-{id(arranged)}")
    told: list[tuple[int, int]] = []
    part = write(store, CLUSTER, JOB, RECORD, arranged, on_progress=lambda *at: told.append(at))
    assert told[-1] == (arranged.size_bytes, arranged.size_bytes)
    prefix = blob_prefix(job_root(CLUSTER, JOB, RECORD.uid), RECORD.seq, RECORD.attempt, RECORD.nonce)
    assert all(info.key.startswith(f"{prefix}/") for info in store.list(""))
    parts = [codec.decode(RankManifest, gzip.decompress(store.get(part.manifest)), bytes_max=1 << 28)]
    manifest = merge(
        cluster=CLUSTER, job=JOB, uid=RECORD.uid, record=RECORD, parts=parts, parent=None, created=""
    )
    for blob in manifest.blobs:
        load(store.get(blob.key))  # each is a safetensors file of its own
    return store, manifest


def content(store: MemoryBlobs, manifest: Manifest) -> dict[str, bytes]:
    with TensorReader(store, manifest, list(manifest.tensors)) as reader:
        return {name: b"".join(bytes(p) for p in reader.stream(name)) for name in manifest.tensors}


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def flat(objects: dict[str, Any]) -> Contents:
    tensors = {
        name: importing.Tensor(
            "F32", tuple(value.shape), lambda at, size, value=value: raw(value)[at : at + size]
        )
        for name, value in objects.items()
    }
    return Contents("safetensors", tensors)


# Round trips --------------------------------------------------------------------------


@pytest.mark.parametrize("form", [Format.SAFETENSORS, Format.TORCH])
def test_an_export_comes_back_with_the_same_bytes_and_values(
    made: Made, tmp_path: Path, form: Format
) -> None:
    path = tmp_path / ("state.pt" if form is Format.TORCH else "folder")
    export(made.store, made.manifest, path, form, full=True)
    contents = read(path)
    assert (contents.format, contents.origin["step"], contents.origin["world"]) == (form.value, 40, 2)
    arranged = arrange(contents)
    contents.close()
    contents = read(path)
    store, manifest = written(arrange(contents))
    contents.close()
    about = manifest.objects.pop("import/about").value  # type: ignore[attr-defined]
    assert (about["world"], about["partial"], about["from"]["job"]) == (2, False, "job")
    assert arranged.names == ["model", "optimizer", "rng/0"][:2]
    assert {n: o.value for n, o in manifest.objects.items()} == {n: o.value for n, o in made.objects.items()}
    before = content(made.store, made.manifest)
    assert content(store, manifest) == before
    assert {n: (t.dtype, t.shape) for n, t in manifest.tensors.items()} == {
        n: (t.dtype, t.shape) for n, t in made.manifest.tensors.items()
    }


def test_a_dcp_export_comes_back_with_keys_that_are_numbers(made: Made, tmp_path: Path) -> None:
    export(made.store, made.manifest, tmp_path / "dcp", Format.DCP, full=True)
    with source(tmp_path / "dcp", None, trust=True, scratch=tmp_path) as contents:
        assert (contents.format, contents.origin["step"]) == ("dcp", 40)
        store, manifest = written(arrange(contents))
    assert manifest.objects["optimizer"].value == made.objects["optimizer"].value
    assert content(store, manifest) == content(made.store, made.manifest)
    assert [path.name for path in tmp_path.iterdir()] == ["dcp"], "nothing of the conversion is left"


def test_a_dcp_folder_of_others_has_its_optimizer_numbered_again(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 3}
    dcp.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    with source(tmp_path / "dcp", Format.DCP, trust=True, scratch=tmp_path) as contents:
        found = arrange(contents).objects["optimizer"]
    assert found["$dict"][0] == "state"
    pairs = found["$dict"][1]["$dict"]
    assert pairs[::2] == [0, 1]
    assert {"$tensor": "optimizer.state.0.exp_avg"} in pairs[1]["$dict"]
    (tmp_path / "dcp" / ".metadata").write_bytes(b"nothing")
    with (
        pytest.raises(Refused, match="torch cannot convert"),
        source(tmp_path / "dcp", None, trust=True, scratch=tmp_path),
    ):
        pass


def test_without_the_generators_no_rank_count_is_claimed(made: Made, tmp_path: Path) -> None:
    export(made.store, made.manifest, tmp_path / "folder", Format.SAFETENSORS)
    contents = read(tmp_path / "folder")
    arranged = arrange(contents)
    contents.close()
    assert arranged.about["world"] is None
    assert sorted(arranged.objects) == ["model", "optimizer"]


def test_large_tensors_are_spread_over_blobs_by_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importing, "BLOB_BYTES", 64)
    values = {
        "a": torch.randn(9, 5),
        "b": torch.randn(3),
        "none": torch.empty(0, 4),
        "one": torch.tensor(2.0),
    }
    store, manifest = written(arrange(flat(values), partial=True))
    assert len(manifest.blobs) > 3
    assert content(store, manifest) == {f"model.{name}": raw(value) for name, value in values.items()}
    assert all(c.off % 4 == 0 for entry in manifest.tensors.values() for c in entry.chunks)


def test_every_dtype_of_torch_and_tied_tensors_come_through(tmp_path: Path) -> None:
    whole = torch.arange(1, 9).reshape(2, 4)
    dtypes = [
        torch.bool,
        torch.uint8,
        torch.int64,
        torch.float16,
        torch.bfloat16,
        torch.float64,
        torch.complex64,
    ]
    model = {str(dtype): whole.to(dtype) for dtype in dtypes}
    tied = torch.randn(3, 3)
    state = {
        "model": {**model, "t": tied, "u": tied, "cut": torch.arange(10)[::3]},
        "schedule": {"last": 3, "lrs": (0.1, float("inf")), 7: None, "raw": b"x"},
        "epoch": 5,
    }
    torch.save(state, tmp_path / "x.pt")
    arranged = arrange(read(tmp_path / "x.pt"))
    store, manifest = written(arranged)
    found = content(store, manifest)
    assert found["model.torch.bfloat16"] == raw(model["torch.bfloat16"])
    assert found["model.torch.complex64"] == raw(torch.view_as_real(model["torch.complex64"]))
    assert (
        manifest.tensors["model.torch.complex64"].dtype,
        manifest.tensors["model.torch.complex64"].shape,
    ) == (
        "F32",
        (2, 4, 2),
    )
    assert found["model.cut"] == raw(torch.tensor([0, 3, 6, 9]))
    value = dict(zip(*[iter(manifest.objects["model"].value["$dict"])] * 2, strict=True))
    assert value["t"] == value["u"] == {"$tensor": "model.t"}
    assert value["torch.complex64"]["dtype"] == "complex64"
    assert manifest.objects["epoch"].value == {"$value": 5}
    assert manifest.objects["schedule"].value == {
        "$dict": ["last", 3, "lrs", {"$tuple": [0.1, {"$float": "inf"}]}, 7, None, "raw", {"$bytes": "eA=="}]
    }


# Names ----------------------------------------------------------------------------------


def test_tensors_alone_are_a_models_and_only_with_the_callers_word() -> None:
    with pytest.raises(Refused, match="tensors alone") as caught:
        arrange(flat({"w": W}))
    assert "--weights-only" in caught.value.fix
    arranged = arrange(flat({"w": W}), partial=True)
    assert arranged.objects == {"model": {"$ordered": ["w", {"$tensor": "model.w"}]}}
    arranged = arrange(flat({"w": W, "x.y": B}), partial=True, prefix="net.")
    assert arranged.names == ["net"]
    assert list(arranged.tensors) == ["net.w", "net.x.y"]


def test_names_are_mapped_and_collisions_refused() -> None:
    source = flat({"module.a": W, "module.b": W, "head": W})
    arranged = arrange(source, partial=True, prefix="", maps=[("module.", "model."), ("head", "model.c")])
    assert arranged.objects == {
        "model": {
            "$ordered": [
                "a",
                {"$tensor": "model.a"},
                "b",
                {"$tensor": "model.b"},
                "c",
                {"$tensor": "model.c"},
            ]
        }
    }
    with pytest.raises(Refused, match=r"the name model\.a"):
        arrange(source, partial=True, prefix="", maps=[("module.", "model."), ("head", "model.a")])
    with pytest.raises(Refused, match="cannot name"):
        arrange(flat({"ä.b": W}), partial=True, prefix="")
    arranged = arrange(source, partial=True, prefix="", only=["head"])
    assert (arranged.objects, list(arranged.tensors)) == ({"head": {"$tensor": "head"}}, ["head"])
    with pytest.raises(Refused, match="nothing under the name 'tail'"):
        arrange(source, partial=True, only=["tail"])


def test_whole_states_are_renamed_with_their_structure(made: Made, tmp_path: Path) -> None:
    export(made.store, made.manifest, tmp_path / "folder", Format.SAFETENSORS)
    contents = read(tmp_path / "folder")
    arranged = arrange(contents, maps=[("model.", "net."), ("optimizer", "sgd")])
    assert arranged.names == ["net", "sgd"]
    assert arranged.objects["sgd"] == made.objects["optimizer"].value
    store, manifest = written(arranged)
    contents.close()
    assert content(store, manifest)["net.w"] == raw(W)
    with pytest.raises(Refused, match="the name model"):
        arrange(read(tmp_path / "folder"), maps=[("optimizer", "model")])
    with pytest.raises(Refused, match="has tracked names already"):
        arrange(read(tmp_path / "folder"), prefix="x.")


def test_parts_of_ranks_go_by_the_name_that_they_are_tracked_under(tmp_path: Path) -> None:
    state = {"data/0": {"at": 1}, "data/1": {"at": 2}, "model": {"w": W}, "lr": {"last": 3}}
    torch.save(state, tmp_path / "x.pt")
    arranged = arrange(read(tmp_path / "x.pt"), maps=[("data", "feed")])
    assert sorted(arranged.objects) == ["feed/0", "feed/1", "lr", "model"]
    arranged = arrange(read(tmp_path / "x.pt"), only=["data"], partial=True)
    assert sorted(arranged.objects) == ["data/0", "data/1"]
    torch.save({"lr": {"a": 1}, "rate": {"a": 2}}, tmp_path / "x.pt")
    with pytest.raises(Refused, match="the name lr"):
        arrange(read(tmp_path / "x.pt"), maps=[("rate", "lr")])


# What cannot be read --------------------------------------------------------------------


def safetensors(path: Path, table: Any, data: bytes = b"", *, cut: int = 0) -> Path:
    header = json.dumps(table).encode() if not isinstance(table, bytes) else table
    whole = len(header).to_bytes(8, "little") + header + data
    path.write_bytes(whole[: len(whole) - cut])
    return path


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("table", "data", "told"),
    [
        ({"a": ENTRY}, b"1234567", "its header tells of"),
        ({"a": ENTRY}, b"123456789", "its header tells of"),
        ({"a": {**ENTRY, "shape": [3]}}, b"12345678", "8 bytes for"),
        ({"a": {**ENTRY, "dtype": "F4"}}, b"12345678", "do not keep"),
        ({"a": {**ENTRY, "data_offsets": [4, 12]}}, b"123456789012", "does not begin where"),
        ({"a": ENTRY, "b": ENTRY}, b"12345678", "does not begin where"),
        ({"a": {**ENTRY, "data_offsets": [0]}}, b"12345678", "no place"),
        ({"a": {**ENTRY, "shape": [-1, -2]}}, b"12345678", "has the shape"),
        ({"a": 3}, b"", "no place"),
        (b'{"a": ', b"", "not JSON"),
        (b"{" + b"[" * 100_000, b"", "not JSON"),
    ],
)
def test_a_malformed_safetensors_file_is_refused_with_its_reason(
    tmp_path: Path, table: Any, data: bytes, told: str
) -> None:
    with pytest.raises(Refused, match=told):
        read(safetensors(tmp_path / "x.safetensors", table, data))


def test_pickles_are_refused_unless_they_are_weights(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"model": {"w": W}, "evil": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(Refused, match="tensors and plain values alone"):
        read(tmp_path / "evil.pt")
    torch.save(Evil(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(Refused, match="tensors and plain values alone"):
        read(tmp_path / "old.pt")
    assert not (tmp_path / "ran").exists()
    torch.save({"w": W}, tmp_path / "old-weights.pt", _use_new_zipfile_serialization=False)
    assert arrange(read(tmp_path / "old-weights.pt"), partial=True).names == ["model"]
    torch.save([W], tmp_path / "list.pt")
    with pytest.raises(Refused, match="holds a list"):
        read(tmp_path / "list.pt")
    torch.save({"m": {"w": W.to_sparse()}}, tmp_path / "sparse.pt")
    with pytest.raises(Refused, match="no plain tensor"):
        read(tmp_path / "sparse.pt")


def test_the_format_is_told_from_the_bytes(made: Made, tmp_path: Path) -> None:
    save_file({"w": W}, tmp_path / "named.pt")
    assert guess(tmp_path / "named.pt") is Format.SAFETENSORS
    with pytest.raises(Refused, match="is safetensors, not torch"):
        read(tmp_path / "named.pt", Format.TORCH)
    export(made.store, made.manifest, tmp_path / "dcp", Format.DCP)
    with pytest.raises(Refused, match="pickle") as caught:
        read(tmp_path / "dcp")
    assert "--trust" in caught.value.fix
    (tmp_path / "text").write_text("hello, world")
    (tmp_path / "empty").mkdir()
    for name in ("text", "empty", "missing"):
        with pytest.raises(Refused):
            guess(tmp_path / name)


def test_a_folder_is_read_by_its_index_and_nothing_outside_of_it(made: Made, tmp_path: Path) -> None:
    folder = tmp_path / "many"
    export(made.store, made.manifest, folder, Format.SAFETENSORS, shard_bytes=100)
    save_file({"stray": W}, folder / "stray.safetensors")
    (folder / "checkpoint.json").unlink()
    contents = read(folder)
    assert sorted(contents.tensors) == ["model.b", "model.none", "model.rows", "model.w"]
    assert arrange(contents, partial=True).names == ["model"], "an export names what it holds"
    contents.close()
    index = folder / "model.safetensors.index.json"
    for file in ("../named.safetensors", "missing.safetensors"):
        index.write_text(json.dumps({"weight_map": {"a": file}}))
        with pytest.raises(Refused, match="which is not there"):
            read(folder)
    index.unlink()
    save_file({"stray": W}, folder / "twice.safetensors")
    with pytest.raises(Refused, match="stray once more"):
        read(folder)


def test_a_source_that_shrinks_is_refused_and_an_import_that_is_over_stops(tmp_path: Path) -> None:
    save_file({"w": torch.randn(1000)}, tmp_path / "x.safetensors")
    contents = read(tmp_path / "x.safetensors")
    arranged = arrange(contents, partial=True)
    with (tmp_path / "x.safetensors").open("r+b") as file:
        file.truncate(2000)
    with pytest.raises(Refused, match="became shorter"):
        written(arranged)
    contents.close()

    def over() -> None:
        raise Refused(importing_files.ErrorCode.USAGE, "it is over")

    store = MemoryBlobs("over")
    with pytest.raises(Refused, match="it is over"):
        write(store, CLUSTER, JOB, RECORD, arrange(flat({"w": W}), partial=True), check=over)
    assert not list(store.list(""))
