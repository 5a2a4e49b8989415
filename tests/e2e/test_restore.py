"""What a restart reads, and from where: what lies on the machine already does not come from the store."""

import os
import re
import signal

import pytest
from tests.support.harness import Harness

from dtrain.protocol.checkpoint import CommitRecord
from dtrain.protocol.ids import JobName

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]


def ask_for_checkpoint(harness: Harness, job: JobName, token: str) -> CommitRecord:
    seq = int(harness.status(job).seq_last)
    harness.client.set_intent(job, checkpoint_token=token)
    return harness.await_commit(job, after=seq)


def note(harness: Harness, job: JobName) -> str:
    (snapshot,) = harness.snapshots(job).values()
    return snapshot.note


def test_a_restart_on_the_same_machine_reads_nothing_from_the_store(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    with Harness(tmp_path_factory.mktemp("s3"), store="s3", agents=1) as harness:
        harness.await_ready()
        args = f"--steps 1000000 --pause-ms 10 --size 1500 --stop-file {harness.stop_file('near')}"
        job = harness.start("near", args, nnodes=1, every_steps=0)
        record = ask_for_checkpoint(harness, job, "one")
        attempt = harness.status(job).attempt
        harness.until("the agent has heard of the commit", lambda: not saving(harness, job))
        harness.until("the manifest is kept", lambda: kept_manifests(harness))
        assert harness.cluster.weed is not None
        server = harness.cluster.weed.pid
        assert server is not None
        # Whoever needed a single byte of the store now would not train before it is thawed.
        os.kill(server, signal.SIGSTOP)
        try:
            harness.cluster.kill_rank(1, job=job)
            status = harness.await_training(job, after_attempt=attempt)
            assert status.restore is not None
            assert (status.restore.seq, status.restore.step) == (record.seq, record.step)
            assert re.search(
                r"restored checkpoint \d+: [\d.]+ MB from snapshots in memory here$", note(harness, job)
            )
        finally:
            os.kill(server, signal.SIGCONT)
        harness.stop_file(job).touch()
        harness.await_end(job)
        steps = int(harness.commits(job)[-1].step)
        calm = harness.submit("calm", f"--steps {steps} --size 1500", nnodes=1, every_steps=0)
        harness.await_end(calm)
        assert harness.digests(calm) == harness.digests(job) != {}
        harness.assert_clean()


def saving(harness: Harness, job: JobName) -> bool:
    return any(snapshot.saving for snapshot in harness.snapshots(job).values())


def kept_manifests(harness: Harness) -> bool:
    return any(harness.cluster.folder.rglob("checkpoints/manifests/*.json.gz"))
