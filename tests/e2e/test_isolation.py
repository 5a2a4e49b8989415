"""Agents that cannot reach etcd: alone, all together, for longer than the job allows, and in a crowd."""

import time
from collections.abc import Iterator

import pytest
from tests.support.harness import Harness, say

from dtrain.protocol.events import EventReason
from dtrain.protocol.ids import JobName
from dtrain.protocol.snapshot import WorkerPhase

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

GRACE_S = 15.0
"""The job's isolation grace: longer than the TTL of 5 s, shorter than anybody would choose."""

AGENTS = 7


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    with Harness(tmp_path_factory.mktemp("h"), faults=True, agents=AGENTS, coordinators=2) as made:
        made.await_ready()
        yield made
        made.assert_clean()


def start(harness: Harness, name: str, more: str = "", **settings: float) -> JobName:
    args = f"--steps 1000000 --pause-ms 20 --stop-file {harness.stop_file(name)} {more}"
    job = harness.start(name, args, nproc=1, **settings)
    harness.await_commit(job, after=0)
    return job


def finish(harness: Harness, job: JobName) -> None:
    harness.stop_file(job).touch()
    harness.await_end(job)
    harness.assert_succeeded(job, int(harness.commits(job)[-1].step))


def members(harness: Harness, job: JobName) -> list[str]:
    return [str(member.agent) for member in harness.status(job).members]


def has_session(harness: Harness, agent: str) -> bool:
    return any(key.endswith(f"agents/{agent}/node") for key in harness.cluster.read("agents/"))


def link_states(harness: Harness, agent: str) -> list[str]:
    """What the agent has said about its link to etcd, in order."""
    return [line for line in harness.log(agent).splitlines() if "etcd link" in line]


def test_a_machine_cut_from_etcd_alone_goes_on_where_the_leader_waits(harness: Harness) -> None:
    job = start(harness, "patient", reschedule_grace_s=120.0, isolation_grace_s=120.0)
    pids, attempt, victim = harness.pids(job), harness.status(job).attempt, members(harness, job)[1]
    harness.cluster.links[victim].cut()
    harness.until("its session has ended", lambda: not has_session(harness, victim))
    harness.until("it knows that it is cut off alone", lambda: "only this machine" in harness.log(victim))
    harness.await_steps(job, 50)
    harness.cluster.links[victim].heal()
    harness.until("it is back", lambda: has_session(harness, victim))
    harness.await_commit(job)
    assert (harness.status(job).attempt, harness.pids(job)) == (attempt, pids)
    assert "the ranks went on" in harness.snapshots(job)[victim].note
    states = " ".join(link_states(harness, victim))
    assert states.index("suspect") < states.index("isolated") < states.index("answers again")
    finish(harness, job)


def test_ranks_left_behind_end_long_before_the_machine_is_back(harness: Harness) -> None:
    # Ranks that do not notice that their peers are gone: somebody has to tell their agent.
    job = start(harness, "impatient", "--stubborn", isolation_grace_s=300.0)
    victim, attempt = members(harness, job)[1], harness.status(job).attempt
    old = {state.pid for state in harness.snapshots(job)[victim].ranks}
    cut_at = time.monotonic()
    harness.cluster.links[victim].cut()
    status = harness.await_training(job, after_attempt=attempt)
    assert victim not in members(harness, job)
    harness.until("its ranks have heard of it and are gone", lambda: not old & harness.alive())
    say(f"ranks of a machine that is cut off ended {time.monotonic() - cut_at:.1f} s after the cut")
    assert not has_session(harness, victim)
    assert "has begun elsewhere" in harness.log(victim)
    harness.await_commit(job)
    harness.cluster.links[victim].heal()
    harness.until("it is back", lambda: has_session(harness, victim))
    harness.until("it holds nothing of the job", lambda: victim not in harness.snapshots(job))
    assert harness.status(job).attempt == status.attempt
    finish(harness, job)


def test_without_etcd_for_longer_than_the_grace_ranks_end_in_order(harness: Harness) -> None:
    job = start(harness, "grace", isolation_grace_s=GRACE_S)
    pids, before = set(harness.pids(job).values()), harness.status(job)
    committed = harness.commits(job)[-1]
    machines, servers = members(harness, job), harness.cluster.etcd_servers
    launchers = {name: harness.launchers(name) for name in machines}
    away_at = time.monotonic()
    servers.freeze()
    try:
        harness.await_steps(job, 50)
        harness.until("the ranks have ended", lambda: not pids & harness.alive())
        away_s = time.monotonic() - away_at
        say(f"ranks ended {away_s:.1f} s after etcd had gone, with a grace of {GRACE_S:g} s")
        assert away_s > GRACE_S
        for name in machines:
            # The arena with what was sealed hangs on the launcher.
            assert launchers[name] == harness.launchers(name) != set()
        said = "".join(harness.log(name) for name in machines)
        assert "isolation_grace" in said
        assert "coordinators cannot reach etcd either" in said
        last = harness.last_step(job)
    finally:
        servers.thaw()
    after = harness.await_training(job, after_attempt=before.attempt)
    assert after.restore is not None
    assert committed.seq <= after.restore.seq
    assert after.restore.step <= last + 1
    assert len(after.restarts) == len(before.restarts), "an etcd that is away costs no restart"
    # Its own words if it is back before its peer is, else the leader's: its session ended meanwhile.
    assert harness.await_event(job, EventReason.AGENT_LOST)
    finish(harness, job)


def test_when_many_vanish_together_the_brake_is_on_and_training_goes_on(harness: Harness) -> None:
    harness.await_ready()
    job = start(harness, "crowd", isolation_grace_s=300.0)
    pids, attempt, machines = harness.pids(job), harness.status(job).attempt, members(harness, job)
    spares = [name for name in harness.cluster.agents if name not in machines]
    gone = [*spares[: AGENTS * 2 // 5], machines[1]][-3:]
    # The member last: the first one of a crowd cannot be told from a single loss.
    for name in gone:
        harness.cluster.links[name].cut()
        harness.until(f"the session of {name} has ended", lambda name=name: not has_session(harness, name))
    harness.await_event(job, EventReason.MASS_LOSS, "vanished")
    harness.await_steps(job, 100)
    for name in gone:
        harness.cluster.links[name].heal()
    harness.await_ready()
    harness.await_commit(job)
    assert (harness.status(job).attempt, harness.pids(job)) == (attempt, pids)
    assert harness.snapshots(job)[machines[1]].phase is WorkerPhase.TRAINING
    finish(harness, job)
