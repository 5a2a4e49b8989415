"""Checkpoints of former releases restore unchanged, at any number of ranks.

``data/checkpoint-0.2.0.tar.xz`` was written by release 0.2.0: three ranks, blocks of 64 bytes.
"""

import json
import tarfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.unit.trainer import pipeline

from dtrain.agent.transferring import Fetch
from dtrain.protocol.ids import Seq, Step

DATA = Path(__file__).parent / "data"


class Holder:
    """Any state, restored as it is."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> Any:
        return self.value

    def load_state_dict(self, value: Any) -> None:
        self.value = value


def numbered(like: torch.Tensor, start: int) -> torch.Tensor:
    return (torch.arange(like.numel()).view(like.shape) + start).to(like.dtype)


def blank() -> dict[str, Any]:
    model = torch.nn.Sequential(torch.nn.Linear(3, 7), torch.nn.BatchNorm1d(7), torch.nn.Linear(7, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return {"model": model, "optimizer": optimizer, "holder": Holder(None), "w": torch.zeros(40)}


@pytest.mark.parametrize(("rank", "world"), [(0, 1), (1, 2), (2, 3), (3, 4)])
def test_a_checkpoint_of_0_2_0_restores(tmp_path: Path, rank: int, world: int) -> None:
    with tarfile.open(DATA / "checkpoint-0.2.0.tar.xz") as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.4
        archive.extractall(tmp_path)
    named = json.loads((tmp_path / "order.json").read_text())
    order = Fetch(
        "f",
        pipeline.JOB,
        pipeline.UID,
        tmp_path.as_uri(),
        Seq(1),
        Step(10),
        named["manifest"],
        named["digest"],
    )
    tracked = blank()
    pipeline.load(tmp_path, order, tracked, rank, world)
    for index, tensor in enumerate(tracked["model"].state_dict().values()):
        assert torch.equal(tensor, numbered(tensor, 100 * index))
    assert tracked["optimizer"].param_groups[0]["lr"] == 0.5
    for index, parameter in enumerate(tracked["model"].parameters()):
        found = tracked["optimizer"].state[parameter]
        assert found["step"].item() == 4
        assert torch.equal(found["exp_avg"], numbered(parameter, 1000 * index))
        assert torch.equal(found["exp_avg_sq"], numbered(parameter, 2000 * index))
    held = tracked["holder"].value
    assert type(held) is OrderedDict
    assert torch.equal(held["c"], torch.complex(torch.arange(6.0), torch.ones(6)).view(2, 3))
    assert held["n"].tolist() == list(np.arange(5))
    assert held["t"] == (1, 2.5, "x")
    assert (held["b"].tolist(), tuple(held["e"].shape), held["z"].item()) == ([True, False], (0, 3), 7)
    assert torch.equal(tracked["w"], torch.arange(40.0))
