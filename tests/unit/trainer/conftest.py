"""What every test of the trainer leaves behind is let go of; runs that talk to a fake agent."""

import os
from collections.abc import Callable, Iterator

import pytest
from tests.unit.trainer import pipeline
from tests.unit.trainer.fake_agent import FakeAgent

from dtrain import trainer
from dtrain.protocol import ranklink
from dtrain.protocol.ids import Attempt, Rank
from dtrain.protocol.ranklink import Hello
from dtrain.trainer.link import AgentLink


@pytest.fixture(autouse=True)
def _memory() -> Iterator[None]:
    yield
    pipeline.let_go()


@pytest.fixture
def arena_fd(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    fd = os.memfd_create("test-arena")
    monkeypatch.setenv(ranklink.ENV_ARENA_FD, str(fd))
    yield fd
    os.close(fd)


@pytest.fixture
def new_run(arena_fd: int) -> Iterator[Callable[[FakeAgent], trainer.Run]]:
    runs: list[trainer.Run] = []

    def make(agent: FakeAgent) -> trainer.Run:
        hello = Hello(1, pipeline.JOB, pipeline.UID, Attempt(1), Rank(0), 0, os.getpid())
        link = AgentLink(agent.socket_path, hello)
        link.start()
        runs.append(trainer.Run(0, 1, 0, link))
        return runs[-1]

    yield make
    for run in runs:
        run.close()
