"""torch.distributed.checkpoint on four ranks: FSDP2, tensor parallelism and both, each mesh to each other."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from tests.unit.trainer import dcp_world, pipeline, resharding
from tests.unit.trainer.dcp_world import GrantingSession
from tests.unit.trainer.resharding import Training, Way
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from dtrain.agent.transferring import Fetch, TransferReport
from dtrain.protocol.errors import Refused

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.timeout(600),
]

SAVED = ("fsdp+tp-2x2", "hsdp-2x2", "fsdp-4")
LOADED = ("fsdp+tp-2x2", "fsdp-4", "ddp+tp-2x2")


def layouts(world: int) -> dict[str, Way]:
    """The ways of ``resharding`` that use all of ``world`` ranks."""
    meshes = {str(n): DeviceMesh("cpu", torch.arange(n)) for n in range(1, world + 1)}
    if world == 4:
        for x, y in ((2, 2), (1, 4), (4, 1)):
            mesh = torch.arange(4).view(x, y)
            meshes[f"{x}x{y}"] = DeviceMesh("cpu", mesh, mesh_dim_names=("x", "y"))
    missing = DeviceMesh("cpu", torch.arange(1))
    for name in ("2", "3", "4", "2x2", "1x4", "4x1"):
        meshes.setdefault(name, missing)
    return {way.name: way for way in resharding.ways(meshes) if way.ranks == world}


def state_of(training: Training) -> dict[str, Any]:
    """What torch's own recipe hands to ``dcp.save``."""
    model, optimizer = get_state_dict(training.net, training.optimizer)
    return {"model": model, "optimizer": optimizer, "extra": training.extra}


def checkpoint(training: Training, root: Path, rank: int, world: int, seq: int, group: Any) -> Fetch:
    """Save; with a group in the background, as torch does it, while the state changes."""
    if group is None:
        report = dcp_world.save_one(state_of(training), root, rank, world, seq)
    else:
        session = GrantingSession(rank, seq)
        storage = dcp_world.writer(session, rank, world, 10 * seq, pipeline.new_arena())
        future = dcp.async_save(state_of(training), storage_writer=storage, process_group=group)
        training.fake_step(17)
        future.result()
        report = dcp_world.upload(session.kept, root, rank, world)
    reports: list[Any] = [None] * world
    dist.all_gather_object(reports, report)
    box = [dcp_world.merged(root, _reports(reports)) if rank == 0 else None]
    dist.broadcast_object_list(box, 0)
    assert isinstance(box[0], Fetch)
    return box[0]


def _reports(found: list[Any]) -> list[TransferReport]:
    return found


def restore(way: Way, root: Path, order: Fetch, expected: dict[str, torch.Tensor], what: str) -> None:
    """Load as a script that has just started does, and compare all that this rank holds."""
    training = Training(way, 99)
    training.forget()
    training.extra = {"count": 0, "loss": torch.tensor(9.0)}
    state = state_of(training)
    reader, _ = dcp_world.reader(root, order)
    dcp.load(state, storage_reader=reader)
    set_state_dict(
        training.net,
        training.optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    training.extra = state["extra"]
    training.compare(expected, what)
    assert training.extra["count"] == 3


def four_ranks(rank: int, world: int, root: Path) -> list[tuple[Fetch, Any]]:
    ways = layouts(world)
    group = dist.new_group(backend="gloo")
    saved = []
    for seq, name in enumerate(SAVED, 1):
        training = Training(ways[name], 1)
        training.fake_step(2)
        expected = training.whole()
        order = checkpoint(training, root, rank, world, seq, group if name == "fsdp+tp-2x2" else None)
        for other in LOADED:
            restore(ways[other], root, order, expected, f"{name} -> {other}")
        saved.append((order, {key: value.numpy() for key, value in expected.items()}))
    return saved


def fewer_ranks(rank: int, world: int, root: Path, saved: list[tuple[Fetch, Any]]) -> None:
    ways = layouts(world)
    for order, values in saved:
        expected = {key: torch.from_numpy(value) for key, value in values.items()}
        for name in (f"fsdp-{world}", f"replicated-{world}"):
            restore(ways[name], root, order, expected, f"checkpoint {order.seq} -> {name}")


def test_each_mesh_of_four_ranks_loads_what_another_saved_and_so_do_fewer_ranks(tmp_path: Path) -> None:
    saved, *others = dcp_world.ranks(4, four_ranks, tmp_path)
    assert [order.seq for order, _ in saved] == [1, 2, 3]
    assert all(len(other) == len(saved) for other in others)
    dcp_world.ranks(2, fewer_ranks, tmp_path, saved)
    # And one process without a group, from the async save of the 2-D mesh.
    order, values = saved[0]
    reader, _ = dcp_world.reader(tmp_path, order)
    target = {"model": resharding.Net(5).state_dict()}
    assert not any(isinstance(value, DTensor) for value in target["model"].values())
    dcp.load(target, storage_reader=reader)
    for name, value in target["model"].items():
        assert torch.equal(value, torch.from_numpy(values[f"net.{name}"])), name


def stage(layers: tuple[int, ...], value: float = 0.0) -> dict[str, Any]:
    """One stage of a pipeline: only its own layers, and what every stage has."""
    made = {f"{n}.weight": torch.full((3, 2), value + n) for n in layers}
    return {"model": made, "norm": torch.full((2,), value), "step": 7 if value else 0}


def save_stages(rank: int, world: int, root: Path) -> TransferReport:
    return dcp_world.save_one(stage(((0, 1), (2,), (3, 4))[rank], 10.0), root, rank, world, 1)


def load_other_stages(rank: int, world: int, root: Path, order: Fetch) -> None:
    del world
    layers = ((0, 1, 2), (3, 4))[rank]
    target = stage(layers)
    reader, _ = dcp_world.reader(root, order)
    dcp.load(target, storage_reader=reader)
    wanted = stage(layers, 10.0)
    assert target["step"] == 7
    assert torch.equal(target["norm"], wanted["norm"])
    for name, value in wanted["model"].items():
        assert torch.equal(target["model"][name], value), name


def test_stages_of_a_pipeline_save_what_each_has_and_load_on_other_ranks(tmp_path: Path) -> None:
    order = dcp_world.merged(tmp_path, dcp_world.ranks(3, save_stages, tmp_path))
    dcp_world.ranks(2, load_other_stages, tmp_path, order)


def test_tracked_state_that_only_some_ranks_have_is_refused(tmp_path: Path) -> None:
    stages = [torch.nn.Sequential(torch.nn.Linear(2, 2)), torch.nn.Sequential(torch.nn.Linear(2, 3))]
    disagree = "ranks disagree about names, dtypes, shapes or meshes"
    with pytest.raises(Refused, match=disagree):
        pipeline.save(tmp_path, [{"model": one} for one in stages])
    named = "only ranks 0 name stage0.0.bias, stage0.0.weight .*; only ranks 1 name stage1.0.bias"
    with pytest.raises(Refused, match=f"{disagree}.*{named}"):
        pipeline.save(tmp_path, [{f"stage{rank}": one} for rank, one in enumerate(stages)])
