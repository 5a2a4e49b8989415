"""A real launcher with real ranks: exits, streams, arena, adoption, clean-up, store."""

import contextlib
import itertools
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from dtrain.agent import lines
from dtrain.agent.launch import processes
from dtrain.agent.launch.link import SOCKET_NAME
from dtrain.agent.launcher_client import LauncherClient
from dtrain.agent.launching import (
    REPORTS,
    ClearBelow,
    Cleared,
    Forked,
    ForkRanks,
    LauncherEnded,
    LauncherReady,
    LauncherReport,
    LauncherState,
    LaunchSettings,
    ProcessId,
    Quit,
    RankEnded,
    RankLaunch,
    ServeStore,
    SignalRanks,
    StoreReady,
)
from dtrain.protocol.ids import Attempt, Rank
from dtrain.protocol.job import Entry, EntryKind

pytestmark = pytest.mark.e2e

WAIT_S = 40.0

R = TypeVar("R", bound=LauncherReport)


class Desk:
    """Keeps the reports of one client and waits for the one a test is about."""

    def __init__(self) -> None:
        self.reports: list[LauncherReport] = []
        self._arrived = threading.Condition()

    def __call__(self, report: LauncherReport) -> None:
        with self._arrived:
            self.reports.append(report)
            self._arrived.notify_all()

    def wait(self, kind: type[R], where: Callable[[R], bool] = lambda _: True) -> R:
        def find() -> R | None:
            return next((r for r in self.reports if isinstance(r, kind) and where(r)), None)

        with self._arrived:
            assert self._arrived.wait_for(find, WAIT_S), f"no {kind.__name__} among {self.reports}"
            found = find()
        assert found is not None
        return found


class Bench:
    """One launcher and a folder for scripts and logs."""

    _attempts = itertools.count(1)
    ready: LauncherReady
    first: LauncherReport

    def __init__(self, folder: Path, *, preload: tuple[str, ...] = (), orphan_grace_s: float = 30.0) -> None:
        self.folder = folder
        self.desk = Desk()
        (folder / "work").mkdir(parents=True, exist_ok=True)
        self.work = folder / "work"
        self.settings = LaunchSettings(
            folder=str(folder / "launcher"),
            working_dir=str(self.work),
            env={"PYTHONPATH": os.environ.get("PYTHONPATH", "")},
            preload=preload,
            orphan_grace_s=orphan_grace_s,
            nproc=2,
        )
        self.client = LauncherClient.start(self.settings, self.desk)
        self.pid = self.client.process.pid

    def new_attempt(self) -> Attempt:
        return Attempt(next(self._attempts))

    def script(self, text: str, name: str = "train.py") -> Entry:
        (self.work / name).write_text(text)
        return Entry(EntryKind.SCRIPT, name)

    def log_dir(self, attempt: Attempt, rank: int = 0) -> Path:
        return self.folder / "logs" / f"attempt_{attempt}" / str(rank)

    def fork(self, entry: Entry, *, world: int = 1, env: dict[str, str] | None = None) -> Attempt:
        attempt = self.new_attempt()
        base = {"PATH": os.environ["PATH"], "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
        ranks = tuple(
            RankLaunch(
                Rank(rank),
                rank,
                {**base, "RANK": str(rank), "LOCAL_RANK": str(rank), **(env or {})},
                str(self.log_dir(attempt, rank)),
            )
            for rank in range(world)
        )
        self.client.send(ForkRanks(attempt, entry, str(self.work), ranks))
        return attempt

    def ended(self, attempt: Attempt, rank: int = 0) -> RankEnded:
        return self.desk.wait(RankEnded, lambda r: r.attempt == attempt and r.rank == rank)

    def run(self, text: str, **options: Any) -> RankEnded:
        return self.ended(self.fork(self.script(text), **options))

    def live_pid(self, attempt: Attempt) -> int:
        return self.desk.wait(Forked, lambda r: r.attempt == attempt).ranks[0].process.pid

    def out(self, attempt: Attempt, rank: int = 0) -> str:
        """What the rank has printed; the folder is there a moment before the file."""
        log = self.log_dir(attempt, rank) / "stdout.log"
        return log.read_text() if log.exists() else ""


@contextlib.contextmanager
def _bench(folder: Path | None = None, **options: Any) -> Iterator[Bench]:
    folder = folder or Path(tempfile.mkdtemp(prefix="dtl-"))
    bench = Bench(folder, **options)
    try:
        yield bench
    finally:
        # A quit, not a kill: what ranks have hidden in sessions of their own must go too.
        client = LauncherClient.attach(bench.settings.folder, bench.client.process, Desk())
        if client is not None:
            client.send(Quit(0.0))
            client.close()
            _await(lambda: _gone(bench.pid), "the launcher's end")
        bench.client.close()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with _bench() as shared:
        # Kept apart: tests that attach anew start a new desk.
        shared.ready = shared.desk.wait(LauncherReady)
        shared.first = shared.desk.reports[0]
        yield shared


@pytest.fixture
def bare(
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable[..., "contextlib.AbstractContextManager[Bench]"]]:
    """Launchers without torch, which start in a tenth of a second."""
    hidden = Path(tempfile.mkdtemp(prefix="dtl-notorch-"))
    (hidden / "torch.py").write_text("raise ImportError('hidden by this test')\n")
    paths = (str(hidden), os.environ.get("PYTHONPATH", ""))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    yield _bench
    shutil.rmtree(hidden)


def _gone(pid: int) -> bool:
    seen = processes.look(pid)
    return seen is None or seen.is_zombie


def _await(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {WAIT_S} s: {what}"
        time.sleep(0.01)


# Imports ------------------------------------------------------------------------


def test_launcher_imports_everything_heavy_and_stays_single_threaded(bench: Bench) -> None:
    assert bench.ready.warning == ""
    assert len(list(Path(f"/proc/{bench.pid}/task").iterdir())) == 1
    attempt = bench.fork(
        bench.script(
            "import sys\n"
            "print(*[n for n in ('torch', 'torch.distributed', 'torch._dynamo', 'dtrain.trainer',"
            " 'grpc', 'etcd3gw', 'boto3', 'google.protobuf') if n in sys.modules])\n"
        )
    )
    assert bench.ended(attempt).exit_code == 0
    assert bench.out(attempt).split() == ["torch", "torch.distributed", "torch._dynamo", "dtrain.trainer"]


def test_ranks_can_verify_what_they_restore(bench: Bench) -> None:
    script = "from dtrain.protocol import checksum; import sys; sys.exit(7 if checksum.provided() else 8)\n"
    assert bench.run(script).exit_code == 7


def test_first_report_is_the_state_before_the_imports(bench: Bench) -> None:
    assert isinstance(bench.first, LauncherState)
    assert bench.first.process == bench.client.process
    assert not bench.first.ready


def test_fork_to_first_line_takes_milliseconds(bench: Bench) -> None:
    started = time.time()
    ended = bench.run("import time, torch, pathlib; pathlib.Path('began').write_text(repr(time.time()))\n")
    began = float((bench.work / "began").read_text())
    sys.stderr.write(f"\nfork order to first line: {(began - started) * 1000:.0f} ms\n")
    assert ended.exit_code == 0


# Exits --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("pass\n", 0),
        ("import sys; sys.exit()\n", 0),
        ("import sys; sys.exit(1)\n", 1),
        ("import sys; sys.exit(93)\n", 93),
        ("import sys; sys.exit('out of luck')\n", 1),
        ("raise RuntimeError('boom')\n", 1),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)\n", -9),
        ("raise KeyboardInterrupt\n", -2),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)\n", -15),
        ("import ctypes; ctypes.string_at(0)\n", -11),
        ("syntax error\n", 1),
    ],
)
def test_exit_code_is_what_python_would_give(bench: Bench, text: str, code: int) -> None:
    assert bench.run(text).exit_code == code


def test_exit_string_goes_to_stderr_and_into_the_tail(bench: Bench) -> None:
    assert bench.run("import sys; sys.exit('out of luck')\n").log_tail == "out of luck\n"


def test_uncaught_exception_leaves_an_error_file_like_records(bench: Bench) -> None:
    ended = bench.run("def f():\n    raise ValueError('bad batch')\nf()\n")
    message = json.loads(ended.error)["message"]
    assert message["message"] == "ValueError: bad batch"
    assert abs(int(message["extraInfo"]["timestamp"]) - time.time()) < 60
    stack = message["extraInfo"]["py_callstack"]
    assert "train.py" in stack
    assert "raise ValueError('bad batch')" in stack
    assert "rank_main" not in stack
    assert ended.log_tail.rstrip().endswith("ValueError: bad batch")
    assert "rank_main" not in ended.log_tail


def test_records_own_error_file_is_kept(bench: Bench) -> None:
    ended = bench.run(
        "from torch.distributed.elastic.multiprocessing.errors import record\n"
        "import json, os\n"
        "@record\n"
        "def main():\n"
        "    raise ValueError('by record')\n"
        "try:\n"
        "    main()\n"
        "finally:\n"
        "    path = os.environ['TORCHELASTIC_ERROR_FILE']\n"
        "    text = json.load(open(path)); text['mark'] = 'of record'; json.dump(text, open(path, 'w'))\n"
    )
    assert json.loads(ended.error)["mark"] == "of record"


def test_long_call_stacks_are_cut_but_stay_json(bench: Bench) -> None:
    ended = bench.run(
        "def f(n):\n    x = '" + "x" * 300 + "'\n    return g(n)\ndef g(n):\n"
        "    if n: return f(n - 1), '" + "y" * 300 + "'\n    raise ValueError('deep ' * 1000)\n"
        "import sys; sys.setrecursionlimit(500)\n"
        "f(100)\n"
    )
    assert len(ended.error.encode()) <= 8192
    assert json.loads(ended.error)["message"]["message"].startswith("ValueError: deep")
    assert len(ended.log_tail.encode()) <= 2048


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (Entry(EntryKind.SCRIPT, "nowhere.py"), "script nowhere.py"),
        (Entry(EntryKind.COMMAND, "no-such-program"), "command no-such-program"),
    ],
)
def test_missing_program_is_one_clear_sentence(bench: Bench, entry: Entry, words: str) -> None:
    ended = bench.ended(bench.fork(entry))
    assert ended.exit_code == 2
    message = json.loads(ended.error)["message"]["message"]
    assert message.startswith(words)
    assert socket.gethostname() in message
    assert ended.log_tail.strip() == message


# What a program sees ------------------------------------------------------------


def test_environment_is_exactly_what_was_given(bench: Bench) -> None:
    entry = bench.script("import os, json; print(json.dumps(dict(os.environ)))\n")
    attempt = bench.fork(entry, env={"COLOUR": "blue"})
    assert bench.ended(attempt).exit_code == 0
    env = json.loads(bench.out(attempt))
    assert env.pop("DTRAIN_ARENA_FD").isdigit()
    assert env == {
        "PATH": os.environ["PATH"],
        "WORLD_SIZE": "1",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "OMP_NUM_THREADS": "1",
        "COLOUR": "blue",
        "DTRAIN_ATTEMPT": str(attempt),
        "TORCHELASTIC_ERROR_FILE": str(bench.log_dir(attempt) / "error.json"),
    }


def test_program_finds_itself_as_under_python(bench: Bench) -> None:
    (bench.work / "sub").mkdir(exist_ok=True)
    (bench.work / "sub" / "beside.py").write_text("NAME = 'beside'\n")
    entry = bench.script(
        "import sys, os, signal, pickle, beside\n"
        "class Thing: pass\n"
        "assert pickle.loads(pickle.dumps(Thing())).__class__ is Thing\n"
        "assert __name__ == '__main__' and sys.modules['__main__'].Thing is Thing\n"
        "assert __file__ == 'sub/me.py', __file__\n"
        "assert sys.argv == ['sub/me.py', '--lr', '1e-3'], sys.argv\n"
        "assert sys.path[0] == os.path.realpath('sub'), sys.path\n"
        "assert os.getpgrp() == os.getpid()\n"
        "assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL\n"
        "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n"
        "assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())\n"
        "assert sys.stdin.read() == ''\n"
        "arena = int(os.environ['DTRAIN_ARENA_FD'])\n"
        "links = {int(n): os.readlink(f'/proc/self/fd/{n}') for n in os.listdir('/proc/self/fd')"
        " if os.path.exists(f'/proc/self/fd/{n}')}\n"
        "assert not [n for n, to in links.items() if 'socket' in to or 'eventpoll' in to], links\n"
        "import logging; assert not logging.getLogger().handlers\n"
        "import atexit; atexit.register(print, 'last words')\n"
        "import threading, time\n"
        "threading.Thread(target=lambda: (time.sleep(0.05), print('thread done'))).start()\n",
        "sub/me.py",
    )
    attempt = bench.fork(Entry(entry.kind, entry.target, ("--lr", "1e-3")))
    ended = bench.ended(attempt)
    assert (ended.exit_code, ended.error) == (0, "")
    assert bench.out(attempt) == "thread done\nlast words\n"
    assert not (bench.work / "sub" / "__pycache__" / "me.cpython-311.pyc").exists()


def test_modules_and_commands_are_entries_too(bench: Bench) -> None:
    bench.script("import sys; print(__name__, *sys.argv[1:])\n", "amodule.py")
    module = bench.fork(Entry(EntryKind.MODULE, "amodule", ("a",)))
    command = bench.fork(Entry(EntryKind.COMMAND, "/bin/sh", ("-c", "echo $RANK of $WORLD_SIZE; exit 5")))
    assert bench.ended(module).exit_code == 0
    assert bench.out(module) == "__main__ a\n"
    assert bench.ended(command).exit_code == 5
    assert bench.out(command) == "0 of 1\n"


def test_unseeded_ranks_draw_different_numbers(bench: Bench) -> None:
    entry = bench.script(
        "import random, torch, numpy; print(random.random(), torch.rand(1).item(), numpy.random.rand())\n"
    )
    attempt = bench.fork(entry, world=2)
    assert [bench.ended(attempt, rank).exit_code for rank in (0, 1)] == [0, 0]
    first, second = (bench.out(attempt, rank).split() for rank in (0, 1))
    assert all(a != b for a, b in zip(first, second, strict=True))


def test_thread_numbers_are_those_of_the_ranks_environment(bench: Bench) -> None:
    entry = bench.script(
        "import ctypes, torch\n"
        "maps = {line.split()[-1] for line in open('/proc/self/maps') if 'openblas' in line}\n"
        "blas = [ctypes.CDLL(path).scipy_openblas_get_num_threads64_() for path in maps]\n"
        "print(torch.get_num_threads(), *blas)\n"
    )
    attempt = bench.fork(entry, env={"OMP_NUM_THREADS": "3"})
    assert bench.ended(attempt).exit_code == 0
    assert set(bench.out(attempt).split()) == {"3"}


def test_sigquit_writes_all_stacks_and_the_rank_lives_on(bench: Bench) -> None:
    attempt = bench.fork(
        bench.script(
            "import time\ndef stuck_here():\n    time.sleep(600)\nprint('up', flush=True)\nstuck_here()\n"
        )
    )
    _await(lambda: bench.out(attempt), "the rank")
    bench.client.send(SignalRanks(attempt, signal.SIGQUIT))
    stderr = bench.log_dir(attempt) / "stderr.log"
    _await(lambda: "stuck_here" in stderr.read_text(), "stacks")
    assert not _gone(bench.live_pid(attempt))
    bench.client.send(SignalRanks(attempt, signal.SIGKILL))
    assert bench.ended(attempt).exit_code == -9


def test_dataloader_workers_run_in_a_forked_rank(bench: Bench) -> None:
    ended = bench.run(
        "from torch.utils.data import DataLoader\n"
        "import torch\n"
        "for context in ('fork', 'spawn'):\n"
        "    loader = DataLoader(range(8), batch_size=2, num_workers=1, multiprocessing_context=context)\n"
        "    if __name__ == '__main__':\n"
        "        assert sum(int(batch.sum()) for batch in loader) == 28\n"
    )
    assert (ended.exit_code, ended.log_tail) == (0, "")


# Arena --------------------------------------------------------------------------


def test_arena_outlives_the_rank_and_reaches_the_next_attempt(bench: Bench) -> None:
    first = bench.run(
        "import os, signal\n"
        "fd = int(os.environ['DTRAIN_ARENA_FD']); os.ftruncate(fd, 4096); os.pwrite(fd, b'sealed', 0)\n"
        "print(fd, flush=True); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    fd = bench.out(first.attempt).strip()
    with Path(f"/proc/{bench.pid}/fd/{fd}").open("rb") as arena:
        assert arena.read(6) == b"sealed"
    second = bench.fork(
        bench.script("import os; print(os.pread(int(os.environ['DTRAIN_ARENA_FD']), 6, 0))\n")
    )
    assert bench.ended(second).exit_code == 0
    assert bench.out(second) == "b'sealed'\n"


# Orders -------------------------------------------------------------------------

SLEEPER = "import time\nprint('up', flush=True)\ntime.sleep(600)\n"


def test_repeated_fork_order_starts_nothing_twice(bench: Bench) -> None:
    attempt = bench.new_attempt()
    launch = RankLaunch(Rank(0), 0, {}, str(bench.log_dir(attempt)))
    order = ForkRanks(attempt, bench.script(SLEEPER), str(bench.work), (launch,))
    bench.client.send(order)
    bench.client.send(order)
    _await(
        lambda: len([r for r in bench.desk.reports if isinstance(r, Forked) and r.attempt == attempt]) == 2,
        "two answers",
    )
    answers = [r for r in bench.desk.reports if isinstance(r, Forked) and r.attempt == attempt]
    assert answers[0].ranks == answers[1].ranks
    bench.client.send(SignalRanks(attempt, signal.SIGTERM))
    assert bench.ended(attempt).exit_code == -signal.SIGTERM


def test_clear_kills_grandchildren_wherever_they_hid(bench: Bench) -> None:
    attempt = bench.fork(
        bench.script(
            "import subprocess, signal, time, pathlib, os\n"
            "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
            "pids = [subprocess.Popen(['sleep', '600']).pid,\n"
            "        subprocess.Popen(['sleep', '600'], start_new_session=True).pid,\n"
            "        int(subprocess.check_output(['setsid', '--fork', 'sh', '-c',\n"
            "            'echo $$; exec sleep 600 >/dev/null']))]\n"
            "pathlib.Path('pids.tmp').write_text(' '.join(map(str, pids)))\n"
            "os.rename('pids.tmp', 'pids')\n"
            "time.sleep(600)\n"
        )
    )
    _await((bench.work / "pids").exists, "grandchildren")
    pids = [int(text) for text in (bench.work / "pids").read_text().split()]
    assert len(pids) == 3
    assert not any(_gone(pid) for pid in pids)
    later = bench.new_attempt()
    bench.client.send(ClearBelow(later, grace_s=0.2))
    assert bench.desk.wait(Cleared, lambda r: r.attempt == later).stuck == ()
    assert all(_gone(pid) for pid in pids)
    assert bench.ended(attempt).exit_code == -9  # it had ignored SIGTERM


def test_clear_finds_what_a_dead_rank_left_behind(bench: Bench) -> None:
    ended = bench.run(
        "import subprocess; print(subprocess.Popen(['sleep', '600'], start_new_session=True).pid)\n"
    )
    orphan = int(bench.out(ended.attempt))
    assert not _gone(orphan)
    later = bench.new_attempt()
    bench.client.send(ClearBelow(later, grace_s=0.0))
    bench.desk.wait(Cleared, lambda r: r.attempt == later)
    assert _gone(orphan)


def test_repeated_clear_spares_the_running_attempt_and_its_daemons(bench: Bench) -> None:
    attempt = bench.fork(
        bench.script(
            "import subprocess, time\n"
            "p = subprocess.run(['setsid', '--fork', 'sh', '-c', 'echo $$; exec sleep 600 >/dev/null 2>&1'],"
            " capture_output=True, env={})\n"
            "print(p.stdout.decode().strip(), flush=True)\n"
            "time.sleep(600)\n"
        )
    )
    _await(lambda: bench.out(attempt).strip(), "a daemon")
    daemon = int(bench.out(attempt))
    bench.client.send(ClearBelow(attempt, grace_s=0.0))
    bench.desk.wait(Cleared, lambda r: r.attempt == attempt)
    assert not _gone(daemon)
    assert not _gone(bench.live_pid(attempt))
    later = bench.new_attempt()
    bench.client.send(ClearBelow(later, grace_s=0.0))
    bench.desk.wait(Cleared, lambda r: r.attempt == later)
    assert _gone(daemon)
    assert _gone(bench.live_pid(attempt))


def test_late_fork_of_a_cleared_attempt_is_not_obeyed(bench: Bench) -> None:
    old, new = bench.new_attempt(), bench.new_attempt()
    bench.client.send(ClearBelow(new, grace_s=0.0))
    launch = RankLaunch(Rank(0), 0, {}, str(bench.log_dir(old)))
    bench.client.send(ForkRanks(old, bench.script(SLEEPER), str(bench.work), (launch,)))
    assert bench.desk.wait(Forked, lambda r: r.attempt == old).ranks == ()


# The store ----------------------------------------------------------------------

MEET = """
import os, torch, torch.distributed as dist
dist.init_process_group("gloo")
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 1))
model(torch.full((1, 2), float(os.environ["RANK"]))).sum().backward()
total = torch.ones(1); dist.all_reduce(total)
print(dist.is_torchelastic_launched(), int(total), model.module.weight.grad.tolist())
dist.destroy_process_group()
"""


def _meet(bench: Bench) -> None:
    attempt = bench.new_attempt()
    bench.client.send(ServeStore(attempt, "127.0.0.1", world_size=2))
    ready = bench.desk.wait(StoreReady, lambda r: r.attempt == attempt)
    assert (ready.problem, ready.port > 0) == ("", True)
    env = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(ready.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RUN_ID": "job",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    started = time.monotonic()
    ranks = bench.fork(bench.script(MEET), world=2, env=env)
    for rank in (0, 1):
        ended = bench.ended(ranks, rank)
        assert ended.exit_code == 0, ended.log_tail
        assert bench.out(ranks, rank) == "True 2 [[0.5, 0.5]]\n"
    sys.stderr.write(f"\ntwo ranks, DDP step, exit: {time.monotonic() - started:.2f} s\n")
    later = bench.new_attempt()
    bench.client.send(ClearBelow(later, grace_s=0.0))
    bench.desk.wait(Cleared, lambda r: r.attempt == later)
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", ready.port)) != 0


def test_two_ranks_meet_in_the_served_store_and_train_with_ddp(bench: Bench) -> None:
    _meet(bench)


def test_store_listens_on_its_host_alone(bench: Bench) -> None:
    attempt = bench.new_attempt()
    bench.client.send(ServeStore(attempt, "127.0.0.1", world_size=1))
    port = bench.desk.wait(StoreReady, lambda r: r.attempt == attempt).port
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.2", port)) != 0


# Agents come and go -------------------------------------------------------------


def test_restarted_agent_finds_ranks_store_and_what_it_missed(bench: Bench) -> None:
    attempt = bench.new_attempt()
    bench.client.send(ServeStore(attempt, "127.0.0.1", world_size=2))
    store = bench.desk.wait(StoreReady, lambda r: r.attempt == attempt)
    entry = bench.script("import os, time, sys\nprint('up', flush=True)\ntime.sleep(600)\n")
    launches = tuple(RankLaunch(Rank(r), r, {}, str(bench.log_dir(attempt, r))) for r in (0, 1))
    bench.client.send(ForkRanks(attempt, entry, str(bench.work), launches))
    forked = bench.desk.wait(Forked, lambda r: r.attempt == attempt)
    bench.client.close()
    os.kill(forked.ranks[1].process.pid, signal.SIGKILL)
    desk = Desk()
    client = LauncherClient.attach(bench.settings.folder, bench.client.process, desk)
    assert client is not None
    bench.client, bench.desk = client, desk
    state = desk.wait(LauncherState)
    assert state.ready
    assert (state.store_attempt, state.store_port) == (attempt, store.port)
    mine = {live.rank: live for live in state.ranks if live.attempt == attempt}
    assert mine[Rank(0)] == forked.ranks[0]
    assert mine[Rank(1)].process == forked.ranks[1].process
    assert bench.ended(attempt, 1).exit_code == -9
    bench.client.send(SignalRanks(attempt, signal.SIGKILL))
    assert bench.ended(attempt, 0).exit_code == -9


def test_newest_connection_wins(bench: Bench) -> None:
    older = bench.desk
    first = bench.client
    bench.desk = Desk()
    client = LauncherClient.attach(bench.settings.folder, first.process, bench.desk)
    assert client is not None
    bench.client = client
    bench.desk.wait(LauncherState)
    count = len(older.reports)
    assert bench.run("pass\n").exit_code == 0
    assert len(older.reports) == count
    first.close()


def test_attach_to_another_process_is_refused(bench: Bench) -> None:
    own = bench.client.process
    stale = ProcessId(own.pid, own.start_time + 1, own.boot_id)
    assert LauncherClient.attach(bench.settings.folder, stale, Desk()) is None
    assert (
        LauncherClient.attach(bench.settings.folder, ProcessId(own.pid, own.start_time, "x"), Desk()) is None
    )
    assert bench.run("pass\n").exit_code == 0  # nobody was harmed


def test_nonsense_on_the_socket_costs_the_connection_only(bench: Bench) -> None:
    folder = os.open(bench.settings.folder, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(f"/proc/self/fd/{folder}/{SOCKET_NAME}")
        os.close(folder)
        connection.settimeout(WAIT_S)
        stream = connection.makefile("rb")
        assert isinstance(lines.decode(REPORTS, stream.readline()), LauncherState)
        connection.sendall(b'{"type":"Explode"}\n')
        while stream.readline():
            pass
    bench.client.close()
    bench.desk = Desk()
    client = LauncherClient.attach(bench.settings.folder, bench.client.process, bench.desk)
    assert client is not None
    bench.client = client
    assert bench.run("pass\n").exit_code == 0


# Launchers of their own ---------------------------------------------------------

Bare = Callable[..., "contextlib.AbstractContextManager[Bench]"]


def test_without_torch_plain_scripts_run_and_the_store_says_why_not(bare: Bare) -> None:
    with bare() as bench:
        assert "torch" in bench.desk.wait(LauncherReady).warning
        assert bench.run("print('plain')\n").exit_code == 0
        attempt = bench.new_attempt()
        bench.client.send(ServeStore(attempt, "127.0.0.1", world_size=1))
        answer = bench.desk.wait(StoreReady)
        assert answer.port == 0
        assert "torch" in answer.problem or "ImportError" in answer.problem


def test_ranks_and_their_children_die_with_the_launcher(bare: Bare) -> None:
    with bare() as bench:
        attempt = bench.fork(
            bench.script(
                "import subprocess, time\n"
                "print(subprocess.Popen(['sleep', '600']).pid, flush=True)\n"
                "time.sleep(600)\n"
            )
        )
        _await(lambda: bench.out(attempt).strip(), "a grandchild")
        os.kill(bench.pid, signal.SIGKILL)
        assert bench.desk.wait(LauncherEnded).exit_code == -9
        assert _gone(bench.live_pid(attempt))
        assert _gone(int(bench.out(attempt)))
        assert LauncherClient.attach(bench.settings.folder, bench.client.process, Desk()) is None


def test_without_an_agent_everything_ends_after_the_orphan_grace(bare: Bare) -> None:
    with bare(orphan_grace_s=0.5) as bench:
        rank = bench.live_pid(bench.fork(bench.script(SLEEPER)))
        time.sleep(0.8)  # the grace does not run while an agent is connected
        assert not _gone(rank)
        bench.client.close()
        _await(lambda: _gone(rank) and _gone(bench.pid), "the end")


@pytest.mark.parametrize("how", ["order", "signal"])
def test_quit_ends_the_ranks_first(bare: Bare, how: str) -> None:
    with bare() as bench:
        rank = bench.live_pid(bench.fork(bench.script(SLEEPER)))
        if how == "order":
            bench.client.send(Quit(1.0))
        else:
            os.kill(bench.pid, signal.SIGTERM)
        ended = bench.desk.wait(LauncherEnded)
        assert ended.exit_code == 0
        assert "ended" in ended.log_tail
        assert _gone(rank)
        assert any(isinstance(r, RankEnded) and r.exit_code == -15 for r in bench.desk.reports)


def test_failing_preload_is_a_warning_by_name(bare: Bare) -> None:
    with bare(preload=("no_such_module_here",)) as bench:
        assert "no_such_module_here" in bench.desk.wait(LauncherReady).warning
        assert bench.run("pass\n").exit_code == 0


THREADY = "import threading, time\nthreading.Thread(target=time.sleep, args=(600,), daemon=True).start()\n"


@contextlib.contextmanager
def _threaded() -> Iterator[Bench]:
    with tempfile.TemporaryDirectory(prefix="dtl-thready-") as modules:
        # Preloaded modules may lie beside the job's scripts; this one must exist before the start.
        (Path(modules) / "thready.py").write_text(THREADY)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", os.pathsep.join([modules, os.environ.get("PYTHONPATH", "")]))
            with _bench(preload=("json", "thready")) as bench:
                yield bench


def test_preload_that_starts_a_thread_makes_ranks_exec_and_is_named(bare: Bare) -> None:
    with _threaded() as bench:
        warning = bench.desk.wait(LauncherReady).warning
        assert "thready runs 1 more thread (" in warning
        assert "exec instead of fork" in warning
        assert bench.run("import sys; assert 'thready' not in sys.modules; sys.exit(7)\n").exit_code == 7
        ended = bench.run("raise ValueError('boom')\n")
        assert json.loads(ended.error)["message"]["message"] == "ValueError: boom"
        sleeper = bench.live_pid(bench.fork(bench.script(SLEEPER)))
        os.kill(bench.pid, signal.SIGKILL)
        bench.desk.wait(LauncherEnded)
        _await(lambda: _gone(sleeper), "the rank follows its launcher")


def test_execd_ranks_meet_in_an_execd_store() -> None:
    with _threaded() as bench:
        assert "thready" in bench.desk.wait(LauncherReady).warning
        _meet(bench)


def test_modules_beside_the_script_can_be_preloaded(bare: Bare) -> None:
    with tempfile.TemporaryDirectory(prefix="dtl-") as folder:
        (Path(folder) / "work").mkdir()
        (Path(folder) / "work" / "mymodel.py").write_text("import os\nIMPORTED_BY = os.getpid()\n")
        with _bench(Path(folder), preload=("mymodel",)) as bench:
            ended = bench.run("import mymodel, os; assert mymodel.IMPORTED_BY == os.getppid()\n")
            assert (ended.exit_code, ended.log_tail) == (0, "")


def test_long_folder_names_are_no_obstacle(bare: Bare, tmp_path: Path) -> None:
    bench = Bench(tmp_path / ("long" * 40))
    bench.desk.wait(LauncherReady)
    bench.client.close()
    desk = Desk()
    client = LauncherClient.attach(bench.settings.folder, bench.client.process, desk)
    assert client is not None
    client.send(Quit(0.0))
    assert desk.wait(LauncherEnded).exit_code is None
    client.close()
    os.waitpid(bench.pid, 0)
