"""A rank that SIGKILL does not end: its machine is left alone and says so, until it is gone."""

from collections.abc import Iterator

import pytest
from tests.support.freezer import Freezer
from tests.support.harness import Harness

from dtrain.protocol import codec
from dtrain.protocol.events import EventReason
from dtrain.protocol.ids import AgentName
from dtrain.protocol.snapshot import NodeRecord

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]


@pytest.fixture
def freezer() -> Iterator[Freezer]:
    with Freezer("unkillable") as made:
        yield made


def problem(harness: Harness, agent: str) -> str:
    """What the machine says is wrong with it."""
    found = harness.cluster.etcd.range(harness.keys.node(AgentName(agent))).items
    return codec.decode(NodeRecord, found[0].value).problem if found else ""


def test_a_rank_that_cannot_be_killed_blocks_its_machine_alone(harness: Harness, freezer: Freezer) -> None:
    name = "stuck"
    args = f"--steps 1000000 --pause-ms 10 --stubborn --stop-file {harness.stop_file(name)}"
    job = harness.start(name, args, nproc=1)
    harness.await_commit(job, after=0)
    before = harness.status(job)
    victim = str(before.members[1].agent)
    rank = before.members[1].first_rank
    pid = harness.pids(job)[rank]
    freezer.freeze(pid)
    harness.cluster.kill_rank(before.members[0].first_rank, job=job)
    event = harness.await_event(job, EventReason.PROCESS_UNKILLABLE)
    assert f"rank {rank} (pid {pid}) on {victim} cannot be killed" in event.message
    after = harness.await_training(job, after_attempt=before.attempt)
    assert victim not in [member.agent for member in after.members]
    # One restart: for the rank that was killed. That a machine is stuck is nobody's fault.
    assert len(after.restarts) <= len(before.restarts) + 1
    assert f"(pid {pid}) on {victim} cannot be killed: it waits in the kernel" in problem(harness, victim)
    assert pid in harness.alive()
    harness.await_commit(job)

    freezer.thaw()
    harness.until("the process is gone", lambda: pid not in harness.alive())
    harness.until("the machine is well again", lambda: not problem(harness, victim))
    # It is used again as soon as it is needed.
    harness.cluster.power_cut(next(str(m.agent) for m in after.members))
    last = harness.await_training(job, after_attempt=after.attempt)
    assert victim in [member.agent for member in last.members]
    for daemon in harness.cluster.agents:
        if harness.cluster.daemon(daemon).process_pid is None:
            harness.cluster.start_daemon(daemon)
    harness.await_ready()
    harness.stop_file(job).touch()
    harness.await_end(job)
    harness.assert_succeeded(job, int(harness.commits(job)[-1].step))
