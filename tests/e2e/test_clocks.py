"""Wall clocks that jump by an hour, on all machines at once, change nothing but what people read."""

import datetime
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.harness import Harness, say

from dtrain.protocol.checkpoint import CommitRecord

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

HOUR_S = 3600
PATCH = Path(__file__).parents[1] / "support" / "wallclock"


@pytest.fixture(scope="module")
def offset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("clock") / "offset"


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory, offset: Path) -> Iterator[Harness]:
    env = {"PYTHONPATH": str(PATCH), "WALLCLOCK_OFFSET_FILE": str(offset)}
    with Harness(tmp_path_factory.mktemp("h"), coordinators=2, agents=2, env=env) as made:
        made.await_ready()
        yield made
        made.assert_clean()


def jump(offset: Path, seconds: float) -> None:
    fresh = offset.with_suffix(".new")
    fresh.write_text(str(seconds))
    fresh.rename(offset)


def off_by_s(record: CommitRecord) -> float:
    """How far the leader's wall clock was from ours when it committed."""
    return datetime.datetime.fromisoformat(record.committed_at).timestamp() - time.time()


def test_an_hour_more_or_less_ends_no_lease_and_restarts_nothing(harness: Harness, offset: Path) -> None:
    args = f"--steps 1000000 --pause-ms 20 --stop-file {harness.stop_file('clocks')}"
    job = harness.start("clocks", args, nproc=1)
    harness.await_commit(job, after=0)
    term, attempt, pids = harness.term(), harness.status(job).attempt, harness.pids(job)
    nodes = {key: kv.create_revision for key, kv in harness.cluster.read("agents/").items() if "/node" in key}
    for hours in (1, -1, 0):
        jump(offset, hours * HOUR_S)
        # The one after the next one: what was open during the jump may carry either time.
        harness.await_commit(job)
        record = harness.await_commit(job)
        say(f"wall clocks jumped to {hours:+d} h: committed at {record.committed_at}")
        assert abs(off_by_s(record) - hours * HOUR_S) < 300, "the jump did not reach the leader"
    for index in range(40):
        jump(offset, HOUR_S if index % 2 else -HOUR_S)
        time.sleep(0.2)
    jump(offset, 0)
    # Longer than the TTL of 5 s: whatever had been missed would be seen by now.
    harness.await_commit(job)
    assert harness.term() == term, "the leader has changed"
    assert (harness.status(job).attempt, harness.pids(job)) == (attempt, pids)
    after = {key: kv.create_revision for key, kv in harness.cluster.read("agents/").items() if "/node" in key}
    assert after == nodes, "a session has ended"
    harness.stop_file(job).touch()
    harness.await_end(job)
    harness.assert_succeeded(job, int(harness.commits(job)[-1].step))


def test_a_suspended_machine_is_seen_by_the_clock_that_deadlines_are_on() -> None:
    """Only CLOCK_BOOTTIME counts sleep; a time namespace moves it alone, as a suspend does."""
    program = (
        "import time; from dtrain.runtime.clock import SystemClock; "
        "from dtrain.storage.etcd.lease_client import boottime; "
        "print(SystemClock().monotonic(), boottime(), time.monotonic())"
    )
    here = time.clock_gettime(time.CLOCK_BOOTTIME), time.monotonic()
    out = subprocess.run(
        ["unshare", "--time", "--boottime", str(HOUR_S), "--fork", sys.executable, "-c", program],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    ).stdout.split()
    agent_clock, guardian_clock, monotonic = (float(word) for word in out)
    assert agent_clock - here[0] == pytest.approx(HOUR_S, abs=30)
    assert guardian_clock - here[0] == pytest.approx(HOUR_S, abs=30)
    assert monotonic - here[1] < 60
