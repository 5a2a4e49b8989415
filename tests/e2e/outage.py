"""The store is gone in the middle of a save: ``python -m tests.e2e.outage --seconds 600``.

Two jobs save as their S3 server is killed. The patient one has time until after
its return: it commits that very checkpoint. The hasty one has not: its checkpoint is
aborted with the reason, and the next one commits. Both train on all the while.
"""

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path

from tests.support.harness import Harness, say

from dtrain.protocol.events import EventReason
from dtrain.protocol.ids import JobName, Seq
from dtrain.storage.blobs.open import open_store

SIZE = 1600
"""Weights and momentum of two matrices of so many rows: 20 MB, two parts."""

BANDWIDTH_MB_S = 5.0
"""So that a save takes long enough to be met in its middle."""

HASTY_S = 12.0
"""Longer than its save takes with a store, on a busy machine."""

RATE_MIN = 0.5
"""Of the rate before; the machine does other things too, training is not what they wait for."""


def run(harness: Harness, seconds: float) -> None:
    """Take the store away for so long, and see what becomes of both jobs."""
    names = {"patient": seconds + 120.0, "hasty": HASTY_S}
    jobs = {}
    for name, timeout_s in names.items():
        args = f"--steps 1000000 --pause-ms 20 --size {SIZE} --stop-file {harness.stop_file(name)}"
        jobs[name] = harness.start(
            name,
            args,
            nnodes=1,
            nproc=1,
            every_steps=0,
            timeout_s=timeout_s,
            bandwidth_mb_s=BANDWIDTH_MB_S,
        )
    patient, hasty = jobs["patient"], jobs["hasty"]
    pids = {job: harness.pids(job) for job in jobs.values()}
    for job in jobs.values():
        ask(harness, job, "before")
        harness.await_commit(job, after=0)
    weed = harness.cluster.weed
    assert weed is not None

    seqs = {job: ask(harness, job, "during") for job in jobs.values()}
    harness.until("both uploads are under way", lambda: all(uploading(harness, job) for job in jobs.values()))
    before = {job: step_s(harness, job, -5.0) for job in jobs.values()}
    weed.stop()
    gone_at = time.monotonic()
    event = harness.await_event(hasty, EventReason.CHECKPOINT_ABORTED)
    say(f"store gone: aborted after {time.monotonic() - gone_at:.1f} s: {event.message}")
    assert "the connection failed" in event.message or "the connection broke" in event.message
    assert "bytes were durable" in event.message
    while time.monotonic() < gone_at + seconds:
        harness.await_steps(patient, 5)
        harness.await_steps(hasty, 5)
    during = {job: step_s(harness, job, -seconds / 2) for job in jobs.values()}
    for job in jobs.values():
        say(
            f"{job}: a step took {before[job] * 1e3:.0f} ms before, "
            f"{during[job] * 1e3:.0f} ms without a store"
        )
        assert before[job] / during[job] >= RATE_MIN
    assert not [record for record in harness.commits(patient) if record.seq >= seqs[patient]]

    weed.start()
    back_at = time.monotonic()
    record = harness.await_commit(patient, after=int(seqs[patient]) - 1)
    say(f"store back: committed {time.monotonic() - back_at:.1f} s later")
    assert record.seq == seqs[patient]
    assert not harness.events(patient, EventReason.CHECKPOINT_ABORTED)
    # What was asked for during the outage may have been tried again, and committed, before this.
    again = ask(harness, hasty, "after")
    harness.await_commit(hasty, after=int(again) - 1)
    for name, job in jobs.items():
        assert harness.pids(job) == pids[job]
        harness.stop_file(name).touch()
    for job in jobs.values():
        harness.await_end(job)
        # Its parts, its blobs and its uploads too: nothing but what the commits name is in the store.
        harness.assert_succeeded(job, int(harness.commits(job)[-1].step))
    harness.assert_clean()


def ask(harness: Harness, job: JobName, token: str) -> Seq:
    """Ask for a checkpoint; return its number once it is open."""
    last = harness.status(job).seq_last
    harness.client.set_intent(job, checkpoint_token=token)
    harness.until(f"{job} opens a checkpoint", lambda: harness.status(job).seq_last > last)
    return harness.status(job).seq_last


def uploading(harness: Harness, job: JobName) -> bool:
    status = harness.status(job)
    store = open_store(status.store)
    try:
        return bool(list(store.list_unfinished(f"{harness.cluster.name}/{job}/{status.uid}/")))
    finally:
        store.close()


def step_s(harness: Harness, job: JobName, since_s: float) -> float:
    """The median time of a step in the last so many seconds."""
    marks = [mark.at for mark in harness.marks(job) if mark.at > time.monotonic() + since_s]
    return statistics.median(later - earlier for earlier, later in itertools.pairwise(marks))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.e2e.outage", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0, help="how long the store is gone")
    args = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="dtrain-outage-") as folder,
        Harness(Path(folder), store="s3", agents=2) as harness,
    ):
        harness.await_ready()
        run(harness, args.seconds)
    sys.stderr.write("every promise held\n")


if __name__ == "__main__":
    main()
