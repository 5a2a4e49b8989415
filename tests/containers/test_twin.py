"""The container twin keeps the contract of ``dtrain.testing``: each node is broken, mended and removed."""

import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dtrain.protocol.errors import NotFound, Refused
from dtrain.testing import DtrainCluster, engine, members

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "failover_test"
SCRIPT = EXAMPLE / "train.py"
READY_S = 400.0

pytestmark = pytest.mark.timeout(1200)


def left(cluster: str) -> list[str]:
    """What the engine still holds of a cluster."""
    client = engine.connect()
    try:
        return [
            f"{kind} {found.name}" for kind, found in engine._everything(client, f"{engine.LABEL}={cluster}")
        ]
    finally:
        client.close()


@pytest.fixture(scope="module")
def cluster() -> Iterator[DtrainCluster]:
    with DtrainCluster(agents=2, small_disk={"etcd-2": "260m"}, ready_timeout_s=READY_S) as made:
        yield made
    assert not left(made.id)


def answers(cluster: DtrainCluster, member: str) -> None:
    endpoint = cluster.endpoints[cluster.etcd_members.index(member)]
    cluster.until(f"{member} answers", lambda: members.status(endpoint))


def test_a_dead_leader_is_succeeded_and_comes_back_under_its_address(cluster: DtrainCluster):
    leader = cluster.leader()
    before = (cluster.address_of(leader), cluster.inner_address(leader))
    cluster.kill(leader)
    cluster.until("another one leads", lambda: cluster.leader() != leader)
    cluster.start(leader)
    cluster.wait_ready()
    assert (cluster.address_of(leader), cluster.inner_address(leader)) == before
    assert cluster.client.info().cluster == cluster.name


def test_a_coordinator_cannot_write_its_disk(cluster: DtrainCluster):
    tried = cluster.execute("c1", "sh", "-c", "echo x > /tmp/x; echo x > /opt/x; echo x > $HOME/x", user="0")
    assert tried.stderr.count("Read-only file system") == 3, tried.stderr


def test_a_disconnected_node_keeps_its_address_and_its_published_port(cluster: DtrainCluster):
    name = next(one for one in cluster.coordinators if one != cluster.leader())
    before = cluster.address_of(name)
    cluster.disconnect(name)
    cluster.until(f"{name} is given up", lambda: name not in cluster.registered())
    cluster.reconnect(name)
    cluster.wait_ready(name)
    [info] = [found for address, found in cluster.client.info_each(timeout_s=20).items() if address == before]
    assert getattr(info, "replica", info) == name


def test_a_partition_is_silent_and_heals(cluster: DtrainCluster):
    name = next(one for one in cluster.coordinators if one != cluster.leader())
    cluster.partition([name], cluster.etcd_members)
    cluster.until(f"{name} is given up", lambda: name not in cluster.registered())
    # The way to the other coordinators is open: only etcd is cut off.
    peer = cluster.inner_address(next(one for one in cluster.coordinators if one != name))
    assert cluster.execute(name, "python", "-c", _connect(peer, 7070)).returncode == 0
    silent = cluster.execute(name, "python", "-c", _connect(cluster.inner_address("etcd-0"), 2379))
    assert "timed out" in silent.stderr, silent.stderr
    cluster.heal()
    cluster.wait_ready(name)


def _connect(host: str, port: int) -> str:
    return f"import socket; socket.create_connection(({host!r}, {port}), timeout=2)"


def test_a_partition_holds_for_a_node_that_restarts(cluster: DtrainCluster):
    name = next(one for one in cluster.coordinators if one != cluster.leader())
    cluster.partition([name], cluster.etcd_members)
    cluster.kill(name)
    cluster.start(name)
    tried = cluster.execute(name, "python", "-c", _connect(cluster.inner_address("etcd-1"), 2379))
    assert tried.returncode != 0
    cluster.heal()
    cluster.wait_ready(name)


def test_the_leading_member_of_etcd_may_freeze_or_vanish(cluster: DtrainCluster):
    for broken, mended in ((cluster.pause, cluster.resume), (cluster.disconnect, cluster.reconnect)):
        member = cluster.etcd_leader()
        broken(member)
        cluster.until("another member leads", lambda member=member: cluster.etcd_leader() != member)
        mended(member)
        answers(cluster, member)


def test_a_member_of_etcd_is_replaced_by_one_without_data(cluster: DtrainCluster):
    before = cluster.inner_address("etcd-1")
    cluster.replace("etcd-1")
    answers(cluster, "etcd-1")
    assert cluster.inner_address("etcd-1") != before
    assert cluster.registered() >= set(cluster.coordinators)
    assert "is replaced" in cluster.logs("etcd-1")


def test_a_small_disk_has_no_byte_left_once_it_is_full(cluster: DtrainCluster):
    cluster.fill_disk("etcd-2")
    tried = cluster.execute("etcd-2", "sh", "-c", "head -c 100000 /dev/zero > /var/lib/etcd/more")
    assert "No space left" in tried.stderr
    cluster.free_disk("etcd-2")
    tried = cluster.execute("etcd-2", "sh", "-c", "head -c 100000 /dev/zero > /var/lib/etcd/more")
    assert tried.returncode == 0
    # With the alarm or the panic that a full disk may have caused, it comes back with its data.
    cluster.start("etcd-2")
    answers(cluster, "etcd-2")
    with pytest.raises(Refused, match="has no end"):
        cluster.fill_disk("etcd-0")


def test_a_job_survives_its_ranks_its_machine_and_a_new_machine(cluster: DtrainCluster):
    job = cluster.submit(SCRIPT, "--steps", 100_000, nnodes="1:2", checkpoint_every_steps=50)
    job.wait_for_step(5)
    cluster.kill_rank(job, 0)
    job.wait_for_attempt(2)
    killed = job.agents[0]
    cluster.kill(killed)
    cluster.until(f"{killed} is given up", lambda: killed not in job.agents and job.phase == "RUNNING")
    cluster.replace(killed)
    cluster.wait_ready(killed)
    # The new machine got the script, too.
    assert cluster.execute(killed, "sh", "-c", "ls /workspace/*/train.py").returncode == 0
    newest = job.commits()[-1].seq if job.commits() else 0
    job.wait_for_commit(after=newest)
    with pytest.raises(NotFound):
        cluster.kill_rank(job, 9)
    shown = cluster.cli("describe", "job", job.name)
    assert shown.returncode == 0, shown.stderr
    job.cancel()
    job.wait(phase="CANCELLED")
    assert cluster.audit().commits > 0


def test_the_documented_test_passes_in_containers(tmp_path: Path):
    text = (ROOT / "docs" / "testing.md").read_text()
    found = re.search(r"<!-- examples/failover_test/test_failover.py -->\n```python\n(.*?)```", text, re.S)
    assert found
    (tmp_path / "test_failover.py").write_text(found[1].replace("ProcessCluster", "DtrainCluster"))
    shutil.copy(SCRIPT, tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_failover.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=1100,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]


KILLED = """
import time
from dtrain.testing import DtrainCluster

cluster = DtrainCluster(agents=0, coordinators=1, etcd_members=1, ready_timeout_s=400)
print(cluster.id, flush=True)
cluster.start_all()
print("ready", flush=True)
time.sleep(600)
"""


def test_nothing_is_left_of_a_killed_test():
    with subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True) as victim:
        assert victim.stdout is not None
        name = victim.stdout.readline().strip()
        assert victim.stdout.readline().strip() == "ready"
        assert left(name)
        victim.send_signal(signal.SIGKILL)
    # Nobody else starts a cluster meanwhile, whose sweep would do it: the watcher has to.
    deadline = time.monotonic() + 120
    while found := left(name):
        assert time.monotonic() < deadline, found
        time.sleep(0.1)
