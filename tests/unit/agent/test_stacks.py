"""Stacks of real processes, and what is made of them."""

import contextlib
import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dtrain.agent.core.events import Event, StacksCollected
from dtrain.agent.core.stacktext import Frame, classify, is_same, main_thread, where
from dtrain.agent.launch import processes as proc
from dtrain.agent.launching import ProcessId
from dtrain.agent.logs import RankLogs
from dtrain.agent.stacks import RankWatch
from dtrain.protocol.ids import Attempt, JobName, Rank, Uid
from dtrain.protocol.ranklink import ENV_STACKS
from dtrain.protocol.snapshot import Stack, StackKind

JOB, UID, ONE = JobName("train"), Uid("u1"), Attempt(1)

ARM = "from dtrain.trainer.stacks import write_on_signal; write_on_signal();"
ON = "print('on', flush=True)"
"""Each program says it from the very place where it is to be found: what comes before is movement."""
SPIN = f"\ndef spin():\n    {ON}\n    while True:\n        pass\nspin()"
SLEEP = f"\nimport time\ndef nap():\n    {ON}\n    time.sleep(1000)\nnap()"
WORK = f"\ndef fib(n):\n    return n if n < 2 else fib(n - 1) + fib(n - 2)\n{ON}\nwhile True:\n    fib(25)"
CHILD = (
    f"\nimport os, time\ndef child():\n    {ON}\n    while True:\n        pass\n"
    "def wait():\n    time.sleep(1000)\n"
    "child() if os.fork() == 0 else wait()"
)


class Bench:
    def __init__(self, root: Path) -> None:
        logs = RankLogs(root)
        logs.prepare(JOB, UID, ONE, Rank(0))
        self.folder = root / "train-u1" / "attempt_1" / "0"
        self.folder.mkdir()
        self.file = self.folder / "stacks.log"
        self.events: queue.Queue[Event] = queue.Queue()
        self.watch = RankWatch(logs, self.events.put)
        self.running: list[subprocess.Popen[bytes]] = []

    def start(self, code: str) -> ProcessId:
        env = {**os.environ, ENV_STACKS: str(self.file)}
        started = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, env=env, start_new_session=True
        )
        self.running.append(started)
        assert started.stdout is not None
        assert started.stdout.readline() == b"on\n"
        found = proc.identify(started.pid)
        assert found is not None
        return found

    def collect(self, process: ProcessId) -> Stack:
        self.watch.collect(JOB, UID, ONE, "d1", {Rank(0): process})
        event = self.events.get(timeout=20)
        assert isinstance(event, StacksCollected)
        assert (event.job, event.attempt, event.dump) == (JOB, ONE, "d1")
        return event.stacks[0]

    def close(self) -> None:
        for one in self.running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(one.pid, signal.SIGKILL)
            one.wait()
            assert one.stdout is not None
            one.stdout.close()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.close()


def test_a_loop_and_a_sleep_are_found_where_they_are_and_neither_is_at_work(bench: Bench) -> None:
    for code, name in ((SPIN, "spin"), (SLEEP, "nap")):
        stack = bench.collect(bench.start(ARM + code))
        assert (stack.kind, stack.moving) == (StackKind.CODE, False)
        assert stack.where.startswith(f"{name} (")


BUILTINS = (
    f"\ndef spin():\n    x = [1] * 999\n    {ON}\n"
    "    while True:\n        x.count(1)\n        sorted(x)\nspin()"
)
POLL = (
    "\nimport time\ndef ready():\n    time.sleep(.05)\n    return False\n"
    f"def wait():\n    {ON}\n    while not ready():\n        pass\nwait()"
)


@pytest.mark.parametrize("code", [BUILTINS, POLL])
def test_a_loop_that_never_leaves_its_place_or_uses_no_cpu_is_no_work(bench: Bench, code: str) -> None:
    process = bench.start(ARM + code)
    assert not any(bench.collect(process).moving for _ in range(3))


def test_a_rank_that_computes_is_at_work(bench: Bench) -> None:
    process = bench.start(ARM + WORK)
    # Two looks may well hit the same depth of its recursion.
    assert any(bench.collect(process).moving for _ in range(6))


def test_a_rank_that_reads_is_at_work(bench: Bench) -> None:
    read = (
        f"\nimport time\nfile = open('/dev/zero', 'rb', buffering=0)\n{ON}\n"
        "while True:\n    file.read(1 << 20); time.sleep(.02)"
    )
    assert bench.collect(bench.start(ARM + read)).moving


def test_a_child_that_stands_still_is_not_at_work_however_busy(bench: Bench) -> None:
    stack = bench.collect(bench.start(ARM + CHILD))
    assert not stack.moving
    assert "in child" in bench.file.read_text()


def test_a_stopped_rank_is_told_apart_and_goes_on_afterwards(bench: Bench) -> None:
    process = bench.start(ARM + SLEEP)
    os.kill(process.pid, signal.SIGSTOP)
    _await(lambda: bench.watch.look(Rank(0), process).state == "T")
    assert bench.collect(process).kind is StackKind.STOPPED
    os.kill(process.pid, signal.SIGCONT)
    _await(lambda: bench.watch.look(Rank(0), process).state == "S")
    assert bench.collect(process).kind is StackKind.CODE


def test_a_program_that_does_not_handle_the_signal_is_not_ended_by_it(bench: Bench) -> None:
    process = bench.start(f"import time; {ON}; time.sleep(1000)")
    assert bench.collect(process).kind is StackKind.UNKNOWN
    assert proc.is_alive(process)


def test_a_program_that_does_not_answer_is_asked_through_py_spy_where_it_is_installed(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = bench.start(f"import time; {ON}; time.sleep(1000)")
    tool = tmp_path / "py-spy"
    # An old one: it knows no whole names.
    refuses = 'case "$*" in *--full*) exit 2;; esac'
    tool.write_text(
        f"#!/bin/sh\necho \"asked $*\" >> {tmp_path}/asked\n{refuses}\ncat <<'END'\n{PY_SPY}END\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    stack = bench.collect(process)
    assert (stack.kind, stack.where) == (StackKind.CODE, "read (data.py:12)")
    assert f"asked dump --nonblocking --pid {process.pid}" in (tmp_path / "asked").read_text()


def test_a_rank_that_has_ended_has_no_stack(bench: Bench) -> None:
    process = bench.start(ARM + SLEEP)
    os.kill(process.pid, signal.SIGKILL)
    bench.running[0].wait()
    assert bench.watch.look(Rank(0), process).state == ""
    assert bench.collect(process).kind is StackKind.UNKNOWN


def test_a_person_gets_all_threads(bench: Bench) -> None:
    threads = "\nimport threading as t, time\nt.Thread(target=lambda: time.sleep(1000), daemon=True).start()"
    process = bench.start(ARM + threads + SLEEP)

    def now() -> tuple[Stack, str]:
        ((stack, text),) = bench.watch.now(JOB, UID, ONE, {Rank(0): process}, "somebody asked")
        return stack, text

    _await(lambda: now()[0].where.startswith("nap"))
    _, text = now()
    assert "somebody asked" in text
    assert text.count("most recent call first") == 2
    assert text in bench.file.read_text()


def test_a_wait_for_the_cpu_is_seen(bench: Bench) -> None:
    process = bench.start(ARM + f"\nimport os; os.sched_setaffinity(0, {{0}}); os.nice(15){SPIN}")
    rival = bench.start(ARM + f"\nimport os; os.sched_setaffinity(0, {{0}}){SPIN}")
    bench.watch.look(Rank(0), process)
    time.sleep(1.0)
    assert bench.watch.look(Rank(0), process).waited_s > 0.3
    assert proc.is_alive(rival)


def _await(condition: Any) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


DUMP = """
Thread 0x00007f1 (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 324 in wait

Current thread 0x00007f2 (most recent call first):
  File "{inner}", line 7 in {name}
  File "/app/my trainer.py", line 42 in step
  File "/app/my trainer.py", line 50 in <module>
"""
PY_SPY = """Process 7: python train.py
Python v3.11.2 (/usr/bin/python3.11)

Thread 7 (idle): "MainThread"
    wait (threading.py:324)
    read (data.py:12)
    <module> (train.py:3)
Thread 8 (active): "other"
    run (other.py:1)
"""


@pytest.mark.parametrize(
    ("inner", "name", "state", "busy", "kind"),
    [
        ("/x/torch/distributed/distributed_c10d.py", "all_reduce", "S", False, StackKind.COLLECTIVE),
        ("/x/torch/autograd/graph.py", "_engine_run_backward", "S", False, StackKind.COLLECTIVE),
        ("/x/torch/autograd/graph.py", "_engine_run_backward", "R", True, StackKind.CODE),
        ("/x/torch/utils/data/dataloader.py", "_try_get_data", "S", False, StackKind.DATA),
        ("/app/model.py", "forward", "R", True, StackKind.CODE),
        ("/app/model.py", "forward", "D", False, StackKind.KERNEL),
        ("/app/model.py", "forward", "T", False, StackKind.STOPPED),
    ],
)
def test_what_a_rank_does_is_told_from_its_main_thread(
    inner: str, name: str, state: str, busy: bool, kind: StackKind
) -> None:
    frames = main_thread(DUMP.format(inner=inner, name=name))
    assert [frame.name for frame in frames] == [name, "step", "<module>"]
    assert classify(frames, state, busy=busy) is kind


def test_the_place_is_the_call_and_the_line_of_the_script_that_made_it() -> None:
    frames = main_thread(DUMP.format(inner="/x/site-packages/torch/functional.py", name="einsum"))
    assert where(frames) == "einsum (functional.py:7), called by step (my trainer.py:42)"


def test_py_spy_is_understood() -> None:
    frames = main_thread(PY_SPY)
    assert frames[1] == Frame("read", "data.py", 12)
    assert where(frames) == "read (data.py:12)"
    # Names of files are shortened to their package.
    inner = PY_SPY.replace("wait (threading.py:324)", "all_reduce (torch/distributed/distributed_c10d.py:9)")
    assert classify(main_thread(inner), "S", busy=False) is StackKind.COLLECTIVE


def test_a_text_without_stacks_is_no_stack() -> None:
    assert main_thread("Segmentation fault\n") == ()
    assert classify((), "S", busy=False) is StackKind.UNKNOWN
    assert where(()) == ""


def test_one_place_may_differ_in_the_innermost_line_only() -> None:
    one = (Frame("f", "a.py", 1), Frame("g", "a.py", 5))
    assert is_same(one, (Frame("f", "a.py", 2), Frame("g", "a.py", 5)))
    assert not is_same(one, (Frame("f", "a.py", 1), Frame("g", "a.py", 6)))
    assert not is_same(one, one[1:])
