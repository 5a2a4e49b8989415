"""The images of 0.1.0 are upgraded to this version's, one container after the other, while a job trains."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from dtrain.protocol import codec
from dtrain.protocol.cluster import ReplicaRecord
from dtrain.protocol.ids import AgentName, ReplicaId
from dtrain.protocol.snapshot import NodeRecord
from dtrain.testing import DtrainCluster
from dtrain.testing.images import Images

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "e2e" / "scripts" / "train.py"
FORMER = "0.1.0"

pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="module")
def former() -> Images:
    wheel = ROOT / "tests" / "skew" / "releases" / f"dtrain-{FORMER}-py3-none-any.whl"
    command = [ROOT / "deploy" / "docker" / "build-local.sh", "--wheel", wheel, "--tag", FORMER]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return Images(coordinator=f"dtrain-coordinator:{FORMER}", agent=f"dtrain-agent:{FORMER}")


@pytest.fixture
def cluster(former: Images) -> Iterator[DtrainCluster]:
    with DtrainCluster(agents=3, slots=1, images=former, ready_timeout_s=400.0) as made:
        yield made


def version_of(cluster: DtrainCluster, node: str) -> str:
    if node in cluster.coordinators:
        items = cluster.etcd.range(cluster.keys.coordinator(ReplicaId(node))).items
        return codec.decode(ReplicaRecord, items[0].value).version if items else ""
    items = cluster.etcd.range(cluster.keys.node(AgentName(node))).items
    return codec.decode(NodeRecord, items[0].value).version if items else ""


def upgraded(cluster: DtrainCluster, node: str, image: str) -> None:
    cluster.stop(node)
    cluster.replace(node, image=image)
    cluster.wait_ready(node)
    assert version_of(cluster, node) != FORMER


def test_every_container_is_upgraded_during_training(cluster: DtrainCluster):
    new = Images().resolved()
    job = cluster.submit(
        *(SCRIPT, "--steps", 10_000_000, "--pause-ms", 20), nnodes=2, checkpoint_every_steps=50
    )
    job.wait_for_commit()
    assert {version_of(cluster, node) for node in (*cluster.coordinators, *cluster.agents)} == {FORMER}

    pids = job.pids()
    for node in cluster.coordinators:
        upgraded(cluster, node, new.coordinator)
        job.wait_for_commit(after=job.commits()[-1].seq)
    assert (job.attempt, job.pids()) == (1, pids), job.describe()

    for node in cluster.agents:
        before = job.attempt
        moves = node in job.agents
        upgraded(cluster, node, new.agent)
        if moves:
            status = job.wait_for_attempt(before + 1)
            assert status.restore is not None
        job.wait_for_commit(after=job.commits()[-1].seq)
    job.cancel()
    job.wait(phase="CANCELLED")
