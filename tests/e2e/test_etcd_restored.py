"""etcd is restored from an older snapshot while a job trains: noticed, survived, put right by an operator."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.contract.etcd.members import etcdctl, restore
from tests.support.harness import Harness, say

from dtrain.protocol.job import JobPhase
from dtrain.storage.etcd.port import Put, Txn

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

CONFIG_EXIT = 78
REVISIONS = 1500
"""More than everybody writes between the restoration and the end of the test."""


@pytest.fixture(scope="module")
def restored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    """A cluster of its own: its history is no history any more."""
    with Harness(tmp_path_factory.mktemp("r"), agents=2, slots=1) as made:
        made.await_ready()
        yield made


def move_on(harness: Harness, revision: int) -> None:
    """Write elsewhere until etcd is beyond ``revision``."""
    while harness.cluster.etcd.txn(Txn((), (Put("/elsewhere", b"x"),))).revision <= revision:
        pass


def test_a_restored_etcd_stops_coordinators_and_no_rank(restored: Harness, tmp_path: Path) -> None:
    harness = restored
    servers = harness.cluster.etcd_servers
    args = f"--steps 1000000 --pause-ms 10 --stop-file {harness.stop_file('old')}"
    job = harness.start("old", args, nproc=1, every_steps=40)
    harness.await_commit(job, after=0)
    snapshot = tmp_path / "snapshot.db"
    etcdctl(servers, "snapshot", "save", str(snapshot))
    # A change of leader, far on, and two commits that the snapshot does not know of.
    move_on(harness, harness.cluster.etcd.range(harness.keys.leader).revision + REVISIONS)
    old = harness.term()
    harness.cluster.kill_leader_process()
    harness.until("there is a new leader", lambda: harness.term() not in (0, old))
    harness.await_commit(job)
    forgotten = harness.await_commit(job)
    pids, term = harness.pids(job), harness.term()
    newest = harness.cluster.etcd.range(harness.keys.leader).revision
    assert harness._auditing is not None
    harness.assert_audited()
    # What follows is another history: the auditor of this one has done its work.
    harness._auditing.close()

    servers.stop()
    restore(servers, snapshot, tmp_path)
    servers.start()
    servers.wait_ready()
    for daemon in harness.cluster.coordinators.values():
        assert daemon.wait(60.0), f"{daemon.name} goes on with another history"
        assert daemon.exit_code == CONFIG_EXIT
    told = "".join(harness.log(name) for name in harness.cluster.coordinators)
    assert "etcd was restored or replaced" in told
    harness.await_steps(job)

    # Started again without a thought, they lead under a term that agents have long left behind.
    for name in harness.cluster.coordinators:
        harness.cluster.start_daemon(name)
    harness.until("somebody leads", lambda: 0 < harness.term() < term)

    def says_what_to_do() -> str:
        answers = harness.client.info_each().values()
        problems = [p for info in answers for p in getattr(info, "problems", ())]
        return next((p for p in problems if "restored from an older state" in p), "")

    problem = harness.until("the leader says what to do", says_what_to_do)
    say(problem)
    assert "--bump-revision" in problem
    step, began = harness.last_step(job), time.monotonic()
    harness.until("5 s have passed", lambda: time.monotonic() - began > 5.0)
    assert harness.last_step(job) > step + 5, "an agent obeyed a term that is over"

    # The operator's step: no revision that was given out before is given out again.
    for name in harness.cluster.coordinators:
        harness.cluster.daemon(name).terminate()
    for daemon in harness.cluster.coordinators.values():
        assert daemon.wait(30.0)
    move_on(harness, newest)
    for name in harness.cluster.coordinators:
        harness.cluster.start_daemon(name)
    harness.until("somebody leads again", lambda: harness.term() > term)
    harness.await_steps(job)
    harness.until("the same ranks train", lambda: harness.pids(job) == pids)
    # Agents obey again.
    harness.client.set_intent(job, wanted="cancel")
    harness.await_end(job, JobPhase.CANCELLED)
    # Nothing that the store holds and etcd forgot was collected.
    manifest = harness.manifest(forgotten)
    assert (manifest.seq, manifest.nonce) == (forgotten.seq, forgotten.nonce)
