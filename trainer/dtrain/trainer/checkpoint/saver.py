"""Takes a frozen snapshot of the tracked state at a step boundary: the only stall of a checkpoint."""

import zlib
from collections.abc import Mapping
from typing import Any

from dtrain.protocol import codec
from dtrain.protocol.ids import Step
from dtrain.protocol.ranklink import Begin, Sealed
from dtrain.trainer.checkpoint import replicas, rng, state
from dtrain.trainer.checkpoint.arena import Arena
from dtrain.trainer.checkpoint.layout import Layout, Placed, Spec, plan
from dtrain.trainer.checkpoint.state import Captured, Leaf

_INDEX_SPARE_BYTES = 1024 * 1024
"""Room for objects to grow between saves without touching new memory in the stall."""


class Saver:
    """Copies the state of one rank into its arena.

    The layout is computed once and compared with names, dtypes and shapes at
    each save; any difference rebuilds it.
    """

    def __init__(self, tracked: Mapping[str, Any], rank: int, world: int, arena: Arena) -> None:
        self._tracked = tracked
        self._rank = rank
        self._world = world
        self._arena = arena
        self._specs: list[Spec] | None = None
        self._layout: Layout | None = None
        self._replicas = replicas.Replicas(rank, world)
        self._entries = b""
        self._targets: list[tuple[Placed, Any]] = []

    def prepare(self) -> None:
        """Lay out the state and touch the memory for it, so that the first save does not.

        Raises:
            Refused: STATE_NOT_SAVABLE.
        """
        captured = self._capture()
        layout = self._lay_out(captured.leaves)
        self._reserve(layout, len(self._index(captured, layout)))

    def seal(self, begin: Begin) -> Sealed:
        """Copy the state and describe the copy. The slot must be free.

        Raises:
            Refused: STATE_NOT_SAVABLE.
        """
        captured = self._capture()
        layout = self._lay_out(captured.leaves)
        index = self._index(captured, layout)
        self._reserve(layout, len(index))
        memory = self._arena.memory
        memory[: len(layout.header)] = layout.header
        self._copy(captured.leaves)
        memory[layout.blob_bytes : layout.blob_bytes + len(index)] = index
        return Sealed(
            seq=begin.seq,
            nonce=begin.nonce,
            step=Step(begin.step),
            path=self._arena.path,
            offset=0,
            size_bytes=layout.blob_bytes,
            index_offset=layout.blob_bytes,
            index_bytes=len(index),
        )

    def _capture(self) -> Captured:
        return state.capture(self._tracked, rng.collect(self._rank), self._rank)

    def _lay_out(self, leaves: list[Leaf]) -> Layout:
        specs = [leaf.spec for leaf in leaves]
        if self._layout is None or specs != self._specs:
            self._layout = plan(specs, self._rank, self._world)
            self._specs = specs
            self._targets = []
            self._replicas.plan(leaves if replicas.wanted() else [])
            self._entries = codec.dumps(
                {name: codec.to_json(entry) for name, entry in self._layout.entries().items()}
            )
        return self._layout

    def _index(self, captured: Captured, layout: Layout) -> bytes:
        objects = {}
        for name, value in captured.objects.items():
            crc = zlib.crc32(codec.canonical(value))
            objects[name] = {"value": value, "crc": f"{crc:08x}"}
        same = self._replicas.digests(captured.leaves)
        head = codec.dumps({"layout": layout.hash, "objects": objects, "same": same})
        return head[:-1] + b',"tensors":' + self._entries + b"}"

    def _reserve(self, layout: Layout, index_bytes: int) -> None:
        needed = layout.blob_bytes + index_bytes
        spare = 0 if needed <= self._arena.size_bytes else _INDEX_SPARE_BYTES + index_bytes
        if self._arena.reserve(needed + spare) or not self._targets:
            self._targets = [(item, self._view(item)) for item in layout.placed if item.block.size_bytes]

    def _view(self, item: Placed) -> Any:
        """The bytes of a block in the arena, as a tensor."""
        import torch

        from dtrain.trainer.checkpoint.dtypes import stored_dtype

        flat = torch.frombuffer(
            self._arena.memory, dtype=torch.uint8, count=item.block.size_bytes, offset=item.offset
        )
        return flat.view(stored_dtype(item.block.spec.dtype)).view(item.block.shape)

    def _copy(self, leaves: list[Leaf]) -> None:
        import torch

        tensors = {leaf.name: leaf.tensor for leaf in leaves}
        on_device = False
        with torch.no_grad():
            for item, target in self._targets:
                source = item.block.of(tensors[item.block.spec.name])
                on_device = on_device or source.is_cuda
                # Without waiting for each: all copies are awaited together below.
                target.copy_(source, non_blocking=True)
        if on_device:
            # A snapshot is sealed only once every byte of it is there.
            torch.cuda.synchronize()
