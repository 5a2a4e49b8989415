"""A working directory that no agent's machine has: packed, stored once, and found again after losses."""

import json
import shutil
from pathlib import Path

import pytest
from tests.e2e.test_cli import dtrain
from tests.support.harness import SCRIPTS, Harness

from dtrain.protocol.events import EventReason
from dtrain.protocol.ids import JobName
from dtrain.protocol.job import JobPhase
from dtrain.protocol.package import package_key, packages_prefix
from dtrain.storage.blobs.open import open_store

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with a script that needs a module, a file and a program beside it."""
    folder = tmp_path / "project"
    (folder / "lib").mkdir(parents=True)
    shutil.copy(SCRIPTS / "train.py", folder / "lib" / "training.py")
    shutil.copy(SCRIPTS / "samples.py", folder / "samples.py")
    (folder / "train.py").write_text(
        "import pathlib, runpy, subprocess, sys\n"
        "assert pathlib.Path('data/words.txt').read_text() == 'beside it'\n"
        "assert subprocess.run(['./tool.sh'], capture_output=True, text=True).stdout == 'ran\\n'\n"
        "assert not pathlib.Path('secret.txt').exists()\n"
        "import samples\n"
        "assert pathlib.Path(samples.__file__).parent == pathlib.Path.cwd()\n"
        "print('started in', pathlib.Path.cwd(), flush=True)\n"
        "runpy.run_path('lib/training.py', run_name='__main__')\n"
    )
    (folder / "data").mkdir()
    (folder / "data" / "words.txt").write_text("beside it")
    (folder / "tool.sh").write_text("#!/bin/sh\necho ran\n")
    (folder / "tool.sh").chmod(0o755)
    (folder / "secret.txt").write_text("not for others")
    (folder / ".gitignore").write_text("secret.txt\n")
    return folder


def write_job(harness: Harness, folder: Path, name: str, args: str, **more: object) -> Path:
    marks = harness._marks_folder(JobName(name))
    job = {
        "name": name,
        "nnodes": 2,
        "nproc_per_node": 2,
        "script": "train.py",
        "working_dir": ".",
        "args": f"{args} --marks {marks}",
        "checkpoint": {"every_steps": 20},
        "shutdown_grace": 2,
        **more,
    }
    path = folder / "job.yaml"
    path.write_text(json.dumps(job))
    return path


def stored(harness: Harness) -> list[str]:
    store = open_store(harness.cluster.store_uri)
    try:
        return [info.key for info in store.list(packages_prefix(harness.cluster.name))]
    finally:
        store.close()


def test_a_packed_job_outlives_its_folder_and_a_machine(harness: Harness, project: Path) -> None:
    job = JobName("packed")
    stop = harness.stop_file(job)
    file = write_job(harness, project, job, f"--steps 1000000 --pause-ms 10 --stop-file {stop}")
    assert "train.py" in dtrain(harness, "submit", str(file), "--dry-run")
    assert not stored(harness)
    dtrain(harness, "submit", str(file))
    package = harness.spec(job).package
    assert package is not None
    assert stored(harness) == [package_key(harness.cluster.name, package.digest, package.nonce)]
    shutil.rmtree(project)
    before = harness.await_training(job)
    harness.await_commit(job)
    victim = before.members[1].agent
    harness.cluster.power_cut(victim)
    after = harness.await_training(job, after_attempt=before.attempt)
    assert victim not in {member.agent for member in after.members}
    harness.cluster.start_daemon(victim)
    stop.touch()
    harness.await_end(job)
    log = dtrain(harness, "logs", job, "--stdout")
    assert f"packages/trees/{job}-" in log
    harness.assert_released(job)
    trees = list(harness.cluster.folder.glob(f"agents/*/packages/trees/{job}-*"))
    harness.until("what was unpacked is gone", lambda: not any(path.exists() for path in trees))


def test_the_same_content_is_stored_once(harness: Harness, project: Path) -> None:
    job = JobName("again")
    file = write_job(harness, project, job, "--steps 5", restarts={"max": 3})
    dtrain(harness, "submit", str(file))
    harness.await_end(job)
    before = stored(harness)
    (project / "__pycache__").mkdir(exist_ok=True)
    (project / "__pycache__" / "x.pyc").write_bytes(b"made by running it here")
    told = dtrain(harness, "submit", str(file), "--set", "name=twice")
    assert "twice" in told
    harness.await_end(JobName("twice"))
    assert stored(harness) == before


def test_a_damaged_copy_ends_the_job_and_the_next_submission_mends_it(
    harness: Harness, project: Path
) -> None:
    job = JobName("damaged")
    (project / "lib" / "more.py").write_text("x = 1\n")
    # More machines than there are: nothing fetches it yet.
    file = write_job(harness, project, job, "--steps 5", nnodes="4:4", pack=True)
    dtrain(harness, "submit", str(file))
    package = harness.spec(job).package
    assert package is not None
    path = Path(harness.cluster.store_uri.removeprefix("file://")) / package_key(
        harness.cluster.name, package.digest, package.nonce
    )
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o600)
    path.write_bytes(data)
    harness.client.set_intent(job, nnodes=(1, 1))
    status = harness.await_end(job, JobPhase.FAILED)
    assert "SHA-256" in status.reason
    assert status.attempt == 1, "no machine can mend it: nothing was tried again"
    assert harness.events(job, EventReason.PACKAGE_UNUSABLE)
    harness.assert_released(job)
    dtrain(harness, "submit", str(file), "--set", "nnodes=1")
    again = harness.spec(job).package
    assert again is not None
    assert (again.digest, again.nonce != package.nonce) == (package.digest, True)
    harness.await_end(job)
