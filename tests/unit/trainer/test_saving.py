"""Saves that the script asks for, natively and through torch, against the small agent."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from tests.unit.trainer import pipeline
from tests.unit.trainer.fake_agent import FakeAgent
from torch.distributed.checkpoint.api import CheckpointException

from dtrain import trainer
from dtrain.protocol.errors import ErrorCode, Refused
from dtrain.protocol.ids import Seq
from dtrain.protocol.ranklink import Outcome

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


Runs = Callable[[FakeAgent], trainer.Run]


def test_a_save_returns_the_number_of_what_is_committed_and_restores(tmp_path: Path, new_run: Runs) -> None:
    with FakeAgent(tmp_path) as agent:
        run, weights = new_run(agent), torch.zeros(3)
        run.track(weights=weights)
        seen = []
        for step in run.steps(4):
            seen.append(step)
            weights += 1
            if step == 1:
                assert run.save(step + 1) == 1
                assert [fetch.step for fetch in agent.committed] == [2]
        run.close()
    assert seen == [0, 1, 2, 3]  # a save takes no step's place
    other = torch.zeros(3)
    pipeline.load(tmp_path / "store", agent.committed[0], {"weights": other})
    assert other.tolist() == [2, 2, 2]
    assert [fetch.step for fetch in agent.committed] == [2, 4]


def test_each_wait_returns_when_it_says(tmp_path: Path, new_run: Runs) -> None:
    with FakeAgent(tmp_path) as agent:
        run = new_run(agent)
        run.track(weights=torch.zeros(3))
        agent.may_commit.clear()
        assert run.save(1, wait="snapshotted") == 1
        agent.may_commit.set()
        assert run.save(2, wait="durable") == 2  # it waits for the outcome of the first
        assert run.save(3, wait="committed") == 3
        assert [fetch.step for fetch in agent.committed] == [1, 2, 3]
        with pytest.raises(Refused, match="step 2 is behind"):
            run.save(2)


def test_an_aborted_save_is_refused_and_training_goes_on(tmp_path: Path, new_run: Runs) -> None:
    with FakeAgent(tmp_path) as agent:
        run = new_run(agent)
        run.track(weights=torch.zeros(3))
        run.restore()
        agent.grants = False

        def abort() -> None:
            agent.wait_report(lambda report: report.save_at == 1)
            begin = agent.begin(1, asked=True)
            agent.send(Outcome(begin.seq, committed=False, final=False, why="ranks 1 asked for step 7"))

        thread = threading.Thread(target=abort)
        thread.start()
        with pytest.raises(
            Refused, match="checkpoint 1 of step 1 is aborted: ranks 1 asked for step 7"
        ) as caught:
            run.save(1)
        thread.join()
        assert caught.value.code is ErrorCode.CHECKPOINT_ABORTED
        agent.grants = True
        assert run.save(2) == 2


def test_what_cannot_be_saved_is_refused_with_its_path(tmp_path: Path, new_run: Runs) -> None:
    with FakeAgent(tmp_path) as agent:
        run = new_run(agent)
        notes: dict[str, object] = {"a": 1}
        run.track(notes=notes)
        notes["hook"] = object()
        with pytest.raises(Refused, match=r"cannot save notes\.hook") as caught:
            run.save(1)
        assert caught.value.code is ErrorCode.STATE_NOT_SAVABLE
        agent.wait_report(
            lambda report: report.problem is not None and "notes.hook" in report.problem.message
        )


def test_without_a_store_a_save_is_refused(tmp_path: Path, new_run: Runs) -> None:
    with FakeAgent(tmp_path, checkpoints=False) as agent:
        run = new_run(agent)
        with pytest.raises(Refused, match="no checkpoint store"):
            run.save(1)


def test_outside_a_job_both_front_doors_are_refused() -> None:
    run = trainer.Run(0, 1, 0, None)
    for call in (lambda: run.dcp_writer(1), run.dcp_reader, lambda: run.save(1)):
        with pytest.raises(Refused, match="was not started by dtrain"):
            call()
    run.close()


# Through torch ---------------------------------------------------------------------------


def test_dcp_saves_are_committed_and_a_new_attempt_loads_the_newest(tmp_path: Path, new_run: Runs) -> None:
    model = torch.nn.Linear(3, 2)
    with FakeAgent(tmp_path) as agent:
        run = new_run(agent)
        assert not run.dcp_reader().exists
        for step in run.steps(4):
            with torch.no_grad():
                model.weight.fill_(step)
            if step % 2:
                storage = run.dcp_writer(step + 1)
                dcp.save({"model": model.state_dict(), "step": step}, storage_writer=storage)
                assert storage.seq == len(agent.committed)
        run.close()
    # No checkpoint of nothing at the end: the script's own is the newest.
    assert [fetch.step for fetch in agent.committed] == [2, 4]
    with FakeAgent(tmp_path, restore=agent.committed[-1], name="again") as agent:
        run = new_run(agent)
        reader = run.dcp_reader()
        assert (reader.exists, reader.step) == (True, 4)
        state = {"model": torch.nn.Linear(3, 2).state_dict(), "step": 0}
        dcp.load(state, storage_reader=reader)
        assert torch.equal(state["model"]["weight"], model.weight)
        assert state["step"] == 3
        assert list(run.steps(5)) == [4]
        with pytest.raises(Refused, match="comes before steps"):
            run.dcp_reader()


def test_random_numbers_go_on_where_the_writer_was_made(tmp_path: Path, new_run: Runs) -> None:
    with FakeAgent(tmp_path) as agent:
        run = new_run(agent)
        storage = run.dcp_writer(1)
        wanted = torch.rand(3)  # drawn before the save: an async one may be far behind
        dcp.save({"x": torch.ones(1)}, storage_writer=storage)
        run.close()
    with FakeAgent(tmp_path, restore=agent.committed[0], name="again") as agent:
        run = new_run(agent)
        dcp.load({"x": torch.zeros(1)}, storage_reader=run.dcp_reader())
        assert run.restore() == 1
        assert torch.equal(torch.rand(3), wanted)


def test_an_async_save_holds_the_values_of_its_step_while_training_goes_on(
    tmp_path: Path, new_run: Runs
) -> None:
    weights = torch.zeros(1000)
    with FakeAgent(tmp_path) as agent:
        run = new_run(agent)
        futures = []
        trained_while_saving = 0
        agent.may_commit.clear()
        for step in run.steps(30):
            weights += 1
            if step in (4, 9):
                futures.append(dcp.async_save({"w": weights}, storage_writer=run.dcp_writer(step + 1)))
            trained_while_saving += any(not future.done() for future in futures)
            if step == 20:
                agent.may_commit.set()
            time.sleep(0.01)
        for future in futures:
            future.result(30)
        run.close()
    assert trained_while_saving > 10
    assert [fetch.step for fetch in agent.committed] == [5, 10]
    for fetch, value in zip(agent.committed, (5.0, 10.0), strict=True):
        with FakeAgent(tmp_path, restore=fetch, name=f"a{fetch.seq}") as again:
            state = {"w": torch.zeros(1000)}
            dcp.load(state, storage_reader=new_run(again).dcp_reader())
            assert state["w"].unique().tolist() == [value]


def test_an_aborted_dcp_save_fails_with_the_reason_and_the_next_one_works(
    tmp_path: Path, new_run: Runs
) -> None:
    with FakeAgent(tmp_path) as agent:
        run = new_run(agent)
        run.restore()
        with pytest.raises(CheckpointException, match="cannot save hook"):
            dcp.save({"hook": object()}, storage_writer=run.dcp_writer(1))
        agent.wait_report(lambda report: report.problem is not None and "hook" in report.problem.message)
        agent.send(Outcome(Seq(1), committed=False, final=False, why="rank 0: cannot save hook"))
        agent.settle(1)
        storage = run.dcp_writer(2)
        dcp.save({"x": torch.ones(1)}, storage_writer=storage)
        assert storage.seq == 2


def test_one_checkpoint_holds_everything_so_the_two_doors_are_not_mixed(
    tmp_path: Path, new_run: Runs
) -> None:
    with FakeAgent(tmp_path) as agent:
        run = new_run(agent)
        run.track(x=torch.ones(1))
        with pytest.raises(Refused, match="either tracks state or saves it through"):
            run.dcp_writer(1)
    with FakeAgent(tmp_path, name="other") as agent:
        run = new_run(agent)
        run.dcp_writer(1)
        with pytest.raises(Refused, match="either tracks state or saves it through"):
            run.save(1)
        with pytest.raises(Refused, match="steps"):
            run.track(x=torch.ones(1))


def test_a_checkpoint_that_the_leader_wants_of_such_a_script_is_given_up(
    tmp_path: Path, new_run: Runs
) -> None:
    with FakeAgent(tmp_path, saves=(2,)) as agent:
        run = new_run(agent)
        assert not run.dcp_reader().exists
        for _ in run.steps(3):
            time.sleep(0.05)
        report = agent.wait_report(lambda report: report.problem is not None)
        assert report.problem is not None
        assert "saves it through torch.distributed.checkpoint" in report.problem.message
