"""``dtrain logs``: which lines, of whom, in which form."""

import json
import threading
import time
from collections.abc import Callable

import pytest
from tests.unit.cli.fakes import JOB, KEYS, FakeReplica, failure, item, running_job, spec, status

from dtrain.cli import following
from dtrain.cli.client import Client, closing
from dtrain.cli.logreading import Wanted
from dtrain.cli.main import run
from dtrain.protocol.ids import AgentName, Attempt, Rank
from dtrain.protocol.job import JobPhase, Member


def shown(address: str, capfd: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    code = run(["logs", "digits", "--coordinators", address, *args])
    told = capfd.readouterr()
    return code, told.out, told.err


@pytest.fixture(autouse=True)
def job(replica: FakeReplica) -> None:
    replica.items = running_job()  # type: ignore[assignment]
    for rank in (0, 1):
        replica.logs |= {
            (3, rank, "stdout"): f"rank {rank} loss=1\nrank {rank} fine\n".encode(),
            (3, rank, "stderr"): b"",
        }


def test_lines_that_a_pattern_is_found_in(address: str, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = shown(address, capfd, "--grep", "loss=", "--rank", "0,1")
    assert (code, out) == (0, "a1/0 | rank 0 loss=1\na1/1 | rank 1 loss=1\n")


def test_an_object_a_line_for_programs(address: str, capfd: pytest.CaptureFixture[str]) -> None:
    _, out, _ = shown(address, capfd, "-o", "json", "--tail", "1")
    line = json.loads(out)
    assert (line["job"], line["attempt"], line["rank"], line["line"]) == ("digits", 3, 0, "rank 0 fine")


def test_what_cannot_be_meant_is_refused(address: str, capfd: pytest.CaptureFixture[str]) -> None:
    for args in (
        ("--since", "yesterday"),
        ("--grep", "("),
        ("--previous", "--attempt", "1"),
        ("-f", "--previous"),
        ("--rank", "one"),
    ):
        assert shown(address, capfd, *args)[0] == 2, args


def test_a_machine_that_had_no_rank_is_not_found(address: str, capfd: pytest.CaptureFixture[str]) -> None:
    code, _, err = shown(address, capfd, "--agent", "gpu-99")
    assert code == 4
    assert "gpu-99" in err


def test_a_replica_of_an_earlier_release_has_no_former_machines(
    address: str, capfd: pytest.CaptureFixture[str]
) -> None:
    code, _, err = shown(address, capfd, "--previous")
    assert code == 4
    assert "earlier release" in err


# Following ----------------------------------------------------------------------------------


def elastic(
    replica: FakeReplica, attempt: int, *agents: str, phase: JobPhase = JobPhase.RUNNING, **more: object
) -> None:
    """The job in an attempt on these machines, two ranks each; each rank writes a line."""
    members = tuple(Member(AgentName(name), node, Rank(2 * node), 2) for node, name in enumerate(agents))
    replica.logs |= {
        (attempt, rank, "stdout"): f"attempt {attempt} rank {rank}\n".encode()
        for rank in range(2 * len(agents))
    }
    now = status(phase, attempt=Attempt(attempt), members=members, **more)
    replica.update([item(KEYS.spec(JOB), spec(nnodes_min=1, nnodes_max=3)), item(KEYS.status(JOB), now)])


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def followed(address: str, wanted: Wanted, play: Callable[[list[str]], None]) -> tuple[list[str], list[str]]:
    """Lines and what was said while ``play`` changed the job to its end."""
    lines: list[str] = []
    said: list[str] = []
    with closing(Client([address], timeout_s=5.0)) as client:
        follower = following.Follower(
            client,
            "digits",
            ranks=wanted.followed,
            write=lambda line: lines.append(line.text.decode().strip()),
            streams=("stdout",),
            trouble=said.append,
        )
        thread = threading.Thread(target=follower.run)
        thread.start()
        play(lines)
        thread.join(30)
        assert not thread.is_alive()
    return sorted(lines), said


def written(attempt: int, *ranks: int) -> list[str]:
    return [f"attempt {attempt} rank {rank}" for rank in ranks]


def test_ranks_that_an_elastic_change_brings_are_followed(replica: FakeReplica, address: str) -> None:
    def play(lines: list[str]) -> None:
        wait_for(lambda: len(lines) == 2)
        elastic(replica, 4, "a1", "a2", "a3")
        wait_for(lambda: len(lines) == 8)
        elastic(replica, 4, "a1", "a2", "a3", phase=JobPhase.SUCCEEDED)

    elastic(replica, 3, "a1")
    lines, said = followed(address, Wanted("all"), play)
    assert lines == written(3, 0, 1) + written(4, *range(6))
    assert said == []


def test_a_machine_that_leaves_and_comes_back_is_followed_when_it_is_there(
    replica: FakeReplica, address: str
) -> None:
    def play(lines: list[str]) -> None:
        wait_for(lambda: len(lines) == 2)
        elastic(replica, 4, "a1")
        elastic(replica, 5, "a2", "a1")
        wait_for(lambda: len(lines) == 4)
        elastic(replica, 5, "a2", "a1", phase=JobPhase.SUCCEEDED)

    elastic(replica, 3, "a1", "a2")
    lines, _ = followed(address, Wanted(agent="a2"), play)
    assert lines == written(3, 2, 3) + written(5, 0, 1)


def test_so_many_ranks_are_followed_and_no_more_which_is_said(
    replica: FakeReplica, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def play(lines: list[str]) -> None:
        wait_for(lambda: len(lines) == 2)
        elastic(replica, 4, "a1", "a2")
        wait_for(lambda: len(lines) == 5)
        elastic(replica, 4, "a1", "a2", phase=JobPhase.SUCCEEDED)

    monkeypatch.setattr(following, "RANKS_MAX", 3)
    elastic(replica, 3, "a1")
    lines, said = followed(address, Wanted("all"), play)
    assert lines == written(3, 0, 1) + written(4, 0, 1, 2)
    (sentence,) = said
    assert sentence.startswith("3 ranks of attempt 4 are followed, 1 more are not")


def test_a_rank_that_fails_is_followed_from_then_on(replica: FakeReplica, address: str) -> None:
    def play(lines: list[str]) -> None:
        wait_for(lambda: len(lines) == 1)
        elastic(replica, 3, "a1", "a2", failure=failure(attempt=Attempt(3)))
        wait_for(lambda: len(lines) == 2)
        elastic(replica, 3, "a1", "a2", phase=JobPhase.FAILED, failure=failure(attempt=Attempt(3)))

    elastic(replica, 3, "a1", "a2")
    lines, _ = followed(address, Wanted(), play)
    assert lines == written(3, 0, 3)
