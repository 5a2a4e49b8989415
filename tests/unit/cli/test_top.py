"""``dtrain top``: what is drawn of what is known, what keys do, and the real thing on a terminal."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from tests.support.tty import Terminal
from tests.unit.cli.fakes import (
    JOB,
    KEYS,
    NOW,
    FakeReplica,
    at,
    event,
    fleet,
    item,
    reading,
    running_job,
    serving,
    snapshot,
)

from dtrain.cli import exits, records
from dtrain.cli.main import run
from dtrain.cli.top import frame, view
from dtrain.cli.top.frame import ordered, rate
from dtrain.cli.top.screen import Keys
from dtrain.cli.top.seen import Seen, moved
from dtrain.cli.top.text import cells, cut
from dtrain.cli.top.view import Look, Page, Sort, View
from dtrain.protocol import errors
from dtrain.protocol.errors import ErrorCode
from dtrain.protocol.events import EventReason, EventType
from dtrain.protocol.ids import Rank, Step
from dtrain.protocol.phases import JobPhase
from dtrain.protocol.rows import AgentRow, JobRow, Movement
from dtrain.protocol.snapshot import RankState, Timing, WorkerPhase

COMMAND = (sys.executable, "-m", "dtrain.cli", "top")
SIZE = (80, 24)


def jobs(count: int, **more: object) -> tuple[JobRow, ...]:
    return tuple(
        JobRow(f"job-{place:02}", JobPhase.RUNNING, "all ranks train", step=place, **more)  # type: ignore[arg-type]
        for place in range(count)
    )


def seen(rows: tuple[JobRow, ...] = (), **more: object) -> Seen:
    return Seen(rows, coordinators=records.group(reading(*fleet())), name="local", **more)  # type: ignore[arg-type]


def drawn(look: Look, known: Seen, size: tuple[int, int] = SIZE, **more: float) -> frame.Frame:
    return frame.frame(look, known, size, now=NOW, at=more.get("at", 0.0))


def texts(found: frame.Frame) -> str:
    return "\n".join(line.text for line in found.lines)


def pressed(look: Look, known: Seen, *keys: str, size: tuple[int, int] = SIZE) -> Look:
    for key in keys:
        found = drawn(look, known, size)
        look = view.press(found.look, key, found.targets, found.height)
    return drawn(look, known, size).look


# What is drawn ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(80, 24), (200, 60), (40, 10), (20, 5), (10, 3), (1, 1), (80, 1), (3, 40)])
@pytest.mark.parametrize("shown", list(View))
def test_no_frame_is_larger_than_the_terminal(size: tuple[int, int], shown: View) -> None:
    wide = replace(jobs(1)[0], name="数据" * 40, reason="原因" * 60)
    events = tuple((JOB, event(seq, EventReason.HANG_FOUND, "x" * 300, 5)) for seq in range(9))
    known = seen(
        (*jobs(50), wide),
        events=events,
        agents=(AgentRow("a" * 90, "Lost"),),
        problems={"c1": ("p" * 300,)},
        trouble="t" * 200,
    )
    page = replace(known, opened=records.group(reading(*running_job())).jobs["digits"])
    looks = [(Look(shown), known), (Look(help=True), known), (Look(typing=True), known)]
    for look, what in [*looks, (Look(page=Page("job", "digits")), page)]:
        found = drawn(look, what, size, at=60.0)
        assert len(found.lines) <= size[1]
        assert max(cells(line.text) for line in found.lines) <= size[0]


def test_a_frame_says_who_leads_what_runs_and_what_happened() -> None:
    rows = (
        JobRow("digits", JobPhase.RUNNING, "all 4 ranks train", step=40, step_s=0.05, ranks=4, world_size=4),
        JobRow("waits", JobPhase.QUEUED, "no machine is free"),
    )
    events = ((JOB, event(1, EventReason.RANK_SIGNALED, "SIGKILL", 80, type=EventType.WARNING)),)
    text = texts(drawn(Look(), seen(rows, events=events, agents=(AgentRow("a1", "Ready", "", 2, 4),))))
    for told in (
        "cluster local   leader c1 (term 7)   2 replicas",
        "jobs 2 (1 QUEUED, 1 RUNNING)   agents 1 (1 Ready)   slots 2/4 busy",
        "digits   RUNNING   40     –      20        4/4",
        "1m20s ago  digits  RankSignaled: SIGKILL",
        "[jobs] 2 agents 3 events 4 replicas  q quit",
    ):
        assert told in text, text


def test_a_checkpoint_on_its_way_is_told_before_the_reason_and_whole_of_the_selected_job() -> None:
    moves = Movement("save", 7, 40, 30_000_000, 40_000_000, 5e6, 2.0, machines=2, expected=2)
    rows = (JobRow("digits", JobPhase.RUNNING, "all 4 ranks train", moving=(moves,)),)
    shown = [line.text for line in frame.frame(Look(), seen(rows), (160, 24), now=NOW, at=100.0).lines]
    assert any("saving 7: 75 % of 40.0 MB, 2s left; all 4 ranks train" in line for line in shown)
    assert any("30.0 MB of 40.0 MB (75 %) in the store, 5.0 MB/s, about 2s left" in line for line in shown)


def test_what_others_wrote_moves_no_cursor() -> None:
    rows = (JobRow("digits", JobPhase.RUNNING, "a\x1b[2Jb\nc"),)
    known = seen(rows, trouble="\x1b]0;title\x07", events=((JOB, event(1, EventReason.PAUSED, "\x1bc", 5)),))
    for shown in View:
        assert all("\x1b" not in line.text for line in drawn(Look(shown), known, at=99.0).lines)
        assert all("\n" not in line.text for line in drawn(Look(shown), known, at=99.0).lines)


def test_the_worst_is_said_and_how_old_the_picture_is() -> None:
    well = seen(jobs(1), read_at=100.0)
    assert drawn(Look(), well, at=101.0).lines[2].text == ""
    lost = replace(well, trouble="no coordinator answers at h:1")
    told = drawn(Look(), lost, at=112.0).lines[2]
    assert (told.text, told.style) == ("12s old: no coordinator answers at h:1; trying again", "red")
    assert "etcd unreachable" in drawn(Look(), replace(well, age_s=60.0), at=101.0).lines[2].text
    leaderless = replace(well, coordinators=records.group(reading(*fleet()[:-1])))
    assert "no leader" in drawn(Look(), leaderless, at=101.0).lines[2].text
    problem = replace(well, problems={"c1": ("the brake is on",), "c2": ("the brake is on", "old etcd")})
    assert drawn(Look(), problem, at=101.0).lines[2].text == (
        "PROBLEM (c1, c2): the brake is on (and 1 more: dtrain get coordinators)"
    )


def test_a_job_without_steps_is_told_for_how_long() -> None:
    row = replace(jobs(1)[0], step_s=0.5)
    before = moved(Seen(), (row,), 100.0)
    known = seen((row,), moved=before)
    later = replace(known, moved=moved(known, (row,), 134.0), read_at=134.0)
    assert "0 (34s)" in texts(drawn(Look(), later, at=134.0))
    # Nobody has looked since: it may have gone on.
    assert later.stalled_s(row, 900.0) == 34.0
    went_on = replace(row, step=9)
    assert moved(known, (went_on,), 134.0) == {row.name: 134.0}
    slow = replace(row, step_s=60.0)
    assert later.stalled_s(slow, 134.0) == 0.0
    assert later.stalled_s(replace(row, phase=JobPhase.QUEUED), 134.0) == 0.0


def test_steps_per_second_have_three_digits_and_are_unknown_without_reports() -> None:
    found = [rate(replace(jobs(1)[0], step_s=step_s)) for step_s in (None, 0.0, 0.0004, 0.05, 0.3, 90.0)]
    assert found == ["–", "–", "2500", "20", "3.33", "0.0111"]


def test_orders_begin_with_what_goes_on_and_are_stable() -> None:
    rows = (
        JobRow("old", JobPhase.FAILED, finished_at=at(500)),
        JobRow("b", JobPhase.RUNNING, step=3, step_s=0.1, submitted_at=at(50)),
        JobRow("new", JobPhase.SUCCEEDED, finished_at=at(5), step=90),
        JobRow("a", JobPhase.QUEUED, submitted_at=at(90)),
    )
    names = {sort: [row.name for row in ordered(rows[::-1], sort)] for sort in Sort}
    assert names[Sort.ACTIVE] == ["a", "b", "new", "old"]
    assert names[Sort.NAME] == ["a", "b", "new", "old"]
    assert names[Sort.STEP] == ["new", "b", "a", "old"]
    assert names[Sort.RATE][0] == "b"
    assert names[Sort.AGE][-2:] == ["a", "b"]
    assert [row.name for row in ordered(rows, Sort.NAME, backwards=True)] == ["old", "new", "b", "a"]


def test_text_is_cut_by_cells_not_by_letters() -> None:
    assert (cells("数据e\u0301"), cut("数据数据", 5), cut("数据数据", 8), cut("abc", 0)) == (
        5,
        "数据…",
        "数据数据",
        "",
    )
    assert cut("0123456789", 5, left=3) == "3456…"
    assert cut("ab", 5, left=30) == ""


# What keys do -----------------------------------------------------------------------------


def test_the_selected_job_stays_selected_while_others_come_and_go() -> None:
    look = pressed(Look(), seen(jobs(50)), *["down"] * 30)
    assert look.key == "job-30"
    found = drawn(look, seen(jobs(50)))
    assert any(line.style == "selected" and "job-30" in line.text for line in found.lines)
    fewer = seen(tuple(row for row in jobs(50) if row.name > "job-25"))
    assert drawn(look, fewer).look.key == "job-30"
    gone = seen(tuple(row for row in jobs(50) if row.name != "job-30"))
    assert drawn(look, gone).look.key == "job-31"
    assert drawn(look, seen()).look.key == ""


@pytest.mark.parametrize("size", [(80, 24), (80, 8), (80, 3), (80, 1)])
def test_wherever_keys_lead_the_selection_is_in_sight(size: tuple[int, int]) -> None:
    known, look = seen(jobs(40)), Look()
    for key in ("end", "pageup", "up", "home", "pagedown", "down", "space", "G", "g", "j", "k", "end"):
        look = pressed(look, known, key, size=size)
        assert look.top <= look.index < look.top + drawn(look, known, size).height
    assert look.key == "job-39"
    assert pressed(look, known, size=(80, 60)).top == 0


def test_a_filter_shows_only_rows_with_the_text_until_it_is_cleared() -> None:
    known = seen(jobs(30))
    look = pressed(Look(), known, "/", "J", "o", "b", "-", "1", "2", "x", "backspace")
    assert "filter: Job-12_" in texts(drawn(look, known))
    look = pressed(look, known, "enter")
    assert (look.filter, look.key, look.typing) == ("Job-12", "job-12", False)
    assert "job-13" not in texts(drawn(look, known))
    assert pressed(look, known, "esc").filter == ""
    # q is a letter of a filter, and leaves otherwise.
    assert pressed(look, known, "/", "q").over is False
    assert "nothing contains" in texts(drawn(pressed(look, known, "/", "q"), known))
    assert pressed(look, known, "q").over


def test_enter_opens_a_page_and_esc_goes_back_to_the_same_row() -> None:
    cluster = records.group(reading(*running_job(), *fleet()))
    known = seen((*jobs(3), JobRow("digits", JobPhase.RUNNING)))
    look = pressed(Look(sort=Sort.NAME), known, "enter")
    assert look.page == Page("job", "digits")
    assert "reading ..." in texts(drawn(look, known))
    opened = replace(known, opened=cluster.jobs["digits"])
    assert "all 4 ranks train" in texts(drawn(look, opened))
    end = pressed(look, opened, "end")
    assert "RankSignaled" in texts(drawn(end, opened))
    assert pressed(end, opened, "down").top == end.top
    assert "it is no more" in texts(drawn(look, replace(known, gone=True)))
    back = pressed(end, opened, "esc")
    assert (back.page, back.key) == (None, "digits")
    agent = pressed(Look(View.AGENTS), replace(known, agents=(AgentRow("a1", "Ready"),)), "enter")
    assert agent.page == Page("agent", "a1")
    assert "h1:1" in texts(drawn(agent, replace(known, opened=cluster.agents["a1"])))


def test_lists_follow_each_other_and_help_leads_back() -> None:
    known = seen(jobs(3))
    assert [pressed(Look(), known, *["tab"] * count).view for count in range(5)] == [*View, View.JOBS]
    assert pressed(Look(), known, "backtab").view is View.REPLICAS
    assert pressed(Look(), known, "3").view is View.EVENTS
    look = pressed(Look(), known, "down", "?")
    assert "Keys" in texts(drawn(look, known))
    assert pressed(look, known, "x").key == "job-01"
    assert pressed(Look(), known, "s").sort is Sort.NAME
    assert pressed(Look(), known, *["s"] * len(Sort), "r").backwards
    assert pressed(Look(), known, "right", "right", "left").left == view.SHIFT
    assert pressed(Look(), seen(), "enter", "down", "end") == Look()


@pytest.mark.parametrize("cuts", [1, 2, 3, 100])
def test_keys_are_understood_however_they_are_cut(cuts: int) -> None:
    data = "q\x1b[A\x1bOB\x1b[5~é\x1b[1;5C\x1b[Z \x7f\r\t".encode()
    keys, found = Keys(), []
    for start in range(0, len(data), cuts):
        found += keys.feed(data[start : start + cuts])
    assert found == ["q", "up", "down", "pageup", "é", "backtab", "space", "backspace", "enter", "tab"]
    assert keys.feed(b"\x1b") == []
    assert keys.waiting
    assert (keys.rest(), keys.waiting) == (["esc"], False)


# The real thing ---------------------------------------------------------------------------


@pytest.fixture
def env(address: str, replica: FakeReplica) -> dict[str, str]:
    replica.items = [*running_job(), *fleet()]
    return {**os.environ, "DTRAIN_COORDINATORS": address}


def test_a_job_is_looked_at_on_a_terminal_of_80_by_24(env: dict[str, str], replica: FakeReplica) -> None:
    with Terminal(COMMAND, env=env) as terminal:
        terminal.shows("digits   RUNNING   45", "Recent events", "RankSignaled: SIGKILL", "s active")
        assert terminal.lines[0].startswith("dtrain top")
        assert terminal.screen.cursor.hidden
        row = next(place for place, line in enumerate(terminal.lines) if line.startswith("digits"))
        assert terminal.screen.buffer[row][0].reverse
        ranks = tuple(
            RankState(Rank(rank), 9, WorkerPhase.TRAINING, Step(99), timing=Timing(0.25, 0.2, 0.1))
            for rank in (0, 1)
        )
        newer = item(KEYS.worker("a1", JOB), snapshot("a1", 0, 99, ranks=ranks))  # type: ignore[arg-type]
        newest = item(KEYS.event(JOB, 3), event(3, EventReason.STRAGGLER, "rank 2 is slow", 0))
        replica.update([one for one in replica.items if one.key != newer.key] + [newer, newest])
        terminal.shows("Straggler: rank 2 is slow", " 4  ")
        terminal.press("\r")
        terminal.shows("job digits", "Checkpoints   latest 4 (step 40")
        terminal.press("\x1b[F")
        terminal.shows("Events", "Straggler")
        terminal.press(8 * "\x1b[C")
        terminal.shows("rank 2 is slow")
        terminal.press("\x1b")
        terminal.shows("[jobs]")
        terminal.press("2")
        terminal.shows("a2     Cordoned")
        terminal.press("q")
        assert terminal.ended() == 0
        assert not terminal.screen.cursor.hidden


def test_a_resized_terminal_is_drawn_anew_and_only_changes_are_written(env: dict[str, str]) -> None:
    with Terminal(COMMAND, env=env) as terminal:
        terminal.shows("Recent events", "RankSignaled")
        terminal.resize(50, 10)
        terminal.until("the last line has moved up", lambda: "[jobs]" in terminal.lines[9])
        assert all(len(line) <= 50 for line in terminal.lines)
        terminal.resize(130, 40)
        terminal.until("the last line has moved down", lambda: "[jobs]" in terminal.lines[39])
        assert sum("[jobs]" in line for line in terminal.lines) == 1
        terminal.shows("Enter  / filter  s active")
        terminal.written = b""
        clock = terminal.lines[0][-12:]
        terminal.until("a second has passed", lambda: terminal.lines[0][-12:] != clock)
        assert b"\x1b[2J" not in terminal.written
        assert b"RUNNING" not in terminal.written.replace(b"(1 RUNNING)", b"")
        terminal.press("q")
        assert terminal.ended() == 0


def test_a_replica_that_is_lost_is_said_and_the_next_one_goes_on(env: dict[str, str]) -> None:
    replicas = [FakeReplica(items=[*running_job(), *fleet()]) for _ in range(2)]
    with serving(replicas[1]) as second, serving(replicas[0]) as first:
        env = {**env, "DTRAIN_COORDINATORS": f"{first},{second}"}
        with Terminal(COMMAND, env=env) as terminal:
            terminal.shows("digits   RUNNING")
            gone = [False]

            def refuse() -> object:
                import grpc

                return grpc.StatusCode.UNAVAILABLE if gone[0] else None

            for one in replicas:
                one.refuse = refuse  # type: ignore[assignment]
            gone[0] = True
            terminal.shows("old: ", "trying again", "digits   RUNNING")
            gone[0] = False
            replicas[0].refuse = lambda: __import__("grpc").StatusCode.UNAVAILABLE
            terminal.lacks("trying again")
            later = [*running_job(reason="it went on"), *fleet()]
            replicas[1].update(later)
            terminal.shows("it went on")
            terminal.press("q")
            assert terminal.ended() == 0


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM), (signal.SIGHUP, -signal.SIGHUP)],
)
def test_a_signal_leaves_the_terminal_as_it_was(env: dict[str, str], number: int, code: int) -> None:
    with Terminal(COMMAND, env=env) as terminal:
        terminal.shows("digits   RUNNING")
        terminal.process.send_signal(number)
        assert terminal.ended() == code
        assert "Traceback" not in terminal.text


def test_ctrl_z_gives_the_terminal_back_and_fg_takes_it_again(env: dict[str, str]) -> None:
    with Terminal(COMMAND, env=env) as terminal:
        terminal.shows("digits   RUNNING")
        terminal.process.send_signal(signal.SIGTSTP)
        terminal.until("it is stopped", lambda: terminal.stopped)
        terminal.draw(0.2)
        assert terminal.restored
        terminal.written = b""
        terminal.process.send_signal(signal.SIGCONT)
        terminal.until("all is drawn anew", lambda: b"digits   RUNNING" in terminal.written)
        assert b"\x1b[?1049h" in terminal.written
        assert not terminal.restored
        terminal.press("q")
        assert terminal.ended() == 0


def test_what_makes_it_no_use_to_go_on_is_told_on_the_terminal_as_it_was(
    env: dict[str, str], replica: FakeReplica
) -> None:
    with Terminal(COMMAND, env=env) as terminal:
        terminal.shows("digits   RUNNING")
        replica.refuse = lambda: errors.Refused(ErrorCode.NOT_PERMITTED, "you may not look any more")
        terminal.until("it ends", lambda: terminal.process.poll() is not None)
        terminal.draw(0.2)
        assert terminal.process.returncode == exits.NOT_ALLOWED
        assert "you may not look any more" in terminal.text
        assert "Traceback" not in terminal.text
        assert b"you may not" in terminal.written.rpartition(b"\x1b[?1049l")[2]


def test_a_closed_window_ends_it(env: dict[str, str]) -> None:
    with Terminal(COMMAND, env=env) as terminal:
        terminal.shows("digits   RUNNING")
        terminal.hang_up()
        assert terminal.process.wait(60) in (0, -signal.SIGHUP)


def test_no_colours_where_they_are_not_wanted(env: dict[str, str]) -> None:
    with Terminal(COMMAND, env={**env, "NO_COLOR": "1"}) as terminal:
        terminal.shows("digits   RUNNING", "RankSignaled")
        colours = {cell.fg for row in terminal.screen.buffer.values() for cell in row.values()}
        assert colours == {"default"}
        terminal.press("q")
        assert terminal.ended() == 0


def test_once_prints_one_plain_frame_also_where_there_is_no_terminal(
    env: dict[str, str], address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in ([], ["--once"]):
        done = subprocess.run(
            [*COMMAND, *words], env=env, capture_output=True, text=True, timeout=60, check=True
        )
        assert done.stderr == ""
        assert "\x1b" not in done.stdout
        for told in (
            "leader c1 (term 7)",
            "digits   RUNNING   45",
            "a2     Cordoned",
            "RankSignaled: SIGKILL",
        ):
            assert told in done.stdout
    assert run(["top", "--once", "--filter", "nothing so", "--coordinators", address]) == 0
    assert "digits   RUNNING" not in capsys.readouterr().out
    with Terminal(COMMAND, env={**env, "TERM": "dumb"}) as terminal:
        terminal.until("it ends", lambda: terminal.process.poll() is not None)
        terminal.draw(0.2)
        assert b"\x1b[?" not in terminal.written
        assert "digits   RUNNING" in terminal.text


def test_a_cluster_that_is_down_is_told_before_the_screen_is_taken(env: dict[str, str]) -> None:
    with Terminal(COMMAND, env={**env, "DTRAIN_COORDINATORS": "127.0.0.1:1"}) as terminal:
        terminal.until("it ends", lambda: terminal.process.poll() is not None)
        terminal.draw(0.2)
        assert terminal.process.returncode == exits.UNREACHABLE
        assert "no coordinator answers at 127.0.0.1:1" in terminal.text
        assert b"?1049h" not in terminal.written


def test_a_replica_of_the_former_release_is_enough(env: dict[str, str], replica: FakeReplica) -> None:
    replica.former = True
    with Terminal(COMMAND, env=env) as terminal:
        terminal.shows("digits   RUNNING   45", "RankSignaled: SIGKILL")
        terminal.press("q")
        assert terminal.ended() == 0


def test_a_thousand_jobs_are_drawn_within_a_frame() -> None:
    known = seen(jobs(1000))
    begun = time.process_time()
    for _ in range(5):
        drawn(Look(), known)
    assert time.process_time() - begun < 5.0
