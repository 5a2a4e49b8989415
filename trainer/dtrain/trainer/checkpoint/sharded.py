"""DTensors: this rank's part, how the whole is spread, and a new one spread alike.

What FSDP2 (``fully_shard``), tensor parallelism and their mixtures keep. The
module behind DTensor is never imported here: without it there are none.
"""

import functools
import sys
from typing import Any

from dtrain.trainer.checkpoint import regions
from dtrain.trainer.checkpoint.regions import Cut, Piece, Spread


def is_sharded(value: Any) -> bool:
    """True for DTensors, replicated ones included."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def part(value: Any) -> Any:
    """This rank's part of a DTensor, as a plain tensor over the same memory."""
    import torch

    with torch.no_grad():
        return value.to_local().detach()


def spread(value: Any, rank: int) -> Spread:
    """How a DTensor lies on the ranks of the job.

    Raises:
        ValueError: its values are not settled (Partial), its placement is of a kind
            unknown here, or its part on this rank is not what its placements say.
    """
    local = tuple(part(value).shape)
    return _checked(value.device_mesh, tuple(value.placements), tuple(value.shape), local, rank)


def empty_like(value: Any, dtype: Any) -> Any:
    """A DTensor spread like ``value``, with memory for this rank's part and nothing in it."""
    import torch

    kind = sys.modules["torch.distributed.tensor"].DTensor
    with torch.no_grad():
        local = torch.empty_like(part(value), dtype=dtype)
        return kind.from_local(
            local,
            value.device_mesh,
            value.placements,
            run_check=False,
            shape=value.shape,
            stride=value.stride(),
        )


@functools.lru_cache(maxsize=4096)
def _checked(
    mesh: Any, placements: tuple[Any, ...], shape: tuple[int, ...], local: tuple[int, ...], rank: int
) -> Spread:
    """Cached, as every snapshot asks this for every tensor.

    Raises:
        ValueError: why it cannot be saved.
    """
    found = _spread(mesh, placements, rank)
    expected = _local_shape(regions.held(found, shape, rank))
    if expected != local and not (expected is None and 0 in local):
        raise ValueError(
            f"its part on rank {rank} has shape {local} where its placements say {expected}: "
            "shards must be cut as torch.chunk cuts, as fully_shard and distribute_tensor do"
        )
    return found


@functools.lru_cache(maxsize=256)
def _spread(mesh: Any, placements: tuple[Any, ...], rank: int) -> Spread:
    cuts = tuple(_cut(placement) for placement in placements)
    own = tuple(int(r) for r in mesh.mesh.flatten().tolist())
    groups = _groups(mesh)
    found = Spread(tuple(mesh.mesh.shape), groups if own in groups else (own,), cuts)
    coordinate = mesh.get_coordinate()
    if (coordinate is not None) != (rank in own):
        raise ValueError(
            f"its mesh of ranks {own} does not count ranks as the job does (this is rank {rank})"
        )
    if coordinate is not None and own[_flat(tuple(coordinate), found.mesh)] != rank:
        raise ValueError(f"its mesh does not count ranks as the job does (this is rank {rank})")
    return found


def _groups(mesh: Any) -> tuple[tuple[int, ...], ...]:
    """The ranks of this mesh and of those beside it in the mesh that it is a slice of.

    A model that is parallel over one dimension of a larger mesh is there once per
    slice: all slices hold the same, and a rank sees only its own.
    """
    try:
        every = mesh._layout.remap_to_tensor(mesh._rank_map)
        rows = every.reshape(-1, mesh.mesh.numel()).tolist()
    except (AttributeError, RuntimeError, TypeError):
        rows = [mesh.mesh.flatten().tolist()]  # an older torch: only what the mesh itself names
    return tuple(sorted(tuple(int(rank) for rank in row) for row in rows))


def _cut(placement: Any) -> Cut | None:
    kind = type(placement).__name__
    if kind == "Replicate":
        return None
    if kind == "Shard":
        return Cut(int(placement.dim))
    if kind == "_StridedShard":
        return Cut(int(placement.dim), int(placement.split_factor))
    if "Partial" in kind:
        raise ValueError(
            f"it is {placement}: ranks hold summands of it, not values; redistribute it to Replicate or Shard"
        )
    raise ValueError(f"its placement {placement} is unknown to this release")


def _local_shape(piece: Piece | None) -> tuple[int, ...] | None:
    """None: the rank has no element of it."""
    if piece is None or not piece.boxes:
        return None
    ends = [[at + size for at, size in zip(box.local, box.shape, strict=True)] for box in piece.boxes]
    return tuple(max(column) for column in zip(*ends, strict=True))


def _flat(coordinate: tuple[int, ...], shape: tuple[int, ...]) -> int:
    return sum(c * stride for c, stride in zip(coordinate, regions.strides_of(shape), strict=True))
