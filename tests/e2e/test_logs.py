"""What ranks wrote can be read after the loss of their machine, and followed through the loss of a leader."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.harness import Harness, say

from dtrain.protocol.ids import JobName
from dtrain.protocol.job import JobStatus, Member

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

COPY_S = 0.5


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    """Agents that copy logs often."""
    flags = ("--report-interval", "0.2", "--log-copy-interval", str(COPY_S))
    with Harness(tmp_path_factory.mktemp("h"), agent_flags=flags) as made:
        made.await_ready()
        yield made
        made.assert_clean()


@pytest.fixture(scope="module")
def job(harness: Harness) -> JobName:
    name = "chatty"
    args = f"--stop-file {harness.stop_file(name)}"
    return harness.start(name, args, script="chatty.py", marks=False)


def logs(harness: Harness, job: JobName, *args: str) -> "subprocess.CompletedProcess[str]":
    return dtrain(harness, "logs", job, *args)


def dtrain(harness: Harness, *args: str) -> "subprocess.CompletedProcess[str]":
    command = _command(harness, *args)
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr
    return done


def _command(harness: Harness, *args: str) -> list[str]:
    env = ["env", f"DTRAIN_COORDINATORS={','.join(harness.cluster.addresses)}"]
    return [*env, sys.executable, "-m", "dtrain.cli", *args]


def written(harness: Harness, job: JobName, member: Member, attempt: int, rank: int, stream: str) -> str:
    """A rank's log as it lies on its machine's disk."""
    uid = harness.status(job).uid
    folder = harness.cluster.folder / "agents" / member.agent / "logs" / f"{job}-{uid}" / f"attempt_{attempt}"
    return (folder / str(rank - member.first_rank) / f"{stream}.log").read_text()


def member_with(status: JobStatus, rank: int) -> Member:
    return next(one for one in status.members if one.first_rank <= rank < one.first_rank + one.nproc)


def test_lines_of_all_ranks_come_in_the_order_of_their_times(harness: Harness, job: JobName) -> None:
    attempt = harness.status(job).attempt
    harness.until("there are lines", lambda: logs(harness, job, "--rank", "3").stdout.count("\n") > 20)
    shown = logs(harness, job, "--rank", "all", "-o", "json").stdout.splitlines()
    lines = [json.loads(line) for line in shown]
    times = [line["time"] for line in lines]
    assert all(times)
    assert times == sorted(times)
    for rank in range(4):
        steps = [line for line in lines if line["rank"] == rank and line["stream"] == "stdout"]
        texts = [f"attempt {attempt} rank {rank} step {step} über" for step in range(len(steps))]
        assert [line["line"] for line in steps] == texts
    # The ranks step together: they are mixed, not one after the other.
    assert [line["rank"] for line in lines] != sorted(line["rank"] for line in lines)


def test_a_lost_machines_log_is_read_from_the_store(harness: Harness, job: JobName) -> None:
    before = harness.status(job)
    lost = member_with(before, 3)
    harness.until(
        "the first lines had time to be copied",
        lambda: written(harness, job, lost, before.attempt, 3, "stdout").count("\n") > 100,
    )
    time.sleep(2 * COPY_S)
    harness.cluster.power_cut(lost.agent)
    harness.await_training(job, after_attempt=before.attempt)

    shown = logs(harness, job, "--previous", "--agent", lost.agent, "--stdout")
    ranks = range(lost.first_rank, lost.first_rank + lost.nproc)
    for rank in ranks:
        prefix = f"{lost.agent}/{rank} | "
        # Also where the attempt after it was given up before its ranks began.
        own = "".join(
            line.removeprefix(prefix) + "\n" for line in shown.stdout.splitlines() if line.startswith(prefix)
        )
        whole = written(harness, job, lost, before.attempt, rank, "stdout")
        assert whole.startswith(own.rstrip("\n"))
        missing = whole.count("\n") - own.count("\n")
        say(f"rank {rank}: {missing} of {whole.count(chr(10))} lines went with the machine")
        # 50 lines a second at most; a loaded machine copies late.
        assert own.count("\n") >= 50
    assert f"of attempt {before.attempt} from the archive up to 20" in shown.stderr
    # The machine of rank 0 lives: its log comes from there, whole.
    assert "archive" not in logs(harness, job, "--previous", "--rank", "0").stderr
    harness.cluster.start_daemon(lost.agent)
    harness.await_ready()


def test_following_goes_on_through_the_loss_of_the_leader_byte_for_byte(
    harness: Harness, job: JobName, tmp_path: Path
) -> None:
    attempt = harness.status(job).attempt
    path = tmp_path / "followed"
    with path.open("wb") as file:
        follower = subprocess.Popen(
            _command(harness, "logs", job, "-f", "--rank", "1", "--stdout"),
            stdout=file,
            stderr=subprocess.DEVNULL,
        )
    try:
        for _ in range(2):
            at = path.stat().st_size
            harness.until("it follows", lambda at=at: path.stat().st_size > at + 500)  # type: ignore[misc]
            harness.cluster.kill_leader_process()
        at = path.stat().st_size
        harness.until("it follows again", lambda: path.stat().st_size > at + 2000)
        status = harness.status(job)
        assert status.attempt == attempt
        harness.stop_file(job).touch()
        harness.await_end(job)
        assert follower.wait(60) == 0
    finally:
        follower.kill()
        follower.wait()
    member = member_with(status, 1)
    expected = "".join(
        f"{member.agent}/1 | {line}\n"
        for line in written(harness, job, member, attempt, 1, "stdout").splitlines()
    )
    assert path.read_text() in (expected, expected.replace(f"{member.agent}/1 | ", ""))


def test_logs_are_in_the_store_whole_once_the_job_is_over(harness: Harness, job: JobName) -> None:
    status = harness.status(job)
    harness.until(
        "every rank has its whole copy",
        lambda: (
            {
                place.first_rank
                for place in harness.client.log_places(job)[0]
                if place.archived and place.attempt == status.attempt and place.first_rank == place.last_rank
            }
            == {0, 1, 2, 3}
        ),
    )
    for daemon in list(harness.cluster.agents):
        harness.cluster.power_cut(daemon)
    shown = harness.until("no agent is registered", lambda: _archived(harness, job))
    steps = [line for line in shown.splitlines() if line.startswith(f"attempt {status.attempt} rank 0 step ")]
    assert len(steps) > 50
    assert f"attempt {status.attempt} rank 0 step " in steps[-1]
    for daemon in list(harness.cluster.agents):
        harness.cluster.start_daemon(daemon)
    harness.await_ready()


def test_a_job_whose_name_was_used_again_can_still_be_read(harness: Harness, job: JobName) -> None:
    first = harness.status(job)
    harness.until("its record is archived", lambda: harness.client.archived_jobs(job)[0])
    harness.submit(job, f"--stop-file {harness.stop_file(job)}", script="chatty.py", marks=False)
    harness.until("the name has another uid", lambda: harness.status(job).uid != first.uid)
    harness.await_end(job)
    described = json.loads(dtrain(harness, "describe", "job", job, "--uid", first.uid, "-o", "json").stdout)
    assert (described["status"]["uid"], described["status"]["phase"]) == (first.uid, "SUCCEEDED")
    kinds = "JobSucceeded,AttemptStarted"
    events = dtrain(harness, "get", "events", job, "--uid", first.uid, "--type", kinds)
    assert events.stdout.count("AttemptStarted") >= 2
    assert events.stdout.count("JobSucceeded") == 1
    shown = logs(harness, job, "--uid", first.uid, "--rank", "1", "--stdout", "--tail", "1").stdout
    assert shown.startswith(f"attempt {first.attempt} rank 1 step ")
    assert first.uid in dtrain(harness, "archive", job).stdout


def _archived(harness: Harness, job: JobName) -> str:
    shown = logs(harness, job, "--stdout")
    return shown.stdout if "no agent that may have logs" in shown.stderr else ""
