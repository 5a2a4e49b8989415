"""How far a checkpoint is, as people read it: in describe, in top, and while they wait."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tests.support.tty import Terminal
from tests.unit.cli.fakes import JOB, NOW, FakeReplica, Item, item, reading, running_job, snapshot
from tests.unit.cli.fakes import KEYS as WHERE

from dtrain.cli import live, records
from dtrain.cli.live import PLAIN_S, Live
from dtrain.cli.main import run
from dtrain.cli.render import describe, moving
from dtrain.protocol.ids import AgentName, Seq, Step
from dtrain.protocol.job import JobPhase
from dtrain.protocol.rows import Movement
from dtrain.protocol.snapshot import Transfer, TransferKind

GB = 1000**3
SAVE = Movement(
    "save",
    7,
    700,
    3_100_000_000,
    4 * GB,
    210e6,
    4.3,
    machines=2,
    expected=2,
)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {},
            "Saving: checkpoint 7 (step 700): 3.1 GB of 4.0 GB (77 %) in the store, 210.0 MB/s,"
            " about 4s left",
        ),
        (
            {"kind": "restore"},
            "Restoring: checkpoint 7 (step 700): 3.1 GB of 4.0 GB (77 %), 210.0 MB/s, about 4s left",
        ),
        (
            {"total_bytes": 0, "left_s": None, "machines": 1},
            "Saving: checkpoint 7 (step 700): 3.1 GB so far in the store, 210.0 MB/s,"
            " 1 of 2 machines have begun",
        ),
        (
            {"machines_done": 1},
            "Saving: checkpoint 7 (step 700): 3.1 GB of 4.0 GB (77 %) in the store, 210.0 MB/s,"
            " about 4s left, 1 of 2 machines are through",
        ),
        (
            {"bytes_per_s": 0.0, "left_s": None},
            "Saving: checkpoint 7 (step 700): 3.1 GB of 4.0 GB (77 %) in the store",
        ),
        (
            {"done_bytes": 4 * GB, "machines_done": 2, "bytes_per_s": 0.0, "left_s": None},
            "Saving: checkpoint 7 (step 700): all 4.0 GB in the store",
        ),
        (
            {"done_bytes": 0, "total_bytes": 0, "bytes_per_s": 0.0, "left_s": None},
            "Saving: checkpoint 7 (step 700): 0 B so far in the store",
        ),
    ],
)
def test_one_sentence_says_of_what_how_much_how_fast_and_how_long(
    changes: dict[str, object], line: str
) -> None:
    assert moving.line(replace(SAVE, **changes)) == line  # type: ignore[arg-type]


def test_a_cell_of_a_list_has_the_least_of_it() -> None:
    assert moving.short(SAVE) == "saving 7: 77 % of 4.0 GB, 4s left"
    assert moving.short(replace(SAVE, total_bytes=0, left_s=None)) == "saving 7: 3.1 GB"


def test_a_bar_fits_its_terminal() -> None:
    wide = moving.bar(SAVE, 200)
    assert wide.startswith("[###############.....] Saving: checkpoint 7")
    for width in (10, 40, 80, 120):
        assert len(moving.bar(SAVE, width)) <= width
    assert not moving.bar(replace(SAVE, total_bytes=0), 200).startswith("[")


def moving_job() -> records.Job:
    told = Transfer(TransferKind.SAVE, Seq(5), Step(50), 30_000_000, 50_000_000, 10e6)
    machines = (("a1", 0), ("a2", 2))
    workers = [
        item(WHERE.worker(AgentName(agent), JOB), snapshot(agent, first, 45, transfers=(told,)))
        for agent, first in machines
    ]
    cluster = records.group(reading(*running_job()), reading(*workers))
    return cluster.jobs["digits"]


def test_describe_says_it_of_all_machines_together() -> None:
    text = "checkpoint 5 (step 50): 60.0 MB of 100.0 MB (60 %) in the store, 20.0 MB/s, about 2s left"
    assert f"Saving        {text}" in describe.job(moving_job(), NOW)


def test_programs_get_it_as_numbers() -> None:
    summary = moving_job().as_json(NOW)["summary"]
    assert summary["moving"] == [
        {
            "kind": "save",
            "seq": 5,
            "step": 50,
            "done_bytes": 60_000_000,
            "total_bytes": 100_000_000,
            "bytes_per_s": 20e6,
            "left_s": 2.0,
            "machines": 2,
            "machines_done": 0,
            "expected": 2,
        }
    ]


def test_who_waits_in_a_pipe_gets_a_plain_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    now = 100.0
    with Live(monotonic=lambda: now) as shown:
        shown.show([SAVE])
        now += PLAIN_S / 2
        shown.show([replace(SAVE, done_bytes=32 * GB // 10)])
        now += PLAIN_S
        shown.show([replace(SAVE, done_bytes=36 * GB // 10)])
        now += PLAIN_S
        shown.show([replace(SAVE, done_bytes=36 * GB // 10)])
        with shown.aside():
            pass
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split(" (step 700): ")[1][:6] for line in err.splitlines()] == ["3.1 GB", "3.6 GB"]
    assert "\x1b" not in err
    assert "\r" not in err


def test_on_a_terminal_the_line_makes_room_and_is_gone_at_the_end(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(live, "_width", lambda: 80)
    with Live() as shown:
        shown.show([SAVE])
        with shown.aside():
            sys.stderr.write("a line of the log\n")
    shown.show([SAVE])
    line = moving.bar(SAVE, 79)
    assert capsys.readouterr().err == (f"\r\x1b[K{line}\r\x1b[Ka line of the log\n\r\x1b[K{line}\r\x1b[K")


def items(done: int, **job: object) -> list[Item]:
    """The job as etcd has it while both machines have ``done`` bytes of 50 MB."""
    told = Transfer(TransferKind.SAVE, Seq(5), Step(50), done, 50_000_000, 10e6)
    return [
        *(one for one in running_job(**job) if "/workers/" not in one.key),
        item(WHERE.worker(AgentName("a1"), JOB), snapshot("a1", 0, 45, transfers=(told,))),
        item(WHERE.worker(AgentName("a2"), JOB), snapshot("a2", 2, 45, transfers=(told,))),
    ]


@pytest.mark.parametrize(
    "words", [("watch", "digits"), ("submit", "FILE", "--follow")], ids=lambda words: words[0]
)
def test_a_bar_stays_below_what_is_told_and_goes_with_the_job(
    words: tuple[str, ...], replica: FakeReplica, address: str, tmp_path: Path
) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("name: digits\nnnodes: 2\nnproc_per_node: 2\nscript: train.py\n")
    (tmp_path / "train.py").touch()
    replica.items = items(10_000_000)
    replica.logs[3, 0, "stdout"] = b"first line\n"
    command = (sys.executable, "-m", "dtrain.cli", *(str(file) if word == "FILE" else word for word in words))
    env = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "TERM")}
    env |= {"DTRAIN_COORDINATORS": address, "XDG_CONFIG_HOME": str(tmp_path / "config")}
    with Terminal(command, env=env, columns=160) as terminal:
        terminal.shows("[####................] Saving: checkpoint 5 (step 50): 20.0 MB of 100.0 MB (20 %)")
        replica.update(items(30_000_000, reason="another sentence"))
        terminal.shows("[############........] Saving: checkpoint 5", "another sentence")
        assert terminal.text.count("Saving") == 1
        written = [line for line in terminal.lines if line]
        assert "Saving" in written[-1]
        replica.update(items(30_000_000, phase=JobPhase.SUCCEEDED, reason="done"))
        terminal.until("it ends", lambda: terminal.process.poll() is not None)
        terminal.draw(0.2)
        assert terminal.process.returncode == 0, terminal.text
        assert "Saving" not in terminal.text
        assert "SUCCEEDED" in terminal.text


def test_a_watch_in_a_pipe_is_records_alone(
    replica: FakeReplica, address: str, capfd: pytest.CaptureFixture[str]
) -> None:
    replica.items = items(10_000_000, phase=JobPhase.SUCCEEDED)
    assert run(["watch", "digits", "--coordinators", address]) == 0
    out, err = capfd.readouterr()
    assert "transfers" not in out
    assert err == ""
    assert "List" not in replica.calls[1:]
