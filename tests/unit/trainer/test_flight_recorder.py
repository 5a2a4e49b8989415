"""What a rank tells of its newest collective while its step stands still, from torch's own recorder."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from dtrain.trainer import stacks
from dtrain.trainer.session import Session

PROGRAM = """
import sys
import torch
import torch.distributed as dist
from dtrain.trainer.stacks import newest_collective

dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
print(newest_collective() or "none")
for _ in range(3):
    dist.all_reduce(torch.ones(2))
print(newest_collective())
dist.barrier()
print(newest_collective())
"""


class Watched:
    """A session, as far as the recorder knows it."""

    def __init__(self) -> None:
        self.step = 7
        self.told: list[str] = []

    def set_collective(self, text: str) -> None:
        self.told.append(text)


def test_the_newest_collective_is_told_by_its_number_and_name(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    before, reduced, after = done.stdout.splitlines()
    assert before == "none"
    assert reduced == "3 gloo:all_reduce"
    assert after.startswith("4 ")


def test_a_process_that_never_loaded_it_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch._C._distributed_c10d", raising=False)
    assert stacks.newest_collective() == ""


@pytest.mark.parametrize(
    "answer", [b"", b"[]", b"{}", b'{"pg_status": {"0": {"last_enqueued_collective": -1}}}']
)
def test_a_recorder_that_says_something_else_does_no_harm(
    monkeypatch: pytest.MonkeyPatch, answer: bytes
) -> None:
    other = SimpleNamespace(_dump_fr_trace_json=lambda *_: answer)
    monkeypatch.setitem(sys.modules, "torch._C._distributed_c10d", other)  # type: ignore[arg-type]
    assert stacks.newest_collective() == ""


def test_it_is_asked_only_while_a_step_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacks, "newest_collective", lambda: "9 nccl:all_reduce")
    watched, recorder = Watched(), stacks.Recorder()
    session = cast(Session, watched)
    recorder.follow(session, 0.0)
    recorder.follow(session, stacks.STILL_S - 0.1)
    assert watched.told == [""]
    recorder.follow(session, stacks.STILL_S)
    assert watched.told == ["", "9 nccl:all_reduce"]
    watched.step += 1
    recorder.follow(session, stacks.STILL_S + 0.1)
    assert watched.told[-1] == ""
