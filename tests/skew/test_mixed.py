"""Coordinators of one release, agents of another, and a client of each: a job's whole life."""

import json
import sys
from pathlib import Path

import grpc
import pytest

from dtrain.protocol import codec
from dtrain.protocol.errors import DtrainError
from dtrain.protocol.events import EventReason
from dtrain.protocol.ids import AgentName, JobName
from dtrain.protocol.pb import agent_pb2
from dtrain.protocol.pb.agent_pb2_grpc import AgentStub
from dtrain.protocol.snapshot import NodeRecord
from dtrain.storage.etcd.port import Delete, Put, Txn
from tests.skew import old
from tests.skew.conftest import Clusters
from tests.skew.old import ROOT, Release
from tests.support.harness import SCRIPTS, Harness, say

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

JOB_FILE = Path(__file__).parent / "job-0.1.0.yaml"
"""A job file with every setting that 0.1.0 knows."""


def test_a_release_runs_alone_and_a_mixture_would_be_seen(former: Release) -> None:
    """The very thing that the other tests rest on."""
    assert former.foreign_modules() == []
    portions = [str(path.parent) for path in sorted(ROOT.glob("*/dtrain"))]
    assert any("__path__" in found for found in former.foreign_modules(PYTHONPATH=":".join(portions)))
    assert Path(former.python).resolve() == Path(sys.executable).resolve(), "the same Python, other libraries"


def cli(harness: Harness, release: Release, *words: str) -> str:
    addresses = ",".join(harness.cluster.addresses)
    config = str(harness.folder / "config")
    return release.run("-m", "dtrain.cli", *words, DTRAIN_COORDINATORS=addresses, XDG_CONFIG_HOME=config)


def versions(harness: Harness, release: Release, what: str) -> dict[str, str]:
    listed = json.loads(cli(harness, release, "get", what, "-o", "json"))
    items = listed["items"] if isinstance(listed, dict) else listed
    found = [item.get("record") or item.get("node") or item for item in items]
    return {str(item.get("replica") or item.get("agent")): str(item["version"]) for item in found}


def what_is_of_another_major_version_is_refused_and_harms_nothing(harness: Harness) -> None:
    """A job's record, a submission and a command: of whichever release leader and agent are."""
    etcd, key = harness.cluster.etcd, harness.keys.spec(JobName("alien"))
    later = codec.dumps(codec.loads(codec.encode(harness.spec(JobName("mixed")))) | {"v": 2, "name": "alien"})
    etcd.txn(Txn((), (Put(key, later),)))
    leader = harness.cluster.leader()
    assert leader is not None
    told = f"left alone: {key} cannot be read: JobSpec has version 2"
    harness.until("the leader leaves it alone", lambda: told in harness.log(leader))
    with pytest.raises(DtrainError, match="version 2; this dtrain reads version 1"):
        harness.client.submit(later, "skew")
    node = codec.decode(NodeRecord, etcd.range(harness.keys.node(AgentName("a1"))).items[0].value)
    header = agent_pb2.Header(
        cluster=harness.cluster.name, term=harness.term(), job="alien", uid="u", attempt=1, id="prepare.1"
    )
    command = agent_pb2.Command(header=header, prepare=agent_pb2.Prepare(spec=later, world_size=1, nnodes=1))
    with grpc.insecure_channel(node.address) as channel, pytest.raises(grpc.RpcError) as refused:
        AgentStub(channel).Execute(command, timeout=20)
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "JobSpec has version 2" in refused.value.details()
    etcd.txn(Txn((), (Delete(key),)))


@pytest.mark.parametrize(("coordinators", "agents"), [("new", "old"), ("old", "new")])
def test_two_releases_run_a_job_together(
    cluster_of: Clusters, former: Release, coordinators: str, agents: str
) -> None:
    releases = {"old": former, "new": old.current()}
    with cluster_of(coordinators=coordinators, agents=agents) as harness:
        # Everybody is what this test says it is.
        for client in releases.values():
            expected = releases[coordinators].version, releases[agents].version
            assert set(versions(harness, client, "coordinators").values()) == {expected[0]}
            assert set(versions(harness, client, "agents").values()) == {expected[1]}
        # The client is of the agents' release: it and the coordinators are the second pair.
        client, other = releases[agents], releases[coordinators]
        stop = harness.stop_file("mixed")
        marks = harness.folder / "marks" / "mixed"
        args = f"--steps 1000000 --pause-ms 10 --stop-file {stop} --marks {marks}"
        words = ("--set", f"working_dir={SCRIPTS}", "--set", f"args={args}")
        assert cli(harness, client, "submit", str(JOB_FILE), *words, "-o", "name") == "job/mixed\n"
        job = JobName("mixed")
        harness.await_training(job)
        harness.await_commit(job, after=0)
        harness.cluster.kill_rank(1, job=job)
        status = harness.await_training(job, after_attempt=1)
        assert status.restore is not None
        pair = f"coordinators {coordinators}, agents {agents}"
        say(f"{pair}: attempt {status.attempt} from step {status.restore.step}")
        harness.await_event(job, EventReason.RESTORED)
        for each in (client, other):
            assert "mixed" in cli(harness, each, "get", "jobs")
            assert "RUNNING" in cli(harness, each, "describe", "job", "mixed", "-o", "json")
            assert "RankSignaled" in cli(harness, each, "get", "events", "mixed", "-o", "json")
            assert cli(harness, each, "get", "checkpoints", "mixed")
            cli(harness, each, "logs", "mixed", "--rank", "0")
        harness.await_commit(job)
        stop.touch()
        harness.await_end(job)
        harness.assert_succeeded(job, int(harness.commits(job)[-1].step))
        what_is_of_another_major_version_is_refused_and_harms_nothing(harness)
        # A second one is cancelled by the client of the other release.
        second = harness.start("second", "--steps 1000000 --pause-ms 10")
        cli(harness, client, "cancel", "second", "--yes")
        harness.until("it is cancelled", lambda: harness.status(second).phase == "CANCELLED")
        harness.assert_released(second)
