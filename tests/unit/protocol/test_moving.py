"""What machines tell of bytes on their way, summed for whoever looks at a job."""

from dataclasses import replace

from dtrain.protocol.moving import Share, Told, movements, told
from dtrain.protocol.rows import Movement

SAVE = Share("save", 7, 700, 30, 100, 10.0)
RESTORE = Share("restore", 7, 700, 30, 100, 10.0)


def summed(*machines: tuple[Share, ...], expected: int) -> tuple[Movement, ...]:
    return movements([Told(one) for one in machines], expected)


def test_nothing_moves() -> None:
    assert summed(expected=4) == ()
    assert summed((), (), expected=2) == ()


def test_machines_are_summed_and_the_slowest_one_says_how_long_it_takes() -> None:
    slow = replace(SAVE, done_bytes=20, bytes_per_s=2.0)
    assert summed((SAVE,), (slow,), expected=2) == (
        Movement("save", 7, 700, 50, 200, 12.0, 40.0, machines=2, machines_done=0, expected=2),
    )


def test_the_whole_is_unknown_while_a_machine_does_not_know_its_part() -> None:
    (found,) = summed((SAVE,), (replace(SAVE, total_bytes=0),), expected=2)
    assert (found.done_bytes, found.total_bytes, found.left_s) == (60, 0, None)


def test_the_whole_of_a_save_is_unknown_while_a_machine_has_not_begun() -> None:
    (found,) = summed((SAVE,), (), expected=2)
    assert (found.done_bytes, found.total_bytes, found.machines, found.expected) == (30, 0, 1, 2)


def test_a_machine_that_needs_nothing_does_not_keep_a_restore_from_being_known() -> None:
    (found,) = summed((RESTORE,), (), expected=2)
    assert (found.done_bytes, found.total_bytes, found.left_s) == (30, 100, 7.0)


def test_one_machine_is_done() -> None:
    done = replace(SAVE, done_bytes=100, bytes_per_s=99.0)
    (found,) = summed((SAVE,), (done,), expected=2)
    assert (found.machines_done, found.done_bytes, found.bytes_per_s, found.left_s) == (1, 130, 10.0, 7.0)


def test_nobody_knows_how_long_it_takes_while_a_machine_stands_still() -> None:
    (found,) = summed((SAVE,), (replace(SAVE, bytes_per_s=0.0),), expected=2)
    assert (found.bytes_per_s, found.left_s) == (10.0, None)


def test_a_save_that_is_all_there_is_told_until_it_is_settled_and_a_restore_is_not() -> None:
    done = Share("save", 7, 700, 100, 100)
    (found,) = summed((done,), expected=1)
    assert (found.done_bytes, found.total_bytes, found.machines_done, found.left_s) == (100, 100, 1, None)
    assert summed((replace(done, kind="restore"),), expected=1) == ()


def test_an_empty_checkpoint_divides_by_nothing() -> None:
    (found,) = summed((Share("save", 7, 700, 0, 0),), expected=1)
    assert (found.done_bytes, found.total_bytes, found.left_s) == (0, 0, None)


def test_a_machine_that_was_too_quick_to_be_watched_counts_beside_those_that_were() -> None:
    part = {"seq": 7, "step": 700, "rank": 0, "size_bytes": 40}
    quick = told({"ranks": [{}], "durable": [part]})
    assert quick == Told((Share("save", 7, 700, 40, 40, told=False),))
    assert movements([quick], 1) == ()
    (found,) = movements([Told((SAVE,)), quick], 2)
    assert (found.done_bytes, found.total_bytes, found.machines_done) == (70, 140, 1)


def test_parts_that_are_durable_and_watched_count_once() -> None:
    watched = {"kind": "save", "seq": 7, "step": 700, "done_bytes": 50, "total_bytes": 80, "bytes_per_s": 1.0}
    part = {"seq": 7, "step": 700, "rank": 0, "size_bytes": 40}
    found = told({"ranks": [{}, {}], "durable": [part], "transfers": [watched], "seq_over": 6})
    assert found == Told((Share("save", 7, 700, 50, 80, 1.0),), 6)


def test_a_machine_with_one_of_two_parts_does_not_know_its_whole() -> None:
    part = {"seq": 7, "step": 700, "rank": 0, "size_bytes": 40}
    assert told({"ranks": [{}, {}], "durable": [part]}).shares[0].total_bytes == 0


def test_what_one_machine_knows_to_be_settled_moves_nowhere() -> None:
    restore = replace(RESTORE, seq=6)
    assert movements([Told(settled=7), Told((SAVE, restore))], 2) == summed((restore,), expected=2)
    (found,) = movements([Told(settled=6), Told((SAVE,), 6)], 2)
    assert (found.seq, found.done_bytes) == (7, 30)
