"""Nothing is left behind: sweeping by folder, the reaper, daemons and the threads that start them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dtrain.local import reaper, sweeping
from dtrain.local.daemons import Daemon, Keeper

# A guardian with a process below it; both live until they are told to end.
GUARDIAN = """
import os, signal, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(sys.argv[1], "w").write(str(child.pid))
signal.signal(signal.SIGTERM, lambda *_: (child.kill(), sys.exit(7)))
child.wait()
"""

# Ends on SIGTERM of its own will; with "deaf" it does not. Leaves its session, as launchers do.
ESCAPED = """
import os, signal, sys, time
os.setsid()
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open(sys.argv[1], "w").write(str(os.getpid()))
time.sleep(600)
"""


def wait_for(condition: Callable[[], object], timeout_s: float = 10.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in ("Z", "X")


def pid_in(path: Path) -> int:
    wait_for(lambda: path.exists() and path.read_text())
    return int(path.read_text())


@pytest.fixture
def started() -> Iterator[list["subprocess.Popen[bytes]"]]:
    processes: list[subprocess.Popen[bytes]] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def sleeper(folder: Path, started: list["subprocess.Popen[bytes]"], **env: str) -> int:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], env=os.environ | env)
    started.append(process)
    return process.pid


def test_processes_are_found_by_the_mark_and_by_any_of_our_variables(
    tmp_path: Path, started: list["subprocess.Popen[bytes]"]
) -> None:
    marked = sleeper(tmp_path, started, **{sweeping.MARK: str(tmp_path / "a1")})
    rank = sleeper(tmp_path, started, DTRAIN_AGENT_SOCKET=str(tmp_path / "a1" / "ranks.sock"))
    near = sleeper(tmp_path, started, **{sweeping.MARK: str(tmp_path) + "-other"})
    other = sleeper(tmp_path, started, OLDPWD=str(tmp_path), PWD=str(tmp_path / "a1"))
    wait_for(lambda: {found.pid for found in sweeping.find(tmp_path)} == {marked, rank})
    assert {found.pid for found in sweeping.find(tmp_path / "a1")} == {marked, rank}
    assert alive(near)
    assert alive(other)


def test_daemons_are_found_by_their_arguments_and_editors_are_not(
    tmp_path: Path, started: list["subprocess.Popen[bytes]"]
) -> None:
    # Arguments are looked at, not what runs: any process can look like a launcher.
    script = "import time; time.sleep(600)"
    launcher = [sys.executable, "-c", script, "-m", "dtrain.agent.launcher", str(tmp_path / "jobs")]
    editor = [sys.executable, "-c", script, str(tmp_path / "job.yaml")]
    cli = [sys.executable, "-c", script, "-m", "dtrain.cli", "up", "--folder", str(tmp_path)]
    started += [subprocess.Popen(command) for command in (launcher, editor, cli)]
    wait_for(lambda: [found.pid for found in sweeping.find(tmp_path)] == [started[0].pid])
    (found,) = sweeping.find(tmp_path)
    assert (found.module, found.parent) == ("dtrain.agent.launcher", os.getpid())


def test_we_and_what_is_above_us_are_never_found(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from dtrain.local import sweeping;"
        "print([f.pid for f in sweeping.find(Path(sys.argv[1]))], sweeping.end_all(Path(sys.argv[1])))"
    )
    env = os.environ | {sweeping.MARK: str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[] []\n"


def test_everything_of_a_folder_ends_even_what_has_left_its_session(
    tmp_path: Path, started: list["subprocess.Popen[bytes]"]
) -> None:
    env = os.environ | {sweeping.MARK: str(tmp_path)}
    started.append(subprocess.Popen([sys.executable, "-c", ESCAPED, str(tmp_path / "pid")], env=env))
    started.append(subprocess.Popen([sys.executable, "-c", GUARDIAN, str(tmp_path / "child")], env=env))
    pids = [pid_in(tmp_path / "pid"), pid_in(tmp_path / "child"), started[1].pid]
    assert all(alive(pid) for pid in pids)
    assert sweeping.end_all(tmp_path) == []
    assert not any(alive(pid) for pid in pids)
    assert sweeping.end_all(tmp_path) == []


def test_a_process_that_does_not_belong_is_never_signalled(
    tmp_path: Path, started: list["subprocess.Popen[bytes]"]
) -> None:
    pid = sleeper(tmp_path, started)
    assert not sweeping.signal_if_found(pid, tmp_path, signal.SIGKILL)
    assert alive(pid)


OWNER = """
import os, subprocess, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
command = [sys.executable, "-m", "dtrain.local.reaper", str(os.getpid()), str(folder), *sys.argv[3:]]
reaper = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
reaper.stdout.readline()
(folder / "reaper").write_text(str(reaper.pid))
subprocess.Popen([sys.executable, "-c", sys.argv[2], str(folder / "pid")],
                 env={"DTRAIN_LOCAL_FOLDER": str(folder)}, start_new_session=False)
time.sleep(600)
"""


@pytest.mark.parametrize("remove", [False, True])
def test_the_reaper_ends_what_a_killed_owner_left(tmp_path: Path, remove: bool) -> None:
    folder = tmp_path / "cluster"
    folder.mkdir()
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(folder), ESCAPED, *(["remove"] if remove else [])]
    )
    escaped, watcher = pid_in(folder / "pid"), pid_in(folder / "reaper")
    # Signals of a terminal are for the owner; the reaper stays.
    os.kill(watcher, signal.SIGINT)
    os.kill(watcher, signal.SIGTERM)
    time.sleep(0.1)
    assert alive(escaped)
    assert alive(watcher)
    owner.kill()
    owner.wait()
    wait_for(lambda: not alive(escaped) and not alive(watcher))
    assert folder.exists() is not remove


def test_a_reaper_whose_owner_has_gone_already_sweeps_at_once(
    tmp_path: Path, started: list["subprocess.Popen[bytes]"]
) -> None:
    pid = sleeper(tmp_path, started, **{sweeping.MARK: str(tmp_path)})
    # Pid 1 lives, but is not who started it.
    done = subprocess.run(
        [sys.executable, "-m", "dtrain.local.reaper", "1", str(tmp_path)],
        timeout=20,
        check=False,
        stdout=subprocess.PIPE,
    )
    assert done.returncode == 0
    assert not alive(pid)
    assert reaper.LOCK in {path.name for path in tmp_path.iterdir()}


@pytest.fixture
def keeper() -> Iterator[Keeper]:
    keeper = Keeper("test")
    yield keeper
    keeper.close()


def daemon(tmp_path: Path, keeper: Keeper, script: str = GUARDIAN) -> Daemon:
    return Daemon(
        "a1",
        [sys.executable, "-c", script, str(tmp_path / "child")],
        folder=tmp_path / "a1",
        log_path=tmp_path / "logs" / "a1.log",
        env=os.environ,
        keeper=keeper,
    )


def test_a_daemon_knows_its_guardian_and_the_process_below(tmp_path: Path, keeper: Keeper) -> None:
    found = daemon(tmp_path, keeper)
    found.start()
    child = pid_in(tmp_path / "child")
    assert found.process_pid == child
    assert found.guardian_pid is not None
    assert found.pids() == sorted([found.guardian_pid, child])
    assert os.getpgid(found.guardian_pid) != os.getpgid(0), "Ctrl-C must not reach it"
    found.terminate()
    assert found.wait(10)
    assert (found.exit_code, found.guardian_pid, found.process_pid) == (7, None, None)
    assert not alive(child)


def test_a_power_cut_ends_all_of_it_at_once_and_it_starts_again(tmp_path: Path, keeper: Keeper) -> None:
    found = daemon(tmp_path, keeper)
    found.start()
    first = [pid_in(tmp_path / "child"), found.guardian_pid or 0]
    escaped = subprocess.Popen(
        [sys.executable, "-c", ESCAPED, str(tmp_path / "rank")],
        env=os.environ | {"DTRAIN_AGENT_SOCKET": str(tmp_path / "a1" / "x.sock")},
    )
    try:
        first.append(pid_in(tmp_path / "rank"))
        found.power_cut()
        assert not any(alive(pid) for pid in first)
        # No handler has run: the guardian would have left with 7.
        assert found.exit_code == -signal.SIGKILL
    finally:
        escaped.kill()
        escaped.wait()
    (tmp_path / "child").unlink()
    found.start()
    child = pid_in(tmp_path / "child")
    assert found.process_pid == child
    found.power_cut()


def test_a_daemon_outlives_the_thread_that_asked_for_it_but_not_its_keeper(tmp_path: Path) -> None:
    import threading

    keeper = Keeper("test")
    found = daemon(tmp_path, keeper, "import time; time.sleep(600)")
    asking = threading.Thread(target=found.start)
    asking.start()
    asking.join()
    time.sleep(0.3)
    assert found.is_running
    keeper.close()
    assert found.wait(10)
    assert found.exit_code == -signal.SIGKILL


def test_a_keeper_hands_errors_to_whoever_asked(keeper: Keeper) -> None:
    with pytest.raises(ZeroDivisionError):
        keeper.call(lambda: 1 / 0)
    assert keeper.call(lambda: 3) == 3


def test_a_daemon_that_cannot_start_leaves_its_last_words(tmp_path: Path, keeper: Keeper) -> None:
    found = daemon(tmp_path, keeper, "import sys; sys.exit('no such setting')")
    found.start()
    assert found.wait(10)
    assert (found.exit_code, found.log_tail()) == (1, "no such setting")
