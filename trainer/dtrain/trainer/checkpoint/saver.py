"""Takes a frozen snapshot of the tracked state at a step boundary: the only stall of a checkpoint."""

import zlib
from collections.abc import Callable, Mapping
from typing import Any

from dtrain.protocol import codec
from dtrain.protocol.ids import Step
from dtrain.protocol.ranklink import Begin, Sealed
from dtrain.trainer.checkpoint import cuda, replicas, rng
from dtrain.trainer.checkpoint.arena import Arena
from dtrain.trainer.checkpoint.layout import Layout, Placed, Spec, plan
from dtrain.trainer.checkpoint.walk import Shot, Walk

_INDEX_SPARE_BYTES = 1024 * 1024
"""Room for objects to grow between saves without touching new memory in the stall."""


class Saver:
    """Copies the state of one rank into its arena.

    The layout is computed once and compared with names, dtypes and shapes at
    each save; any difference rebuilds it.
    """

    def __init__(
        self, tracked: Mapping[str, Any], rank: int, world: int, arena: Arena, device: Any = None
    ) -> None:
        self._tracked = tracked
        self._rank = rank
        self._world = world
        self._arena = arena
        self._walk = Walk(tracked, rank)
        self._specs: list[Spec] | None = None
        self._layout: Layout | None = None
        self._replicas = replicas.Replicas(rank, world)
        self._entries = b""
        self._placed: list[tuple[int, Placed]] = []
        self._views: list[Any] = []
        self._overlap = cuda.overlap_for(device)

    def prepare(self) -> None:
        """Lay out the state and begin to touch the memory for it, so that the first save need not.

        Raises:
            Refused: STATE_NOT_SAVABLE.
        """
        shot = self._walk.capture(rng.collect(self._rank))
        layout = self._lay_out(shot)
        self._arena.reserve_soon(self._wanted(layout.blob_bytes, len(self._index(shot, layout))))

    def seal(self, begin: Begin) -> Sealed:
        """Copy the state and describe the copy, every byte of which is there. The slot must be free.

        Raises:
            Refused: STATE_NOT_SAVABLE.
        """
        sealed, shot = self._begin(begin)
        cuda.copy_and_wait(self._views, self._sources(shot))
        return sealed

    def seal_behind(
        self, begin: Begin, done: Callable[[Sealed, Exception | None], None], taking: Callable[[], None]
    ) -> bool:
        """Copy what lies on a GPU while training goes on.

        ``taking`` is called before anything is queued, ``done`` once every byte is there: on a
        thread of its own, with what went wrong if anything did. False: this state or device does not
        allow for it, and nothing was done.

        Raises:
            Refused: STATE_NOT_SAVABLE.
        """
        overlap = self._overlap
        if overlap is None:
            return False
        sealed, shot = self._begin(begin)
        sources = self._sources(shot)
        taking()
        if not overlap.start(self._tracked, self._views, sources, lambda error: done(sealed, error)):
            cuda.copy_and_wait(self._views, sources)
            done(sealed, None)
        return True

    def join(self) -> None:
        """Order what the training stream does from now on behind a copy that may still run."""
        if self._overlap is not None:
            self._overlap.join()

    def close(self) -> None:
        """Wait for a copy that may still run."""
        if self._overlap is not None:
            self._overlap.finish()

    def _begin(self, begin: Begin) -> tuple[Sealed, Shot]:
        """Everything but the tensors."""
        self.close()  # its slot was given up meanwhile; the copy into it may still run
        shot = self._walk.capture(rng.collect(self._rank))
        layout = self._lay_out(shot)
        index = self._index(shot, layout)
        self._reserve(layout, len(index))
        memory = self._arena.memory
        memory[: len(layout.header)] = layout.header
        memory[layout.blob_bytes : layout.blob_bytes + len(index)] = index
        sealed = Sealed(
            seq=begin.seq,
            nonce=begin.nonce,
            step=Step(begin.step),
            path=self._arena.path,
            offset=0,
            size_bytes=layout.blob_bytes,
            index_offset=layout.blob_bytes,
            index_bytes=len(index),
            index_crc=f"{zlib.crc32(index):08x}",
        )
        return sealed, shot

    def _lay_out(self, shot: Shot) -> Layout:
        if self._layout is None or shot.specs is not self._specs:
            if self._layout is None or shot.specs != self._specs:
                self._layout = plan(shot.specs, self._rank, self._world)
                index = {spec.name: number for number, spec in enumerate(shot.specs)}
                self._placed = [
                    (index[item.block.spec.name], item)
                    for item in self._layout.placed
                    if item.block.size_bytes
                ]
                self._views = []
                compared = replicas.wanted()
                self._replicas.plan(shot.specs if compared else [], shot.tensors if compared else [])
                self._entries = codec.canonical(
                    {name: codec.to_json(entry) for name, entry in self._layout.entries().items()}
                )
            self._specs = shot.specs
        return self._layout

    def _index(self, shot: Shot, layout: Layout) -> bytes:
        """The JSON behind the blob. Its parts are JSON already: a large state is not written out again."""
        names = sorted(shot.objects)
        objects = b",".join(b"%b:%b" % (codec.canonical(name), shot.objects[name]) for name in names)
        return b'{"layout":%b,"objects":{%b},"same":%b,"tensors":%b}' % (
            codec.canonical(layout.hash),
            objects,
            codec.canonical(self._replicas.digests(shot.tensors)),
            self._entries,
        )

    def _wanted(self, blob_bytes: int, index_bytes: int) -> int:
        needed = blob_bytes + index_bytes
        return needed if needed <= self._arena.size_bytes else needed + _INDEX_SPARE_BYTES + index_bytes

    def _reserve(self, layout: Layout, index_bytes: int) -> None:
        if layout.blob_bytes + index_bytes > self._arena.size_bytes:
            self._arena.reserve(self._wanted(layout.blob_bytes, index_bytes))
            self._views = []
        if not self._views:
            self._views = [self._view(item) for _, item in self._placed]

    def _view(self, item: Placed) -> Any:
        """The bytes of a block in the arena, as a tensor."""
        import torch

        from dtrain.trainer.checkpoint.dtypes import stored_dtype

        flat = torch.frombuffer(
            self._arena.memory, dtype=torch.uint8, count=item.block.size_bytes, offset=item.offset
        )
        return flat.view(stored_dtype(item.block.spec.dtype)).view(item.block.shape)

    def _sources(self, shot: Shot) -> list[Any]:
        """What goes into each view."""
        tensors = shot.tensors
        return [item.block.of(tensors[index]) for index, item in self._placed]
