"""What goes wrong around a command: one sentence and an exit code, whatever it is, and never a traceback."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from click.shell_completion import ShellComplete
from tests.unit.cli.fakes import JOB, KEYS, FakeReplica, failure, fleet, item, running_job, spec, status

from dtrain.cli import completing, exits
from dtrain.cli.globals import Settings
from dtrain.cli.main import cli, run
from dtrain.protocol import errors
from dtrain.protocol.errors import ErrorCode
from dtrain.protocol.job import Condition, JobPhase

Out = pytest.CaptureFixture[str]
COMMAND = (sys.executable, "-m", "dtrain.cli")


@pytest.fixture(autouse=True)
def nothing_configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    for name in list(os.environ):
        if name.startswith(("DTRAIN_", "ETCDCTL_", "PET_")):
            monkeypatch.delenv(name)


def ended(replica: FakeReplica, phase: JobPhase, **more: object) -> None:
    replica.items = [item(KEYS.spec(JOB), spec()), item(KEYS.status(JOB), status(phase, **more))]


def refusing(kind: type[errors.DtrainError], code: ErrorCode) -> Callable[[FakeReplica], None]:
    def prepare(replica: FakeReplica) -> None:
        replica.items = running_job()
        replica.refuse = lambda: kind(code, "told to")

    return prepare


def running(replica: FakeReplica) -> None:
    replica.items = running_job()


WAIT = ("wait", "digits", "--timeout", "5s")
CODES: dict[int, tuple[Callable[[FakeReplica], None], tuple[str, ...]]] = {
    exits.OK: (running, ("get", "jobs")),
    exits.USAGE: (running, ("get", "everything")),
    exits.NOT_FOUND: (running, ("describe", "job", "nobody")),
    exits.CONFLICT: (refusing(errors.Conflict, ErrorCode.CONFLICT), ("resume", "digits")),
    exits.TIMED_OUT: (running, ("wait", "digits", "--timeout", "50ms")),
    exits.NOT_ALLOWED: (refusing(errors.Refused, ErrorCode.NOT_PERMITTED), ("resume", "digits")),
    exits.CHECK_FAILED: (refusing(errors.Refused, ErrorCode.BLOB_CORRUPT), ("resume", "digits")),
    exits.JOB_FAILED: (lambda replica: ended(replica, JobPhase.FAILED, failure=failure()), WAIT),
    exits.JOB_CANCELLED: (lambda replica: ended(replica, JobPhase.CANCELLED), WAIT),
    exits.BUDGET_SPENT: (
        lambda replica: ended(
            replica, JobPhase.FAILED, conditions=(Condition("Finished", "True", "BudgetExhausted"),)
        ),
        WAIT,
    ),
}


@pytest.mark.parametrize("code", CODES)
def test_each_end_has_the_exit_code_that_the_table_says(
    replica: FakeReplica, address: str, capsys: Out, code: int
) -> None:
    prepare, words = CODES[code]
    prepare(replica)
    assert run([*words, "--coordinators", address]) == code
    told = capsys.readouterr().err
    assert "Traceback" not in told
    assert (f"error[{ErrorCode.BUG}" in told) is (code == exits.BUG)


def test_every_code_of_the_table_is_tested() -> None:
    elsewhere = {exits.BUG, exits.UNREACHABLE, exits.INTERRUPTED, exits.TERMINATED}
    assert set(CODES) | elsewhere == set(exits.MEANINGS)


def test_a_cluster_that_is_down_is_named_with_what_to_do(capsys: Out) -> None:
    begun = time.monotonic()
    assert run(["get", "jobs", "--coordinators", "127.0.0.1:1"]) == exits.UNREACHABLE
    assert time.monotonic() - begun < 4.0
    told = capsys.readouterr().err
    assert "no coordinator answers at 127.0.0.1:1" in told
    assert "fix:" in told


def test_without_a_leader_records_are_read_and_written(
    replica: FakeReplica, address: str, capsys: Out
) -> None:
    leaderless = [one for one in fleet() if one.key != "leader"]
    replica.items = [*running_job(), *leaderless]
    assert run(["get", "jobs", "--coordinators", address]) == 0
    assert run(["suspend", "digits", "--coordinators", address]) == 0
    assert "suspend accepted" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"name: [1\nb", "not valid YAML"),
        (b"name: digits\nname: other\nscript: x.py\n", "twice"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
        (b"", "error"),
        (b"- a\n- b\n", "error"),
        (b"name: &a digits\nscript: *b\n", "error"),
    ],
)
def test_a_bad_job_file_is_told_with_its_place(
    tmp_path: Path, capsys: Out, content: bytes, told: str
) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(content)
    assert run(["submit", str(path), "--dry-run"]) == exits.USAGE
    err = capsys.readouterr().err
    assert told in err
    assert f"error[{ErrorCode.BAD_JOB_FILE}]" in err


def test_a_file_that_cannot_be_read_is_no_bug(
    tmp_path: Path, capsys: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(["submit", str(tmp_path)]) == exits.USAGE
    assert run(["submit", str(tmp_path / "absent.yaml")]) == exits.NOT_FOUND
    path = tmp_path / "job.yaml"
    path.write_text("name: digits\n")

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    # Root may read everything.
    monkeypatch.setattr(Path, "open", refuse)
    assert run(["submit", str(path)]) == exits.USAGE
    assert "Permission denied" in capsys.readouterr().err


def dtrain(*words: str, **how: object) -> "subprocess.Popen[str]":
    env = {**os.environ, "PYTHONUNBUFFERED": ""}
    return subprocess.Popen([*COMMAND, *words], env=env, text=True, stderr=subprocess.PIPE, **how)  # type: ignore[call-overload,no-any-return]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux's device without room")
@pytest.mark.parametrize("words", [("version",), ("completion", "bash"), ("--help",)])
def test_an_output_without_room_is_said_so(words: tuple[str, ...]) -> None:
    with Path("/dev/full").open("w") as full, dtrain(*words, stdout=full) as process:
        _, told = process.communicate(timeout=30)
    assert process.returncode == exits.USAGE
    assert told.startswith(
        f"error[{ErrorCode.LOCAL_IO}]: this machine cannot read or write the output: No space"
    )


def test_a_reader_that_has_left_is_no_trouble(replica: FakeReplica, address: str) -> None:
    replica.items = running_job()
    with dtrain("get", "jobs", "-o", "json", "--coordinators", address, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        told = process.stderr.read()
    assert (process.returncode, told) == (0, "")


@pytest.fixture
def frozen() -> Iterator[str]:
    """A replica that accepts connections and never says anything."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, exits.INTERRUPTED), (signal.SIGTERM, -signal.SIGTERM)]
)
@pytest.mark.parametrize("words", [("wait", "digits"), ("logs", "-f", "digits"), ("get", "jobs", "--watch")])
def test_a_signal_ends_a_wait_without_a_word_too_many(
    replica: FakeReplica, address: str, words: tuple[str, ...], number: int, code: int
) -> None:
    replica.items = running_job()
    with dtrain(*words, "--coordinators", address, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 30
        while replica.calls.count("Read") < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(number)
        _, told = process.communicate(timeout=30)
    # The shell makes 143 of a SIGTERM.
    assert process.returncode == code
    assert "Traceback" not in told


def test_ctrl_c_while_a_replica_is_frozen_ends_the_command(frozen: str) -> None:
    with dtrain("get", "jobs", "--coordinators", frozen, stdout=subprocess.DEVNULL) as process:
        time.sleep(1.0)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=30)
    assert process.returncode == exits.INTERRUPTED
    assert told.strip() == ""


def test_whatever_status_a_server_answers_is_told_in_words(
    replica: FakeReplica, address: str, capsys: Out
) -> None:
    quick = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED}
    for code in set(grpc.StatusCode) - {grpc.StatusCode.OK} - quick:
        replica.refuse = lambda code=code: code  # type: ignore[misc]
        assert run(["get", "jobs", "--coordinators", address]) in exits.MEANINGS
        told = capsys.readouterr().err
        assert code.name in told or "is of a release that does not know" in told
        assert "Traceback" not in told


# Completion -----------------------------------------------------------------------------


def completed(words: str, env: dict[str, str]) -> tuple[list[str], float]:
    """What bash would be offered, and how long that took beyond starting the command."""
    index = str(len(words.split()) - (not words.endswith(" ")))
    given = {
        **os.environ,
        **env,
        "_DTRAIN_COMPLETE": "bash_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": index,
    }
    begun = time.monotonic()
    done = subprocess.run(COMMAND, env=given, capture_output=True, text=True, timeout=30, check=True)
    assert done.stderr == ""
    return [line.partition(",")[2] for line in done.stdout.split()], time.monotonic() - begun


def test_live_names_of_jobs_and_agents_are_offered(
    replica: FakeReplica, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The budget is for people at a shell; here it is the names that count.
    monkeypatch.setattr(completing, "BUDGET_S", 30.0)
    monkeypatch.setenv("DTRAIN_COORDINATORS", address)
    replica.items = [*running_job(), *fleet()]

    def offered(*words: str) -> list[str]:
        shell = ShellComplete(cli, {"obj": Settings()}, "dtrain", "_DTRAIN_COMPLETE")
        return [item.value for item in shell.get_completions(list(words[:-1]), words[-1])]

    assert offered("cancel", "") == ["digits"]
    assert offered("pause", "job/dig") == ["job/digits"]
    assert offered("drain", "a") == ["a1", "a2"]
    assert offered("drain", "b") == []


@pytest.mark.parametrize("how", ["frozen", "down", "etcd frozen", "misspelt"])
def test_completion_gives_up_within_its_budget_and_says_nothing(frozen: str, how: str) -> None:
    env = {
        "frozen": {"DTRAIN_COORDINATORS": frozen},
        "down": {"DTRAIN_COORDINATORS": "127.0.0.1:1"},
        "etcd frozen": {"DTRAIN_ENDPOINTS": f"http://{frozen}"},
        "misspelt": {"DTRAIN_COORDINATOR": frozen},
    }[how]
    _, floor_s = completed("dtrain descr", {})
    found, took_s = completed("dtrain describe ", env)
    assert not [name for name in found if name not in ("job", "agent", "coordinator")]
    # A call that nobody answers takes five seconds elsewhere; gRPC has to be imported meanwhile.
    assert took_s < floor_s + 4.0


def test_bash_completes_with_the_printed_script(tmp_path: Path) -> None:
    command = tmp_path / "dtrain"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m dtrain.cli "$@"\n')
    command.chmod(0o755)
    script = (
        "source <(dtrain completion bash); COMP_WORDS=(dtrain desc); COMP_CWORD=1; "
        '_dtrain_completion dtrain; echo "${COMPREPLY[@]}"'
    )
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", script], env=env, capture_output=True, text=True, timeout=60, check=True
    )
    assert "describe" in done.stdout


# Start-up --------------------------------------------------------------------------------

READS = {"google", "grpc"}
BUDGETS: dict[tuple[str, ...], set[str]] = {
    ("get", "jobs"): READS,
    ("get", "agents"): READS,
    ("get", "jobs", "-o", "json"): READS,
    ("get", "jobs", "-o", "yaml"): {*READS, "yaml"},
    ("describe", "job", "digits"): READS,
    ("wait", "digits", "--for", "running"): READS,
    ("suspend", "digits"): READS,
    ("pause", "digits"): READS,
    ("cancel", "digits", "--yes"): READS,
    ("scale", "digits", "--nnodes", "2"): READS,
    ("cordon", "a1"): READS,
    ("version",): READS,
    ("version", "--client"): set(),
    ("completion", "fish"): set(),
    ("submit", "--help"): set(),
    ("top", "--once"): READS,
    ("top", "--help"): set(),
}
_HEAVY = """
import sys
before = set(sys.modules)
from dtrain.cli.main import run
code = run(sys.argv[1:])
tops = {name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
print("LOADED", code, *sorted(tops - {"click", "dtrain"}))
"""


@pytest.mark.parametrize("words", BUDGETS, ids=" ".join)
def test_a_verb_imports_what_it_needs_and_no_more(
    replica: FakeReplica, address: str, words: tuple[str, ...]
) -> None:
    replica.items = [*running_job(), *fleet()]
    env = {**os.environ, "DTRAIN_COORDINATORS": address}
    done = subprocess.run(
        [sys.executable, "-c", _HEAVY, *words],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    _, code, *loaded = done.stdout.splitlines()[-1].split()
    assert code == "0", done.stderr
    known = BUDGETS[words]
    assert {name for name in loaded if not name.startswith("_")} <= known | {
        "typing_extensions",
        "cython_runtime",
    }
