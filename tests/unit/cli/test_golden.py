"""What each list and description prints in each format, word for word.

``pytest tests/unit/cli/test_golden.py --rewrite`` writes the files again; the diff is the review: JSON and
YAML are public interface and only grow, tables may change.
"""

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
from tests.unit.cli.fakes import NOW, FakeReplica, fleet, running_job

from dtrain.cli import naming
from dtrain.cli.client import Client
from dtrain.cli.main import run
from dtrain.protocol.errors import NotFound

GOLDEN = Path(__file__).parent / "golden"
VERBS = {
    "get-jobs": ("get", "jobs"),
    "get-agents": ("get", "agents"),
    "get-coordinators": ("get", "coordinators"),
    "get-checkpoints": ("get", "checkpoints", "digits"),
    "get-events": ("get", "events"),
    "describe-job": ("describe", "job", "digits"),
    "describe-agent": ("describe", "agent", "a2"),
    "wait": ("wait", "digits", "--for", "step=1"),
}
FORMATS = ("table", "wide", "json", "yaml", "name")
OFFERED = {"describe-job": ("table", "json", "yaml"), "describe-agent": ("table", "json", "yaml")}
CASES = [
    (verb, form) for verb in VERBS for form in OFFERED.get(verb, FORMATS) if (verb, form) != ("wait", "wide")
]


@pytest.fixture(params=["now", "former"])
def release(request: pytest.FixtureRequest, replica: FakeReplica) -> str:
    """The same is said with replicas of the release before this one."""
    replica.former = request.param == "former"
    return str(request.param)


@pytest.mark.parametrize(("verb", "form"), CASES)
def test_output_is_what_it_was(
    replica: FakeReplica,
    address: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    release: str,
    verb: str,
    form: str,
) -> None:
    monkeypatch.setattr(time, "time", lambda: NOW)
    # The addresses are of this test: nobody is asked there.
    monkeypatch.setattr(Client, "info_each", lambda *_, **__: {})
    replica.items = [replace(one, create_revision=7) for one in [*running_job(), *fleet()]]
    assert run([*VERBS[verb], "-o", form, "--coordinators", address]) == 0
    printed = capsys.readouterr().out
    path = GOLDEN / f"{verb}.{form}"
    if request.config.getoption("--rewrite") and release == "now":
        path.write_text(printed)
    assert printed == path.read_text()


def test_objects_say_what_they_are() -> None:
    for path in GOLDEN.glob("*.json"):
        document = json.loads(path.read_text())
        assert document["v"] == 1
        assert document["kind"].removesuffix("List") in ("Job", "Agent", "Coordinator", "Checkpoint", "Event")


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("nodes", "did you mean 'dtrain get agents'?"),
        ("leader", "did you mean 'dtrain get coordinators'?"),
        ("chekpoints", "did you mean 'dtrain get checkpoints'?"),
        ("pods-and-more", "there are agents, checkpoints, coordinators, events, jobs"),
    ],
)
def test_other_words_for_lists_get_a_suggestion(
    capsys: pytest.CaptureFixture[str], word: str, told: str
) -> None:
    assert run(["get", word]) == 2
    assert told in capsys.readouterr().err


def test_the_singular_will_do(replica: FakeReplica, address: str, capsys: pytest.CaptureFixture[str]) -> None:
    replica.items = running_job()
    assert run(["get", "job", "-o", "name", "--coordinators", address]) == 0
    assert capsys.readouterr().out == "job/digits\n"


def test_an_unknown_name_says_which_there_are() -> None:
    with pytest.raises(NotFound) as caught:
        naming.find(["a", "b"], "c", "job")
    assert caught.value.fix == "dtrain get jobs shows a, b"
