"""Failing schedules become small ones, and stay what they were."""

import json
from pathlib import Path

import pytest

from dtrain.coordinator.core.draft import Draft

from . import kinds
from .cluster import play, run
from .schedule import JobShape, Schedule, Shape, Storm, Strike, load, parse
from .shrink import Shrinker, name_of

PINNED = sorted(Path(__file__).with_name("pinned").glob("*.json"))
GONE = "I3: checkpoint {} was the newest and is gone"


def noisy() -> Schedule:
    """Two jobs, five machines and forty strikes, of which two matter to ``needs_two``."""
    jobs = tuple(JobShape(name, 1.0, 100, nnodes_min=2, nnodes_max=3, nproc=2) for name in ("train", "other"))
    strikes = [Strike(float(at), "watch cut") for at in range(1, 39)]
    strikes[7] = Strike(8.0, "rank crash", "a1/0", args={"code": 0.0})
    strikes[30] = Strike(31.0, "etcd outage", lasts_s=16.0)
    shape = Shape((5, 10, 10), 5, 5, jobs, clock_drift=0.1)
    return Schedule(1, shape, (Storm(0.0, 40.0), Storm(100.0, 130.0)), strikes=tuple(strikes))


def needs_two(schedule: Schedule) -> list[str]:
    """A world in which a crash and a later outage of at least 4 s are a bug; else another one, or none."""
    found = {strike.kind: strike for strike in schedule.strikes or ()}
    crash, outage = found.get("rank crash"), found.get("etcd outage")
    if crash is not None and outage is not None and crash.at < outage.at and outage.lasts_s >= 4.0:
        return [f"at {outage.at:.3f} s: {GONE.format(int(outage.at))}"]
    return ["at 3.000 s: c1 died of KeyError: 'x'"] if outage is not None else []


def test_only_what_matters_is_left() -> None:
    shrinker = Shrinker(noisy(), needs_two(noisy())[0], needs_two)
    small = shrinker.run()
    assert [strike.kind for strike in small.strikes or ()] == ["rank crash", "etcd outage"]
    assert (small.strikes or ())[1].lasts_s == 4.0
    assert len(small.storms) == 1
    assert small.shape.replica_ttls_s == (5,)
    assert [job.nnodes_min * job.nproc for job in small.shape.jobs] == [1]
    assert shrinker.runs < 400


def test_another_bug_on_the_way_is_not_taken_for_this_one() -> None:
    small = Shrinker(noisy(), needs_two(noisy())[0], needs_two).run()
    assert name_of(needs_two(small)[0]) == small.violation == "I3 checkpoint was the"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("at 3.1 s: G6: attempt 3 of train restores 4", "at 70.12 s: G6: attempt 12 of other restores 1"),
        ("at 1.0 s: auditor: revision 7: I6: a1 went", "at 2.0 s: auditor: revision 912: I6: a3 went"),
        ("at 1.0 s: c1 died of KeyError: 'a1'\n  File", "at 9.0 s: c3 died of KeyError: 'a7'\n  File"),
    ],
)  # fmt: skip
def test_one_bug_has_one_name_in_every_run(one: str, other: str) -> None:
    assert name_of(one) == name_of(other)


def test_bugs_of_different_invariants_have_different_names() -> None:
    assert name_of("at 1.0 s: I6: a1 went back") != name_of("at 1.0 s: I7: a1 went back")


def test_what_a_run_wrote_down_is_the_same_run_again() -> None:
    first = run(12, trace=True)
    again = play(parse(json.loads(first.schedule.dumps())), trace=True)
    assert first.schedule.strikes
    assert (again.fingerprint, again.events) == (first.fingerprint, first.events)
    assert again.trace == first.trace


def test_a_deliberate_bug_is_shrunk_to_few_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restoring the oldest checkpoint instead of the newest shows as soon as one rank dies."""

    def oldest(self: Draft) -> object:
        return next((commit.value for commit in self.commits()), None)

    monkeypatch.setattr(Draft, "newest_good", oldest)
    job = JobShape("train", 1.0, 50, every_steps=5)
    strikes = [Strike(4.0 + 1.5 * number, "watch cut") for number in range(12)]
    strikes.append(Strike(20.0, "rank crash", "a1/0", args={"code": 0.0}))
    schedule = Schedule(1, Shape((5, 5), 5, 1, (job,)), (Storm(0.0, 25.0),), strikes=tuple(strikes))
    violations = play(schedule).violations
    assert "G6" in violations[0]
    small = Shrinker(schedule, violations[0], lambda candidate: play(candidate).violations).run()
    assert [strike.kind for strike in small.strikes or ()] == ["rank crash"]
    assert small.shape.replica_ttls_s == (5,)


@pytest.mark.parametrize("path", PINNED, ids=lambda path: path.stem)
def test_a_schedule_that_once_found_a_bug_passes(path: Path) -> None:
    schedule = load(path)
    assert schedule.about
    assert not play(schedule).violations


@pytest.mark.parametrize("kind", sorted(kinds.KINDS))
def test_every_kind_of_fault_strikes_and_heals(kind: str) -> None:
    job = JobShape("train", 1.0, 60, nnodes_min=2, nnodes_max=2, every_steps=5)
    shape = Shape((5, 5, 5), 5, 3, (job,), page_keys=3)
    result = play(Schedule(7, shape, (Storm(0.0, 30.0),), mix={kind: 4.0}))
    assert not result.violations, result.violations[0]
    assert {strike.kind for strike in result.schedule.strikes or ()} == {kind}
