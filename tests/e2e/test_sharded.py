"""FSDP2 through real agents: a job loses a machine and goes on with fewer ranks, and with more again."""

import signal

import pytest
from tests.support.harness import Harness, say

from dtrain.protocol.ids import JobName

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


def notes(harness: Harness) -> dict[tuple[int, int], tuple[int, str]]:
    """World size and digest of the gathered state, by attempt and step."""
    found = {}
    for line in (harness.folder / "digests").read_text().splitlines():
        attempt, world, step, digest = line.split()
        found[int(attempt), int(step)] = (int(world), digest)
    return found


def assert_resumed_exactly(harness: Harness, job: JobName, world: int) -> None:
    """The first state of this attempt is, gathered, the one that the ranks before it had at that step."""
    status = harness.status(job)
    assert status.restore is not None
    step = int(status.restore.step)
    harness.until("the first digest is noted", lambda: (status.attempt, step) in notes(harness))
    found = notes(harness)
    now_world, now = found[status.attempt, step]
    former = [n for (attempt, at), n in sorted(found.items()) if at == step and attempt < status.attempt]
    assert former, (status.attempt, step, sorted(found)[-20:])
    before = former[-1]
    say(f"step {step}: saved by {before[0]} ranks, restored by {now_world}")
    assert (now_world, now) == (world, before[1])


def test_shards_of_three_ranks_go_on_as_shards_of_two_and_of_three_again(harness: Harness) -> None:
    stop = harness.stop_file("sharded")
    args = f"--steps 1000000 --pause-ms 20 --stop-file {stop} --digests {harness.folder / 'digests'}"
    job = harness.start("sharded", args, script="fsdp.py", nnodes=3, nnodes_min=2, nproc=1, every_steps=15)
    status = harness.status(job)
    assert status.world_size == 3
    record = harness.await_commit(job, after=0)
    manifest = harness.manifest(record)
    # Every rank has written its own rows, and the last rank has none of two rows.
    weight, small = manifest.tensors["model.0.weight"], manifest.tensors["model.2.weight"]
    assert sorted((c.o, c.s) for c in weight.chunks) == [((0, 0), (4, 7)), ((4, 0), (4, 7)), ((8, 0), (2, 7))]
    assert sorted(manifest.blobs[c.b].rank for c in small.chunks) == [0, 1]

    agent = status.members[2].agent
    assert harness.cluster.daemon(agent).send(signal.SIGTERM)
    harness.await_training(job, after_attempt=status.attempt)
    assert_resumed_exactly(harness, job, world=2)

    assert harness.cluster.daemon(agent).wait(90.0)
    harness.await_commit(job)
    attempt = harness.status(job).attempt
    # The job grows by itself, at a checkpoint that its ranks hold at.
    harness.cluster.start_daemon(agent)
    harness.await_training(job, after_attempt=attempt)
    assert_resumed_exactly(harness, job, world=3)
    stop.touch()
    harness.await_end(job)
