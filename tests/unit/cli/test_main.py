"""The command itself: help, suggestions, errors, what is imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

from dtrain.cli.main import MEANT, Verbs, cli, run

HEAVY = (
    "rich",
    "grpc",
    "pydantic",
    "etcd3gw",
    "boto3",
    "yaml",
    "psutil",
    "google",
    "torch",
    "tenacity",
    "structlog",
)


def verbs() -> list[str]:
    return cli.list_commands(click.Context(cli))


def commands() -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for verb in verbs():
        command = cli.get_command(click.Context(cli), verb)
        assert command is not None
        found.append((verb,))
        if isinstance(command, click.Group):
            found += [(verb, inner) for inner in command.commands]
    return found


@pytest.fixture(autouse=True)
def nothing_configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    for name in list(os.environ):
        if name.startswith(("DTRAIN_", "ETCDCTL_", "PET_")):
            monkeypatch.delenv(name)


def test_the_verbs_are_those_of_the_folder() -> None:
    assert set(verbs()) == {
        *("doctor", "up", "run", "submit", "get", "describe", "watch", "top", "logs", "stacks", "wait"),
        *("checkpoint", "cancel"),
        *("checkpoints", "cordon", "uncordon", "drain"),
        *("suspend", "resume", "pause", "unpause"),
        *("coordinator", "agent", "archive", "version", "completion", "chaos", "audit", "scale", "etcdctl"),
    }


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_each_help_has_at_least_two_examples(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*words, "--help"]) == 0
    text = capsys.readouterr().out
    assert "Examples:" in text
    assert text.split("Examples:")[1].count("dtrain ") >= 2


@pytest.mark.parametrize("words", [["--help"], ["get", "--help"], ["run", "--help"], ["completion", "zsh"]])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    code = (
        "import sys; from dtrain.cli.main import run; code = run(sys.argv[1:]);"
        f"print('LOADED', sorted(set(sys.modules) & set({HEAVY!r})), code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "LOADED [] 0"


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("list", "dtrain get'"),
        ("status", "dtrain describe'"),
        ("nodes", "dtrain get agents'"),
        ("stop", "dtrain cancel'"),
        ("rm", "dtrain cancel'"),
        ("events", "dtrain get events'"),
        ("leader", "dtrain get coordinators'"),
        ("describ", "dtrain describe'"),
        ("sumbit", "dtrain submit'"),
        ("xyzzy", "the verbs are agent, archive, audit, cancel, chaos,"),
    ],
)
def test_an_unknown_verb_gets_a_suggestion(word: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([word, "x"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error[DT-1005]: there is no verb '{word}'; ")
    assert meant in error


def test_every_suggested_verb_exists() -> None:
    assert {words.split()[0] for words in MEANT.values()} <= set(verbs())
    assert isinstance(cli, Verbs)


def test_no_verb_at_all_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 2
    assert "Commands:" in capsys.readouterr().err


def test_an_error_is_one_object_with_o_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["get", "jobs", "-o", "json"]) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    told = json.loads(captured.err)
    assert (told["kind"], told["code"], told["exit_code"]) == ("Error", "DT-4001", 3)
    assert "dtrain up" in told["fix"]


def test_options_may_stand_before_or_after_the_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["-o", "json", "get", "jobs"]) == 3
    assert json.loads(capsys.readouterr().err)["code"] == "DT-4001"


def test_no_traceback_without_debug(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dtrain.cli.context.addresses", lambda settings: 1 / 0)
    assert run(["get", "jobs"]) == 1
    error = capsys.readouterr().err
    assert "error[DT-9000]: a bug in dtrain, id " in error
    assert "Traceback" not in error
    assert run(["get", "jobs", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_cancel_without_a_terminal_needs_yes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dtrain.cli.reading.name", lambda client, job: job)
    assert run(["cancel", "digits", "--coordinators", "127.0.0.1:1"]) == 2
    assert "--yes" in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_are_printed(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["completion", shell]) == 0
    assert "_DTRAIN_COMPLETE" in capsys.readouterr().out


def test_completion_of_names_is_silent_when_the_cluster_is_down() -> None:
    env = os.environ | {
        "_DTRAIN_COMPLETE": "bash_complete",
        "COMP_WORDS": "dtrain cancel ",
        "COMP_CWORD": "2",
        "DTRAIN_COORDINATORS": "127.0.0.1:1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "dtrain.cli"], check=False, env=env, capture_output=True, text=True, timeout=20
    )
    assert (done.stdout.strip(), done.stderr) == ("", "")


def test_dry_run_without_a_cluster_checks_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("name: digits\nscript: train.py\n")
    (tmp_path / "train.py").touch()
    assert run(["submit", str(path), "--dry-run", "-o", "json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["name"] == "digits"
    assert "only the file was checked" in captured.err


def test_job_file_errors_are_listed_with_o_json_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("name: X\nnnode: 3\n")
    assert run(["submit", str(path), "-o", "json"]) == 2
    assert len(json.loads(capsys.readouterr().err)["details"]) == 3
