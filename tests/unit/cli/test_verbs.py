"""Verbs against a replica over real gRPC: output, exit codes, what is asked of the cluster."""

import json
import os
import threading
import time
from pathlib import Path

import pytest
from tests.unit.cli.fakes import (
    JOB,
    KEYS,
    TERM,
    FakeReplica,
    commit,
    failure,
    fleet,
    item,
    running_job,
    spec,
    status,
)

from dtrain.cli import context, following, records, waiting
from dtrain.cli.client import Client, closing
from dtrain.cli.main import run
from dtrain.protocol.checkpoint import Latest
from dtrain.protocol.errors import Refused
from dtrain.protocol.ids import Attempt, Seq, Step
from dtrain.protocol.job import Condition, JobPhase
from dtrain.protocol.snapshot import FailureKind

Out = pytest.CaptureFixture[str]


def ended(phase: JobPhase, **more: object) -> list[object]:
    return [item(KEYS.spec(JOB), spec()), item(KEYS.status(JOB), status(phase, **more))]


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (["get", "jobs"], "JobList"),
        (["get", "agents"], "AgentList"),
        (["get", "coordinators"], "CoordinatorList"),
        (["get", "checkpoints", "digits"], "CheckpointList"),
        (["get", "events"], "EventList"),
        (["get", "jobs", "dig"], "Job"),
        (["describe", "job/digits"], "Job"),
        (["describe", "agent", "a1"], "Agent"),
    ],
)
def test_every_read_verb_answers_in_json_and_yaml(
    replica: FakeReplica, address: str, capsys: Out, words: list[str], kind: str
) -> None:
    import yaml

    replica.items = [*running_job(), *fleet()]
    for item_ in replica.items:
        if item_.key.startswith("coordinators/"):
            # The real addresses would be asked how old their mirrors are.
            object.__setattr__(
                item_,
                "value",
                item_.value.replace(b"h1:7070", address.encode()).replace(b"h2:7070", b"127.0.0.1:1"),
            )
    assert run([*words, "--coordinators", address, "-o", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["v"], found["kind"], found["revision"]) == (1, kind, 9)
    assert run([*words, "--coordinators", address, "-o", "yaml"]) == 0
    again = yaml.safe_load(capsys.readouterr().out)
    assert again["kind"] == kind
    assert run([*words, "--coordinators", address]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_what_is_wrong_is_told_beside_every_answer(replica: FakeReplica, address: str, capsys: Out) -> None:
    replica.items = [*running_job(), *fleet()]
    replica.problems = ["etcd has no space"]
    assert run(["describe", "job/digits", "--coordinators", address]) == 0
    assert "PROBLEM (c1): etcd has no space" in capsys.readouterr().err


def test_names_only(replica: FakeReplica, address: str, capsys: Out) -> None:
    replica.items = [*running_job(), *fleet()]
    assert run(["get", "jobs", "--coordinators", address, "-o", "name"]) == 0
    assert run(["get", "agents", "--coordinators", address, "-o", "name"]) == 0
    assert capsys.readouterr().out == "job/digits\nagent/a1\nagent/a2\n"


def test_submit_prints_three_next_commands_on_stderr(
    replica: FakeReplica, address: str, capsys: Out, tmp_path: Path
) -> None:
    (tmp_path / "train.py").touch()
    path = tmp_path / "job.yaml"
    path.write_text("name: digits\nscript: train.py\n")
    words = ["submit", str(path), "--coordinators", address, "--request-id", "r1"]
    assert run(words) == 0
    captured = capsys.readouterr()
    assert captured.out == "job digits submitted\n"
    assert captured.err.count("\n  dtrain ") == 3
    assert run(words) == 0
    assert "nothing changed" in capsys.readouterr().out
    assert json.loads(replica.submitted["r1"])["working_dir"] == str(tmp_path)


def test_submit_follow_shows_logs_and_returns_the_jobs_code(
    replica: FakeReplica, address: str, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "train.py").touch()
    path = tmp_path / "job.yaml"
    path.write_text("name: digits\nscript: train.py\n")
    replica.logs = {(3, 0, "stdout"): b"step 1\nstep 2\n", (3, 0, "stderr"): b"a warning"}
    replica.items = ended(JobPhase.RUNNING)  # type: ignore[assignment]
    threading.Timer(
        0.4, lambda: replica.update(ended(JobPhase.FAILED, failure=failure(attempt=Attempt(3))))
    ).start()  # type: ignore[arg-type]
    assert run(["submit", str(path), "--follow", "--coordinators", address]) == 20
    captured = capfd.readouterr()
    assert captured.out == "job digits submitted\nstep 1\nstep 2\n"
    assert "a warning\n" in captured.err
    assert "Root cause of attempt 3   rank 3 on a2, pid 4711: SIGKILL, out of memory" in captured.err


@pytest.mark.parametrize(
    ("phase", "code"), [(JobPhase.SUCCEEDED, 0), (JobPhase.FAILED, 137), (JobPhase.CANCELLED, 21)]
)
def test_run_returns_the_failing_ranks_code_and_says_which(
    replica: FakeReplica,
    address: str,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    phase: JobPhase,
    code: int,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").touch()
    replica.items = ended(phase, failure=failure())  # type: ignore[assignment]
    assert (
        run(["run", "--coordinators", address, "--name", "digits", "--rdzv_backend=c10d", "train.py", "--x"])
        == code
    )
    error = capfd.readouterr().err
    assert "--rdzv-backend has no effect" in error
    if phase is JobPhase.FAILED:
        assert error.splitlines()[-1] == (
            "dtrain: digits FAILED: exit code 137 from rank 3 on a2, pid 4711: SIGKILL, out of memory"
        )


def test_pet_variables_stand_for_flags(
    replica: FakeReplica, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").touch()
    monkeypatch.setenv("PET_NPROC_PER_NODE", "3")
    monkeypatch.setenv("PET_NNODES", "2:4")
    monkeypatch.setenv("DTRAIN_COORDINATORS", address)
    replica.items = ended(JobPhase.SUCCEEDED)  # type: ignore[assignment]
    assert run(["run", "--name", "digits", "train.py"]) == 0
    (found,) = [json.loads(value) for value in replica.submitted.values()]
    assert (found["nnodes_min"], found["nnodes_max"], found["nproc_per_node"]) == (2, 4, 3)


def test_cancel_with_yes_writes_the_intent(replica: FakeReplica, address: str, capsys: Out) -> None:
    replica.items = running_job()
    assert run(["cancel", "digits", "--yes", "--coordinators", address]) == 0
    assert [(intent.job, intent.wanted) for intent in replica.intents] == [("digits", "cancel")]
    assert "@" in replica.intents[0].by
    assert capsys.readouterr().out == "digits: cancel accepted\n"


def test_suspend_and_resume_write_the_intent(replica: FakeReplica, address: str, capsys: Out) -> None:
    replica.items = running_job()
    assert run(["suspend", "digits", "--coordinators", address]) == 0
    assert run(["resume", "digits", "--coordinators", address, "-o", "name"]) == 0
    assert [(intent.job, intent.wanted) for intent in replica.intents] == [
        ("digits", "suspend"),
        ("digits", "run"),
    ]
    assert capsys.readouterr().out == "digits: suspend accepted\njob/digits\n"


def test_suspend_wait_returns_when_the_machines_are_free(
    replica: FakeReplica, address: str, capsys: Out
) -> None:
    reason = "suspended by ann at step 40, with checkpoint 4"
    replica.items = ended(JobPhase.SUSPENDED, reason=reason)  # type: ignore[assignment]
    assert run(["suspend", "digits", "--wait", "--coordinators", address]) == 0
    assert capsys.readouterr().out == f"digits: {reason}\n"
    replica.items = ended(JobPhase.SUCCEEDED)  # type: ignore[assignment]
    assert run(["suspend", "digits", "--wait", "--coordinators", address]) == 5
    assert capsys.readouterr().out == "digits: ended as SUCCEEDED\n"


def test_pause_and_unpause_write_the_intent(replica: FakeReplica, address: str, capsys: Out) -> None:
    replica.items = running_job()
    assert run(["pause", "digits", "--coordinators", address]) == 0
    assert run(["unpause", "digits", "--coordinators", address, "-o", "name"]) == 0
    assert [(intent.job, intent.pause) for intent in replica.intents] == [
        ("digits", "pause"),
        ("digits", "unpause"),
    ]
    assert capsys.readouterr().out == "digits: pause accepted\njob/digits\n"


def test_pause_wait_returns_when_ranks_are_held_or_never_will_be(
    replica: FakeReplica, address: str, capsys: Out
) -> None:
    reason = "paused by ann at step 40, with checkpoint 4"
    replica.items = ended(JobPhase.RUNNING, reason=reason, held=Seq(4))  # type: ignore[assignment]
    assert run(["pause", "digits", "--wait", "--coordinators", address]) == 0
    assert capsys.readouterr().out == f"digits: {reason}\n"
    reason = "it cannot be paused, as it has no store to save the step in, and goes on"
    cannot = (Condition("Paused", "False", "CannotPause", reason),)
    replica.items = ended(JobPhase.RUNNING, reason=reason, conditions=cannot)  # type: ignore[assignment]
    assert run(["pause", "digits", "--wait", "--coordinators", address]) == 5
    assert capsys.readouterr().out == f"digits: {reason}\n"


def test_a_coordinator_that_knows_no_pauses_is_told_of(
    replica: FakeReplica, address: str, capsys: Out
) -> None:
    replica.items = running_job()
    replica.knows_pauses = False
    assert run(["pause", "digits", "--coordinators", address]) == 2
    assert "is of a former release: it cannot pause digits" in capsys.readouterr().err


def test_resume_wait_returns_when_ranks_train_or_it_has_ended(
    replica: FakeReplica, address: str, capsys: Out
) -> None:
    replica.items = running_job()
    assert run(["resume", "digits", "--wait", "--coordinators", address]) == 0
    assert capsys.readouterr().out == "digits: all 4 ranks train\n"
    replica.items = ended(JobPhase.FAILED)  # type: ignore[assignment]
    assert run(["resume", "digits", "--wait", "--coordinators", address]) == 20


def test_scale_sets_the_bounds(replica: FakeReplica, address: str, capsys: Out) -> None:
    replica.items = running_job()
    assert run(["scale", "digits", "--nnodes", "2:8", "--coordinators", address]) == 0
    assert run(["scale", "digits", "--nnodes", "1", "--coordinators", address]) == 0
    found = [(i.wanted, i.nnodes_min, i.nnodes_max) for i in replica.intents]
    assert found == [("", 2, 8), ("", 1, 1)]
    assert capsys.readouterr().out == (
        "digits: may have 2:8 machines from now on\ndigits: may have 1 machine from now on\n"
    )
    assert run(["scale", "digits", "--nnodes", "3:2", "--coordinators", address]) == 2
    assert "--nnodes cannot be '3:2'" in capsys.readouterr().err


def test_checkpoint_wait_names_the_one_that_was_committed(
    replica: FakeReplica, address: str, capsys: Out
) -> None:
    replica.items = running_job()

    def commit_it() -> None:
        # On a busy machine the command comes late.
        while not replica.intents:
            time.sleep(0.02)
        token = replica.intents[0].checkpoint_token
        items = [i for i in running_job(token_done=token, seq_last=Seq(6)) if "open/" not in i.key]
        replica.update([*items, item(KEYS.checkpoint(JOB, Seq(6)), commit(6, 60))])

    timer = threading.Timer(0.3, commit_it)
    timer.daemon = True
    timer.start()
    assert run(["checkpoint", "digits", "--wait", "--coordinators", address]) == 0
    assert capsys.readouterr().out == "digits: checkpoint 6 of step 60 is committed\n"


def test_checkpoint_wait_says_when_there_is_none(replica: FakeReplica, address: str, capsys: Out) -> None:
    replica.items = running_job()
    threading.Timer(0.3, lambda: replica.update(ended(JobPhase.CANCELLED))).start()  # type: ignore[arg-type]
    assert run(["checkpoint", "digits", "--wait", "--coordinators", address]) == 5
    assert "no checkpoint of digits was committed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("phase", "goal", "code"),
    [
        (JobPhase.SUCCEEDED, "finished", 0),
        (JobPhase.FAILED, "finished", 20),
        (JobPhase.CANCELLED, "finished", 21),
        (JobPhase.RUNNING, "running", 0),
        (JobPhase.RUNNING, "step=40", 0),
        (JobPhase.FAILED, "running", 20),
        (JobPhase.SUCCEEDED, "running", 5),
        (JobPhase.SUCCEEDED, "checkpoint=3", 5),
        (JobPhase.RUNNING, "finished", 6),
    ],
)
def test_wait_has_the_codes_of_the_table(
    replica: FakeReplica, address: str, phase: JobPhase, goal: str, code: int
) -> None:
    replica.items = ended(phase)  # type: ignore[assignment]
    words = ["wait", "digits", "--for", goal, "--timeout", "200ms", "--coordinators", address]
    assert run(words) == code


def test_wait_returns_soon_after_the_write(replica: FakeReplica, address: str) -> None:
    import time

    replica.items = ended(JobPhase.RUNNING)  # type: ignore[assignment]
    begun = time.monotonic()
    threading.Timer(
        0.3,
        lambda: replica.update(
            [*ended(JobPhase.RUNNING), item(KEYS.latest(JOB), Latest(TERM, Seq(8), Step(80)))]
        ),
    ).start()  # type: ignore[list-item]
    assert run(["wait", "digits", "--for", "checkpoint=7", "--coordinators", address]) == 0
    assert time.monotonic() - begun < 1.3


@pytest.mark.parametrize("text", ["", "done", "checkpoint", "step=x", "running=3"])
def test_wait_refuses_what_it_does_not_know(text: str) -> None:
    with pytest.raises(Refused, match="cannot wait"):
        waiting.parse(text)


def test_logs_default_to_rank_0_and_the_one_that_failed(
    replica: FakeReplica, address: str, capfd: pytest.CaptureFixture[str]
) -> None:
    replica.items = ended(JobPhase.FAILED, failure=failure(attempt=Attempt(3)))  # type: ignore[assignment]
    replica.logs = {(3, rank, "stdout"): f"line of {rank}\nlast of {rank}".encode() for rank in range(4)}
    assert run(["logs", "digits", "--stdout", "--coordinators", address]) == 0
    assert (
        capfd.readouterr().out == "a1/0 | line of 0\na1/0 | last of 0\na1/3 | line of 3\na1/3 | last of 3\n"
    )
    assert run(["logs", "digits", "--stdout", "--rank", "1", "--tail", "1", "--coordinators", address]) == 0
    assert capfd.readouterr().out == "last of 1\n"
    assert run(["logs", "digits", "--stderr", "--coordinators", address]) == 4


def test_stacks_are_those_of_all_ranks_and_of_the_attempt_that_was_ended_for_a_hang(
    replica: FakeReplica, address: str, capfd: pytest.CaptureFixture[str]
) -> None:
    hang = failure(kind=FailureKind.HANG, signal=None, attempt=Attempt(2))
    replica.items = ended(JobPhase.RUNNING, failure=hang)  # type: ignore[assignment]
    replica.logs = {(2, rank, "stacks"): f"stack of {rank}\n".encode() for rank in range(4)}
    assert run(["logs", "digits", "--stacks", "--coordinators", address]) == 0
    assert capfd.readouterr().out == "".join(f"a1/{rank} | stack of {rank}\n" for rank in range(4))
    assert run(["logs", "digits", "--stacks", "--rank", "3", "--coordinators", address]) == 0
    assert capfd.readouterr().out == "stack of 3\n"
    replica.items = ended(JobPhase.RUNNING)  # type: ignore[assignment]
    replica.logs = {(3, rank, "stacks"): b"" for rank in range(4)}
    assert run(["logs", "digits", "--stacks", "--coordinators", address]) == 4
    assert "dtrain stacks digits" in capfd.readouterr().err


def test_a_follower_goes_on_across_attempts_and_lost_replicas(
    replica: FakeReplica, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import grpc

    monkeypatch.setattr(following, "_POLL_S", 0.2)

    replica.items = ended(JobPhase.RUNNING)  # type: ignore[assignment]
    replica.logs = {(3, 0, "stdout"): b"one\n"}
    lines: list[bytes] = []
    troubles: list[str] = []
    with closing(Client([address], timeout_s=0.3)) as client:
        follower = following.Follower(
            client,
            "digits",
            ranks=lambda job: [0],
            write=lambda line: lines.append(line.text),
            streams=("stdout",),
            trouble=troubles.append,
        )
        found: list[records.Job] = []
        thread = threading.Thread(target=lambda: found.append(follower.run()))
        thread.start()
        wait_for(lambda: lines == [b"one\n"])
        replica.refuse = lambda: grpc.StatusCode.UNAVAILABLE
        wait_for(lambda: len(troubles) == 1)
        replica.logs = {(3, 0, "stdout"): b"one\ntwo\n", (4, 0, "stdout"): b"three\n"}
        replica.update(ended(JobPhase.RUNNING, attempt=Attempt(4)))  # type: ignore[arg-type]
        replica.refuse = lambda: None
        wait_for(lambda: sorted(lines) == [b"one\n", b"three\n", b"two\n"])
        replica.update(ended(JobPhase.SUCCEEDED, attempt=Attempt(4)))  # type: ignore[arg-type]
        thread.join(10)
    assert found[0].phase is JobPhase.SUCCEEDED
    assert "connected again" in troubles[1]
    assert sorted(lines) == [b"one\n", b"three\n", b"two\n"]


def test_the_context_file_names_the_cluster_until_its_up_has_gone(
    replica: FakeReplica, address: str, capsys: Out
) -> None:
    replica.items = running_job()
    known = context.known_here("local", (address,), ("http://127.0.0.1:1",), Path("/x"))
    context.remember(known)
    assert run(["get", "jobs", "-o", "name"]) == 0
    context.remember(context.Known("local", (address,), pid=known.pid, started=1))
    assert run(["get", "jobs"]) == 3
    assert run(["get", "jobs", "--cluster", "local"]) == 3
    assert run(["get", "jobs", "--cluster", "other"]) == 4
    context.forget(known)
    assert "local" in context.load()[1], "another up has written it since"
    context.path().write_text("{damaged")
    assert context.load() == ("", {})
    assert "runs no more" in capsys.readouterr().err


@pytest.fixture
def became(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], dict[str, str]]]:
    """What etcdctl was started with; one is installed."""
    found: list[tuple[list[str], dict[str, str]]] = []

    def execve(program: str, words: list[str], environ: dict[str, str]) -> None:
        found.append(([program, *words[1:]], environ))
        raise SystemExit(0)

    for name in ("DTRAIN_ENDPOINTS", "ETCDCTL_ENDPOINTS", "DTRAIN_COORDINATORS", "ETCDCTL_USER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "execve", execve)
    install(tmp_path / "bin")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    context.path().unlink(missing_ok=True)
    return found


def install(folder: Path) -> Path:
    folder.mkdir()
    program = folder / "etcdctl"
    program.touch(0o755)
    return program


def test_etcdctl_of_a_local_cluster_is_the_one_beside_its_etcd(
    tmp_path: Path, became: list[tuple[list[str], dict[str, str]]]
) -> None:
    beside = install(tmp_path / "a folder")
    endpoints = ("http://127.0.0.1:1", "http://127.0.0.1:2")
    context.remember(
        context.known_here("local", ("127.0.0.1:1",), endpoints, Path("/x"), etcdctl=str(beside))
    )
    assert run(["etcdctl", "get", "--prefix", "/dtrain/", "-w", "json", "-o"]) == 0
    ((words, environ),) = became
    assert words == [str(beside), "get", "--prefix", "/dtrain/", "-w", "json", "-o"]
    assert (environ["ETCDCTL_API"], environ["ETCDCTL_ENDPOINTS"]) == ("3", ",".join(endpoints))
    beside.unlink()
    assert run(["etcdctl", "get", "x"]) == 0
    assert became[1][0][0] == str(tmp_path / "bin" / "etcdctl"), "where it has gone, the installed one"


def test_etcdctl_of_another_etcd_gets_what_options_and_environment_say(
    tmp_path: Path,
    became: list[tuple[list[str], dict[str, str]]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: Out,
) -> None:
    assert run(["etcdctl", "get", "x"]) == 3
    assert "--endpoints" in capsys.readouterr().err
    monkeypatch.setenv("DTRAIN_PASSWORD", "secret")
    flags = ["--endpoints", "https://e:2379", "--user", "reader", "--cacert", str(install(tmp_path / "ca"))]
    assert run([*flags, "etcdctl", "endpoint", "status"]) == 0
    ((words, environ),) = became
    assert words[1:] == ["endpoint", "status"]
    assert (environ["ETCDCTL_ENDPOINTS"], environ["ETCDCTL_USER"]) == ("https://e:2379", "reader:secret")
    assert environ["ETCDCTL_CACERT"] == flags[-1]
    (tmp_path / "bin" / "etcdctl").unlink()
    assert run([*flags, "etcdctl", "get", "x"]) == 4
    assert "install it" in capsys.readouterr().err


def test_a_misspelt_variable_is_refused_with_a_suggestion(
    address: str, monkeypatch: pytest.MonkeyPatch, capsys: Out
) -> None:
    monkeypatch.setenv("DTRAIN_COORDINATOR", address)
    assert run(["get", "jobs"]) == 2
    assert "did you mean DTRAIN_COORDINATORS?" in capsys.readouterr().err


def test_a_restart_is_told_with_its_cause_once() -> None:
    from tests.unit.cli.fakes import reading

    from dtrain.cli.render import sentences

    changes = sentences.Turns()
    job = records.group(reading(*running_job(failure=failure()))).jobs["digits"]
    assert changes.lines(job) == [
        "digits  attempt 2 failed: rank 3 on a2, pid 4711: SIGKILL, out of memory",
        "digits  RUNNING  attempt 3  all 4 ranks train",
    ]
    assert changes.lines(job) == []


def test_flags_beat_the_environment(
    replica: FakeReplica, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DTRAIN_COORDINATORS", "127.0.0.1:1")
    replica.items = running_job()
    assert run(["--coordinators", address, "get", "jobs", "-o", "name"]) == 0
    assert run(["get", "jobs", "-o", "name", "--coordinators", address]) == 0


def wait_for(condition: object, timeout_s: float = 10.0) -> None:
    import time

    end = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def test_a_machine_is_cordoned_by_the_beginning_of_its_name(
    replica: FakeReplica, address: str, capsys: Out
) -> None:
    replica.items = fleet()
    words = ["--coordinators", address]
    assert run(["cordon", "agent/a1", "--for", "2h", "--reason", "loud fan", *words]) == 0
    assert capsys.readouterr().out.startswith("a1: cordoned until 20")
    assert run(["cordon", "a1", "-o", "json", *words]) == 0
    assert json.loads(capsys.readouterr().out)["until"] == ""
    first, second = replica.cordons
    assert (first.agent, first.reason, first.ttl_s, first.drain) == ("a1", "loud fan", 7200, False)
    assert first.by
    assert second.ttl_s == 0


def test_uncordon_says_whether_there_was_anything_to_lift(
    replica: FakeReplica, address: str, capsys: Out
) -> None:
    replica.items = fleet()
    assert run(["uncordon", "a2", "--coordinators", address]) == 0
    assert run(["uncordon", "a1", "--coordinators", address]) == 0
    assert capsys.readouterr().out == "a2: uncordoned\na1: was not cordoned\n"


def test_drain_waits_until_no_rank_runs_there(replica: FakeReplica, address: str, capsys: Out) -> None:
    replica.items = [*running_job(), *fleet()]
    words = ["drain", "a2", "--yes", "--wait", "--coordinators", address]
    assert run([*words, "--timeout", "100ms"]) == 6
    assert "digits still has ranks on a2" in capsys.readouterr().err
    timer = threading.Timer(0.3, lambda: replica.update(fleet()))
    timer.start()
    try:
        assert run([*words, "--timeout", "30s"]) == 0
    finally:
        timer.join()
    assert capsys.readouterr().out == "a2: drained\n"
    assert all(request.drain for request in replica.cordons)


def test_an_unknown_machine_is_said_so(replica: FakeReplica, address: str, capsys: Out) -> None:
    replica.items = fleet()
    assert run(["drain", "b7", "--coordinators", address]) != 0
    assert "there is no agent 'b7'" in capsys.readouterr().err
    assert not replica.cordons


def test_stacks_of_a_rank_that_is_not_there_are_missed_in_words(
    replica: FakeReplica, address: str, capsys: Out
) -> None:
    replica.items = running_job()
    assert run(["stacks", "digits", "--coordinators", address]) == 0
    assert "read (x.py:3)" in capsys.readouterr().out
    assert run(["stacks", "digits", "--rank", "7", "--coordinators", address]) == 4
    assert "none of the ranks 7 runs in job digits now" in capsys.readouterr().err
