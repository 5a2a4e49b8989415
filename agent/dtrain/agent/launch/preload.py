"""Importing what every rank will need, and telling whether forking is still safe.

A fork copies only the thread that called it: locks held by another thread stay
locked for ever in the child. So the launcher counts its threads, and where an
import has started one (or has opened a GPU, which a child cannot use after a
fork) the module is named and ranks are exec'd instead. gRPC is safe as long as
nothing was done with it: its core lives in threads, from the first channel or
server until seconds after the last one, and these are found by their names.

Looked at before each fork, not only after the imports: threads may start late,
and one that has ended is no danger any more.
"""

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from dtrain.agent.launch.processes import open_descriptors, thread_count, thread_names
from dtrain.protocol import checksum
from dtrain.protocol.wording import some

# DDP's constructor imports torch._dynamo, which takes longer than torch itself.
TORCH_MODULES = ("torch", "torch.distributed", "torch.nn.parallel", "torch._dynamo")
SDK_MODULE = "dtrain.trainer"

_GPU_DEVICES = ("/dev/nvidia-uvm", "/dev/kfd")

THREADS_SHOWN = 4

_OWNERS = (
    ("grpc", "gRPC"),
    ("event_engine", "gRPC"),
    ("cuda", "CUDA"),
    ("pt_nccl", "torch.distributed"),
    ("pt_", "torch"),
    ("jemalloc", "jemalloc"),
)
"""Libraries by the names of their threads, as the kernel has them (15 characters)."""


@dataclass(slots=True)
class Preloaded:
    """What the imports did to this process."""

    warnings: list[str] = field(default_factory=list)
    offenders: list[str] = field(default_factory=list)
    """Modules whose import started threads or opened a GPU."""
    descriptors: frozenset[int] = frozenset()
    """Opened by the imports: they belong to the libraries and stay open in the ranks."""

    def fork_problem(self) -> str:
        """Why this process must not fork now; "" if it may."""
        names = thread_names()[1:]
        if names:
            return f"{self._blame(names)} runs {_counted(names)} in the launcher"
        if _holds_gpu():
            return f"{self._blame(())} has opened a GPU in the launcher"
        return ""

    def _blame(self, threads: Sequence[str]) -> str:
        if self.offenders:
            return ", ".join(self.offenders)
        # It was started after the imports, by what they left behind.
        known = {owner for thread in threads for mark, owner in _OWNERS if thread.startswith(mark)}
        return ", ".join(sorted(known)) or "something that was imported"


def _counted(names: Sequence[str]) -> str:
    shown = sorted(set(names))
    plural = "" if len(names) == 1 else "s"
    return f"{len(names)} more thread{plural} ({some(shown, THREADS_SHOWN)})"


def calm_libraries() -> None:
    """Keep numeric libraries from starting threads while they are imported.

    OpenBLAS starts its pool when it is loaded, and torch's check for CUDA would
    initialise the driver. Ranks get their own numbers after the fork.
    """
    os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")


def preload(names: tuple[str, ...], working_dir: str, breathe: Callable[[], None]) -> Preloaded:
    """Import torch, the SDK and ``names``; ``breathe`` is called between imports.

    A failing import is a warning, never an error: the script that needs the
    module shows the reason better than the launcher could.
    """
    before = frozenset(open_descriptors())
    result = Preloaded()
    # Before the job's own folder is on the path.
    provide_checksum()
    # A job may preload modules of its own, which lie beside its script.
    sys.path.insert(0, working_dir)
    torch_is_missing = False
    for name in (*TORCH_MODULES, SDK_MODULE, *names):
        if torch_is_missing and name in TORCH_MODULES:
            continue
        threads, gpu = thread_count(), _holds_gpu()
        try:
            importlib.import_module(name)
        except BaseException as error:  # noqa: BLE001  user code may raise anything, SystemExit too
            torch_is_missing = torch_is_missing or name == "torch"
            result.warnings.append(f"cannot preload {name}: {type(error).__name__}: {error}"[:500])
        if thread_count() > threads or _holds_gpu() > gpu:
            result.offenders.append(name)
        breathe()
    if working_dir in sys.path:
        sys.path.remove(working_dir)
    result.descriptors = frozenset(open_descriptors()) - before
    return result


def provide_checksum() -> None:
    """Give the ranks a CRC32C; without one they have their agent verify what they restore."""
    if checksum.provided() is not None:
        return
    try:
        digest = importlib.import_module("dtrain.storage.blobs.digest")
        checksum.provide(digest.crc32c)
    except (ImportError, ValueError):
        return
    # A script may have a module of that name beside it, and must get its own.
    for name in [name for name in sys.modules if name.partition(".")[0] == "crc32c"]:
        del sys.modules[name]


def _holds_gpu() -> bool:
    torch: Any = sys.modules.get("torch")
    cuda = getattr(torch, "cuda", None)
    if cuda is not None and hasattr(cuda, "is_initialized") and cuda.is_initialized():
        return True
    return any(target.startswith(_GPU_DEVICES) for target in open_descriptors().values())
