"""The simulation can fail: bugs put in on purpose are found by some seed of a short list."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import pytest

from dtrain.agent.core import commands
from dtrain.agent.reporter import Reporter
from dtrain.coordinator import persistence
from dtrain.coordinator.core import committing, liveness, manifest, phases, retention, settling
from dtrain.coordinator.core.draft import Draft
from dtrain.coordinator.world import World
from dtrain.protocol.commands import Prepare, Start
from dtrain.protocol.ids import Rank
from dtrain.storage.checkpoints import verifying
from dtrain.storage.checkpoints.reading import Damage
from dtrain.storage.etcd.mirror import MirrorState
from dtrain.storage.etcd.port import Txn

from . import readers, swarm
from .cluster import Cluster, play, run
from .etcd import EtcdAccess
from .schedule import JobShape, Schedule, Shape, Storm, Strike

SEEDS = range(1, 26)


def is_caught(what: str, seeds: Iterable[int] = SEEDS, **how: Any) -> bool:
    """Whether some seed finds a violation that says ``what``."""
    return any(what in violation for seed in seeds for violation in run(seed, **how).violations)


def hunt(seed: int, mix: Mapping[str, float], *, jobs: int = 1) -> Schedule:
    """A run with the faults that bring a certain bug to light, and no others."""
    drawn = swarm.draw(seed)
    job = replace(drawn.shape.jobs[0], submissions_max=9, total_steps=80, nnodes_min=2, nnodes_max=2)
    several = tuple(replace(job, name=name) for name in ("train", "other", "third")[:jobs])
    shape = replace(drawn.shape, jobs=several, machines=3, replica_ttls_s=(5, 5))
    return replace(drawn, shape=shape, storms=(Storm(0.0, 90.0),), ends_calm=False, mix=mix)


def is_hunted_down(what: str, mix: Mapping[str, float], *, jobs: int = 1, seeds: int = 12) -> bool:
    """Whether a few such runs find a violation that says ``what``."""
    runs = (play(hunt(seed, mix, jobs=jobs)) for seed in range(1, seeds + 1))
    return any(what in violation for result in runs for violation in result.violations)


def sleepy_leaders(cluster: Cluster) -> None:
    """Again and again the leader's machine is paused with its clocks until its lease is over, and the
    other replicas are lost: when it wakes it believes that it leads, and nobody else does.
    """

    def pause() -> None:
        name = cluster.leader_name()
        leader = cluster.replicas.get(name or "")
        if leader is None or leader.guardian is None or cluster.checks.job_is_over():
            return
        guardian = leader.guardian
        for other in cluster.replicas.values():
            if other is not leader and other.guardian is not None:
                other.crash()
                cluster.scheduler.after(leader.ttl_s + 6.0, other.boot)
        guardian.freeze(clocks=True)
        cluster.scheduler.after(leader.ttl_s + 2.0, guardian.thaw)
        cluster.scheduler.after(leader.ttl_s + 20.0, pause)

    cluster.scheduler.after(12.0 + cluster.scheduler.rng.random(), pause)


def cut_and_compacted_watches(cluster: Cluster) -> None:
    """Several times a second all watches end, and what they missed is compacted before they are back."""

    def cut() -> None:
        if cluster.checks.job_is_over():
            return
        cluster.etcd.memory.cut_watches()
        cluster.scheduler.after(0.04, lambda: cluster.etcd.compact(0))
        cluster.scheduler.after(0.15 + 0.3 * cluster.scheduler.rng.random(), cut)

    cluster.scheduler.after(10.0, cut)


def test_deletions_between_two_lists_are_not_missed() -> None:
    assert not is_caught("", range(1, 9), calm=True, prepare=cut_and_compacted_watches)


def test_a_leader_that_slept_with_its_clocks_writes_nothing() -> None:
    for seed in range(1, 6):
        assert not run(seed, calm=True, prepare=sleepy_leaders).violations


def test_a_leader_that_is_not_fenced_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    fenced = persistence.fenced

    def unfenced(keys: Any, *args: Any) -> Txn:
        txn = fenced(keys, *args)
        return replace(txn, compares=tuple(c for c in txn.compares if c.key != keys.leader))

    monkeypatch.setattr(persistence, "fenced", unfenced)
    found = (run(seed, calm=True, prepare=sleepy_leaders).violations for seed in range(1, 26))
    assert "I1" in next((violations[0] for violations in found if violations), "")


def test_open_checkpoints_that_are_not_settled_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settling, "settle", lambda _draft, **_how: True)
    assert is_hunted_down(
        "is open for attempt", {"rank crash": 8.0, "checkpoint now": 2.0, "store slow": 15.0}
    )


def isolated(spares: int, *, draining: bool = False) -> list[str]:
    """What is wrong with a run in which a1, which has ranks, is cut off for longer than its lease lasts."""
    job = JobShape("train", 1.0, 200, nnodes_min=2, nnodes_max=2, every_steps=20, reschedule_grace_s=20.0)
    strikes = [Strike(20.0, "cannot reach etcd", "a1", 9.0)]
    if draining:
        strikes.insert(0, Strike(19.9, "agent drained", "a1", 30.0, {"grace_s": 60.0}))
    shape = Shape((5, 5, 5), 5, 2 + spares, (job,), clock_drift=0.0)
    return play(Schedule(1, shape, (Storm(0.0, 40.0),), strikes=tuple(strikes))).violations


@pytest.mark.parametrize("spares", [0, 1])
def test_an_agent_that_is_not_waited_for_is_caught(monkeypatch: pytest.MonkeyPatch, spares: int) -> None:
    """Whether the next attempt begins with the same decision, or cannot begin at all."""
    assert not isolated(spares)
    until = liveness._until
    monkeypatch.setattr(
        liveness, "_until", lambda draft, due, why: until(draft, due - draft.spec.reschedule_grace_s, why)
    )
    assert "I9: a1 was called lost" in isolated(spares)[0]


def test_one_that_drained_need_not_be_waited_for() -> None:
    assert not isolated(1, draining=True)


def test_slots_given_to_two_jobs_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(World, "reserve", lambda *_args: None)
    mix = {"rank crash": 4.0, "member lags": 5.0, "agent guardian crash": 20.0}
    assert is_hunted_down("slots", mix, jobs=3)


def test_a_commit_without_all_parts_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(committing, "is_complete", lambda parts, _record: len(parts) > 0)
    # The merge would refuse it: both guards have to fail.
    monkeypatch.setattr(manifest, "_identity", lambda *_args: [])
    monkeypatch.setattr(manifest, "tiling_problem", lambda _entry: "")
    assert is_caught("G9")


def test_an_agent_that_obeys_an_older_attempt_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = commands._refusal

    def obedient(state: Any, command: Any) -> Any:
        return None if isinstance(command, Prepare) else refusal(state, command)

    monkeypatch.setattr(commands, "_refusal", obedient)
    assert is_hunted_down("I6", {"commands late": 4.0, "command replayed": 1.0, "rank crash": 8.0})


def test_snapshots_without_a_fence_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def bare(self: Any, txn: Txn) -> Any:
        guards = tuple(compare for compare in txn.compares if "/workers/" not in compare.key)
        return self._etcd.txn(replace(txn, compares=guards))

    monkeypatch.setattr(Reporter, "_txn", bare)
    mix = {"ambiguous writes": 5.0, "agent guardian crash": 8.0, "rank crash": 6.0}
    assert is_hunted_down("I6", mix, seeds=24)


def test_a_watch_that_skips_a_revision_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = EtcdAccess.watch

    def hasty(self: Any, key: str, end: str, start: int) -> Any:
        return watch(self, key, end, start + 2 if start > 20 else start)

    monkeypatch.setattr(EtcdAccess, "watch", hasty)
    assert is_caught("I8")


def test_a_list_that_forgets_deletions_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    relist = MirrorState.relist

    def forgetful(self: Any, items: Any, revision: int) -> Any:
        fresh = {kv.key: kv for kv in items}
        return relist(self, {**self._items, **fresh}.values(), revision)

    monkeypatch.setattr(MirrorState, "relist", forgetful)
    assert is_caught("I8", range(1, 26), calm=True, prepare=cut_and_compacted_watches)


def test_a_restore_from_another_than_the_newest_commit_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def oldest(self: Draft) -> Any:
        bad = set(self.job.bad) | self.quarantined
        return next((c.value for c in self.commits() if c.value.seq not in bad), None)

    monkeypatch.setattr(Draft, "newest_good", oldest)
    assert is_hunted_down("G6", {"rank crash": 12.0, "checkpoint now": 3.0})


def test_ranks_that_restore_different_states_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = iter(range(10**6))

    def fickle(header: Any, rendezvous: str, restore: Any) -> Start:
        return Start(header, rendezvous, restore if next(counter) % 2 else None)

    monkeypatch.setattr(phases, "Start", fickle)
    assert is_caught("restored different steps")


def test_retention_of_the_newest_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    surplus: Callable[..., list[Any]] = retention.surplus

    def greedy(draft: Draft) -> list[Any]:
        return surplus(draft) or list(draft.commits()[-1:])

    monkeypatch.setattr(retention, "surplus", greedy)
    assert is_caught("I3")


READ = {"checkpoint read": 2.0, "checkpoint now": 2.0, "checkpoint deleted": 3.0, "damage reported": 3.0}


def late_readers(cluster: Cluster) -> None:
    """Somebody begins to read the oldest checkpoint just when a newer one makes it one too many."""
    told = cluster.etcd.on_revision

    def on_revision(revision: int, events: Any) -> None:
        told(revision, events)
        places = [cluster.keys.parse(event.kv.key) for event in events if event.kind != "delete"]
        for place in places:
            if place is not None and place.kind == "checkpoint":
                cluster.scheduler.after(
                    0.03 * cluster.scheduler.rng.random(), lambda job=place.job: read(job)
                )

    def read(job: str) -> None:
        strike = Strike(cluster.scheduler.now, "checkpoint read", job, args={"which": 0.3})
        reader = readers.begin(cluster, strike, ttl_s=5)
        if reader is not None:
            cluster.scheduler.after(2.0, reader.end)

    cluster.etcd.on_revision = on_revision


def test_a_retirement_that_looks_at_no_pins_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_caught("", range(1, 9), calm=True, prepare=late_readers)
    monkeypatch.setattr(Draft, "nobody_under", lambda _draft, _prefix: None)
    assert is_caught("was retired while somebody read it", calm=True, prepare=late_readers)


def test_an_operator_who_may_delete_everything_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "untouchable", lambda _shelf: {})
    assert is_hunted_down("was the newest", READ)


def test_a_report_of_damage_that_is_believed_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def believe(_store: Any, _manifest: str, _digest: str, blob: str, chunk: int) -> Any:
        return Damage(blob, chunk, "00", "11", Rank(0), ())

    monkeypatch.setattr(verifying, "verify_chunk", believe)
    assert is_hunted_down("which is whole", READ)
