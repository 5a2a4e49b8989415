"""The SDK as a script sees it, against a small agent with a real socket, transfer process and store."""

import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.trainer import pipeline
from tests.unit.trainer.fake_agent import FakeAgent

from dtrain import trainer
from dtrain.protocol import ranklink
from dtrain.protocol.errors import ErrorCode, Refused
from dtrain.protocol.ids import Seq
from dtrain.protocol.ranklink import Outcome, StopRank
from dtrain.protocol.snapshot import WorkerPhase
from dtrain.trainer.link import EXIT_ATTEMPT_OVER


class Training:
    """A small deterministic job with dropout, momentum, a schedule and shuffled data."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(4, 32), torch.nn.Dropout(0.3), torch.nn.BatchNorm1d(32), torch.nn.Linear(32, 1)
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=50)
        self.data = trainer.Sampler(30, 8, seed=3)
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(30, 4, generator=generator)

    def track(self, run: trainer.Run) -> None:
        run.track(model=self.model, optimizer=self.optimizer, scheduler=self.scheduler, data=self.data)

    def step(self) -> float:
        batch = self.inputs[next(self.data)]
        self.optimizer.zero_grad()
        loss = (self.model(batch) - batch.sum(1, keepdim=True)).square().mean()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        return loss.item()

    def bits(self) -> list[Any]:
        state = [*self.model.state_dict().values()]
        for part in self.optimizer.state_dict()["state"].values():
            state += part.values()
        return [tensor.tolist() for tensor in state]


def test_alone_a_run_just_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ranklink.ENV_SOCKET, raising=False)
    run = trainer.join()
    run.track(model=torch.nn.Linear(1, 1))
    assert list(run.steps(3)) == [0, 1, 2]
    run.report(loss=1.0)
    with run.section("evaluate"):
        assert not run.should_stop()
    assert not run.should_checkpoint(4)
    with pytest.raises(Refused, match="no checkpoint is wanted at step 4"):
        run.save(4)
    assert (run.rank, run.world_size, run.local_rank, str(run.device)) == (0, 1, 0, "cpu")
    run.close()


def test_importing_it_brings_in_nothing_but_the_standard_library() -> None:
    script = (
        "import sys; before = set(sys.modules)\n"
        "from dtrain import trainer\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new - set(sys.stdlib_module_names) - {'dtrain'}))\n"
        "print(sorted(n for n in sys.modules if n.startswith('dtrain.')\n"
        "             and n.split('.')[1] not in ('protocol', 'trainer')))\n"
        "print([n for n in sys.modules if n.startswith(('dtrain.protocol.pb', 'dtrain.protocol.wire'))])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:3] == ["[]", "[]", "[]"]


def test_a_script_with_thousands_of_open_files_keeps_its_agent(
    tmp_path: Path, new_run: Callable[[FakeAgent], trainer.Run]
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 4096)), hard))
    files = [os.open(os.devnull, os.O_RDONLY) for _ in range(1200)]
    try:
        with FakeAgent(tmp_path) as agent:
            run = new_run(agent)
            run.track(model=torch.nn.Linear(1, 1))
            assert list(run.steps(2)) == [0, 1]
            agent.wait_report(lambda report: report.step == 2)
    finally:
        for file in files:
            os.close(file)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_resumed_run_ends_with_the_same_bits(
    tmp_path: Path, new_run: Callable[[FakeAgent], trainer.Run]
) -> None:
    straight = Training(1)
    for _ in range(12):
        straight.step()

    with FakeAgent(tmp_path, saves=(5,)) as agent:
        run = new_run(agent)
        first = Training(1)
        first.track(run)
        for step in run.steps(10_000):
            run.report(loss=first.step())
            if step == 0:
                await_order(run)
            # Goes on past the commit, and then dies.
            if step >= 5 and agent.committed:
                break
        (checkpoint,) = agent.committed
        run.close()

    with FakeAgent(tmp_path, restore=replace(checkpoint, id="again")) as agent:
        run = new_run(agent)
        second = Training(99)
        second.track(run)
        seen = []
        for step in run.steps(12):
            seen.append(step)
            second.step()
        assert seen == [5, 6, 7, 8, 9, 10, 11]
        final = agent.wait_report(lambda r: r.phase is WorkerPhase.DONE)
        assert final.last_step == 12
        assert [c.step for c in agent.committed] == [12]
    assert second.bits() == straight.bits()


def test_the_last_checkpoint_is_waited_for(
    tmp_path: Path, new_run: Callable[[FakeAgent], trainer.Run]
) -> None:
    with FakeAgent(tmp_path) as agent:
        run = new_run(agent)
        run.track(x=torch.zeros(3))
        assert list(run.steps(2)) == [0, 1]
        assert [c.step for c in agent.committed] == [2]


def test_without_a_store_nothing_is_waited_for(
    tmp_path: Path, new_run: Callable[[FakeAgent], trainer.Run]
) -> None:
    with FakeAgent(tmp_path, checkpoints=False) as agent:
        run = new_run(agent)
        run.track(x=torch.zeros(3))
        assert list(run.steps(2)) == [0, 1]
        run.close()
        assert agent.wait_report(lambda r: r.phase is WorkerPhase.DONE).step == 2


def test_a_target_that_has_passed_is_late(
    tmp_path: Path, new_run: Callable[[FakeAgent], trainer.Run]
) -> None:
    with FakeAgent(tmp_path) as agent:
        run = new_run(agent)
        run.track(x=torch.zeros(3))
        for step in run.steps(6):
            if step == 4:
                begin = agent.begin(3)
                problem = agent.wait_report(lambda r: r.problem is not None).problem
                assert problem is not None
                assert (problem.seq, problem.late, problem.step) == (begin.seq, True, 4)
                agent.send(Outcome(begin.seq, committed=False, final=False))
        assert [c.step for c in agent.committed] == [6]


def test_a_busy_slot_is_reported_and_stays_frozen(
    tmp_path: Path, new_run: Callable[[FakeAgent], trainer.Run]
) -> None:
    with FakeAgent(tmp_path) as agent:
        run = new_run(agent)
        x = torch.zeros(3)
        run.track(x=x)
        for step in run.steps(8):
            x += 1
            if step == 1:
                agent.begin(3)
                await_order(run)
            if step == 3:
                sealed = agent.wait_report(lambda r: r.sealed is not None).sealed
                assert sealed is not None
                busy = agent.begin(6)
                await_order(run)
            if step == 6:
                problem = agent.wait_report(lambda r: r.problem is not None).problem
                assert problem is not None
                assert (problem.seq, problem.late) == (busy.seq, False)
                assert "still being saved" in problem.message
                with Path(sealed.path).open("rb") as arena:
                    data = arena.read(sealed.size_bytes)
                from safetensors.torch import load

                assert load(data)["x"].tolist() == [3.0, 3.0, 3.0]
                agent.send(Outcome(busy.seq, committed=False, final=False))
                agent.wait_report(lambda r: r.step >= 5 and r.sealed is None)


def await_order(run: trainer.Run) -> None:
    deadline = time.monotonic() + 10
    while run._session._begin is None:  # type: ignore[union-attr]
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_state_that_cannot_be_saved_does_not_stop_training(
    tmp_path: Path, new_run: Callable[[FakeAgent], trainer.Run]
) -> None:
    class Odd:
        def state_dict(self) -> dict[str, Any]:
            return {"f": {1, 2}}

        def load_state_dict(self, state: dict[str, Any]) -> None: ...

    with FakeAgent(tmp_path) as agent:
        run = new_run(agent)
        run.track(odd=Odd())
        ended = threading.Event()

        def lead() -> None:
            problem = agent.wait_report(lambda r: r.problem is not None).problem
            assert problem is not None
            assert "odd.f: set" in problem.message
            ended.set()
            agent.send(Outcome(problem.seq, committed=False, final=True))

        leader = threading.Thread(target=lead)
        leader.start()
        assert list(run.steps(3)) == [0, 1, 2]
        leader.join()
        assert ended.is_set()
    with pytest.raises(Refused) as refused:
        trainer.Run(0, 1, 0, None).track(number=3)
    assert refused.value.code is ErrorCode.STATE_NOT_SAVABLE


def test_a_restarted_agent_learns_everything_again(
    tmp_path: Path, new_run: Callable[[FakeAgent], trainer.Run]
) -> None:
    with FakeAgent(tmp_path) as agent:
        run = new_run(agent)
        run.track(x=torch.zeros(3))
        for step in run.steps(6):
            if step == 1:
                agent._open = agent.begin(3)
                agent._open = None  # the first agent never uploads it
                await_order(run)
            if step == 3:
                agent.wait_report(lambda r: r.sealed is not None)
                agent.hang_up()
                agent.reports.clear()
                agent.listen()
                again = agent.wait_report(lambda r: True)
                assert again.sealed is not None
                assert again.step == 3
                agent.send(Outcome(again.sealed.seq, committed=False, final=False))
        assert len(agent.hellos) == 2


def test_a_stopped_rank_leaves_its_loop(tmp_path: Path, new_run: Callable[[FakeAgent], trainer.Run]) -> None:
    with FakeAgent(tmp_path) as agent:
        run = new_run(agent)
        seen = []

        def loop() -> None:
            for step in run.steps(1000):
                seen.append(step)
                if step == 2:
                    agent.send(StopRank("test"))
                    while not run.should_stop():
                        time.sleep(0.001)

        with pytest.raises(SystemExit) as left:
            loop()
        assert left.value.code == EXIT_ATTEMPT_OVER
        assert seen == [0, 1, 2]


def test_a_rank_of_an_attempt_that_is_over_exits(tmp_path: Path) -> None:
    with FakeAgent(tmp_path, accept=False) as agent:
        env = {**os.environ, ranklink.ENV_SOCKET: agent.socket_path, ranklink.ENV_ATTEMPT: "1"}
        script = (
            "from dtrain import trainer\nimport time\nrun = trainer.join()\nprint('kept')\ntime.sleep(30)"
        )
        done = subprocess.run(
            [sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False, timeout=30
        )
    assert done.returncode == EXIT_ATTEMPT_OVER
    assert "this attempt is over (test)" in done.stderr


def test_bytes_that_cannot_be_loaded_are_reported_and_training_never_begins(
    tmp_path: Path, new_run: Callable[[FakeAgent], trainer.Run]
) -> None:
    (tmp_path / "store").mkdir()
    order = pipeline.save(tmp_path / "store", [{"x": torch.zeros(3)}])
    with FakeAgent(tmp_path, restore=order) as agent:
        run = new_run(agent)
        run.track(x=torch.zeros(4))

        def lead() -> None:
            failed = agent.wait_report(lambda r: r.restore_failed is not None)
            assert failed.phase is WorkerPhase.RESTORING
            agent.send(StopRank("restore failed"))

        leader = threading.Thread(target=lead)
        leader.start()
        with pytest.raises(SystemExit):
            next(run.steps(5))
        leader.join()
        report = agent.wait_report(lambda r: r.restore_failed is not None).restore_failed
        assert report is not None
        assert report.seq == Seq(1)
        assert "shape" in report.message


def test_a_forked_worker_neither_speaks_nor_hangs(
    tmp_path: Path, new_run: Callable[[FakeAgent], trainer.Run]
) -> None:
    with FakeAgent(tmp_path) as agent:
        run = new_run(agent)
        run.track(x=torch.zeros(3))
        for step in run.steps(2):
            if step == 0:
                child = os.fork()
                if child == 0:
                    run.report(loss=666.0)
                    run.close()
                    os._exit(0)
                assert os.waitpid(child, 0)[1] == 0
        assert not any(r.metrics.get("loss") == 666.0 for r in agent.reports)
        assert len(agent.hellos) == 1


def test_numbers_that_are_not_finite_still_reach_the_agent(
    tmp_path: Path, new_run: Callable[[FakeAgent], trainer.Run]
) -> None:
    with FakeAgent(tmp_path) as agent:
        run = new_run(agent)
        for _ in run.steps(1):
            run.report(loss=float("nan"), lr=0.1)
        report = agent.wait_report(lambda r: r.phase is WorkerPhase.DONE)
        assert (report.nonfinite, report.nonfinite_seen) == (("loss",), {"loss": 0})
        assert report.metrics["lr"] == 0.1
        assert "loss" not in report.metrics


@pytest.mark.parametrize("uses_torch", [True, False])
def test_the_only_rank_of_an_attempt_runs_what_runs_on_many(tmp_path: Path, uses_torch: bool) -> None:
    """A job that has shrunk to one rank wraps its model as before; a script without torch loads none."""
    script = (
        "import sys\n"
        + ("import torch, torch.distributed as dist\n" if uses_torch else "")
        + "from dtrain import trainer\n"
        + "run = trainer.join()\n"
        + (
            "model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 1))\n"
            "model(torch.ones(1, 2)).sum().backward()\n"
            "assert (dist.get_rank(), dist.get_world_size()) == (0, 1)\n"
            if uses_torch
            else "assert 'torch' not in sys.modules\n"
        )
        + "run.close()\n"
    )
    with FakeAgent(tmp_path) as agent:
        env = {
            **os.environ, ranklink.ENV_SOCKET: agent.socket_path, ranklink.ENV_ATTEMPT: "4", "RANK": "0",
            "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False, timeout=60
        )
    assert done.returncode == 0, done.stderr


def test_no_rank_trains_before_all_have_their_state(tmp_path: Path) -> None:
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    script = (
        "from dtrain import trainer\n"
        "import torch, torch.distributed as dist\n"
        "run = trainer.join()\n"
        "total = torch.tensor(run.rank + 1)\n"
        "run.track(total=total)\n"
        "for step in run.steps(10):\n"
        "    dist.all_reduce(total)\n"
        "    run.report(total=total)\n"
        "    break\n"
        "run.close()\n"
    )
    ranks: list[subprocess.Popen[bytes]] = []
    with FakeAgent(tmp_path, name="a0") as first, FakeAgent(tmp_path, name="a1") as second:
        second.may_plan.clear()
        try:
            for rank, agent in enumerate((first, second)):
                env = {
                    **os.environ, ranklink.ENV_SOCKET: agent.socket_path, ranklink.ENV_ATTEMPT: "4",
                    "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(store.port), "OMP_NUM_THREADS": "1",
                }  # fmt: skip
                ranks.append(subprocess.Popen([sys.executable, "-c", script], env=env))
            for agent in (first, second):
                agent.wait_report(lambda r: r.wants_restore)
            store.wait(["dtrain/4/restored/arrived"])
            assert store.add("dtrain/4/restored/arrived", 0) == 1
            assert not any(r.phase is WorkerPhase.TRAINING for r in first.reports)
            second.may_plan.set()
            for agent in (first, second):
                assert agent.wait_report(lambda r: "total" in r.metrics).metrics["total"] == 3
            assert [rank.wait(30) for rank in ranks] == [0, 0]
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
