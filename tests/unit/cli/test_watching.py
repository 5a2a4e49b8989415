"""Watches over real gRPC: nothing left out, nothing twice, on whichever replica."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import grpc
import pytest
from tests.unit.cli.fakes import JOB, KEYS, FakeReplica, fleet, item, running_job, serving, spec, status

from dtrain.cli import watching
from dtrain.cli.answers import Item
from dtrain.cli.client import Client, closing
from dtrain.cli.main import run
from dtrain.cli.watching import Moment
from dtrain.protocol.ids import JobName, Step
from dtrain.protocol.job import JobPhase

Two = tuple[FakeReplica, FakeReplica, Client]


def job(phase: JobPhase = JobPhase.RUNNING, step: int = 40, name: str = JOB) -> list[Item]:
    found = [item(KEYS.spec(JobName(name)), replace(spec(), name=JobName(name)))]
    return [*found, item(KEYS.status(JobName(name)), status(phase, step=Step(step)))]


@pytest.fixture
def two() -> Iterator[Two]:
    """Two replicas of one etcd: what one knows, the other does."""
    first, second = FakeReplica(items=job()), FakeReplica(items=job())
    second.history, second.changed = first.history, first.changed
    with (
        serving(first) as one,
        serving(second) as other,
        closing(Client([one, other], timeout_s=2.0)) as client,
    ):
        client._current = 0
        yield first, second, client


def step_of(moment: Moment) -> int:
    return int(json.loads(moment.items[f"jobs/{JOB}/status"].value)["step"])


def told(moment: Moment) -> tuple[int, int, bool]:
    return moment.revision, step_of(moment), moment.listed


def both(two: Two, items: list[Item]) -> None:
    first, second, _ = two
    first.update(items)
    second.items, second.revision = first.items, first.revision


def test_every_transaction_is_one_moment_though_a_replica_is_lost(two: Two) -> None:
    first, _, client = two
    said: list[str] = []
    seen = watching.moments(client, ["jobs/"], said.append)
    assert next(seen).listed
    both(two, job(step=41))
    both(two, job(step=42))
    assert [told(next(seen)) for _ in range(2)] == [(10, 41, False), (11, 42, False)]
    first.refuse = lambda: grpc.StatusCode.UNAVAILABLE
    both(two, job(step=43))
    both(two, job(step=44))
    assert [told(next(seen)) for _ in range(2)] == [(12, 43, False), (13, 44, False)]


def test_a_replica_that_knows_less_is_passed_over(two: Two) -> None:
    first, second, client = two
    seen = watching.moments(client, ["jobs/"], lambda _: None)
    next(seen)
    first.known_from = 99
    both(two, job(step=41))
    assert (next(seen).listed, second.calls[-1]) == (False, "Changes")


def test_where_nobody_knows_what_came_between_the_newest_state_is_told_as_such(two: Two) -> None:
    first, second, client = two
    said: list[str] = []
    seen = watching.moments(client, ["jobs/"], said.append)
    next(seen)
    both(two, job(step=41))
    both(two, job(step=42))
    first.known_from = second.known_from = 11
    first.history.clear()
    moment = next(seen)
    assert (moment.revision, step_of(moment), moment.listed) == (11, 42, True)
    assert said == ["what came between is not known any more: the newest state, of revision 11"]
    both(two, job(step=43))
    later = next(seen)
    assert (later.revision, later.listed) == (12, False)


def test_what_the_first_list_had_already_is_not_told_again() -> None:
    ahead = [replace(one, mod_revision=10) if one.key.endswith("status") else one for one in job(step=41)]
    replica = FakeReplica(items=job())
    with serving(replica) as address, closing(Client([address])) as client:
        replica.update(job(step=41))
        # A list may be newer than its revision says, never older.
        replica.items, replica.revision = ahead, 9
        seen = watching.moments(client, ["jobs/"], lambda _: None)
        assert step_of(next(seen)) == 41
        replica.revision = 10
        replica.update(job(step=42))
        assert next(seen).revision == 11


def test_a_watch_goes_on_behind_a_revision_deletions_too(two: Two) -> None:
    _, _, client = two
    both(two, job(step=41))
    both(two, job(step=42) + job(name="b"))
    both(two, job(step=42))
    seen = watching.moments(client, ["jobs/"], lambda _: None, after=10)
    assert (next(seen).revision, next(seen).revision) == (10, 11)
    last = next(seen)
    assert (last.revision, [change.value for change in last.changes]) == (12, [None, None])


def test_replicas_of_the_former_release_are_watched_by_looking_again(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "POLL_S", 0.02)
    first, second, client = two
    first.former = second.former = True
    seen = watching.moments(client, ["jobs/"], lambda _: None)
    next(seen)
    both(two, job(step=41))
    assert step_of(next(seen)) == 41


Out = pytest.CaptureFixture[str]


def changing(replica: FakeReplica, state: list[Item]) -> None:
    """That state, once the changes are waited for."""

    def go() -> None:
        while "Changes" not in replica.calls:
            time.sleep(0.01)
        replica.update(state)

    threading.Thread(target=go, daemon=True).start()


def test_watch_tells_a_job_to_its_end(replica: FakeReplica, address: str, capsys: Out) -> None:
    replica.items = running_job()
    ended = [one for one in running_job() if not one.key.endswith("/status")]
    ended.append(item(KEYS.status(JOB), status(JobPhase.SUCCEEDED, reason="all ranks are done")))
    changing(replica, ended)
    assert run(["watch", "dig", "-o", "json", "--coordinators", address]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {one["key"] for one in found[:-1]} >= {"spec", "status", "latest"}
    assert (found[-1]["key"], found[-1]["record"]["phase"]) == ("status", "SUCCEEDED")
    revisions = [one["revision"] for one in found]
    assert revisions == sorted(revisions)


@pytest.mark.parametrize(
    ("words", "kind", "name"),
    [
        (["jobs"], "Job", "digits"),
        (["agents"], "Agent", "a1"),
        (["coordinators"], "Coordinator", "c1"),
        (["checkpoints", "digits"], "Checkpoint", None),
        (["events"], "Event", None),
    ],
)
def test_every_list_can_stay_and_writes_one_object_a_line(
    replica: FakeReplica, address: str, capsys: Out, words: list[str], kind: str, name: str | None
) -> None:
    replica.items = [*running_job(), *fleet()]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Client, "changes", interrupted)
        assert run(["get", *words, "--watch", "--coordinators", address]) == 130
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert found
    assert {(one["v"], one["kind"], one["revision"]) for one in found} == {(1, kind, 9)}
    assert name is None or found[0]["name"] == name


def interrupted(*_args: object, **_how: object) -> None:
    raise KeyboardInterrupt


def test_only_what_is_selected_is_told(replica: FakeReplica, address: str, capsys: Out) -> None:
    replica.items = [*job(), *job(JobPhase.FAILED, name="other")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Client, "changes", interrupted)
        for words in (["--phase", "failed"], ["oth*"]):
            assert run(["get", "jobs", *words, "-w", "-o", "name", "--coordinators", address]) == 130
            assert capsys.readouterr().out == "job/other\n"


def test_what_is_selected_no_more_is_told_once(replica: FakeReplica, address: str, capsys: Out) -> None:
    replica.items = job()
    states = [job(JobPhase.FAILED), job(JobPhase.FAILED, step=41), job(step=42)]
    ask = Client.changes

    def next_state(self: Client, *args: Any, **how: Any) -> Any:
        if not states:
            raise KeyboardInterrupt
        replica.update(states.pop(0))
        return ask(self, *args, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Client, "changes", next_state)
        assert (
            run(["get", "jobs", "--phase", "running", "-w", "-o", "json", "--coordinators", address]) == 130
        )
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(one["revision"], one["status"]["phase"]) for one in found] == [
        (9, "RUNNING"),
        (10, "FAILED"),
        (12, "RUNNING"),
    ]


def test_on_a_terminal_a_list_changes_in_place(replica: FakeReplica, address: str) -> None:
    replica.items = job()
    ours, theirs = pty.openpty()
    env = {name: value for name, value in os.environ.items() if not name.startswith("DTRAIN_")}
    process = subprocess.Popen(
        [sys.executable, "-m", "dtrain.cli", "get", "jobs", "-w", "--coordinators", address],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=env | {"TERM": "xterm", "COLUMNS": "160", "LINES": "40"},
        start_new_session=True,
    )
    os.close(theirs)
    seen = b""

    def until(text: bytes) -> None:
        nonlocal seen
        deadline = time.monotonic() + 60
        while text not in seen:
            assert time.monotonic() < deadline, seen
            if select.select([ours], [], [], 0.2)[0]:
                seen += os.read(ours, 65536)

    try:
        until(b"all 4 ranks train")
        replica.update(job(JobPhase.FAILED))
        until(b"FAILED")
        # The cursor went up over the lines of before.
        assert b"\x1b[1A" in seen
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    finally:
        process.kill()
        process.wait()
        os.close(ours)
