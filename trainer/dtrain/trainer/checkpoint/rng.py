"""The state of every random number generator of this rank, under names of its own.

The process's own generators (python, numpy, torch, CUDA) need no mention. Generators
that a script made are tracked like anything else, and become ``Tracked``.
"""

import hashlib
import json
import logging
import random
import sys
from collections.abc import Mapping
from typing import Any

from dtrain.trainer.checkpoint import plain

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


def adopt(name: str, thing: Any, rank: int, world: int) -> Any:
    """Return what to track instead of a generator; anything else as it is."""
    is_numpy = type(thing).__module__.startswith("numpy.random") and hasattr(thing, "bit_generator")
    is_torch = type(thing).__module__ in ("torch", "torch._C") and type(thing).__name__ == "Generator"
    if is_numpy or is_torch or type(thing) is random.Random:
        return Tracked(name, thing, rank, world)
    return thing


class Tracked:
    """A numpy ``Generator``, torch ``Generator`` or ``random.Random`` of the script; each rank has its own.

    For another number of ranks: generators that stood alike on all ranks (they were
    seeded alike, and must agree) go on alike; others from a seed derived from
    where they stood and the rank.
    """

    def __init__(self, name: str, generator: Any, rank: int, world: int) -> None:
        self._name = name
        self._generator = generator
        self._rank = rank
        self._world = world

    def state_dict(self) -> dict[str, Any]:
        return {"state": plain.encode(self._state(), self._name), "world": self._world}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from this rank's part alone."""
        self.load_parts({self._rank: state})

    def load_parts(self, parts: Mapping[int, Any]) -> None:
        """Go on from the parts of all ranks that saved."""
        own = parts.get(self._rank)
        if own is not None and own["world"] == self._world:
            self._set(plain.decode(own["state"]))
            return
        states = [parts[rank]["state"] for rank in sorted(parts)]
        if all(state == states[0] for state in states):
            self._set(plain.decode(states[0]))
            return
        text = f"{self._name}/{self._rank}/{json.dumps(states, sort_keys=True)}".encode()
        self._seed(int.from_bytes(hashlib.sha256(text).digest()[:7], "big"))
        log.warning(
            "the number of ranks changed: %s of rank %d goes on from a derived seed", self._name, self._rank
        )

    def _state(self) -> Any:
        if isinstance(self._generator, random.Random):
            return self._generator.getstate()
        if hasattr(self._generator, "bit_generator"):
            return self._generator.bit_generator.state
        return self._generator.get_state()

    def _set(self, state: Any) -> None:
        if isinstance(self._generator, random.Random):
            version, numbers, gauss = state
            self._generator.setstate((version, tuple(numbers), gauss))
        elif hasattr(self._generator, "bit_generator"):
            self._generator.bit_generator.state = state
        else:
            self._generator.set_state(state)

    def _seed(self, seed: int) -> None:
        if isinstance(self._generator, random.Random):
            self._generator.seed(seed)
        elif hasattr(self._generator, "bit_generator"):
            bits = self._generator.bit_generator
            bits.state = type(bits)(seed).state
        else:
            self._generator.manual_seed(seed)
