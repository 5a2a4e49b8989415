"""The judgement of the soak can fail: each kind of leak is found, and killing often hides none."""

from collections.abc import Callable

import pytest
from tests.support.growth import Finding, Sample, Seen, judge

HOUR_S = 3600.0


def soak(
    rss: Callable[[float, float], float],
    *,
    threads: Callable[[float, float], float] = lambda _at, _age: 9,
    fds: Callable[[float, float], float] = lambda _at, _age: 20,
    life_s: float = 600.0,
    leads_s: float = HOUR_S,
) -> list[Finding]:
    """One role, killed every ``life_s``; values by time of the run and age of the process."""
    samples = []
    for turn in range(int(HOUR_S / 20)):
        at = 20.0 * turn
        age = at % life_s
        life = f"{int(at / life_s)}"
        weight = (rss(at, age), int(threads(at, age)), int(fds(at, age)))
        # It may lose the lead again: what it has opened stays.
        one = Seen("coordinator", "c1", life, age, *weight, leads=leads_s <= age < leads_s + 60.0)
        samples.append(Sample(at, turn % 10 < 4, (one,)))
    return judge(samples, warm_up_s=30.0, life_s_min=400.0)


def growing(findings: list[Finding]) -> set[str]:
    return {finding.metric for finding in findings if finding.grows}


def test_what_stays_is_not_called_growth() -> None:
    findings = soak(lambda at, age: 60.0 + (at % 7) * 0.3)
    assert growing(findings) == set()
    assert {finding.metric for finding in findings} == {"rss_mb", "threads", "fds"}
    assert all(finding.lives == 6 for finding in findings)


def test_a_young_process_that_fills_its_caches_is_not_called_growth() -> None:
    assert growing(soak(lambda _at, age: 50.0 + min(age, 60.0) / 6)) == set()


def test_connections_to_one_member_after_another_are_not_called_growth() -> None:
    findings = soak(lambda _at, _age: 60.0, fds=lambda _at, age: 24 + min(age // 60, 6))
    assert growing(findings) == set()


def test_memory_that_is_lost_little_by_little_is_found_though_no_life_is_long() -> None:
    assert growing(soak(lambda _at, age: 60.0 + age * 60.0 / HOUR_S)) == {"rss_mb"}


def test_what_grows_with_the_history_of_the_cluster_is_found() -> None:
    assert growing(soak(lambda at, _age: 60.0 + 40.0 * at / HOUR_S)) == {"rss_mb"}
    # Each life takes up what there is and keeps it: no trend within any of them.
    assert growing(soak(lambda at, _age: 60.0 + 4.0 * (at // 600))) == {"rss_mb"}


@pytest.mark.parametrize(("metric", "each_s"), [("threads", 120), ("fds", 40)])
def test_a_thread_or_descriptor_lost_now_and_then_is_found(metric: str, each_s: int) -> None:
    leaking = {metric: lambda _at, age: 10 + age // each_s}
    assert growing(soak(lambda _at, _age: 60.0, **leaking)) == {metric}


def test_one_peak_is_no_growth() -> None:
    assert growing(soak(lambda at, _age: 200.0 if at == HOUR_S - 20 else 60.0)) == set()


def test_what_a_replica_opens_when_it_begins_to_lead_is_no_growth() -> None:
    opened = {
        "threads": lambda _at, age: 12 + (5 if age >= 500.0 else 0),
        "fds": lambda _at, age: 15 + (10 if age >= 500.0 else 0),
    }
    findings = soak(
        lambda _at, age: 60.0 + (3.0 if age >= 500.0 else 0.0), life_s=1000.0, leads_s=500.0, **opened
    )
    assert growing(findings) == set()
    assert {finding.role for finding in findings} == {"coordinator", "coordinator that led"}


def test_what_a_leader_loses_little_by_little_is_found() -> None:
    leaking = {"fds": lambda _at, age: 15 + max(0.0, age - 100.0) // 40}
    findings = soak(lambda _at, _age: 60.0, life_s=900.0, leads_s=100.0, **leaking)
    assert [finding.role for finding in findings if finding.grows] == ["coordinator that led"]
