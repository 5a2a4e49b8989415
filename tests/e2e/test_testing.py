"""The public failover fixtures, as processes: what the documentation shows, each fault of the contract."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from dtrain.protocol.errors import NotFound, Refused
from dtrain.testing import ProcessCluster

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "failover_test"
SCRIPT = EXAMPLE / "train.py"

pytestmark = pytest.mark.timeout(900)


def documented() -> str:
    """The first test of the users' page, as it stands there."""
    text = (ROOT / "docs" / "testing.md").read_text()
    found = re.search(r"<!-- examples/failover_test/test_failover.py -->\n```python\n(.*?)```", text, re.S)
    assert found, "docs/testing.md shows no first test"
    return found[1]


def test_the_documented_test_is_the_example_and_is_short():
    assert documented() == (EXAMPLE / "test_failover.py").read_text()
    body = documented().partition("def ")[2].splitlines()
    assert len(body) < 15


def test_the_documented_test_passes_as_the_documentation_runs_it(tmp_path):
    (tmp_path / "test_failover.py").write_text(documented())
    shutil.copy(SCRIPT, tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_failover.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]


@pytest.fixture(scope="module")
def cluster() -> Iterator[ProcessCluster]:
    with ProcessCluster(agents=2, ready_timeout_s=300) as made:
        yield made


def test_every_fault_of_the_contract_and_its_undoing(cluster: ProcessCluster):
    """One job, one thing broken after the other: what only disturbs must not restart it."""
    # Endless as far as this test goes; its last fault is a rank's death, then it is cancelled.
    job = cluster.submit(SCRIPT, "--steps", 100_000, nnodes=2, checkpoint_every_steps=50)
    job.wait_for_step(5)
    assert job.agents == tuple(str(member.agent) for member in job.members)
    assert set(job.pids()) == {0, 1}

    leader = cluster.leader()
    cluster.kill(leader)
    cluster.until("another one leads", lambda: cluster.leader() != leader)
    cluster.start(leader)
    cluster.wait_ready()

    other = next(name for name in cluster.coordinators if name != cluster.leader())
    cluster.disconnect(other)
    cluster.until(f"{other} is given up", lambda: other not in cluster.registered())
    cluster.reconnect(other)
    cluster.wait_ready(other)

    cluster.replace(other)
    cluster.restart(cluster.leader())
    cluster.wait_ready()

    member = cluster.etcd_leader()
    cluster.kill(member)
    cluster.until("another member leads", lambda: cluster.etcd_leader() != member)
    cluster.start(member)

    commit = job.wait_for_commit()
    cluster.kill("store")
    cluster.start("store")
    job.wait_for_commit(after=commit.seq)
    assert job.attempt == 1, job.describe()

    job_rank = job.pids()[1]
    cluster.kill_rank(job, 1)
    job.wait_for_attempt(2)
    assert not psutil.pid_exists(job_rank)
    assert job.pids()[1] != job_rank
    assert job.events("RankSignaled")
    with pytest.raises(NotFound):
        cluster.kill_rank(job, 7)

    shown = cluster.cli("get", "jobs", "-o", "name")
    assert (shown.returncode, shown.stdout.strip()) == (0, f"job/{job.name}"), shown.stderr
    job.cancel()
    job.wait(phase="CANCELLED")
    assert cluster.audit().commits > 0


def test_a_paused_machine_stands_still_and_goes_on(cluster: ProcessCluster):
    cluster.pause("a1")
    states = {psutil.Process(pid).status() for pid in cluster.local.daemon("a1").pids()}
    assert states - {psutil.STATUS_ZOMBIE} == {psutil.STATUS_STOPPED}
    cluster.until("a1 is given up", lambda: "a1" not in cluster.registered())
    cluster.resume("a1")
    cluster.wait_ready("a1")


def test_a_job_that_fails_tells_why(cluster: ProcessCluster, tmp_path: Path):
    (tmp_path / "bad.py").write_text("raise SystemExit('there is nothing to train')\n")
    job = cluster.submit("bad.py", working_dir=tmp_path, restarts={"max": 0})
    with pytest.raises(AssertionError) as caught:
        job.wait()
    told = str(caught.value)
    assert "FAILED" in told
    assert "there is nothing to train" in told


def test_what_processes_cannot_do_is_refused(cluster: ProcessCluster):
    for node in (*cluster.etcd_members, "store"):
        with pytest.raises(Refused):
            cluster.disconnect(node)
    with pytest.raises(NotFound, match="there are c1"):
        cluster.kill("a9")


def test_nothing_is_left_when_a_test_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DTRAIN_TESTING_LOGS", str(tmp_path / "logs"))
    folder = tmp_path / "cluster"
    with (
        pytest.raises(RuntimeError, match="the test fails") as caught,
        ProcessCluster(
            agents=1, coordinators=1, etcd_members=1, store="dir", folder=folder, ready_timeout_s=300
        ),
    ):
        raise RuntimeError("the test fails")
    [logs] = (tmp_path / "logs").iterdir()
    assert {path.name for path in logs.iterdir()} >= {"c1.log", "a1.log", "etcd-0.log"}
    assert str(logs) in " ".join(caught.value.__notes__)
    left = [
        p.pid for p in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(p.info["cmdline"] or ())
    ]
    assert not left
