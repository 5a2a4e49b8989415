"""A committed manifest as ``torch.distributed.checkpoint`` sees one."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from dtrain.protocol.checkpoint import ChunkEntry, Manifest, TensorEntry
from dtrain.protocol.errors import ErrorCode, Refused
from dtrain.trainer.checkpoint import dtypes, state

_COMPLEX = {"complex64": torch.complex64, "complex128": torch.complex128}


class Catalog:
    """Where each name of torch's lies in the checkpoint.

    A checkpoint of ``dcp.save`` says so itself (``paths``). One that was saved natively is
    flattened by torch's own rules, so that ``{"model": model.state_dict()}`` finds what
    ``run.track(model=model)`` has saved.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.paths: dict[str, tuple[str | int, ...]] = {}
        self._tensors: dict[str, tuple[str, str]] = {}
        self._objects: dict[str, Any] = {}
        self._roots: dict[str, str] = {}
        if manifest.paths:
            self._take_flat()
        else:
            self._take_nested()
        self._chunks: dict[tuple[str, tuple[int, ...]], ChunkEntry] = {
            (name, self._cut(name, chunk.o)): chunk
            for name in self._tensors
            for chunk in _solid_first(self.entry(name))
        }

    def metadata(self) -> Metadata:
        """What planners plan from: a new one for each call, as they may change it."""
        found: dict[str, Any] = {name: self._described(name) for name in self._tensors}
        found.update({name: BytesStorageMetadata() for name in (*self._objects, *self._roots)})
        return Metadata({name: found[name] for name in sorted(found)}, planner_data=dict(self.paths))

    def entry(self, name: str) -> TensorEntry:
        """The stored form of a tensor."""
        return self.manifest.tensors[self._tensors[name][0]]

    def original(self, name: str) -> str:
        """The torch dtype's name where the stored one differs, else ""."""
        return self._tensors[name][1]

    def chunk(self, name: str, offset: tuple[int, ...]) -> ChunkEntry:
        """The stored chunk that begins at ``offset``.

        Raises:
            Refused: RESTORE_FAILED.
        """
        found = self._chunks.get((name, offset))
        if found is None:
            raise Refused(ErrorCode.RESTORE_FAILED, f"{name} has no chunk at {list(offset)}")
        return found

    def encoded(self, name: str) -> Any:
        """The JSON that the object ``name`` is decoded from, or is a part of."""
        root = self._roots.get(name)
        return self.manifest.objects[root].value if root is not None else self._objects[name]

    def pick(self, name: str, value: Any) -> Any:
        """The object ``name`` out of what ``encoded(name)`` was decoded to."""
        root = self._roots.get(name)
        return value if root is None else flatten_state_dict({root: value})[0][name]

    def _take_flat(self) -> None:
        for name, path in self.manifest.paths.items():
            self.paths[name] = tuple(path)
            entry = self.manifest.objects.get(name)
            if entry is None or _only_dtype(entry.value, name):
                if name not in self.manifest.tensors:
                    raise Refused(ErrorCode.RESTORE_FAILED, f"the checkpoint's manifest has no {name}")
                self._tensors[name] = (name, "" if entry is None else entry.value["dtype"])
            else:
                self._objects[name] = entry.value

    def _take_nested(self) -> None:
        for root, entry in self.manifest.objects.items():
            if root.startswith("rng/"):
                continue
            places: dict[int, tuple[str, str]] = {}
            keep: list[Any] = []
            nested = state.decode(_plain(entry.value), lambda text: self._stand_in(text, places, keep))  # noqa: B023
            flat, mapping = flatten_state_dict({root: nested})
            for name, value in flat.items():
                self.paths[name] = tuple(mapping[name])
                if id(value) in places:
                    self._tensors[name] = places[id(value)]
                else:
                    self._roots[name] = root

    def _stand_in(self, text: str, places: dict[int, tuple[str, str]], keep: list[Any]) -> Any:
        """Takes a tensor's place while torch flattens; arrays are objects to torch."""
        name, original, numpy = text.split("\0")
        if name not in self.manifest.tensors:
            raise Refused(ErrorCode.RESTORE_FAILED, f"the checkpoint's manifest has no tensor {name}")
        found: Any = object() if numpy else torch.empty(0, device="meta")
        keep.append(found)  # else another object could get its id
        if not numpy:
            places[id(found)] = (name, original)
        return found

    def _cut(self, name: str, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """Without the dimension that a complex number is stored as."""
        return sizes[:-1] if self.original(name) in _COMPLEX else sizes

    def _described(self, name: str) -> TensorStorageMetadata:
        entry, original = self.entry(name), self.original(name)
        dtype = getattr(torch, original) if original else dtypes.stored_dtype(entry.dtype)
        chunks = [
            ChunkStorageMetadata(torch.Size(self._cut(name, chunk.o)), torch.Size(self._cut(name, chunk.s)))
            for chunk in _solid_first(entry)
        ]
        size = torch.Size(self._cut(name, entry.shape))
        return TensorStorageMetadata(TensorProperties(dtype=dtype), size, chunks)


def tensors_in(encoded: Any) -> Iterator[str]:
    """Names of the stored tensors that an encoded value refers to."""
    if isinstance(encoded, Mapping):
        if "$tensor" in encoded:
            yield encoded["$tensor"]
            return
        encoded = list(encoded.values())
    if isinstance(encoded, list):
        for part in encoded:
            yield from tensors_in(part)


def _plain(encoded: Any) -> Any:
    """The same value, each tensor described by one text, so that it can be decoded without its bytes."""
    if isinstance(encoded, list):
        return [_plain(part) for part in encoded]
    if not isinstance(encoded, dict):
        return encoded
    if "$tensor" in encoded:
        extra = (encoded.get("dtype", ""), encoded.get("numpy", ""))
        return {"$tensor": "\0".join((encoded["$tensor"], *extra))}
    return {key: _plain(part) for key, part in encoded.items()}


def _only_dtype(encoded: Any, name: str) -> bool:
    return (
        isinstance(encoded, dict) and encoded.get("$tensor") == name and set(encoded) == {"$tensor", "dtype"}
    )


def _solid_first(entry: TensorEntry) -> list[ChunkEntry]:
    """Chunks with elements; where there are none, one of those without."""
    return [chunk for chunk in entry.chunks if chunk.len] or list(entry.chunks[:1])
