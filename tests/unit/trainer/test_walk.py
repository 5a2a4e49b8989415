"""A capture that remembers the form of the state finds what one that remembers nothing finds."""

import math
import random
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dtrain.protocol import codec
from dtrain.protocol.errors import Refused
from dtrain.trainer.checkpoint import state
from dtrain.trainer.checkpoint.walk import Shot, Walk


class Holder:
    """State that a test can change in any way."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self.asked = 0

    def state_dict(self) -> Any:
        self.asked += 1
        return self.value

    def load_state_dict(self, value: Any) -> None:
        self.value = value


def assert_as_anew(shot: Shot, tracked: dict[str, Any]) -> None:
    captured = state.capture(tracked, {}, 0)
    assert shot.specs == [leaf.spec for leaf in captured.leaves]
    for leaf, tensor in zip(captured.leaves, shot.tensors, strict=True):
        stored = tensor.detach().resolve_neg()
        assert stored.dtype == leaf.tensor.dtype
        assert stored.reshape(-1).tolist() == leaf.tensor.reshape(-1).tolist(), leaf.name
    assert list(shot.objects) == list(captured.objects)
    for name, value in captured.objects.items():
        entry = codec.loads(shot.objects[name])
        assert codec.canonical(entry["value"]) == codec.canonical(value)
        assert repr(entry["value"]) == repr(codec.loads(codec.canonical(value)))


def is_remembered(walk: Walk, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether another capture of the same state encodes nothing of it anew."""
    asked: list[str] = []
    real = state.capture

    def spy(given: Any, *args: Any, **more: Any) -> Any:
        asked.extend(given)
        return real(given, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(state, "capture", spy)
        walk.capture({})
    return not asked


def rich() -> dict[str, Any]:
    return {
        "b": torch.arange(6.0).view(2, 3),
        "a": [1, 2.5, -0.0, None, True, "text", torch.ones(2, dtype=torch.bfloat16)],
        "nested": {1: (torch.zeros(3), 4), 2: OrderedDict(z=1, y=torch.ones(()))},
        "count": Counter("hello"),
        "empty": {},
        "bytes": b"raw",
        "complex": torch.tensor([1 + 2j, 3 - 4j]),
    }


CHANGES: list[Callable[[dict[str, Any]], Any]] = [
    lambda v: v["b"].data.add_(1),
    lambda v: v.update(b=torch.arange(6.0).view(2, 3) + 9),
    lambda v: v.update(b=v["b"].t()),
    lambda v: v.update(b=v["b"].double()),
    lambda v: v.update(b=torch.nn.Parameter(v["b"].detach())),
    lambda v: v["a"].__setitem__(0, v["a"][0] + 1),
    lambda v: v["a"].__setitem__(0, True),
    lambda v: v["a"].__setitem__(0, 1.0),
    lambda v: v["a"].__setitem__(1, v["a"][1] * 2),
    lambda v: v["a"].__setitem__(2, 0.0),
    lambda v: v["a"].__setitem__(2, -0.0),
    lambda v: v["a"].__setitem__(2, math.nan),
    lambda v: v["a"].__setitem__(2, math.inf),
    lambda v: v["a"].__setitem__(3, 7),
    lambda v: v["a"].__setitem__(3, None),
    lambda v: v["a"].__setitem__(4, not v["a"][4]),
    lambda v: v["a"].__setitem__(5, v["a"][5] + '"hole'),
    lambda v: v["a"].append(len(v["a"])),
    lambda v: v["nested"].__setitem__(1, (torch.zeros(3), v["nested"][1][1] + 1)),
    lambda v: v["nested"].__setitem__(1, (v["nested"][1][0], v["nested"][1][1] + 1)),
    lambda v: v["nested"][2].update(x=3),
    lambda v: v["nested"][2].move_to_end("z"),
    lambda v: v["count"].update("lo"),
    lambda v: v["empty"].update(now=1),
    lambda v: v.update(tied=v["b"]),
    lambda v: v.update(tied=v["b"].clone()),
    lambda v: v.update(complex=v["complex"].conj()),
    lambda v: v.update(bytes=v["bytes"] + b"!"),
    lambda v: v.update({f"key{len(v)}": len(v)}),
    lambda v: v.pop("tied", None),
]


@pytest.mark.parametrize("seed", range(20))
def test_any_sequence_of_changes_is_captured_as_if_for_the_first_time(seed: int) -> None:
    chance = random.Random(seed)
    tracked: dict[str, Any] = {"h": Holder(rich()), "plain": {"lr": 0.1, "n": 1}}
    walk = Walk(tracked, 0)
    assert_as_anew(walk.capture({}), tracked)
    for _ in range(40):
        for _ in range(chance.choice((0, 1, 1, 2, 4))):
            chance.choice(CHANGES)(tracked["h"].value)
        tracked["plain"]["lr"] *= 0.5
        assert_as_anew(walk.capture({}), tracked)


def test_what_keeps_its_form_is_not_encoded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    tracked = {"model": model, "optimizer": optimizer, "schedule": schedule}

    def train() -> None:
        optimizer.zero_grad()
        model(torch.randn(4, 3)).sum().backward()
        optimizer.step()
        schedule.step()

    train()
    walk = Walk(tracked, 0)
    walk.capture({})
    for _ in range(3):
        train()
        assert is_remembered(walk, monkeypatch)
        train()
        assert_as_anew(walk.capture({}), tracked)


def test_the_specs_are_the_same_object_while_nothing_of_them_changes() -> None:
    tracked: dict[str, Any] = {"h": Holder({"w": torch.ones(2), "n": 1})}
    walk = Walk(tracked, 0)
    first = walk.capture({"rng/0/x": (1, torch.zeros(3))})
    tracked["h"].value["n"] = 2
    assert walk.capture({"rng/0/x": (2, torch.zeros(3))}).specs is first.specs
    tracked["h"].value["w"] = torch.ones(3)
    assert walk.capture({"rng/0/x": (2, torch.zeros(3))}).specs is not first.specs


def test_state_dict_is_asked_once_a_capture() -> None:
    """It may be a collective: a rank that asks twice would wait for ranks that ask once."""
    holder = Holder({"w": torch.ones(2)})
    walk = Walk({"h": holder}, 0)
    for count in range(1, 5):
        walk.capture({})
        assert holder.asked == count
        if count == 2:
            holder.value = {"w": torch.ones(3)}


def test_names_do_not_depend_on_what_was_captured_before() -> None:
    """All ranks must give a tensor the same name, also one that was restarted in between."""
    tracked: dict[str, Any] = {"a": {"x": torch.ones(1)}, "a.b": {"c": torch.ones(1)}}
    walk = Walk(tracked, 0)
    assert [spec.name for spec in walk.capture({}).specs] == ["a.x", "a.b.c"]
    tracked["a"]["b"] = {"c": torch.zeros(1)}
    assert_as_anew(walk.capture({}), tracked)
    assert [spec.name for spec in walk.capture({}).specs] == ["a.x", "a.b.c", "a.b.c~"]


def test_no_tensor_is_kept_alive() -> None:
    import weakref

    tracked: dict[str, Any] = {"h": Holder({"w": torch.ones(1000)})}
    walk = Walk(tracked, 0)
    for _ in range(2):
        walk.capture({})
    memory = weakref.ref(tracked["h"].value["w"])
    tracked["h"].value["w"] = torch.zeros(1)
    assert memory() is None


def test_what_cannot_be_saved_is_refused_the_second_time_too() -> None:
    tracked: dict[str, Any] = {"h": Holder({"w": torch.ones(2)})}
    walk = Walk(tracked, 0)
    walk.capture({})
    tracked["h"].value["bad"] = object()
    for _ in range(2):
        with pytest.raises(Refused, match=r"h\.bad"):
            walk.capture({})


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_shards_are_remembered_and_their_changes_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    holder = Holder({"w": distribute_tensor(torch.arange(8.0), mesh, [Shard(0)])})
    tracked = {"h": holder}
    walk = Walk(tracked, 0)
    shot = walk.capture({})
    assert shot.tensors[0].tolist() == list(range(8))
    with torch.no_grad():
        holder.value["w"].add_(1)
    assert is_remembered(walk, monkeypatch)
    assert walk.capture({}).tensors[0].tolist() == list(range(1, 9))
    holder.value["w"] = holder.value["w"].redistribute(mesh, [Replicate()])
    captured = state.capture(tracked, {}, 0)
    assert walk.capture({}).specs == [leaf.spec for leaf in captured.leaves] != shot.specs
