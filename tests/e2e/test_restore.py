"""What a restart reads, and from where: what lies on the machine already does not come from the store."""

import os
import re
import signal
from collections.abc import Callable

import pytest
from tests.support.harness import Harness

from dtrain.protocol.checkpoint import CommitRecord
from dtrain.protocol.ids import JobName

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


def ask_for_checkpoint(harness: Harness, job: JobName, token: str) -> CommitRecord:
    seq = int(harness.status(job).seq_last)
    harness.client.set_intent(job, checkpoint_token=token)
    return harness.await_commit(job, after=seq)


def test_restarts_on_the_same_machine_read_nothing_from_the_store(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """After a rank's crash from the arena, which outlives the agent; after the launcher's from the cache."""
    flags = ("--report-interval", "0.2", "--cache-size", "1GB")
    with Harness(tmp_path_factory.mktemp("s3"), store="s3", agents=1, agent_flags=flags) as harness:
        harness.await_ready()
        (agent,) = harness.cluster.agents
        args = f"--steps 1000000 --pause-ms 10 --size 2500 --stop-file {harness.stop_file('near')}"
        job = harness.start("near", args, nnodes=1, every_steps=0)
        record = ask_for_checkpoint(harness, job, "one")
        folder = harness.cluster.folder
        harness.until("the manifest is kept", lambda: any(folder.rglob("checkpoints/manifests/*.gz")))
        assert harness.cluster.weed is not None
        server = harness.cluster.weed.pid
        assert server is not None
        # Whoever needed a single byte of the store from now on would not train before it is thawed.
        os.kill(server, signal.SIGSTOP)
        try:
            crash(
                harness,
                job,
                record,
                lambda: harness.cluster.kill_rank(1, job=job),
                "snapshots in memory here",
            )
            before = harness.cluster.daemon(agent).process_pid
            harness.cluster.kill_agent(agent)
            harness.until(
                "another agent runs", lambda: harness.cluster.daemon(agent).process_pid not in (None, before)
            )
            harness.await_steps(job)
            crash(
                harness,
                job,
                record,
                lambda: harness.cluster.kill_rank(0, job=job),
                "snapshots in memory here",
            )
            crash(harness, job, record, lambda: harness.cluster.kill_launcher(agent), "the cache here")
        finally:
            os.kill(server, signal.SIGCONT)
        harness.stop_file(job).touch()
        harness.await_end(job)
        steps = int(harness.commits(job)[-1].step)
        calm = harness.submit("calm", f"--steps {steps} --size 2500", nnodes=1, every_steps=0)
        harness.await_end(calm)
        assert harness.digests(calm) == harness.digests(job) != {}
        harness.assert_clean()


def crash(
    harness: Harness, job: JobName, record: CommitRecord, strike: Callable[[], object], source: str
) -> None:
    """Strike; the job must train again from the checkpoint, with all of it from one place."""
    attempt = harness.status(job).attempt
    strike()
    status = harness.await_training(job, after_attempt=attempt)
    assert status.restore is not None
    assert (status.restore.seq, status.restore.step) == (record.seq, record.step)
    (snapshot,) = harness.snapshots(job).values()
    assert re.fullmatch(rf"restored checkpoint {record.seq}: [\d.]+ MB from {source}", snapshot.note)
