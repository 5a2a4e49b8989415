"""What training would find on this machine, as one JSON object: ``python -m dtrain.trainer.environment``.

Run as a process of its own, with the modules to import as arguments: importing is what it tries,
and what that starts or breaks ends with it.
"""

import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def describe(preload: Sequence[str]) -> dict[str, Any]:
    """Return versions and devices as torch tells them, and what importing ``preload`` leaves behind.

    Keys: ``torch``, ``cuda``, ``nccl`` (versions, "" for none), ``gpus``, ``devices_seen``, ``gloo``,
    ``preload``, ``threads`` after the imports, ``cuda_initialized``; ``error`` if an import fails.
    """
    found: dict[str, Any] = {
        "preload": list(preload),
        "devices_seen": len(list(Path("/dev").glob("nvidia[0-9]*"))),
    }
    try:
        import torch
        import torch.distributed

        for name in preload:
            importlib.import_module(name)
    except Exception as error:  # noqa: BLE001 - whatever a user's module raises is the answer
        return found | {"error": f"{type(error).__name__}: {error}"}
    cuda: Any = torch.cuda
    found |= {
        "threads": len(list(Path("/proc/self/task").iterdir())),
        "cuda_initialized": cuda.is_initialized(),
    }
    nccl = torch.distributed.is_nccl_available()
    return found | {
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "gpus": cuda.device_count(),
        "gloo": torch.distributed.is_gloo_available(),
        "nccl": ".".join(map(str, cuda.nccl.version())) if nccl and cuda.is_available() else "",
    }


if __name__ == "__main__":
    # What is imported may print, too: the answer is the last line.
    sys.stdout.write("\n" + json.dumps(describe(sys.argv[1:])) + "\n")
