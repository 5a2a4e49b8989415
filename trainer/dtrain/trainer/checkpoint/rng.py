"""The state of every random number generator of this rank, under names of its own."""

import hashlib
import logging
import random
import sys
from collections.abc import Mapping
from typing import Any

log = logging.getLogger("dtrain.trainer")


def prefix(rank: int) -> str:
    """Prefix of the names that only ``rank`` saves."""
    return f"rng/{rank}/"


def collect(rank: int) -> dict[str, Any]:
    """State by name, as values that ``state.capture`` can encode."""
    import torch

    version, numbers, gauss = random.getstate()
    found: dict[str, Any] = {
        "python": (version, torch.tensor(numbers, dtype=torch.int64), gauss),
        "torch": torch.get_rng_state(),
    }
    # Only if the script uses it: importing it here would cost memory for nothing.
    numpy = sys.modules.get("numpy")
    if numpy is not None and hasattr(numpy, "random"):
        name, keys, *rest = numpy.random.get_state()
        # As int64: older torch has no uint32.
        found["numpy"] = (name, torch.from_numpy(keys.astype("int64")), *rest)
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        found["cuda"] = torch.cuda.get_rng_state()
    return {prefix(rank) + key: value for key, value in found.items()}


def install(rank: int, values: Mapping[str, Any]) -> None:
    """Set every generator from decoded values of ``collect``."""
    import torch

    for name, value in values.items():
        kind = name.removeprefix(prefix(rank))
        if kind == "python":
            version, numbers, gauss = value
            random.setstate((version, tuple(numbers.tolist()), gauss))
        elif kind == "torch":
            torch.set_rng_state(value.clone())
        elif kind == "numpy":
            import numpy as np

            algorithm, keys, *rest = value
            np.random.set_state((algorithm, keys.numpy().astype("uint32"), *rest))
        elif kind == "cuda" and torch.cuda.is_available():
            torch.cuda.set_rng_state(value.clone())


def derive(rank: int, step: int, job_seed: str) -> None:
    """Seed every generator from where the run stands, as the saved states are for other ranks."""
    import torch

    text = hashlib.sha256(f"{job_seed}/{step}/{rank}".encode()).digest()
    seed = int.from_bytes(text[:7], "big")
    random.seed(seed)
    torch.manual_seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None and hasattr(numpy, "random"):
        numpy.random.seed(seed % 2**32)
    log.warning(
        "the number of ranks changed: random numbers of rank %d go on from a seed derived from step %d",
        rank,
        step,
    )
