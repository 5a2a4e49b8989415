"""torch.distributed.checkpoint through dtrain: what is saved comes back, for any number of ranks."""

import dataclasses
import gzip
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from tests.unit.trainer import dcp_world, pipeline
from tests.unit.trainer.dcp_world import GrantingSession
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint import planner as dcp_planner
from torch.distributed.checkpoint import storage as dcp_storage
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from dtrain.agent.transferring import FetchFailed
from dtrain.protocol.errors import ErrorCode, Refused
from dtrain.trainer.dcp import planner as planners

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Unsavable:
    """Only pickle could keep it."""


def full() -> dict[str, torch.Tensor]:
    """The global tensors, whoever holds them."""
    return {
        "rows": torch.arange(15.0).reshape(5, 3),
        "columns": torch.arange(14, dtype=torch.int64).reshape(2, 7),
        "single": torch.tensor([[7.0, 8.0]]),  # one row: all ranks but one have nothing of it
        "nothing": torch.empty(0, 3),
        "replica": torch.arange(6.0).reshape(2, 3).to(torch.bfloat16),
        "number": torch.tensor(2.5),
    }


def state(world: int, value: Callable[[torch.Tensor], torch.Tensor] = torch.clone) -> dict[str, Any]:
    """Sharded over all ranks, plain tensors and objects; ``value`` makes the contents."""
    tensors = {name: value(tensor) for name, tensor in full().items()}
    placements = {
        "rows": [Shard(0)],
        "columns": [Shard(1)],
        "single": [Shard(0)],
        "nothing": [Shard(0)],
        "replica": [Replicate()],
        "number": [Replicate()],
    }
    if world > 1:
        mesh = init_device_mesh("cpu", (world,))
        tensors = {
            name: distribute_tensor(tensor, mesh, placements[name]) for name, tensor in tensors.items()
        }
    return {
        "model": tensors,
        "plain": {
            "waves": value(torch.tensor([1 + 2j, 3 - 4j])),
            "mask": value(torch.tensor([True, False, True])),
            "one": value(torch.tensor(3, dtype=torch.int16)),
            "list": [value(torch.ones(2)), value(torch.full((3,), 2.0))],
        },
        "epoch": 3,
        "sampler": {"seen": [1, 2, 3], "share": 0.5, "name": "ü", "none": None, "pair": (1, "b")},
        "table": np.arange(4, dtype=np.int32),
    }


def blank(world: int) -> dict[str, Any]:
    found = state(world, torch.zeros_like)
    found["epoch"] = 0
    found["sampler"] = {"seen": [], "share": 0.0, "name": "", "none": 1, "pair": ()}
    found["table"] = np.zeros(4, dtype=np.int32)
    return found


def check(loaded: dict[str, Any], *, gather: bool) -> None:
    for name, tensor in full().items():
        found = loaded["model"][name]
        found = found.full_tensor() if gather else found
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor), name
    assert torch.equal(loaded["plain"]["waves"], torch.tensor([1 + 2j, 3 - 4j]))
    assert loaded["plain"]["mask"].tolist() == [True, False, True]
    assert loaded["plain"]["one"].item() == 3
    assert [part.tolist() for part in loaded["plain"]["list"]] == [[1, 1], [2, 2, 2]]
    assert loaded["epoch"] == 3
    assert loaded["sampler"] == {"seen": [1, 2, 3], "share": 0.5, "name": "ü", "none": None, "pair": (1, "b")}
    assert loaded["table"].tolist() == [0, 1, 2, 3]
    assert loaded["table"].dtype == np.int32


# What the processes of the group do -------------------------------------------------------


def save_three_times(rank: int, world: int, root: Path) -> list[Any]:
    """Once with torch's planner, twice with its plan cached; the last with other values."""
    reports = [dcp_world.save_one(state(world), root, rank, world, 1)]
    for seq in (2, 3):
        planner = DefaultSavePlanner(enable_plan_caching=True)
        values = state(world, torch.zeros_like if seq == 2 else torch.clone)
        reports.append(dcp_world.save_one(values, root, rank, world, seq, planner=planner))
    return reports


def load(rank: int, world: int, root: Path, order: Any) -> None:
    reader, _ = dcp_world.reader(root, order)
    target = blank(world)
    dcp.load(target, storage_reader=reader)
    check(target, gather=world > 1)


def save_what_differs(rank: int, world: int, root: Path) -> list[Any]:
    objects = dcp_world.save_one({"epoch": rank, "x": torch.ones(2)}, root, rank, world, 1)
    session = GrantingSession(rank, 2)
    storage = dcp_world.writer(session, rank, world, 20, pipeline.new_arena())
    dcp.save({"x": torch.full((2,), float(rank)), "y": torch.ones(3)}, storage_writer=storage)
    assert session.kept is not None
    memory = Path(session.kept.path).read_bytes()
    index = memory[session.kept.index_offset :][: session.kept.index_bytes]
    return [objects, index]


def refuse_a_pickle(rank: int, world: int) -> tuple[str, str]:
    session = GrantingSession(rank, 1)
    storage = dcp_world.writer(session, rank, world, 10, pipeline.new_arena())
    contents = {"user": {"hook": Unsavable()} if rank else {}, "x": torch.ones(2)}
    try:
        dcp.save(contents, storage_writer=storage)
    except CheckpointException as error:
        (failure,) = error.failures.values()
        return session.given_up, str(failure[0])
    return session.given_up, ""


# Claims -------------------------------------------------------------------------------------


def test_two_ranks_save_and_any_number_loads_the_values_of_a_full_gather(tmp_path: Path) -> None:
    by_rank = dcp_world.ranks(2, save_three_times, tmp_path)
    orders = [dcp_world.merged(tmp_path, list(reports)) for reports in zip(*by_rank, strict=True)]
    for order in (orders[0], orders[2]):  # the third was planned from the cache
        load(0, 1, tmp_path, order)
    dcp_world.ranks(2, load, tmp_path, orders[0])
    dcp_world.ranks(3, load, tmp_path, orders[2])


def test_values_that_differ_between_ranks_are_refused_by_name(tmp_path: Path) -> None:
    by_rank = dcp_world.ranks(2, save_what_differs, tmp_path)
    with pytest.raises(Refused, match="object epoch differs between ranks 0 and 1") as caught:
        dcp_world.merged(tmp_path, [found[0] for found in by_rank])
    assert caught.value.code is ErrorCode.RANKS_DISAGREE
    first, second = (json.loads(found[1])["same"] for found in by_rank)
    assert first["x"] != second["x"]
    assert first["y"] == second["y"]


def test_an_object_that_only_pickle_could_keep_is_refused_with_its_path_on_all_ranks() -> None:
    told = dcp_world.ranks(2, refuse_a_pickle)
    for _, message in told:
        assert "cannot save user.hook" in message
        assert "Unsavable" in message
    # The rank that has it tells its agent, so that no other rank waits for it.
    assert told[0][0] == ""
    assert "user.hook" in told[1][0]


def saved(root: Path, contents: dict[str, Any], **more: Any) -> Any:
    return dcp_world.merged(root, [dcp_world.save_one(contents, root, 0, 1, 1, **more)])


def test_the_blob_is_safetensors_and_the_manifest_keeps_torchs_paths(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    saved(tmp_path, {"model": {"w": torch.arange(4.0)}, "epoch": 1})
    (blob,) = tmp_path.rglob("*.st")
    assert torch.equal(load_file(blob)["model.w"], torch.arange(4.0))
    (manifest,) = tmp_path.rglob("manifests/*.json.gz")
    document = json.loads(gzip.decompress(manifest.read_bytes()))
    assert document["paths"] == {"model.w": ["model", "w"], "epoch": ["epoch"]}


def test_a_flipped_bit_in_the_store_is_refused(tmp_path: Path) -> None:
    order = saved(tmp_path, {"w": torch.arange(1000.0)})
    (blob,) = tmp_path.rglob("*.st")
    data = bytearray(blob.read_bytes())
    data[-100] ^= 4
    blob.chmod(0o600)
    blob.write_bytes(data)
    report = pipeline.fetch(tmp_path, order)
    assert isinstance(report, FetchFailed)
    assert report.bad is not None
    assert report.bad.expected != report.bad.found


def test_what_was_saved_natively_is_loaded_where_names_allow_it(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    order = pipeline.save(tmp_path, [{"model": model, "optimizer": optimizer, "notes": {"a": [1, 2]}}])
    reader, _ = dcp_world.reader(tmp_path, order)
    other = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    target = {"model": other.state_dict(), "notes": {"a": []}}
    dcp.load(target, storage_reader=reader)
    for name, tensor in model.state_dict().items():
        assert torch.equal(target["model"][name], tensor), name
    assert target["notes"] == {"a": [1, 2]}
    everything: dict[str, Any] = {}
    reader, _ = dcp_world.reader(tmp_path, order)
    _load_state_dict(everything, reader, planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    moment = optimizer.state_dict()["state"][0]["exp_avg"]
    assert torch.equal(everything["optimizer"]["state"]["0"]["exp_avg"], moment)


def test_nothing_is_pickled_on_the_way_to_the_store_or_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: Any, **__: Any) -> Any:
        raise AssertionError("pickled")

    monkeypatch.setattr(torch, "save", forbidden)
    monkeypatch.setattr(torch, "load", forbidden)
    order = saved(tmp_path, state(1))
    load(0, 1, tmp_path, order)
    assert b"\x80\x02" not in next(iter(tmp_path.rglob("*.st"))).read_bytes()[:4096]


def test_own_planners_keep_objects_as_json_and_open_no_pickle(tmp_path: Path) -> None:
    order = saved(tmp_path, {"epoch": 4, "w": torch.ones(2)}, planner=planners.SavePlanner())
    reader, _ = dcp_world.reader(tmp_path, order)
    target = {"epoch": 0, "w": torch.zeros(2)}
    dcp.load(target, storage_reader=reader, planner=planners.LoadPlanner())
    assert (target["epoch"], target["w"].tolist()) == (4, [1, 1])
    folder = tmp_path / "torch"
    dcp.save({"epoch": 5}, checkpoint_id=folder, planner=planners.SavePlanner())
    target = {"epoch": 0}
    dcp.load(target, checkpoint_id=folder, planner=planners.LoadPlanner())
    assert target == {"epoch": 5}
    dcp.save({"epoch": 5}, checkpoint_id=tmp_path / "pickled")
    with pytest.raises(CheckpointException, match="pickles are not opened"):
        dcp.load(target, checkpoint_id=tmp_path / "pickled", planner=planners.LoadPlanner())


def test_a_planner_that_wants_pickles_is_refused(tmp_path: Path) -> None:
    class Unpickling(dcp.DefaultLoadPlanner):
        def load_bytes(self, read_item: Any, value: Any) -> None:
            super().load_bytes(read_item, value)

    order = saved(tmp_path, {"epoch": 4})
    reader, _ = dcp_world.reader(tmp_path, order)
    with pytest.raises(CheckpointException, match="Unpickling would unpickle epoch"):
        dcp.load({"epoch": 0}, storage_reader=reader, planner=Unpickling())


def test_a_cached_plan_that_no_longer_fits_is_refused_and_a_changed_dtype_is_seen(tmp_path: Path) -> None:
    order = saved(tmp_path, {"w": torch.ones(2)}, planner=DefaultSavePlanner(enable_plan_caching=True))
    narrow = {"w": torch.ones(2, dtype=torch.bfloat16)}
    report = dcp_world.save_one(
        narrow, tmp_path, 0, 1, 2, planner=DefaultSavePlanner(enable_plan_caching=True)
    )
    order = dcp_world.merged(tmp_path, [report])
    reader, _ = dcp_world.reader(tmp_path, order)
    assert reader.read_metadata().state_dict_metadata["w"].properties.dtype is torch.bfloat16


def test_a_writer_is_for_one_save_and_for_all_ranks_together(tmp_path: Path) -> None:
    session = GrantingSession(0, 1)
    storage = dcp_world.writer(session, 0, 1, 10, pipeline.new_arena())
    dcp.save({"w": torch.ones(1)}, storage_writer=storage)
    assert storage.seq == 1
    with pytest.raises(CheckpointException, match="a writer is for one save"):
        dcp.save({"w": torch.ones(1)}, storage_writer=storage)
    storage = dcp_world.writer(session, 0, 1, 10, pipeline.new_arena())
    with pytest.raises(Refused, match="use_collectives"):
        storage.set_up_storage_writer(True, rank=0, use_collectives=False)


def test_a_writer_does_not_leave_its_rank() -> None:
    storage = dcp_world.writer(GrantingSession(0, 1), 0, 1, 10, None)
    with pytest.raises(Refused, match="cannot leave its rank"):
        pickle.dumps(storage)


def test_errors_survive_the_way_to_other_ranks() -> None:
    error = Refused(ErrorCode.CHECKPOINT_ABORTED, "no space", fix="make room")
    other = pickle.loads(pickle.dumps(error))
    assert (type(other), other.code, str(other), other.fix) == (Refused, error.code, "no space", "make room")


def test_each_look_at_the_metadata_is_a_new_one(tmp_path: Path) -> None:
    order = saved(tmp_path, {"w": torch.arange(4.0)})
    reader, _ = dcp_world.reader(tmp_path, order)
    first, second = reader.read_metadata(), reader.read_metadata()
    assert first == second
    assert first is not second
    assert first.planner_data == {"w": ("w",)}


# What this relies on in torch ---------------------------------------------------------------


FIELDS = {
    dcp_storage.WriteResult: ("index", "size_in_bytes", "storage_data"),
    dcp_planner.WriteItem: ("index", "type", "bytes_io_data", "tensor_data"),
    dcp_planner.TensorWriteData: ("chunk", "properties", "size"),
    dcp_planner.SavePlan: ("items", "storage_data", "planner_data", "usable"),
    dcp_planner.LoadPlan: ("items", "storage_data", "planner_data"),
    dcp_planner.ReadItem: (
        "type",
        "dest_index",
        "dest_offsets",
        "storage_index",
        "storage_offsets",
        "lengths",
    ),
    dcp_metadata.MetadataIndex: ("fqn", "offset", "index"),
    dcp_metadata.Metadata: ("state_dict_metadata", "planner_data", "storage_data", "storage_meta", "version"),
    dcp_metadata.TensorStorageMetadata: ("properties", "size", "chunks"),
    dcp_metadata.ChunkStorageMetadata: ("offsets", "sizes"),
    dcp_metadata.BytesStorageMetadata: (),
}


def test_torchs_dataclasses_have_the_fields_that_this_relies_on() -> None:
    """When a release of torch fails here, read its storage.py and planner.py before changing the table."""
    for kind, wanted in FIELDS.items():
        assert tuple(field.name for field in dataclasses.fields(kind)) == wanted, (torch.__version__, kind)
    assert dcp_storage.StorageWriter.__abstractmethods__ == {
        "reset",
        "set_up_storage_writer",
        "prepare_local_plan",
        "prepare_global_plan",
        "write_data",
        "finish",
        "validate_checkpoint_id",
    }
    assert dcp_storage.StorageReader.__abstractmethods__ == {
        "reset",
        "read_metadata",
        "set_up_storage_reader",
        "prepare_local_plan",
        "prepare_global_plan",
        "read_data",
        "validate_checkpoint_id",
    }
    planner = DefaultSavePlanner()
    planner.set_up_planner({"a": {"b": 1}}, None, True)
    assert (planner.mappings, planner.state_dict) == ({"a.b": ("a", "b")}, {"a.b": 1})
