"""An upgrade by the book, under a job that trains: coordinators one by one, once back again, then agents."""

import pytest

from dtrain.protocol import codec
from dtrain.protocol.cluster import ReplicaRecord
from dtrain.protocol.ids import AgentName, JobName, ReplicaId
from dtrain.protocol.snapshot import NodeRecord
from tests.skew import old
from tests.skew.conftest import Clusters
from tests.skew.old import Release
from tests.support.harness import Harness, say

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]


def version_of(harness: Harness, name: str) -> str:
    """What a daemon says in etcd that it runs; "" while it is not registered."""
    keys = harness.keys
    kind: type[ReplicaRecord] | type[NodeRecord] = ReplicaRecord if name.startswith("c") else NodeRecord
    key = keys.coordinator(ReplicaId(name)) if name.startswith("c") else keys.node(AgentName(name))
    found = harness.cluster.etcd.range(key).items
    return codec.decode(kind, found[0].value).version if found else ""


def stop(harness: Harness, name: str) -> None:
    daemon = harness.cluster.daemon(name)
    daemon.terminate()
    harness.until(f"{name} has ended", lambda: not daemon.is_running)


def start(harness: Harness, name: str, release: Release) -> None:
    daemon = harness.cluster.daemon(name)
    daemon.use(release.python)
    daemon.start()
    harness.until(f"{name} runs {release.version}", lambda: version_of(harness, name) == release.version)


def led_by(harness: Harness, name: str, job: JobName, before: int) -> int:
    """Wait until ``name`` leads and has committed a checkpoint; return its term."""

    def leads() -> bool:
        return harness.cluster.leader() == name and harness.term() not in (0, before)

    harness.until(f"{name} leads", leads)
    term = harness.term()
    commit = harness.await_commit(job)
    harness.until("the term has committed", lambda: harness.commits(job)[-1].term == term)
    say(f"{name} ({version_of(harness, name)}) leads term {term}, checkpoint {commit.seq}")
    return term


def test_a_rolling_upgrade_restarts_no_rank(cluster_of: Clusters, former: Release) -> None:
    new = old.current()
    flags = ("--report-interval", "0.2", "--keep-ranks", "true")
    with cluster_of(coordinators="old", agents="old", agent_flags=flags) as harness:
        end = harness.stop_file("rolling")
        # An agent that stops gives up its lease: a job says itself how long to wait for the next one.
        args = f"--steps 1000000 --pause-ms 10 --stop-file {end}"
        job = harness.start("rolling", args, every_steps=25, reschedule_grace_s=300.0)
        pids, term = harness.pids(job), 0

        # Coordinators: each release leads twice, over what the other one has written.
        harness.led_by_former_release(job)
        stop(harness, "c1")
        term = led_by(harness, "c2", job, term)
        start(harness, "c1", new)
        stop(harness, "c2")
        term = led_by(harness, "c1", job, term)
        start(harness, "c2", former)  # thought better of it
        stop(harness, "c1")
        term = led_by(harness, "c2", job, term)
        start(harness, "c1", new)
        stop(harness, "c2")
        led_by(harness, "c1", job, term)
        start(harness, "c2", new)
        assert (harness.pids(job), harness.status(job).attempt) == (pids, 1)

        # Agents: their ranks, of the old release, go on under the new one.
        for name in ("a1", "a2"):
            stop(harness, name)
            start(harness, name, new)
            harness.until(f"{name} has adopted its ranks", lambda: harness.pids(job) == pids)
            harness.await_steps(job)
            harness.await_commit(job)
        assert (harness.pids(job), harness.status(job).attempt) == (pids, 1)

        # What was adopted is as good as what would have been started.
        harness.cluster.kill_rank(0, job=job)
        status = harness.await_training(job, after_attempt=1)
        assert (status.attempt, status.restore is not None) == (2, True)
        harness.await_commit(job)
        end.touch()
        harness.await_end(job)
        harness.assert_succeeded(job, int(harness.commits(job)[-1].step))
