"""Where restored values go: in place where loading means no more, through load_state_dict elsewhere."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.trainer import pipeline

from dtrain.protocol.errors import ErrorCode, Refused


class Versioned(torch.nn.Module):
    """Renames a parameter of its former self."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3))
        self.loads = 0

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        self.loads += 1
        super()._load_from_state_dict(state, prefix, *rest)


class Extra(torch.nn.Module):
    """Keeps a value beside its tensors."""

    def __init__(self, value: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((3,), float(value)))
        self.value = value

    def get_extra_state(self) -> Any:
        return {"value": self.value}

    def set_extra_state(self, state: Any) -> None:
        self.value = state["value"]


def through(tmp_path: Path, saved: Any, loaded: Any) -> Any:
    order = pipeline.save(tmp_path, [{"m": saved}])
    pipeline.load(tmp_path, order, {"m": loaded})
    return loaded


def test_a_plain_module_is_filled_where_it_is_and_not_loaded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved, loaded = torch.nn.Linear(3, 4), torch.nn.Linear(3, 4)
    where = loaded.weight.data_ptr()
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", lambda *_: pytest.fail("it was called"))
    through(tmp_path, saved, loaded)
    assert loaded.weight.data_ptr() == where
    assert torch.equal(loaded.weight, saved.weight)
    assert torch.equal(loaded.bias, saved.bias)


def test_a_module_that_loads_in_a_way_of_its_own_does_so(tmp_path: Path) -> None:
    saved, loaded = Versioned(), Versioned()
    torch.nn.init.ones_(saved.weight)
    through(tmp_path / "a", torch.nn.Sequential(saved), torch.nn.Sequential(loaded))
    assert loaded.loads == 1
    assert loaded.weight.tolist() == [1, 1, 1]
    extra = through(tmp_path / "b", Extra(5), Extra(6))
    assert (extra.value, extra.weight.tolist()) == (5, [5, 5, 5])


def test_hooks_that_change_what_is_loaded_are_called(tmp_path: Path) -> None:
    def double(_module: Any, state: Any, prefix: str, *_rest: Any) -> None:
        state[f"{prefix}bias"] = state[f"{prefix}bias"] * 2

    saved, loaded = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    loaded.register_load_state_dict_pre_hook(double)
    through(tmp_path, saved, loaded)
    assert torch.equal(loaded.bias, saved.bias * 2)


def test_a_state_dict_that_gives_copies_is_not_filled_in_vain(tmp_path: Path) -> None:
    def copied(_module: Any, state: Any, _prefix: str, _local: Any) -> Any:
        return {key: value.clone() for key, value in state.items()}

    saved, loaded = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    loaded._register_state_dict_hook(copied)
    through(tmp_path, saved, loaded)
    assert torch.equal(loaded.weight, saved.weight)


def test_another_dtype_is_converted_as_load_state_dict_does(tmp_path: Path) -> None:
    saved, loaded = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3, dtype=torch.bfloat16)
    through(tmp_path, saved, loaded)
    assert torch.equal(loaded.weight, saved.weight.to(torch.bfloat16))


@pytest.mark.parametrize(
    ("loaded", "told"),
    [
        (torch.nn.Linear(3, 4), "size mismatch for weight"),
        (torch.nn.Linear(3, 3, bias=False), "Unexpected key"),
        (torch.nn.Linear(3, 3, device="meta"), "m.weight is on the meta device"),
        (torch.zeros(2), "m is a tensor, the checkpoint has another kind"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_name(tmp_path: Path, loaded: Any, told: str) -> None:
    with pytest.raises(Refused, match=told) as refused:
        through(tmp_path, torch.nn.Linear(3, 3), loaded)
    assert refused.value.code is ErrorCode.RESTORE_FAILED


def test_views_and_frozen_parameters_are_filled(tmp_path: Path) -> None:
    saved, loaded = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    base = torch.zeros(4, 8)
    loaded.weight = torch.nn.Parameter(base[:, ::2].t(), requires_grad=False)
    through(tmp_path, saved, loaded)
    assert torch.equal(base[:, ::2].t(), saved.weight)


def test_an_optimizer_keeps_the_numbering_of_the_checkpoint(tmp_path: Path) -> None:
    def make(order: list[int]) -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
        torch.manual_seed(1)
        ps = [torch.nn.Parameter(torch.rand(size)) for size in (2, 3, 4)]
        groups = [{"params": [ps[i]], "lr": 0.1 * (i + 1)} for i in order]
        return ps, torch.optim.Adam(groups)

    parameters, saved = make([0, 1, 2])
    for p in parameters:
        p.grad = torch.rand(p.shape)
    saved.step()
    _, loaded = make([0, 1, 2])
    through(tmp_path, saved, loaded)
    assert str(loaded.state_dict()) == str(saved.state_dict())


def test_two_tracked_names_that_run_together_stay_apart(tmp_path: Path) -> None:
    one, two = {"b": torch.ones(2)}, torch.zeros(2)
    order = pipeline.save(tmp_path, [{"a": one, "a.b": two}])
    first, second = {"b": torch.full((2,), 7.0)}, torch.full((2,), 7.0)
    pipeline.load(tmp_path, order, {"a": first, "a.b": second})
    assert (first["b"].tolist(), second.tolist()) == ([1, 1], [0, 0])


def test_values_that_have_drifted_apart_are_refused_unless_that_is_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = [{"w": torch.full((4,), float(rank // 2))} for rank in range(3)]
    with pytest.raises(Refused, match="tensor w differs between rank 0 and ranks 2") as refused:
        pipeline.save(tmp_path / "a", ranks)
    assert refused.value.code is ErrorCode.RANKS_DISAGREE
    monkeypatch.setenv("DTRAIN_CHECK_REPLICAS", "off")
    assert pipeline.save(tmp_path / "b", ranks).seq == 1


def test_buffers_may_differ_between_ranks_and_rank_zeros_count(tmp_path: Path) -> None:
    ranks = [torch.nn.BatchNorm1d(2) for _ in range(2)]
    ranks[1].running_mean += 1
    order = pipeline.save(tmp_path, [{"m": module} for module in ranks])
    loaded = torch.nn.BatchNorm1d(2)
    loaded.running_mean += 9
    pipeline.load(tmp_path, order, {"m": loaded}, rank=1, world=2)
    assert loaded.running_mean.tolist() == [0, 0]
