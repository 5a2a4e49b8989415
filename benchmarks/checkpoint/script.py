"""The training program whose steps are timed while it saves: matmuls beside 0.3 GB of state.

Under dtrain it uses the SDK, elsewhere ``dcp.async_save`` with a reused stager. Each step appends
``<duration ns> <saving>`` to a file; ``saving`` is 1 if a save was under way from its beginning to its
end, 0 if none was, and steps that saw one begin or end are left out. With ``--bare`` it times the empty
loop instead, and writes microseconds per step.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

TENSORS = 9
ROWS = 8192


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--every", type=int, default=0)
    parser.add_argument("--bare", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.bare:
        _bare(args.steps, args.out)
    elif "DTRAIN_AGENT_SOCKET" in os.environ:
        _ours(args.steps, args.out)
    else:
        _theirs(args.steps, args.every, args.out)


def _ours(steps: int, out: Path) -> None:
    from dtrain import trainer

    run = trainer.join()
    run.track(state=_state())
    session: Any = run._session  # the SDK has no need to tell a script
    _train(run.steps(steps), lambda: session.report().sealed is not None, out)


def _theirs(steps: int, every: int, out: Path) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    state = {"state": _state()}
    stager = DefaultStager(StagingOptions(False, False, False, False))
    saves: list[Future[Any]] = []

    def loop() -> Iterable[int]:
        for step in range(steps):
            yield step
            if (step + 1) % every == 0 and all(save.done() for save in saves):
                folder = out.parent / "dcp" / str(step)
                saves.append(dcp.async_save(state, checkpoint_id=folder, async_stager=stager))  # type: ignore[arg-type]

    _train(loop(), lambda: any(not save.done() for save in saves), out)
    for save in saves:
        save.result()
    stager.close()
    dist.destroy_process_group()


def _state() -> dict[str, torch.Tensor]:
    return {f"layer.{index}": torch.randn(ROWS, 1024) for index in range(TENSORS)}


def _train(steps: Iterable[int], is_saving: Callable[[], bool], out: Path) -> None:
    a = torch.randn(512, 512)
    lines = []
    for _ in steps:
        before = is_saving()
        began = time.perf_counter_ns()
        for _ in range(4):
            a = torch.tanh(a @ a)
        took = time.perf_counter_ns() - began
        if is_saving() == before:
            lines.append(f"{took} {int(before)}\n")
    _write(out, "".join(lines))


def _bare(steps: int, out: Path) -> None:
    from dtrain import trainer

    run = trainer.join()
    run.track(state={"position": 0})
    began = 0.0
    for step in run.steps(steps):
        if step == 1:  # the first one also lays out the state
            began = time.perf_counter()
        if step == steps - 1:
            ours = (time.perf_counter() - began) / (steps - 2) * 1e6
    began = time.perf_counter()
    for _ in range(steps):
        pass
    bare = (time.perf_counter() - began) / steps * 1e6
    _write(out, f"{ours} {bare}\n")


def _write(out: Path, text: str) -> None:
    part = out.with_suffix(".part")
    part.write_text(text)
    part.rename(out)


if __name__ == "__main__":
    sys.exit(main())
