"""A job of real ranks that loses machines, gets others, and is scaled: every sample is seen once per epoch.

Chapters of one run: two ranks, one, three, two. What its ranks write down tells which samples
each step has trained on; of a step that was done twice the later one counts, as it is what the
weights at the end hold.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.support.harness import Harness, say

from dtrain.protocol.events import EventReason
from dtrain.protocol.ids import JobName
from dtrain.protocol.job import JobPhase, JobStatus

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

SIZE = 300
"""Samples in the data: an epoch takes 25 to 75 steps."""


@dataclass(frozen=True, slots=True)
class Line:
    """One step of one rank."""

    attempt: int
    world: int
    rank: int
    step: int
    loss: float
    samples: tuple[int, ...]


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    flags = ("--report-interval", "0.2")
    with Harness(tmp_path_factory.mktemp("h"), slots=1, agent_flags=flags) as made:
        made.await_ready()
        yield made
        made.assert_clean()


@pytest.fixture(scope="module")
def job(harness: Harness) -> JobName:
    """On two of three machines: the third is away."""
    harness.cluster.power_cut(sorted(harness.cluster.agents)[-1])
    args = (
        f"--samples {folder(harness)} --size {SIZE} --pause-ms 20 --stop-file {harness.stop_file('elastic')}"
    )
    submitted = harness.submit(
        "elastic", args, script="samples.py", nnodes_min=1, nnodes=2, nproc=0, every_steps=50, marks=False
    )
    harness.until("it is on two machines", lambda: world(harness, submitted) == 2)
    return submitted


def folder(harness: Harness) -> Path:
    return harness.folder / "samples"


def world(harness: Harness, job: JobName) -> int:
    """Ranks of the job, if all of them have done a step."""
    status = harness.status(job)
    ranks = harness.training(job)
    base = status.restore.step if status.restore else 0
    moved = status.phase is JobPhase.RUNNING and all(state.step > base for state in ranks.values())
    return status.world_size if moved and len(ranks) == status.world_size else 0


def lines(harness: Harness) -> list[Line]:
    found = []
    for path in folder(harness).glob("*[0-9]"):
        for line in path.read_text().splitlines(keepends=True):
            words = line.split()
            if line.endswith("\n"):
                attempt, ranks, rank, step = (int(word) for word in words[:4])
                samples = tuple(int(word) for word in words[5:])
                found.append(Line(attempt, ranks, rank, step, float(words[4]), samples))
    return found


def changes(harness: Harness, job: JobName, to: int, what: str) -> JobStatus:
    """Wait until the job trains on ``to`` ranks, in the attempt after this one."""
    began = time.monotonic()
    harness.until(f"{what}: it is on {to}", lambda: world(harness, job) == to)
    say(f"{what}: trains on {to} after {time.monotonic() - began:.2f} s")
    return harness.status(job)


def assert_no_step_twice(harness: Harness, status: JobStatus) -> None:
    """The attempt before went on to the very step that this one began at."""
    assert status.restore is not None
    before = [line.step for line in lines(harness) if line.attempt == status.attempt - 1]
    assert max(before) + 1 == status.restore.step


def test_a_lost_machine_is_not_waited_for(harness: Harness, job: JobName) -> None:
    harness.await_commit(job, after=0)
    before = harness.status(job)
    harness.cluster.power_cut(before.members[1].agent)
    after = changes(harness, job, 1, "a machine lost")
    assert [m.agent for m in after.members] == [before.members[0].agent]


def test_machines_that_come_join_at_a_checkpoint_together(harness: Harness, job: JobName) -> None:
    before = harness.status(job)
    # One that is back within its lease goes once more when that ends, and the other one grows without it.
    present = {harness.keys.node(before.members[0].agent)}
    harness.until(
        "former lives are over",
        lambda: {key for key in harness.cluster.read("agents/") if key.endswith("/node")} == present,
    )
    harness.client.set_intent(job, nnodes=(1, 3), by="ann")
    for agent in set(harness.cluster.agents) - {before.members[0].agent}:
        harness.cluster.start_daemon(agent)
    after = changes(harness, job, 3, "two machines come")
    assert after.attempt == before.attempt + 1, "they joined one after the other"
    assert after.members[0].agent == before.members[0].agent
    assert len(after.restarts) <= len(before.restarts), "a change of size costs no restart"
    assert_no_step_twice(harness, after)
    harness.await_event(job, EventReason.GROWING)


def test_scaled_down_it_leaves_its_last_machine_at_a_checkpoint(harness: Harness, job: JobName) -> None:
    before = harness.status(job)
    harness.client.set_intent(job, nnodes=(1, 2), by="ann")
    after = changes(harness, job, 2, "scaled down")
    assert after.attempt == before.attempt + 1
    assert after.members == before.members[:2]
    assert len(after.restarts) <= len(before.restarts), "a change of size costs no restart"
    assert_no_step_twice(harness, after)
    harness.await_event(job, EventReason.SHRINKING)


def test_every_sample_was_seen_exactly_once_in_every_epoch(harness: Harness, job: JobName) -> None:
    harness.stop_file("elastic").touch()
    harness.await_end(job)
    newest: dict[int, int] = {}
    for line in lines(harness):
        newest[line.step] = max(newest.get(line.step, 0), line.attempt)
    last = harness.commits(job)[-1]
    assert sorted(newest) == list(range(last.step))
    stream: list[int] = []
    sizes: list[int] = []
    of = {(line.attempt, line.step, line.rank): line for line in lines(harness)}
    for step, attempt in sorted(newest.items()):
        ranks = of[attempt, step, 0].world
        each = [of[attempt, step, rank].samples for rank in range(ranks)]
        stream += [samples[i] for i in range(len(each[0])) for samples in each]
        sizes += [ranks] if sizes[-1:] != [ranks] else []
    assert sizes == [2, 1, 3, 2]
    epochs = [stream[i : i + SIZE] for i in range(0, len(stream), SIZE)]
    say(f"{len(epochs)} epochs of {SIZE} samples over {sizes} ranks")
    assert len(epochs) > 4
    assert all(sorted(epoch) == list(range(SIZE)) for epoch in epochs[:-1])
    assert len(set(epochs[-1])) == len(epochs[-1])


# Machines that differ -------------------------------------------------------------------------


@pytest.fixture
def unequal(tmp_path: Path) -> Iterator[Harness]:
    """A machine with one slot and one with two."""
    with Harness(tmp_path, agents=2, slots=(1, 2), agent_flags=("--report-interval", "0.2")) as made:
        made.await_ready()
        yield made
        made.assert_clean()


def places(harness: Harness, attempt: int) -> list[dict[str, int]]:
    """What each rank of an attempt was told of its place, by rank."""
    found = [json.loads(path.read_text()) for path in folder(harness).glob("*.env")]
    numbers = [{name: int(value) for name, value in one.items()} for one in found]
    return sorted((one for one in numbers if one.pop("ATTEMPT") == attempt), key=lambda one: one["RANK"])


def place(rank: int, world: int, local: tuple[int, int], group: tuple[int, int]) -> dict[str, int]:
    return {
        "RANK": rank,
        "WORLD_SIZE": world,
        "ROLE_RANK": rank,
        "ROLE_WORLD_SIZE": world,
        "LOCAL_RANK": local[0],
        "LOCAL_WORLD_SIZE": local[1],
        "GROUP_RANK": group[0],
        "GROUP_WORLD_SIZE": group[1],
    }


def test_machines_of_one_and_two_slots_have_a_rank_for_each_and_one_is_lost(unequal: Harness) -> None:
    args = f"--samples {folder(unequal)} --size {SIZE} --pause-ms 20 --stop-file {unequal.stop_file('auto')}"
    shape = {"nnodes_min": 1, "nnodes": 2, "nproc": 0, "every_steps": 20, "marks": False}
    job = unequal.submit("auto", args, script="samples.py", **shape)  # type: ignore[arg-type]
    unequal.until("three ranks train", lambda: world(unequal, job) == 3)
    status = unequal.status(job)
    slots = {"a1": 1, "a2": 2}
    assert {member.agent: member.nproc for member in status.members} == slots
    expected, first = [], 0
    for group, member in enumerate(status.members):
        count = slots[member.agent]
        expected += [place(first + i, 3, (i, count), (group, 2)) for i in range(count)]
        first += count
    assert places(unequal, status.attempt) == expected

    # The smaller one goes: what three ranks have saved goes on on two.
    commit = unequal.await_commit(job)
    assert commit.world_size == 3
    unequal.cluster.power_cut("a1")
    after = changes(unequal, job, 2, "the machine with one slot lost")
    assert after.restore is not None
    assert after.restore.seq >= commit.seq
    assert places(unequal, after.attempt) == [place(i, 2, (i, 2), (0, 1)) for i in range(2)]
    done = {line.step: line for line in lines(unequal) if line.attempt == after.attempt}
    assert min(done) == after.restore.step
    unequal.stop_file("auto").touch()
    unequal.await_end(job)
