"""Who takes part in which round: the decisions, without etcd."""

import random
from dataclasses import replace

import pytest

from dtrain.integrations.rendezvous import core
from dtrain.integrations.rendezvous.core import Closed, Formed, Limits, RunState, TimedOut, Wait, Write

TWO = Limits(2, 2)
ELASTIC = Limits(1, 2)


def step(state, me, limits=TWO, *, expired=False, last_call_over=False):
    return core.join(state, me, limits, expired=expired, last_call_over=last_call_over)


def written(state, me, limits=TWO, **options):
    found = step(state, me, limits, **options)
    assert isinstance(found, Write), found
    return found.state


def formed(*nodes, limits=TWO):
    state = RunState()
    for node in nodes:
        state = written(state, node, limits)
    if not state.complete:
        state = written(state, nodes[0], limits, last_call_over=True)
    assert state.complete
    return state


def test_a_full_round_is_complete_with_its_last_participant():
    state = written(written(RunState(), "b"), "a")
    assert state.complete
    assert step(state, "b") == Formed(round=0, rank=0, size=2)
    assert step(state, "a") == Formed(round=0, rank=1, size=2)


def test_a_round_with_too_few_waits_even_after_the_last_call():
    state = written(RunState(), "a")
    assert isinstance(step(state, "a", last_call_over=True), Wait)


def test_a_round_with_enough_waits_for_the_last_call():
    state = written(RunState(), "a", ELASTIC)
    assert isinstance(step(state, "a", ELASTIC), Wait)
    assert step(written(state, "a", ELASTIC, last_call_over=True), "a", ELASTIC) == Formed(0, 0, 1)


def test_the_last_call_is_on_only_while_a_round_has_enough():
    limits = Limits(2, 3)
    state = written(written(RunState(), "a", limits), "b", limits)
    assert core.enough(state, limits)
    assert not core.enough(core.living(state, {"a"}), limits)


def test_a_latecomer_waits_and_is_a_reason_to_restart():
    state = formed("a", limits=ELASTIC)
    assert core.reasons_to_restart(state, {"a", "b"}, "a", 0) == 0
    state = written(state, "b", ELASTIC)
    assert state.waiting == ("b",)
    assert isinstance(step(state, "b", ELASTIC), Wait)
    assert core.reasons_to_restart(state, {"a", "b"}, "a", 0) == 1


def test_a_latecomer_gets_into_the_next_round():
    state = core.turn_over(written(formed("a", limits=ELASTIC), "b", ELASTIC), "a")
    assert (state.round, state.complete, state.participants, state.waiting) == (1, False, ("a",), ("b",))
    state = written(state, "b", ELASTIC)
    assert [step(state, node, ELASTIC) for node in "ab"] == [Formed(1, 0, 2), Formed(1, 1, 2)]


def test_who_is_too_many_stands_by_and_disturbs_nobody():
    state = written(formed("a", "b"), "c")
    assert state.standby == ("c",)
    assert isinstance(step(state, "c", expired=True), Wait), "its time does not pass"
    assert core.reasons_to_restart(state, {"a", "b", "c"}, "a", 0) == 0


def test_who_stands_by_takes_the_place_of_the_dead():
    state = core.living(written(formed("a", "b"), "c"), {"a", "c"})
    assert core.reasons_to_restart(state, {"a", "c"}, "a", 0) == 1
    found = step(state, "c")
    assert found == Write(replace(state, standby=(), waiting=("c",)), restart_clock=True)
    state = written(core.turn_over(found.state, "a"), "c")
    assert step(state, "c") == Formed(1, 1, 2)


def test_who_stands_by_takes_no_place_of_one_that_restarts_its_workers():
    state = core.turn_over(written(formed("a", "b"), "c"), "a")
    assert isinstance(step(state, "c"), Wait)
    state = core.turn_over(state, "b")
    assert isinstance(step(state, "c"), Wait)
    state = written(state, "a")
    assert state.complete
    assert set(state.world) == {"a", "b"}


def test_nobody_who_waits_is_left_over_to_restart_a_full_round_for_ever():
    state = replace(formed("a", limits=ELASTIC), waiting=("b", "c", "d"))
    state = written(core.turn_over(state, "a"), "b", ELASTIC)
    assert state.complete
    assert core.reasons_to_restart(state, set("abcd"), "a", 1) == 0
    assert isinstance(step(state, "c", ELASTIC), Wait)


def test_the_last_to_leave_a_round_opens_the_next_one():
    state = formed("a", "b")
    state = core.turn_over(state, "b")
    assert (state.round, state.complete, state.waiting) == (0, True, ("b",))
    state = core.turn_over(state, "a")
    assert (state.round, state.complete, state.participants, state.waiting) == (1, False, ("a",), ("b",))


def test_a_dead_participant_makes_room_in_a_round_that_collects():
    state = core.living(written(RunState(), "a"), {"b"})
    assert state.participants == ()
    assert state.round == 0


def test_a_round_whose_nodes_have_all_died_is_over():
    state = core.living(formed("a", "b"), set())
    assert (state.round, state.complete) == (1, False)


def test_a_lost_node_is_a_reason_to_restart_for_the_others():
    state = formed("a", "b")
    assert core.reasons_to_restart(core.living(state, {"a"}), {"a"}, "a", 0) == 1


def test_a_node_that_was_taken_for_dead_restarts_its_workers():
    state = core.living(formed("a", "b"), {"a"})
    assert core.reasons_to_restart(state, {"a"}, "b", 0) == 1


def test_a_lost_state_is_a_reason_to_restart():
    assert core.reasons_to_restart(RunState(round=4), {"a"}, "a", 3) == 1


def test_ranks_stay_and_newcomers_follow():
    limits = Limits(2, 3)
    state = formed("c", "b", "a", limits=limits)
    state = core.living(state, {"a", "c"})
    for node in "ac":
        state = core.turn_over(state, node)
    state = written(state, "0", limits)
    state = written(state, "a", limits)
    assert state.world == ("c", "a", "0")


def test_the_store_of_a_round_is_forgotten_with_it():
    state = replace(formed("a", limits=ELASTIC), store="h:1")
    assert core.turn_over(state, "a").store == ""
    assert core.living(state, set()).store == ""


def test_a_closed_run_takes_nobody():
    state = replace(RunState(), closed=True)
    assert step(state, "a") == Closed(stood_by=False)
    assert step(replace(state, standby=("a",)), "a") == Closed(stood_by=True)


def test_a_round_under_way_ends_in_peace_when_the_run_is_closed():
    state = replace(formed("a", "b"), closed=True, waiting=("c",))
    assert core.reasons_to_restart(state, {"a"}, "a", 0) == 0


def test_who_tried_too_long_takes_itself_out_first():
    state = written(RunState(), "a")
    assert written(state, "a", expired=True).participants == ()
    assert step(RunState(), "a", expired=True) == TimedOut()
    waiting = replace(formed("x", limits=ELASTIC), waiting=("a",))
    assert written(waiting, "a", ELASTIC, expired=True).waiting == ()


def test_a_round_that_is_complete_counts_though_the_time_is_over():
    assert step(formed("a", "b"), "a", expired=True) == Formed(0, 0, 2)


def test_the_state_is_kept_by_some_of_the_living():
    nodes = {f"n{number}" for number in range(9)}
    assert sum(core.keeps_state(nodes, node) for node in nodes) == core.KEEPERS
    assert core.keeps_state({"a"}, "a")
    assert not core.keeps_state({"a"}, "")


@pytest.mark.parametrize("seed", range(150))
def test_whatever_happens_the_living_meet_in_one_round_in_the_end(seed):
    """Random deaths, restarts, arrivals; then calm: as many as fit are in one round, nobody restarts."""
    rng = random.Random(seed)
    least = rng.randint(1, 3)
    limits = Limits(least, rng.randint(least, 4))
    state, alive, inside, born = RunState(), set(), {}, 0

    def act(node, *, last_call_over):
        """One look and one step of one agent. ``inside``: the round its workers run in, None: it joins."""
        nonlocal state
        state = core.living(state, alive)
        if inside[node] is not None:
            if core.reasons_to_restart(state, alive, node, inside[node]) == 0:
                return False
            if state.round == inside[node]:
                state = core.turn_over(state, node)
            inside[node] = None
            return True
        match step(state, node, limits, last_call_over=last_call_over):
            case Write(new):
                state = new
            case Formed(number, rank, _size):
                assert state.world[rank] == node
                inside[node] = number
            case Wait():
                return False
        assert len(state.participants) <= limits.most
        assert len(set(state.world)) == len(state.world)
        everywhere = [*state.participants, *state.waiting, *state.standby]
        assert len(set(everywhere)) == len(everywhere), "a node is in one place only"
        return True

    for _ in range(60):
        happens = rng.random()
        if happens < 0.15 and len(alive) < 6:
            born += 1
            alive.add(f"n{born}")
            inside[f"n{born}"] = None
        elif happens < 0.25 and alive:
            alive.remove(rng.choice(sorted(alive)))
        elif happens < 0.35 and alive:
            node = rng.choice(sorted(alive))
            if inside[node] is not None:
                # Its workers have failed.
                state = core.living(state, alive)
                state = core.turn_over(state, node) if state.round == inside[node] else state
                inside[node] = None
        elif alive:
            act(rng.choice(sorted(alive)), last_call_over=rng.random() < 0.3)
    while len(alive) < limits.least:
        born += 1
        alive.add(f"n{born}")
        inside[f"n{born}"] = None
    for _ in range(200):
        moved = [act(node, last_call_over=True) for node in sorted(alive)]
        if not any(moved):
            break
    else:
        pytest.fail(f"it never comes to rest: {state}")
    training = {node for node in alive if inside[node] is not None}
    assert len(training) == min(len(alive), limits.most)
    assert {inside[node] for node in training} == {state.round}
    assert training == set(state.world)
