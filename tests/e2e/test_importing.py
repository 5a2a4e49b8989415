"""State from elsewhere: imported, committed like any other, and gone on from with the same bits."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.test_checkpoints import COMMAND, LIMIT_S, as_json, dtrain
from tests.support.harness import Harness

from dtrain.protocol.events import EventReason
from dtrain.protocol.ids import JobName
from dtrain.protocol.job import JobPhase

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

STEPS = 60
# Long enough for a checkpoint in the middle, whose step is chosen ahead of the newest report.
ARGS = f"--steps {STEPS} --pause-ms 20"


@pytest.fixture(scope="module")
def origin(harness: Harness) -> JobName:
    """A job that ran from beginning to end undisturbed: what others must arrive at."""
    job = harness.start("origin", ARGS, every_steps=20, keep_last=10)
    harness.assert_succeeded(job, STEPS)
    return job


def waiting(harness: Harness, name: str, args: str = ARGS) -> JobName:
    """A job that does not begin without a checkpoint."""
    job = harness.submit(name, args, every_steps=20, keep_last=10, await_import=True)
    harness.until(f"{name} waits", lambda: "waiting for a checkpoint" in harness.status(job).reason)
    return job


def files(harness: Harness, job: JobName) -> list[Path]:
    """What the store holds of a job, whatever it is."""
    found = (Path(harness.cluster.store_uri.removeprefix("file://")) / harness.cluster.name / job).rglob("*")
    return [path for path in found if path.is_file()]


@pytest.mark.parametrize("form", ["safetensors", "torch", "dcp"])
def test_what_was_exported_goes_on_with_the_same_bits(
    harness: Harness, origin: JobName, tmp_path: Path, form: str
) -> None:
    middle = next(record for record in harness.commits(origin) if 0 < record.step < STEPS)
    path = tmp_path / {"safetensors": "folder", "torch": "state.pt", "dcp": "dcp"}[form]
    dtrain(harness, "export", origin, str(middle.seq), "--full", "--format", form, "--to", str(path))
    job = waiting(harness, f"again-{form}")
    more = ["--trust"] if form == "dcp" else []
    if more:
        refused = dtrain(harness, "import", job, str(path), code=2)
        assert "--trust" in refused.stderr
    told = as_json(harness, "import", job, str(path), *more)
    assert (told["step"], told["names"]) == (middle.step, ["data", "model", "optimizer"])
    harness.assert_succeeded(job, STEPS)
    first = harness.commits(job)[0]
    assert (first.seq, first.step) == (told["seq"], middle.step)
    assert harness.await_event(job, EventReason.RESTORED).object == f"checkpoint/{first.seq}"
    # Not a step before it was done again.
    assert min(mark.step for mark in harness.marks(job)) == middle.step
    assert harness.digests(job) == harness.digests(origin) != {}
    assert as_json(harness, "verify", job, str(first.seq))["ok"] is True


def test_weights_alone_begin_a_training_of_their_own(harness: Harness, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    weights = {"0.weight": torch.randn(64, 64), "0.bias": torch.randn(64)}
    path = tmp_path / "weights.safetensors"
    save_file(weights, path)
    job = waiting(harness, "weights")
    assert "--weights-only" in dtrain(harness, "import", job, str(path), code=2).stderr
    shown = as_json(harness, "import", job, str(path), "--weights-only", "--dry-run")
    assert shown["contents"] == {"model.0.bias": ["F32", [64]], "model.0.weight": ["F32", [64, 64]]}
    assert not harness.opened(job)
    told = as_json(harness, "import", job, str(path), "--weights-only")
    assert (told["step"], told["names"]) == (0, ["model"])
    harness.assert_succeeded(job, STEPS)
    assert min(mark.step for mark in harness.marks(job)) == 0
    out = tmp_path / "back.safetensors"
    dtrain(harness, "export", job, str(told["seq"]), "--to", str(out))
    from safetensors.torch import load_file

    back = load_file(out)
    assert {name.removeprefix("model."): value.tolist() for name, value in back.items()} == {
        name: value.tolist() for name, value in weights.items()
    }


def test_a_killed_import_leaves_nothing_but_what_the_collector_takes(
    harness: Harness, tmp_path: Path
) -> None:
    job = waiting(harness, "killed")
    path = tmp_path / "large.safetensors"
    # Of three blobs: sparse, as nothing but its size counts.
    count, each = 3, 256 * 1024**2
    table = {
        f"t{n}": {"dtype": "U8", "shape": [each], "data_offsets": [n * each, (n + 1) * each]}
        for n in range(count)
    }
    header = json.dumps(table).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + count * each)
    env = {key: value for key, value in os.environ.items() if not key.startswith(("DTRAIN_", "PET_"))}
    env |= {"DTRAIN_COORDINATORS": ",".join(harness.cluster.addresses)}
    command = [*COMMAND, "checkpoints", "import", job, str(path), "--weights-only"]
    victim = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        harness.until("a blob is durable", lambda: files(harness, job))
    finally:
        victim.send_signal(signal.SIGKILL)
        victim.wait()
    assert harness.opened(job), "it was killed in the middle"
    assert harness.status(job).phase is JobPhase.QUEUED
    began = time.monotonic()
    harness.until("the import is aborted", lambda: not harness.opened(job), LIMIT_S)
    assert time.monotonic() - began < 90.0
    assert "has gone" in harness.await_event(job, EventReason.CHECKPOINT_ABORTED).message
    assert not harness.commits(job)
    assert files(harness, job)
    dtrain(harness, "gc", job, "--yes")
    assert not files(harness, job)
    # The job still waits, and takes another one.
    told = import_small(harness, job, tmp_path)
    harness.assert_succeeded(job, STEPS)
    assert harness.commits(job)[0].seq == told["seq"] > 1


def import_small(harness: Harness, job: JobName, folder: Path) -> Any:
    import torch
    from safetensors.torch import save_file

    save_file({"0.weight": torch.ones(64, 64), "0.bias": torch.zeros(64)}, folder / "small.safetensors")
    return as_json(harness, "import", job, str(folder / "small.safetensors"), "--weights-only")


def test_a_job_that_has_begun_is_not_imported_into(harness: Harness, tmp_path: Path) -> None:
    stop = harness.stop_file("begun")
    job = harness.start("begun", f"--steps 1000000 --pause-ms 10 --stop-file {stop}", every_steps=0)
    import torch
    from safetensors.torch import save_file

    save_file({"0.weight": torch.ones(2)}, tmp_path / "small.safetensors")
    done = dtrain(harness, "import", job, str(tmp_path / "small.safetensors"), "--weights-only", code=5)
    assert "before its first attempt only" in done.stderr
    assert "await_import" in done.stderr
    assert not harness.cluster.read(f"jobs/{job}/orders/")
    stop.touch()
    harness.await_end(job)
