"""What was imported is restored into what a script tracks: whole, or the part that came along."""

import gzip
import hashlib
import logging
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.trainer.test_roundtrip import Holder

from dtrain.coordinator.core.manifest import merge
from dtrain.protocol import codec
from dtrain.protocol.checkpoint import Manifest, OpenRecord, RankManifest
from dtrain.protocol.errors import Refused
from dtrain.protocol.ids import Attempt, ClusterName, JobName, Seq, Step, Term, Uid
from dtrain.storage.blobs.memory import MemoryBlobs
from dtrain.storage.checkpoints.exporting import Format, export
from dtrain.storage.checkpoints.importing import Contents, arrange, write
from dtrain.storage.checkpoints.importing_files import read
from dtrain.trainer.checkpoint import restore, rng
from dtrain.trainer.checkpoint.source import Range

CLUSTER, JOB = ClusterName("c1"), JobName("job")


class Bytes:
    """A ``Source`` over a store."""

    filler = None

    def __init__(self, store: MemoryBlobs, manifest: Manifest) -> None:
        self.manifest = manifest
        self._blobs = [store.get(blob.key) for blob in manifest.blobs]

    def want(self, ranges: Any) -> None:
        assert all(isinstance(one, Range) for one in ranges)

    def view(self, blob: int, offset: int, length: int) -> memoryview:
        return memoryview(self._blobs[blob])[offset : offset + length]

    def is_still_good(self) -> bool:
        return True


def imported(contents: Contents, step: int = 0, **how: Any) -> tuple[MemoryBlobs, Manifest]:
    record = OpenRecord(
        Term(3), Uid("u9"), Seq(1), Attempt(0), Step(step), "00ff", 1, timeout_s=60.0, imported="i"
    )
    store = MemoryBlobs(f"imported-{random.random()}")
    part = write(store, CLUSTER, JOB, record, arrange(contents, **how))
    packed = store.get(part.manifest)
    assert hashlib.sha256(packed).hexdigest() == part.digest
    parts = [codec.decode(RankManifest, gzip.decompress(packed), bytes_max=1 << 28)]
    return store, merge(
        cluster=CLUSTER, job=JOB, uid=record.uid, record=record, parts=parts, parent=None, created=""
    )


def training(seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.BatchNorm1d(5))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1 / seed)
    model(torch.randn(4, 6)).square().mean().backward()
    optimizer.step()
    return {"model": model, "optimizer": optimizer, "extra": Holder({"n": seed, "t": (1, None, 2.5)})}


def bits(tracked: dict[str, Any]) -> list[Any]:
    found: list[Any] = [tracked["extra"].value, tracked["optimizer"].state_dict()["param_groups"]]
    for state in (tracked["model"].state_dict(), *tracked["optimizer"].state_dict()["state"].values()):
        found += [(key, value.reshape(-1).tolist()) for key, value in state.items()]
    return found


def test_a_torch_file_of_states_by_name_is_a_whole_training(tmp_path: Path) -> None:
    before = training(1)
    torch.save({name: thing.state_dict() for name, thing in before.items()}, tmp_path / "x.pt")
    store, manifest = imported(read(tmp_path / "x.pt"), 7)
    after = training(2)
    assert bits(after) != bits(before)
    random.seed(5)
    drawn = random.getstate()
    assert restore.load(Bytes(store, manifest), after, 0, 1).step == 7
    assert bits(after) == bits(before)
    assert random.getstate() == drawn, "no generators came along: the script's own stay as they are"


@pytest.mark.parametrize("form", [Format.SAFETENSORS, Format.TORCH])
def test_generators_come_along_for_the_same_number_of_ranks(tmp_path: Path, form: Format) -> None:
    before = training(1)
    values = {name: thing.state_dict() for name, thing in before.items()}
    states = [rng.collect(rank) for rank in (0, 1)]
    torch.save({**values, **states[0], **states[1], "dtrain": {"step": 9, "world": 2}}, tmp_path / "x.pt")
    store, manifest = imported(read(tmp_path / "x.pt"), 9)
    # Imported, exported, and imported again: it still is of two ranks.
    again = tmp_path / ("folder" if form is Format.SAFETENSORS else "again.pt")
    export(store, manifest, again, form, full=True)
    contents = read(again)
    assert (contents.origin["world"], contents.origin["step"]) == (2, 9)
    store, manifest = imported(contents, 9)
    contents.close()
    after = training(2)
    restore.load(Bytes(store, manifest), after, 1, 2)
    assert bits(after) == bits(before)
    assert torch.equal(rng.collect(1)["rng/1/torch"], states[1]["rng/1/torch"])
    restore.load(Bytes(store, manifest), training(3), 0, 3)
    assert not torch.equal(rng.collect(0)["rng/0/torch"], states[0]["rng/0/torch"]), "of three ranks: derived"


def test_weights_alone_leave_the_rest_as_the_script_made_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before, after = training(1), training(2)
    torch.save({f"module.{k}": v for k, v in before["model"].state_dict().items()}, tmp_path / "w.pt")
    store, manifest = imported(read(tmp_path / "w.pt"), partial=True, prefix="", maps=[("module.", "model.")])
    optimizer = after["optimizer"].state_dict()["state"][0]["exp_avg"].clone()
    with caplog.at_level(logging.WARNING):
        restore.load(Bytes(store, manifest), after, 0, 4)
    assert "extra, optimizer: not in the imported checkpoint, begins fresh" in caplog.text
    assert "which is not tracked" not in caplog.text
    for name, value in before["model"].state_dict().items():
        assert torch.equal(after["model"].state_dict()[name], value)
    assert torch.equal(after["optimizer"].state_dict()["state"][0]["exp_avg"], optimizer)
    assert after["extra"].value["n"] == 2


def test_weights_are_converted_to_the_type_of_the_parameters(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2).to(torch.bfloat16)
    wanted = torch.randn(2, 3)
    torch.save({"weight": wanted, "bias": torch.zeros(2)}, tmp_path / "w.pt")
    store, manifest = imported(read(tmp_path / "w.pt"), partial=True)
    restore.load(Bytes(store, manifest), {"model": model}, 0, 1)
    assert torch.equal(model.weight, wanted.to(torch.bfloat16))


def test_nothing_in_common_and_a_module_with_other_keys_are_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(2, 3)}, tmp_path / "w.pt")
    store, manifest = imported(read(tmp_path / "w.pt"), partial=True)
    with pytest.raises(Refused, match="nothing of what is tracked: net") as caught:
        restore.load(Bytes(store, manifest), {"net": torch.nn.Linear(3, 2)}, 0, 1)
    assert "--map" in caught.value.fix
    with pytest.raises(Refused, match="Missing key"):
        restore.load(Bytes(store, manifest), {"model": torch.nn.Linear(3, 2)}, 0, 1)
    torch.save({"model": {"weight": torch.zeros(2, 3)}}, tmp_path / "whole.pt")
    store, manifest = imported(read(tmp_path / "whole.pt"))
    with pytest.raises(Refused, match="no state named optimizer"):
        restore.load(Bytes(store, manifest), {"optimizer": Holder({})}, 0, 1)
