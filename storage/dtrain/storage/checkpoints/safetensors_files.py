"""Safetensors files written as a stream: no tensor is held whole unless its chunks demand it."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dtrain.protocol import codec
from dtrain.protocol.checkpoint import Manifest
from dtrain.storage.checkpoints import objects
from dtrain.storage.checkpoints.reading import ITEM_BYTES, TensorReader, size_bytes

HEADER_ALIGN = 64
INDEX = "model.safetensors.index.json"


def write(
    reader: TensorReader,
    manifest: Manifest,
    names: Sequence[str],
    tensors: Sequence[str],
    to: Path,
    *,
    single: bool,
    shard_bytes: int,
    on_written: Callable[[int], None],
) -> None:
    """Write one file, or a folder of files of about ``shard_bytes`` with an index and the JSON values."""
    if single:
        _file(reader, manifest, tensors, to, on_written)
        return
    to.mkdir()
    shards = _shards(manifest, tensors, shard_bytes)
    if len(shards) == 1:
        _file(reader, manifest, shards[0], to / "model.safetensors", on_written)
    else:
        weights: dict[str, str] = {}
        for number, shard in enumerate(shards, 1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            _file(reader, manifest, shard, to / file, on_written)
            weights |= dict.fromkeys(shard, file)
        total = sum(size_bytes(manifest.tensors[name]) for name in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weights.items()))}
        (to / INDEX).write_text(json.dumps(index, indent=1))
    objects.write_about(to / objects.ABOUT_FILE, manifest, names)


def _shards(manifest: Manifest, tensors: Sequence[str], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name in tensors:
        own = size_bytes(manifest.tensors[name])
        if shards[-1] and size + own > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += own
    return shards


def _file(
    reader: TensorReader,
    manifest: Manifest,
    tensors: Sequence[str],
    path: Path,
    on_written: Callable[[int], None],
) -> None:
    # Larger items first, as they lie otherwise: then each one is aligned to its own size.
    ordered = sorted(tensors, key=lambda name: -ITEM_BYTES[manifest.tensors[name].dtype])
    origin = {key: str(value) for key, value in objects.about(manifest).items()}
    table: dict[str, Any] = {"__metadata__": {"format": "pt", **origin}}
    offset = 0
    for name in ordered:
        entry = manifest.tensors[name]
        end = offset + size_bytes(entry)
        table[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    header = codec.dumps(table)
    header += b" " * (-(8 + len(header)) % HEADER_ALIGN)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)
        for name in ordered:
            for piece in reader.stream(name):
                file.write(piece)
                on_written(len(piece))
