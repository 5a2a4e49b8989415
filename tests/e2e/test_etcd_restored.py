"""etcd loses its data and is restored from a backup while jobs train, by the scripts that operators use.

With raised revisions nobody has to be told anything. Without them agents obey
nobody until an operator says that they may.
"""

import os
import signal
import time
from pathlib import Path

import pytest
from tests.contract.etcd.members import backup, leader_of, restore
from tests.support.harness import Harness, say

from dtrain.protocol import codec
from dtrain.protocol.events import EventReason
from dtrain.protocol.ids import RESTORE_BUMP_LEAST, JobName, Rank
from dtrain.protocol.job import JobPhase
from dtrain.protocol.snapshot import NodeRecord
from dtrain.storage.etcd.port import Put, Txn

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

CONFIG_EXIT = 78
REVISIONS = 1500
"""More than everybody writes between the restoration and the end of the test."""


def train(harness: Harness, name: str) -> JobName:
    args = f"--steps 1000000 --pause-ms 10 --stop-file {harness.stop_file(name)}"
    return harness.start(name, args, nproc=1, every_steps=40)


def lose(harness: Harness, saved: Path, folder: Path, *, bump: bool) -> str:
    """All members lose their data and get those of ``saved``; tell what the operator was told."""
    servers = harness.cluster.etcd_servers
    servers.stop()
    said = restore(servers, saved, folder, bump=bump)
    servers.start()
    servers.wait_ready()
    return said


def problems_of(harness: Harness) -> dict[str, str]:
    """What each agent says is wrong with it."""
    found = harness.cluster.read("agents/").items()
    nodes = [codec.decode(NodeRecord, kv.value) for key, kv in found if key.endswith("/node")]
    return {node.agent: node.problem for node in nodes}


def test_training_goes_on_through_a_restoration_with_raised_revisions(tmp_path: Path) -> None:
    with Harness(tmp_path / "r", agents=2, slots=2, etcd_members=3) as harness:
        harness.await_ready()
        servers = harness.cluster.etcd_servers
        job = train(harness, "old")
        harness.await_commit(job, after=0)
        saved = backup(servers, tmp_path / "backups")
        known = {record.seq for record in harness.commits(job)}
        # What the backup does not know: a leader, an attempt, two checkpoints, a job, and an election of
        # etcd's, so that the raft terms of the restored cluster are below those that everybody has seen.
        old = harness.term()
        harness.cluster.kill_leader_process()
        harness.until("there is a new leader", lambda: harness.term() not in (0, old))
        os.kill(harness.pids(job)[Rank(0)], signal.SIGKILL)
        harness.await_training(job, after_attempt=1)
        late = train(harness, "late")
        harness.await_training(late)
        late_pids = set(harness.pids(late).values())
        leading = leader_of(servers)
        servers.kill(leading)
        servers.start_member(leading)
        servers.wait_ready()
        harness.await_commit(job)
        forgotten = harness.await_commit(job)
        pids, term, newest = harness.pids(job), harness.term(), harness.cluster.etcd.range("/").revision
        assert len(pids) == 2
        harness.assert_audited()

        began = time.monotonic()
        said = lose(harness, saved, tmp_path, bump=True)
        assert "nothing: coordinators and agents go on by themselves" in said
        back = time.monotonic()
        say(f"etcd was away for {back - began:.1f} s")
        harness.until(
            "the attempt that etcd had forgotten is led again",
            lambda: (s := harness.status(job)).attempt == 2 and s.phase is JobPhase.RUNNING,
        )
        assert harness.term() >= newest + RESTORE_BUMP_LEAST > term
        first = harness.await_commit(job, after=forgotten.seq)
        say(f"the next checkpoint was committed {time.monotonic() - back:.1f} s after etcd was back")
        assert harness.pids(job) == pids, "ranks were restarted"
        assert first.attempt == forgotten.attempt == 2

        # Numbers went on above the forgotten ones; of these none is adopted, none is deleted.
        status = harness.status(job)
        assert status.unknown_from <= forgotten.seq <= status.unknown_to < first.seq
        committed = {record.seq for record in harness.commits(job)}
        assert not {seq for seq in committed if seq not in known and seq <= status.unknown_to}
        manifest = harness.manifest(forgotten)
        assert (manifest.seq, manifest.nonce) == (forgotten.seq, forgotten.nonce)
        told = " ".join(event.message for event in harness.events(job, EventReason.ETCD_RESTORED))
        assert "attempt 2 goes on" in told
        assert "neither used nor deleted" in told
        # The job that etcd does not know ends in order, and the operator sees it.
        harness.until("the ranks of the unknown job are gone", lambda: not late_pids & harness.alive())
        answers = harness.client.info_each().values()
        problems = [p for info in answers for p in getattr(info, "problems", ())]
        assert any(f"etcd knows no job {late}" in problem for problem in problems), problems
        harness.client.set_intent(job, wanted="cancel")
        harness.await_end(job, JobPhase.CANCELLED)


def test_agents_obey_an_etcd_whose_revisions_went_back_only_when_they_are_told(tmp_path: Path) -> None:
    flags = ("--report-interval", "0.2", "--keep-ranks", "true")
    with Harness(tmp_path / "r", agents=2, slots=1, agent_flags=flags) as harness:
        harness.await_ready()
        etcd = harness.cluster.etcd
        job = train(harness, "old")
        harness.await_commit(job, after=0)
        saved = backup(harness.cluster.etcd_servers, tmp_path / "backups")
        # A change of leader, far on, and two commits that the backup does not know of.
        far = etcd.range(harness.keys.leader).revision + REVISIONS
        while etcd.txn(Txn((), (Put("/elsewhere", b"x"),))).revision <= far:
            pass
        old = harness.term()
        harness.cluster.kill_leader_process()
        harness.until("there is a new leader", lambda: harness.term() not in (0, old))
        harness.await_commit(job)
        forgotten = harness.await_commit(job)
        pids, term = harness.pids(job), harness.term()
        assert harness._auditing is not None
        harness.assert_audited()
        # What follows is another history: the auditor of this one has done its work.
        harness._auditing.close()

        said = lose(harness, saved, tmp_path, bump=False)
        assert "--accept-restored-etcd" in said
        coordinators, agents = harness.cluster.coordinators, harness.cluster.agents
        for daemon in coordinators.values():
            assert daemon.wait(60.0), f"{daemon.name} goes on with another history"
            assert daemon.exit_code == CONFIG_EXIT
        assert "etcd was restored or replaced" in "".join(harness.log(name) for name in coordinators)
        harness.await_steps(job)

        # Started again without a thought, they lead under a term that agents have long left behind.
        for name in coordinators:
            harness.cluster.start_daemon(name)
        harness.until("somebody leads", lambda: 0 < harness.term() < term)
        harness.until(
            "every agent says that it obeys nobody",
            lambda: (
                len(found := problems_of(harness)) == 2
                and all("obeys nobody" in problem for problem in found.values())
            ),
        )

        def says_what_to_do() -> str:
            answers = harness.client.info_each().values()
            problems = [p for info in answers for p in getattr(info, "problems", ())]
            return next((p for p in problems if "restored from an older state" in p), "")

        assert "--accept-restored-etcd" in harness.until("the leader says what to do", says_what_to_do)
        harness.await_steps(job)
        assert harness.pids(job) == pids, "an agent obeyed a term that is over"

        # The operator's word: agents that leave their ranks alone, and forget the terms they have obeyed.
        # Nobody leads meanwhile, who would call them lost.
        for daemon in coordinators.values():
            daemon.terminate()
        for daemon in coordinators.values():
            assert daemon.wait(60.0)
        for daemon in agents.values():
            daemon.terminate()
            assert daemon.wait(60.0)
            daemon._command = (*daemon._command, "--accept-restored-etcd", "true")
            harness.cluster.start_daemon(daemon.name)
        harness.until("all agents are registered", lambda: len(problems_of(harness)) == 2)
        for name in coordinators:
            harness.cluster.start_daemon(name)
        began = time.monotonic()
        first = harness.await_commit(job, after=forgotten.seq)
        say(f"the next checkpoint was committed {time.monotonic() - began:.1f} s after agents had been told")
        assert harness.pids(job) == pids, "ranks were restarted"
        assert not any(problems_of(harness).values())
        assert first.seq > forgotten.seq
        manifest = harness.manifest(forgotten)
        assert (manifest.seq, manifest.nonce) == (forgotten.seq, forgotten.nonce)
        harness.client.set_intent(job, wanted="cancel")
        harness.await_end(job, JobPhase.CANCELLED)
