"""A process that saves in one mode when told to: ``python -m benchmarks.checkpoint.worker MODE FOLDER``.

Reads ``prepare``, ``save`` and ``quit`` from stdin and answers each with a line of JSON. One rank with
a process group, as DCP wants it; one thread for copies, so that all modes copy alike.
"""

import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.checkpoint import modes

TENSORS = 9
TENSOR_BYTES = 32 * 1024 * 1024
STATE_BYTES = TENSORS * TENSOR_BYTES


def main() -> None:
    mode_name, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    tensors = {f"layer.{index}": torch.randn(TENSOR_BYTES // 4096, 1024) for index in range(TENSORS)}
    mode: modes.Mode = modes.MODES[mode_name]({"model": tensors}, folder)
    number = 0
    _say({"ready": True})
    for line in sys.stdin:
        order = line.strip()
        if order == "quit":
            break
        for tensor in tensors.values():
            tensor.add_(1e-3)  # a step: what is saved was written a moment ago
        own, other, began = time.process_time(), mode.other_cpu_s(), time.perf_counter()
        if order == "prepare":
            mode.prepare()
        else:
            mode.save(number)
        stall = time.perf_counter() - began
        if order == "save":
            mode.wait()
            number += 1
        total = time.perf_counter() - began
        cpu = time.process_time() - own + mode.other_cpu_s() - other
        if order == "save":
            modes.empty(folder)
        _say({"stall_s": stall, "total_s": total, "cpu_s": cpu, "shared_bytes": mode.shared_bytes()})
    mode.close()
    dist.destroy_process_group()


def _say(answer: object) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
