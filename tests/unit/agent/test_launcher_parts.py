"""The launcher's parts: identity, descent, attribution, what a dead rank left, preloading."""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dtrain.agent.launch import processes, reading
from dtrain.agent.launch.family import ALL_ATTEMPTS, Clearing, Family, RankChild, StoreChild
from dtrain.agent.launching import LiveRank, ProcessId
from dtrain.protocol.ids import Attempt, Rank


@contextlib.contextmanager
def _sleeper(**options: object) -> Iterator[int]:
    with subprocess.Popen(["sleep", "600"], **options) as process:
        yield process.pid
        process.kill()


def _rank(pid: int, attempt: int) -> RankChild:
    process = processes.identify(pid)
    assert process is not None
    return RankChild(LiveRank(Attempt(attempt), Rank(0), 0, process), "", "")


def test_a_process_is_told_from_a_later_one_with_its_pid():
    own = processes.identify(os.getpid())
    assert processes.is_alive(own)
    assert not processes.is_alive(ProcessId(own.pid, own.start_time + 1, own.boot_id))
    assert not processes.is_alive(ProcessId(own.pid, own.start_time, "another boot"))


def test_a_zombie_has_an_identity_but_is_not_alive():
    process = subprocess.Popen(["true"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    identity = processes.identify(process.pid)
    assert identity is not None
    assert not processes.is_alive(identity)
    process.wait()
    assert processes.identify(process.pid) is None


def test_a_name_with_parentheses_does_not_confuse_the_reader(tmp_path):
    odd = tmp_path / "a) S 1 (b"
    odd.symlink_to("/bin/sleep")
    with subprocess.Popen([odd, "600"]) as process:
        seen = processes.look(process.pid)
        process.kill()
    assert seen.parent == os.getpid()


def test_clear_up_attributes_by_rank_group_and_environment():
    with (
        _sleeper(process_group=0) as old,
        _sleeper(process_group=0) as new,
        _sleeper(process_group=0, env={"DTRAIN_ATTEMPT": "1"}) as stray,
        _sleeper(process_group=0) as unknown,
        _sleeper(process_group=0) as store,
        _sleeper(process_group=old) as member,
    ):
        family = Family(ranks={old: _rank(old, 1), new: _rank(new, 2)})
        family.stores = {store: StoreChild(Attempt(1), store, -1)}
        family.newest_forked = 2
        ours = {old, new, stray, unknown, store, member}
        assert ours & family.older_than(2, with_stores=True) == {old, member, stray, store}
        assert ours & family.older_than(2, with_stores=False) == {old, member, stray}
        assert ours & family.older_than(3, with_stores=False) == {old, member, stray, new, unknown}


def test_helpers_of_preloaded_modules_live_until_the_end():
    with _sleeper() as helper:
        family = Family()
        family.adopt_household()
        assert helper not in family.older_than(5, with_stores=True)
        assert helper in family.older_than(ALL_ATTEMPTS, with_stores=True)


def test_what_cannot_die_is_named_after_the_patience(monkeypatch):
    monkeypatch.setattr(Family, "older_than", lambda *_args, **_kw: {2**22 + 1})  # above any pid
    clearing = Clearing(below=3, ask_until=100.0)
    family = Family()
    assert clearing.advance(family, 99.0) == (False, ())
    assert not clearing.advance(family, 100.0)[0]
    assert not clearing.advance(family, 104.9)[0]
    assert clearing.advance(family, 105.0) == (True, (2**22 + 1,))


def test_error_file_is_passed_on_whole_or_cut_to_its_end(tmp_path):
    path = tmp_path / "error.json"
    assert reading.error_text(path) == ""
    path.write_text('{"message": "small"}')
    assert reading.error_text(path) == '{"message": "small"}'
    stack = "\n".join(f"frame {n} \u20ac" for n in range(2000)) + "\nValueError: the end"
    detail = {"py_callstack": stack, "timestamp": "1"}
    path.write_text(json.dumps({"message": {"message": "ValueError", "extraInfo": detail}}))
    text = reading.error_text(path)
    assert len(text.encode()) <= reading.ERROR_BYTES_MAX
    assert json.loads(text)["message"]["extraInfo"]["py_callstack"].endswith("ValueError: the end")
    path.write_text("x" * 20_000)
    assert len(reading.error_text(path)) <= reading.ERROR_BYTES_MAX


def test_log_tail_prefers_stderr(tmp_path):
    (tmp_path / "stdout.log").write_text("out")
    assert reading.log_tail(tmp_path) == "out"
    (tmp_path / "stderr.log").write_text("e" * 5000 + "end")
    assert reading.log_tail(tmp_path) == ("e" * 5000 + "end")[-2048:]


@pytest.mark.parametrize("module", ["dtrain.agent.launcher", "dtrain.agent.launcher_client"])
def test_launcher_and_client_load_no_heavy_library(module):
    code = f"import sys; import {module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    heavy = {"torch", "numpy", "grpc", "google.protobuf", "etcd3gw", "boto3", "pydantic", "structlog"}
    assert not heavy & set(loaded.split())


def test_ranks_are_given_a_crc32c_and_keep_the_name_of_its_library_for_themselves() -> None:
    code = (
        "import sys; from dtrain.agent.launch.preload import provide_checksum; "
        "from dtrain.protocol import checksum; provide_checksum(); provide_checksum(); "
        "print(checksum.provided()(memoryview(b'123456789'), 0), [n for n in sys.modules if 'crc32c' in n])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said == f"{0xE3069283} []\n"


def test_a_process_lives_as_long_as_one_of_its_threads() -> None:
    """After SIGKILL the first thread of a stuck rank is a zombie at once; the one in the kernel is not."""
    program = (
        "import ctypes, threading, time; "
        "threading.Thread(target=time.sleep, args=(60,)).start(); print(flush=True); "
        "ctypes.CDLL(None).pthread_exit(None)"
    )
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        child.stdout.readline()
        process = processes.identify(child.pid)
        assert process is not None
        deadline = time.monotonic() + 10
        while not (seen := processes.look(child.pid)) or not seen.is_zombie:
            assert time.monotonic() < deadline, "the first thread does not end"
            time.sleep(0.01)
        assert processes.is_alive(process)
        assert not processes.is_over(seen)
        # The thread that lives may not have come to its sleep yet: one that runs waits in nothing.
        while not processes.waits_in(child.pid):
            assert time.monotonic() < deadline, "the thread that lives is not seen to wait"
            time.sleep(0.01)
    finally:
        child.kill()
        child.wait()
        assert child.stdout is not None
        child.stdout.close()
    assert not processes.is_alive(process)
    assert processes.waits_in(child.pid) == ""


@pytest.mark.parametrize(
    ("done", "problem"),
    [
        ("import json", ""),
        ("import grpc", ""),
        (
            "import grpc; channel = grpc.insecure_channel('127.0.0.1:1')\n"
            "from dtrain.agent.launch.preload import thread_names\n"
            # They start one after the other, and have their starter's name at first.
            "while len([one for one in thread_names()[1:] if 'python' not in one]) < 2: pass",
            r"gRPC runs \d+ more threads \(",
        ),
        (
            "import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()",
            r"something that was imported runs 1 more thread \(",
        ),
        (
            "import types; sys.modules['torch'] = types.SimpleNamespace("
            "cuda=types.SimpleNamespace(is_initialized=lambda: True))",
            "something that was imported has opened a GPU",
        ),
    ],
)
def test_what_makes_a_fork_unsafe_is_named_whenever_it_was_begun(done: str, problem: str) -> None:
    """In a process of its own: nothing here may be a launcher's only thread."""
    code = (
        f"import sys; from dtrain.agent.launch.preload import Preloaded; {done}\n"
        "print(Preloaded().fork_problem(), end='', flush=True); import os; os._exit(0)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert re.match(problem, told) if problem else told == ""


def test_a_module_that_starts_a_thread_when_it_is_imported_is_named(tmp_path: Path) -> None:
    """In a process of its own, and without torch, which takes seconds."""
    (tmp_path / "thready.py").write_text(
        "import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()"
    )
    code = (
        "import sys; sys.modules['torch'] = None; from dtrain.agent.launch.preload import preload\n"
        "found = preload(('json', 'thready'), sys.argv[1], lambda: None)\n"
        "print(found.offenders, found.fork_problem(), end='', flush=True); import os; os._exit(0)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert re.match(r"\['thready'\] thready runs 1 more thread \(", told), told
