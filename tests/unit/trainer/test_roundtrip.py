"""What is saved comes back bit for bit, whatever it is and however many ranks there are."""

import math
import random
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.unit.trainer import pipeline

from dtrain.coordinator.core.manifest import tiling_problem
from dtrain.protocol.checkpoint import ChunkEntry, TensorEntry
from dtrain.protocol.errors import ErrorCode, Refused
from dtrain.trainer.checkpoint import layout, state

DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32,
    torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e8m0fnu,
]  # fmt: skip


class Holder:
    """Any state, restored as it is."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> Any:
        return self.value

    def load_state_dict(self, value: Any) -> None:
        self.value = value


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Random *bits*, so that NaN payloads and negative zeros occur."""
    size = math.prod(shape) * dtype.itemsize
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (size,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).view(shape) if size else torch.empty(shape, dtype=dtype)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    flat = [t.detach().contiguous().view(-1).view(torch.uint8) if t.numel() else None for t in (a, b)]
    return flat[0] is flat[1] is None or torch.equal(*flat)  # type: ignore[arg-type]


def test_every_dtype_and_odd_shape_comes_back_bit_for_bit(tmp_path: Path) -> None:
    tensors = {
        f"{str(dtype).removeprefix('torch.')}-{'x'.join(map(str, shape))}": random_tensor(dtype, shape, seed)
        for seed, dtype in enumerate(DTYPES)
        for shape in [(), (1,), (7,), (3, 5), (0,), (2, 0, 3), (2, 3, 4, 1)]
    }
    order = pipeline.save(tmp_path, [{"h": Holder(tensors)}])
    target = Holder(None)
    pipeline.load(tmp_path, order, {"h": target})
    assert list(target.value) == list(tensors)
    for name, tensor in tensors.items():
        assert same_bits(tensor, target.value[name]), name


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.lists(
        st.tuples(
            st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.uint8]),
            st.lists(st.integers(0, 9), max_size=3).map(tuple),
        ),
        min_size=1,
        max_size=12,
    ),
    world=st.integers(1, 5),
    block_bytes=st.sampled_from([1, 16, 64, 1 << 20]),
)
def test_chunks_of_all_ranks_tile_every_tensor_exactly(
    shapes: list[tuple[torch.dtype, tuple[int, ...]]], world: int, block_bytes: int
) -> None:
    names = {
        torch.float32: "F32",
        torch.bfloat16: "BF16",
        torch.int64: "I64",
        torch.uint8: "U8",
    }
    specs = [layout.Spec(f"t{i}", names[dtype], shape) for i, (dtype, shape) in enumerate(shapes)]
    specs.append(layout.Spec("buffer", "F32", (3,), owner=0))
    plans = [layout.plan(specs, rank, world, block_bytes=block_bytes) for rank in range(world)]
    assert len({p.hash for p in plans}) == 1
    chunks: dict[str, list[ChunkEntry]] = {}
    for plan in plans:
        for item in plan.placed:
            assert item.offset % layout.ITEM_BYTES[item.block.spec.dtype] == 0
        for name, entry in plan.entries().items():
            chunks.setdefault(name, []).extend(entry.chunks)
    for spec in specs:
        assert tiling_problem(TensorEntry(spec.dtype, spec.shape, tuple(chunks[spec.name]))) == ""


@pytest.mark.parametrize("shape", [(200_000, 1024), (75_000, 1024), (1, 30_000_000), (3, 2, 10_000_000)])
def test_one_big_tensor_is_balanced_over_ranks(shape: tuple[int, ...]) -> None:
    specs = [layout.Spec("big", "F32", shape), layout.Spec("small", "F32", (10,))]
    loads = [layout.plan(specs, rank, 4).blob_bytes for rank in range(4)]
    assert max(loads) / (sum(loads) / 4) <= 1.05


def make_training(seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer, Any]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.BatchNorm1d(16), torch.nn.Linear(16, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=100)
    return model, optimizer, scheduler


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(16, 8)).square().mean().backward()
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("saved_world", [1, 2, 3])
@pytest.mark.parametrize("loaded_world", [1, 2, 3])
def test_model_optimizer_and_scheduler_survive_a_change_of_world_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved_world: int, loaded_world: int
) -> None:
    monkeypatch.setattr(layout, "BLOCK_BYTES_MAX", 128)
    original = layout.plan
    monkeypatch.setattr(
        "dtrain.trainer.checkpoint.saver.plan",
        lambda specs, rank, world: original(specs, rank, world, block_bytes=128),
    )
    model, optimizer, scheduler = make_training(1)
    train(model, optimizer, scheduler, 3)
    tracked = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    order = pipeline.save(tmp_path, [tracked] * saved_world)
    plan = pipeline.fetched(tmp_path, order)
    for rank in range(loaded_world):
        other, other_optimizer, other_scheduler = make_training(2 + rank)
        again = {"model": other, "optimizer": other_optimizer, "scheduler": other_scheduler}
        pipeline.restoring.load(pipeline.PlanSource(plan), again, rank, loaded_world)
        for name, tensor in model.state_dict().items():
            assert same_bits(tensor, other.state_dict()[name]), name
        assert str(optimizer.state_dict()) == str(other_optimizer.state_dict())
        assert scheduler.state_dict() == other_scheduler.state_dict()


def test_random_numbers_go_on_where_they_were(tmp_path: Path) -> None:
    import numpy as np

    random.seed(5), torch.manual_seed(6), np.random.seed(7)
    np.random.normal()  # leaves half a pair behind
    order = pipeline.save(tmp_path, [{}])
    expected = (random.random(), torch.rand(3).tolist(), np.random.normal())
    random.seed(0), torch.manual_seed(0), np.random.seed(0)
    pipeline.load(tmp_path, order, {})
    assert (random.random(), torch.rand(3).tolist(), np.random.normal()) == expected


def test_another_world_size_derives_random_numbers_per_rank(tmp_path: Path) -> None:
    order = pipeline.save(tmp_path, [{}])
    drawn = []
    for rank in (0, 1, 0):
        pipeline.load(tmp_path, order, {}, rank=rank, world=2)
        drawn.append((random.random(), torch.rand(1).item()))
    assert drawn[0] == drawn[2] != drawn[1]


def test_structure_of_json_survives(tmp_path: Path) -> None:
    import numpy as np

    value = {
        "z": 1, "a": [1, 2.5, -0.0, None, True, "ü", b"\x00\xff"], "t": (1, (2,), []), "inf": -math.inf,
        "ints": {3: "three", "3": "string", None: 0, (1, "k"): 1, 1.5: 2}, "$odd": {"$dict": 1}, "big": 2**90,
        "o": OrderedDict([("b", 1), ("a", 2)]), "c": Counter("hello"), "empty": {},
        "tensor": {"x": torch.ones(2)},
        "np": np.arange(6, dtype=np.uint16).reshape(2, 3), "scalar": np.float64(0.1),
        "size": torch.Size([2, 3]),
    }  # fmt: skip
    order = pipeline.save(tmp_path, [{"h": Holder(value), "n": Holder(None), "nan": Holder(math.nan)}])
    target, nothing, nan = Holder(0), Holder(1), Holder(2)
    pipeline.load(tmp_path, order, {"h": target, "n": nothing, "nan": nan})
    assert repr(target.value) == repr({**value, "size": (2, 3)})
    assert type(target.value["o"]) is OrderedDict
    assert type(target.value["c"]) is Counter
    assert target.value["np"].dtype == np.uint16
    assert nothing.value is None
    assert math.isnan(nan.value)


def test_tensors_and_containers_are_restored_in_place(tmp_path: Path) -> None:
    tensor, table, items = torch.arange(5.0), {"k": 1}, [1, 2]
    order = pipeline.save(tmp_path, [{"t": tensor, "d": table, "l": items}])
    tensor2, table2, items2 = torch.zeros(5), {"other": 2}, [9]
    pipeline.load(tmp_path, order, {"t": tensor2, "d": table2, "l": items2})
    assert torch.equal(tensor, tensor2)
    assert table2 == {"k": 1}
    assert items2 == [1, 2]


def test_tied_weights_and_views_are_stored_once_and_right(tmp_path: Path) -> None:
    weight = torch.randn(64, 64)
    value = {
        "a": weight,
        "b": weight,
        "column": weight[:, 3],
        "t": weight.t(),
        "conj": torch.randn(4, dtype=torch.complex64).conj(),
    }
    sealed = pipeline.seal({"h": Holder(value)}, 0, 1)
    assert sealed.size_bytes < 3 * weight.nbytes
    order = pipeline.save(tmp_path, [{"h": Holder(value)}])
    target = Holder(None)
    pipeline.load(tmp_path, order, {"h": target})
    for name, tensor in value.items():
        assert same_bits(tensor.resolve_conj(), target.value[name]), name


def test_wrapped_modules_keep_plain_names() -> None:
    class DistributedDataParallel(torch.nn.Module):
        def __init__(self, module: torch.nn.Module) -> None:
            super().__init__()
            self.module = module

    inner = torch.nn.Linear(2, 2)
    captured = state.capture({"model": DistributedDataParallel(inner)}, {}, 0)
    assert {leaf.name for leaf in captured.leaves} == {"model.weight", "model.bias"}


def test_buffers_are_written_by_rank_zero() -> None:
    captured = state.capture({"model": torch.nn.BatchNorm1d(4)}, {}, 1)
    owners = {leaf.name: leaf.owner for leaf in captured.leaves}
    assert owners["model.running_mean"] == owners["model.num_batches_tracked"] == 0
    assert owners["model.weight"] is None


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ({"a": {"f": lambda: 0}}, "h.a.f: function"),
        ({"s": {1, 2}}, "h.s: set"),
        ([torch.eye(2).to_sparse()], "h.0: its layout is torch.sparse_coo"),
        ({"m": torch.empty(2, device="meta")}, "h.m: it is on the meta device"),
    ],
)
def test_what_cannot_be_saved_is_named(value: Any, path: str) -> None:
    with pytest.raises(Refused, match=path) as refused:
        state.capture({"h": Holder(value)}, {}, 0)
    assert refused.value.code is ErrorCode.STATE_NOT_SAVABLE


def test_blobs_open_with_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    tensors = {str(dtype): random_tensor(dtype, (3, 5)) for dtype in DTYPES if not dtype.is_complex}
    pipeline.save(tmp_path, [{"h": Holder(tensors)}, {"h": Holder(tensors)}])
    found: dict[str, torch.Tensor] = {}
    for blob in tmp_path.rglob("*.st"):
        found.update(load_file(blob))
    for name, tensor in tensors.items():
        stored = found[f"h.{name}"]
        assert same_bits(tensor, stored.view(tensor.dtype)), name


def test_a_changed_dtype_rebuilds_the_layout(tmp_path: Path) -> None:
    from dtrain.protocol.ids import Seq, Step
    from dtrain.protocol.ranklink import Begin
    from dtrain.trainer.checkpoint.saver import Saver

    holder = Holder({"x": torch.ones(4)})
    saver = Saver({"h": holder}, 0, 1, pipeline.new_arena())
    first = saver.seal(Begin(Seq(1), "n", Step(1)))
    holder.value = {"x": torch.ones(4, dtype=torch.bfloat16)}
    second = saver.seal(Begin(Seq(2), "n", Step(2)))
    assert second.size_bytes == first.size_bytes - 8


def test_nesting_is_bounded_and_comes_back_at_the_bound(tmp_path: Path) -> None:
    value: Any = torch.ones(1)
    for _ in range(state.DEPTH_MAX - 1):
        value = [value]
    order = pipeline.save(tmp_path, [{"h": Holder(value)}])
    target = Holder(None)
    pipeline.load(tmp_path, order, {"h": target})
    assert repr(target.value) == repr(value)
    with pytest.raises(Refused, match="nested deeper"):
        state.capture({"h": Holder([value])}, {}, 0)
