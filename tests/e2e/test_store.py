"""The store is damaged, or away: restores look before they trust, and training never waits for it."""

import os
import signal
import time
from pathlib import Path

import pytest
from tests.support.harness import Harness, say

from dtrain.protocol.checkpoint import CommitRecord
from dtrain.protocol.events import EventReason
from dtrain.protocol.ids import JobName

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]


def store_folder(harness: Harness) -> Path:
    return harness.cluster.folder / "store"


def damage(harness: Harness, record: CommitRecord) -> str:
    """Flip one byte of a tensor in one blob of a checkpoint, in its file; return the blob's key."""
    manifest = harness.manifest(record)
    chunk = manifest.tensors["model.0.weight"].chunks[0]
    key = manifest.blobs[chunk.b].key
    (path,) = [path for path in store_folder(harness).rglob(key.rpartition("/")[2]) if path.is_file()]
    data = bytearray(path.read_bytes())
    data[chunk.off + chunk.len // 2] ^= 0x01
    path.chmod(0o600)
    path.write_bytes(data)
    return key


def test_a_damaged_checkpoint_is_quarantined_and_the_one_before_restored(harness: Harness) -> None:
    args = f"--steps 1000000 --pause-ms 10 --stop-file {harness.stop_file('damaged')}"
    # Nothing is committed between the damage and the fault: this one is asked for by hand.
    job = harness.start("damaged", args, every_steps=0, keep_last=5)
    first = ask_for_checkpoint(harness, job, "one")
    second = ask_for_checkpoint(harness, job, "two")
    key = damage(harness, second)
    attempt = harness.status(job).attempt
    harness.cluster.kill_rank(1, job=job)
    status = harness.await_training(job, after_attempt=attempt + 1)
    assert status.restore is not None
    assert (status.restore.seq, status.restore.step) == (first.seq, first.step)
    event = harness.await_event(job, EventReason.CHECKPOINT_QUARANTINED)
    assert key in event.message
    (bad,) = harness.bad(job)
    assert (bad.seq, bad.blob) == (second.seq, key)
    assert bad.expected != bad.found
    # Every rank went back: none has trained on from the damaged one.
    resumed = {}
    for mark in harness.marks(job):
        if mark.attempt == status.attempt:
            resumed.setdefault(mark.rank, mark.step)
    assert resumed == dict.fromkeys(range(4), first.step)
    newer = ask_for_checkpoint(harness, job, "three")
    harness.stop_file(job).touch()
    harness.await_end(job)
    assert harness.commits(job)[-1].seq > newer.seq
    # Damage of the store cost an attempt, but none of the budget that is for the script's failures.
    steps = int(harness.commits(job)[-1].step)
    calm = harness.submit("undamaged", f"--steps {steps}", every_steps=0)
    harness.await_end(calm)
    assert harness.digests(calm) == harness.digests(job) != {}


def ask_for_checkpoint(harness: Harness, job: JobName, token: str) -> CommitRecord:
    seq = int(harness.status(job).seq_last)
    harness.client.set_intent(job, checkpoint_token=token)
    return harness.await_commit(job, after=seq)


def test_training_goes_on_while_the_store_is_away(harness: Harness) -> None:
    args = f"--steps 1000000 --pause-ms 10 --stop-file {harness.stop_file('storeless')}"
    job = harness.start("storeless", args, timeout_s=8.0)
    harness.await_commit(job, after=0)
    pids, attempt = harness.pids(job), harness.status(job).attempt
    folder, away = store_folder(harness), harness.cluster.folder / "store-away"
    # A file in its place: not even a new folder of that name can be made.
    folder.rename(away)
    folder.write_text("this disk is gone")
    began = time.monotonic()
    event = harness.await_event(job, EventReason.CHECKPOINT_ABORTED)
    say(f"store away: first abort after {time.monotonic() - began:.1f} s: {event.message}")
    harness.await_steps(job, 20)
    seq = int(harness.status(job).seq_last)
    folder.unlink()
    away.rename(folder)
    harness.await_commit(job, after=seq)
    assert harness.pids(job) == pids
    assert harness.status(job).attempt == attempt
    harness.stop_file(job).touch()
    harness.await_end(job)
    harness.assert_succeeded(job, int(harness.commits(job)[-1].step))


def test_training_goes_on_while_an_s3_server_hangs(tmp_path_factory: pytest.TempPathFactory) -> None:
    with Harness(tmp_path_factory.mktemp("s3"), store="s3", agents=2) as harness:
        harness.await_ready()
        args = f"--steps 1000000 --pause-ms 10 --stop-file {harness.stop_file('hung')}"
        job = harness.start("hung", args, timeout_s=3.0)
        harness.await_commit(job, after=0)
        pids, attempt = harness.pids(job), harness.status(job).attempt
        assert harness.cluster.weed is not None
        server = harness.cluster.weed.pid
        assert server is not None
        os.kill(server, signal.SIGSTOP)
        try:
            event = harness.await_event(job, EventReason.CHECKPOINT_ABORTED)
            say(f"S3 server frozen: {event.message}")
            harness.await_steps(job, 20)
        finally:
            os.kill(server, signal.SIGCONT)
        harness.await_commit(job)
        assert (harness.status(job).attempt, harness.pids(job)) == (attempt, pids)
        harness.stop_file(job).touch()
        harness.await_end(job)
        harness.assert_succeeded(job, int(harness.commits(job)[-1].step))
        harness.assert_clean()
