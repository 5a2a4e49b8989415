"""etcd stands still for longer than every lease: training does not notice, and nothing is decided twice."""

import time

import pytest
from tests.support.harness import Harness, say

from dtrain.protocol.ids import JobName

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

AWAY_S = {"frozen": 8.0, "killed": 4.0}
"""Frozen for longer than the TTL of 5 s: all leases end while nobody can renew them. An etcd
that starts again gives every lease its full TTL, however long it was away; the leader has
demoted itself after 3.5 s."""


@pytest.fixture(scope="module")
def job(harness: Harness) -> JobName:
    args = f"--steps 1000000 --pause-ms 10 --stop-file {harness.stop_file('away')}"
    started = harness.start("away", args)
    harness.await_commit(started, after=0)
    return started


@pytest.mark.parametrize("how", ["frozen", "killed"])
def test_ranks_train_through_an_etcd_that_is_away(harness: Harness, job: JobName, how: str) -> None:
    pids, attempt = harness.pids(job), harness.status(job).attempt
    servers, step, began = harness.cluster.etcd_servers, harness.last_step(job), time.monotonic()
    if how == "frozen":
        servers.freeze()
    else:
        servers.kill()
    harness.until("etcd was away for long enough", lambda: time.monotonic() - began > AWAY_S[how])
    harness.await_steps(job)
    say(f"{harness.last_step(job) - step} steps while etcd was {how}")
    if how == "frozen":
        servers.thaw()
    else:
        # From this thread, which lives as long as the test: the member dies with its starter.
        servers.start_member(0)
    back = time.monotonic()
    harness.until("there is a leader again", lambda: harness.term())
    harness.await_ready()
    harness.await_commit(job)
    say(f"a checkpoint is committed {time.monotonic() - back:.1f} s after etcd is back")
    harness.await_steps(job)
    assert harness.status(job).attempt == attempt
    assert harness.pids(job) == pids


def test_the_job_ends_as_if_nothing_had_happened(harness: Harness, job: JobName) -> None:
    harness.stop_file(job).touch()
    harness.await_end(job)
    harness.assert_succeeded(job, int(harness.commits(job)[-1].step))


def test_losing_one_member_of_three_is_not_noticed(tmp_path_factory: pytest.TempPathFactory) -> None:
    with Harness(tmp_path_factory.mktemp("h3"), etcd_members=3, agents=2) as harness:
        harness.await_ready()
        args = f"--steps 1000000 --pause-ms 10 --stop-file {harness.stop_file('three')}"
        job = harness.start("three", args)
        pids, attempt = harness.pids(job), harness.status(job).attempt
        servers = harness.cluster.etcd_servers
        # One of the three is the leader of etcd, and each is the one that some of us talk to.
        for index in range(3):
            servers.kill(index)
            began = time.monotonic()
            harness.await_commit(job)
            say(f"member {index} killed: a checkpoint committed {time.monotonic() - began:.1f} s later")
            servers.start_member(index)
            servers.wait_ready()
        harness.await_steps(job)
        assert (harness.status(job).attempt, harness.pids(job)) == (attempt, pids)
        harness.stop_file(job).touch()
        harness.await_end(job)
        harness.assert_succeeded(job, int(harness.commits(job)[-1].step))
        harness.assert_clean()
