"""Who is next: order, claims, patience, and who makes room for whom."""

from collections.abc import Mapping
from dataclasses import replace

import pytest

from dtrain.coordinator.core.queue import (
    AGING_S,
    HOLD_S,
    PATIENCE_S,
    PLACES_TOLD,
    REST_S,
    Machine,
    Queue,
    Running,
    Waiting,
    arrange,
)
from dtrain.protocol.ids import AgentName, JobName

NOW = 1000.0


def waits(name: str, *, nodes: int = 1, ranks: int = 2, priority: int = 0, since: float = 0.0) -> Waiting:
    return Waiting(JobName(name), priority, since, NOW, nodes, nodes, ranks)


def runs(name: str, *agents: str, ranks: int = 2, priority: int = 0, since: float = 0.0) -> Running:
    return Running(JobName(name), priority, since, {AgentName(agent): ranks for agent in agents})


def arranged(
    waiting: list[Waiting],
    running: list[Running] | None = None,
    *,
    slots: str = "a b",
    now: float = NOW,
    before: Queue | None = None,
) -> Queue:
    """``slots``: machines of two slots; what runs has some of them."""
    machines = {}
    for name in slots.split():
        used = sum(job.ranks.get(AgentName(name), 0) for job in running or [])
        machines[AgentName(name)] = Machine(2, 2 - used)
    return arrange(waiting, running or [], machines, now, {} if before is None else before.fitting)


def claims(queue: Queue) -> Mapping[str, list[str]]:
    return {job: sorted(claim) for job, claim in queue.claims.items()}


def order(*waiting: Waiting) -> list[str]:
    return list(arranged(list(waiting)).waiting)


def test_the_more_important_come_first_then_those_that_have_waited_longer() -> None:
    assert order(waits("young", since=9), waits("old", since=1), waits("big", priority=1, since=20)) == [
        "big",
        "old",
        "young",
    ]


def test_waiting_makes_up_for_priority_so_that_nobody_starves() -> None:
    old = waits("old", since=0)
    for priority in (1, 10):
        assert order(old, waits("new", priority=priority, since=AGING_S * priority - 1)) == ["new", "old"]
        assert order(old, waits("new", priority=priority, since=AGING_S * priority + 1)) == ["old", "new"]


def test_what_the_first_can_have_now_is_not_for_those_behind() -> None:
    queue = arranged([waits("first", since=0), waits("second", since=1), waits("third", since=2)])
    assert claims(queue) == {"first": ["a"], "second": ["b"]}
    assert queue.held_from(JobName("first")) == {}
    assert queue.held_from(JobName("second")) == {"a": 2}
    assert queue.held_from(JobName("third")) == {"a": 2, "b": 2}
    assert [queue.places[JobName(job)].fits for job in ("first", "second", "third")] == [True, True, False]


def test_a_running_job_is_kept_from_nothing() -> None:
    queue = arranged([waits("first")])
    assert queue.held_from(JobName("runs")) == {}
    assert queue.claimed() == {"a": 2}


def test_what_the_first_is_about_to_claim_is_nothing_to_grow_onto_either() -> None:
    big, small, busy = waits("big", nodes=2), waits("small", since=1), runs("busy", "a")
    early = arranged([replace(big, nodes_min=3), small], [busy], slots="a b c")
    assert (early.claims, early.soon) == ({"small": {"b": 2}}, {"c": 2, "a": 2})
    assert early.claimed() == {"b": 2, "c": 2, "a": 2}
    late = arranged([big], [busy], now=NOW + PATIENCE_S)
    assert (late.soon, late.claimed()) == ({}, {"a": 2, "b": 2})


def test_small_jobs_slip_in_until_the_patience_of_the_first_is_over() -> None:
    big, small, busy = waits("big", nodes=2), waits("small", since=1), runs("busy", "a")
    early = arranged([big, small], [busy])
    assert early.places[JobName("small")].fits
    assert early.changes_at == NOW + PATIENCE_S
    late = arranged([big, small], [busy], now=NOW + PATIENCE_S)
    assert claims(late) == {"big": ["a", "b"]}
    assert not late.places[JobName("small")].fits


def test_the_reserved_machines_are_those_that_need_least_and_the_rest_is_free_for_others() -> None:
    running = [runs("one", "a", ranks=2), runs("two", "b", ranks=1)]
    queue = arranged([waits("big", nodes=2), waits("small", since=1)], running, slots="a b c", now=NOW + 99)
    assert claims(queue)["big"] == ["b", "c"]
    assert not queue.places[JobName("small")].fits
    roomy = arranged([waits("big", nodes=2), waits("small", since=1)], running, slots="a b c d", now=NOW + 99)
    assert roomy.places[JobName("big")].fits
    assert claims(roomy)["big"] == ["c", "d"]


def test_nothing_is_kept_for_a_job_that_all_machines_together_could_not_hold() -> None:
    queue = arranged([waits("huge", nodes=3), waits("small", since=1)], now=NOW + 999)
    assert claims(queue) == {"small": ["a"]}


def test_only_the_first_that_cannot_begin_reserves() -> None:
    waiting = [waits("big", nodes=2), waits("second", nodes=2, since=1)]
    queue = arranged(waiting, [runs("busy", "a", "b")], now=NOW + 999)
    assert claims(queue) == {"big": ["a", "b"]}


def test_a_job_that_could_begin_and_does_not_is_not_waited_for_without_end() -> None:
    stuck, other = waits("stuck", nodes=2), waits("other", since=1)
    first = arranged([stuck, other])
    assert claims(first) == {"stuck": ["a", "b"]}
    assert arranged([stuck]).changes_at == NOW + HOLD_S
    later = arranged([stuck, other], now=NOW + HOLD_S, before=first)
    assert claims(later) == {"other": ["a"]}


def test_the_less_important_make_room_the_least_important_first_then_the_youngest() -> None:
    running = [
        runs("five", "a", priority=5),
        runs("old", "b", since=1),
        runs("young", "c", since=2),
        runs("equal", "d", priority=7),
    ]
    slots = "a b c d"
    one = arranged([waits("big", priority=7)], running, slots=slots)
    assert one.victims == {"young": "big"}
    assert claims(one) == {"big": ["c"]}
    three = arranged([waits("big", priority=7, nodes=3)], running, slots=slots)
    assert set(three.victims) == {"five", "old", "young"}
    assert arranged([waits("big", priority=7, nodes=4)], running, slots=slots).victims == {}


def test_no_more_jobs_make_room_than_needed() -> None:
    # Taken in order of importance, the one with a single slot turns out not to be needed.
    running = [runs("half", "a", ranks=1), runs("whole", "b", priority=1)]
    queue = arranged([waits("big", priority=7)], running, slots="a b")
    assert queue.victims == {"half": "big"}
    spread = [runs("tiny", "a", ranks=1), runs("wide", "a", ranks=1, priority=1), runs("b2", "b", priority=2)]
    assert set(arranged([waits("big", priority=7)], spread).victims) == {"tiny", "wide"}
    both = [runs("tiny", "a", ranks=1), runs("b2", "b", priority=1)]
    full = [*both, runs("mine", "a", ranks=1, priority=7)]
    assert set(arranged([waits("big", priority=7)], full).victims) == {"b2"}


def test_who_made_room_comes_after_it_whatever_the_clocks_say() -> None:
    small = replace(waits("small", since=-1e6), after="big")
    assert order(small, waits("big", priority=1, since=0)) == ["big", "small"]
    assert order(small, waits("other")) == ["small", "other"]


def test_who_cannot_be_saved_makes_room_last_of_equals() -> None:
    lossy = replace(runs("lossy", "a", since=9), saves=False)
    queue = arranged([waits("big", priority=1)], [lossy, runs("saved", "b", since=1)])
    assert set(queue.victims) == {"saved"}


def test_what_comes_free_by_itself_is_awaited_before_anybody_has_to_make_room() -> None:
    running = [replace(runs("going", "a"), leaving=True), runs("small", "b")]
    queue = arranged([waits("big", priority=1)], running)
    assert queue.victims == {}
    assert claims(queue) == {"big": ["a"]}
    assert queue.why(JobName("big")) == "waits until going has made room"


def test_two_important_jobs_do_not_count_on_the_same_machine() -> None:
    running = [runs("x", "a"), runs("y", "b")]
    queue = arranged([waits("p", priority=3), waits("q", priority=2)], running)
    assert queue.victims == {"x": "p", "y": "q"}
    third = arranged([waits("p", priority=3), waits("q", priority=2), waits("r", priority=1)], running)
    assert len(third.victims) == 2
    assert not third.places[JobName("r")].fits


def test_who_made_room_before_is_left_alone_for_a_while() -> None:
    tired = replace(runs("tired", "a", since=NOW), made_room=True)
    first = arranged([waits("big", priority=9)], [tired], slots="a")
    assert first.victims == {}
    assert first.changes_at is not None
    assert first.changes_at <= NOW + REST_S
    later = arranged([waits("big", priority=9)], [tired], slots="a", now=NOW + REST_S)
    assert later.victims == {"tired": "big"}


def test_nobody_makes_room_for_a_job_that_could_not_begin() -> None:
    big = replace(waits("big", priority=9), ready=False)
    assert arranged([big], [runs("small", "a", "b")], now=NOW + 999).victims == {}


def test_waiting_longer_does_not_make_others_give_up_their_machines() -> None:
    queue = arranged([waits("old", since=-(10**9))], [runs("new", "a", "b")], now=NOW)
    assert queue.victims == {}


def test_a_job_that_starts_again_finds_its_machines_whoever_waits() -> None:
    again = replace(waits("again", nodes=2, since=50), restarts=True)
    queue = arranged([waits("old", priority=3), again])
    assert claims(queue) == {"again": ["a", "b"]}
    assert queue.held_from(JobName("old")) == {"a": 2, "b": 2}


def test_ranks_for_all_slots_need_a_machine_of_their_own() -> None:
    whole = waits("whole", ranks=0)
    queue = arranged([whole], [runs("busy", "a", ranks=1)])
    assert queue.claims == {"whole": {"b": 2}}
    full = arranged([whole, waits("x", since=1)], [runs("busy", "a", ranks=1), runs("other", "b", ranks=1)])
    assert full.why(JobName("whole")) == ""
    assert not full.places[JobName("whole")].fits


@pytest.mark.parametrize(
    ("place", "words"),
    [
        (1, ""),
        (2, "2nd in the queue: waits for 2 agents with 2 free slots, behind j01 (priority 3)"),
        (3, "3rd in the queue: waits for 2 agents with 2 free slots, behind j01 (priority 3) and 1 more"),
        (11, "11th in the queue: waits for 2 agents with 2 free slots, behind j01 (priority 3) and 9 more"),
        (PLACES_TOLD + 1, f"waits for 2 agents with 2 free slots, behind more than {PLACES_TOLD - 1} jobs"),
    ],
)
def test_each_waiting_job_is_told_why(place: int, words: str) -> None:
    waiting = [waits(f"j{n:02d}", nodes=2, priority=3, since=n) for n in range(1, PLACES_TOLD + 3)]
    queue = arranged(waiting, [runs("busy", "a", "b", priority=3)])
    assert queue.why(JobName(f"j{place:02d}")) == words


def test_machines_that_are_free_and_held_back_for_others_are_named() -> None:
    big, small, busy = waits("big", nodes=2), waits("small", since=1), runs("busy", "a")
    early = arranged([big, small], [busy])
    assert early.why(JobName("small")) == ""
    late = arranged([big, small], [busy], now=NOW + PATIENCE_S)
    assert late.why(JobName("small")) == (
        "2nd in the queue: waits for 1 agent with 2 free slots (b is held back for big), "
        "behind big (priority 0)"
    )
    assert late.holders(JobName("small"), AgentName("b")) == ("big",)
    assert late.holders(JobName("big"), AgentName("b")) == ()
    # What is not free is not held back: it is in use.
    assert "a" not in dict(late.places[JobName("small")].kept)


def test_a_job_that_lacks_machines_stands_behind_nobody_and_nobody_behind_it() -> None:
    huge, big, small = waits("huge", nodes=9), waits("big", nodes=2, since=1), waits("small", since=2)
    for late_s in (0, PATIENCE_S):
        queue = arranged([huge, big, small], [runs("busy", "a", "b")], now=NOW + late_s)
        assert queue.why(JobName("huge")) == ""
        assert not queue.places[JobName("huge")].fits
        assert queue.why(JobName("big")) == ""
        assert queue.why(JobName("small")) == (
            "2nd in the queue: waits for 1 agent with 2 free slots, behind big (priority 0)"
        )


def test_a_job_that_others_make_room_for_says_so() -> None:
    waiting = [waits("p", nodes=2, priority=3), waits("q", priority=2)]
    queue = arranged(waiting, [runs("x", "a"), runs("y", "b")])
    assert queue.why(JobName("p")) == "waits until x and y have made room"
    assert queue.why(JobName("q")) == (
        "2nd in the queue: waits for 1 agent with 2 free slots, behind p (priority 3)"
    )


def test_two_hundred_jobs_and_a_thousand_machines_are_arranged_in_no_time() -> None:
    names = [f"m{n:04d}" for n in range(1000)]
    running = [runs(f"r{n:03d}", *names[n * 10 : n * 10 + 10], priority=n % 3) for n in range(100)]
    waiting = [waits(f"w{n:03d}", nodes=20, priority=n % 5, since=n) for n in range(200)]
    queue = arranged(waiting, running, slots=" ".join(names), now=NOW + 99)
    assert len(queue.waiting) == 200
    assert queue.victims
    # However it is drawn, no machine is claimed beyond its slots.
    assert max(queue.claimed().values()) <= 2
