"""Digests of what several ranks hold alike, so that the leader can see that it is alike.

Only one rank writes a replicated tensor: without this the values of the others
would be dropped unseen. Short tensors are hashed whole, of longer ones a sample
that is spread evenly over them. Ranks that drift apart by training differ nearly
everywhere; a single different element in a long tensor may be missed.
"""

import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dtrain.trainer.checkpoint import regions
from dtrain.trainer.checkpoint.layout import Spec

ENV_CHECK = "DTRAIN_CHECK_REPLICAS"
"""``off``: do not compare, for ranks on hardware that does not compute bit for bit alike."""

SAMPLE_BYTES = 16 * 1024
"""Looked at per tensor, at most."""

_PARTS = 64
"""Places in a longer tensor."""

_BATCH_BYTES = 4 * 1024 * 1024


def wanted() -> bool:
    """Whether this rank should compare."""
    return os.environ.get(ENV_CHECK, "").lower() not in ("off", "0", "false", "no")


@dataclass(frozen=True, slots=True)
class _Item:
    """Leaf ``index``, called ``key`` in the index, whose sample lies at ``start`` of the scratch memory."""

    index: int
    key: str
    start: int
    stop: int
    sampled: bool


class Replicas:
    """Digests the replicated leaves of one rank. ``plan`` comes first, and again when the layout changes."""

    def __init__(self, rank: int, world: int) -> None:
        self._rank = rank
        self._world = world
        self._batches: list[tuple[list[_Item], list[Any]]] = []
        self._scratch: Any = None

    def plan(self, specs: Sequence[Spec], tensors: Sequence[Any]) -> None:
        """Choose what to look at in tensors of these forms, of which this rank has ``tensors``."""
        import torch

        batches: list[list[_Item]] = [[]]
        at = 0
        for index, (spec, tensor) in enumerate(zip(specs, tensors, strict=True)):
            key = self._key(spec)
            size = tensor.numel() * tensor.element_size()
            if key is None or size == 0:
                continue
            sampled = size > SAMPLE_BYTES
            length = _sample_shape(tensor)[0] * _PARTS * tensor.element_size() if sampled else size
            start = -(-at // 8) * 8
            if start + length > _BATCH_BYTES:
                batches.append([])
                start = 0
            at = start + length
            batches[-1].append(_Item(index, key, start, at, sampled))
        longest = max((batch[-1].stop for batch in batches if batch), default=0)
        self._scratch = torch.empty(longest, dtype=torch.uint8)
        self._batches = [
            (batch, [self._target(item, tensors[item.index]) for item in batch]) for batch in batches if batch
        ]

    def digests(self, tensors: Sequence[Any]) -> dict[str, str]:
        """CRC32 in hex by tensor name; ``name#n`` for part ``n`` of a sharded tensor."""
        import torch

        found: dict[str, str] = {}
        if not self._batches:
            return found
        with torch.no_grad():
            memory = memoryview(self._scratch.numpy())
            for items, targets in self._batches:
                sources = [
                    _sample(tensors[item.index]) if item.sampled else tensors[item.index] for item in items
                ]
                # One call for thousands of small tensors: each alone would cost more than its bytes.
                torch._foreach_copy_(targets, sources)
                for item in items:
                    found[item.key] = f"{zlib.crc32(memory[item.start : item.stop]):08x}"
        return found

    def _key(self, spec: Spec) -> str | None:
        """None: no other rank has it, or rank 0's counts anyway."""
        if spec.local or spec.owner is not None or self._world == 1:
            return None
        if spec.spread is None:
            return spec.name
        piece = regions.held(spec.spread, spec.shape, self._rank)
        if piece is None or len(piece.ranks) == 1:
            return None
        return (
            spec.name
            if piece.number == 0 and len(piece.ranks) == self._world
            else f"{spec.name}#{piece.number}"
        )

    def _target(self, item: _Item, tensor: Any) -> Any:
        flat = self._scratch[item.start : item.stop].view(tensor.dtype)
        return flat.view((_PARTS, -1)) if item.sampled else flat.view(tensor.shape)


def _sample_shape(tensor: Any) -> tuple[int, int]:
    """Elements per place, and from one place to the next."""
    length = max(1, SAMPLE_BYTES // _PARTS // tensor.element_size())
    return length, (tensor.numel() - length) // (_PARTS - 1)


def _sample(tensor: Any) -> Any:
    """The same elements on every rank, however they lie in its memory."""
    length, step = _sample_shape(tensor)
    if tensor.is_contiguous():
        return tensor.as_strided((_PARTS, length), (step, 1))
    import torch

    places = torch.arange(_PARTS, device=tensor.device)[:, None] * step
    flat = places + torch.arange(length, device=tensor.device)
    return tensor[torch.unravel_index(flat, tensor.shape)]
