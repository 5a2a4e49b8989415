"""Files that plain torch reads: ``torch.save`` files and folders of ``torch.distributed.checkpoint``.

Tensors are first put together in a scratch file beside the target and mapped, so
that memory stays small; torch itself then writes its format. Its folders have a
pickled ``.metadata``: that is torch's, on the way out only, and nothing of dtrain
ever reads one. With ``importing_torch`` the only place in this package that imports torch.
"""

import mmap
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dtrain.protocol.checkpoint import Manifest
from dtrain.protocol.errors import ErrorCode, Refused
from dtrain.storage.checkpoints import objects
from dtrain.storage.checkpoints.reading import TensorReader, size_bytes

ALIGN = 64

TORCH_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "U16": "uint16",
    "I16": "int16",
    "F16": "float16",
    "BF16": "bfloat16",
    "U32": "uint32",
    "I32": "int32",
    "F32": "float32",
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
    "C64": "complex64",
    "C128": "complex128",
}
"""What torch calls the dtypes of checkpoints."""


def write_torch(
    reader: TensorReader,
    manifest: Manifest,
    names: Sequence[str],
    tensors: Sequence[str],
    to: Path,
    *,
    scratch: Path,
    on_written: Callable[[int], None],
) -> None:
    """Write ``{tracked name: state}`` as one file, with ``dtrain`` saying where it comes from.

    Raises:
        Refused: torch is not installed, or lacks a dtype.
    """
    torch = _torch()
    stored = _Scratch(torch, manifest, scratch)
    stored.fill(reader, tensors, on_written)
    torch.save({**stored.state(names), "dtrain": objects.about(manifest)}, to)


def write_dcp(
    reader: TensorReader,
    manifest: Manifest,
    names: Sequence[str],
    tensors: Sequence[str],
    to: Path,
    *,
    scratch: Path,
    on_written: Callable[[int], None],
) -> None:
    """Write ``{tracked name: state}`` as a folder that ``dcp.load`` reads, at any world size.

    Raises:
        Refused: torch is not installed, or lacks a dtype.
    """
    torch = _torch()
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    stored = _Scratch(torch, manifest, scratch)
    stored.fill(reader, tensors, on_written)
    with warnings.catch_warnings():
        # There is no process group here, and none is wanted.
        warnings.simplefilter("ignore", UserWarning)
        save(stored.state(names), storage_writer=FileSystemWriter(to, thread_count=1), no_dist=True)
    # DCP makes text of every key; whoever imports the folder again finds here how they were.
    objects.write_about(to / objects.ABOUT_FILE, manifest, names)


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise Refused(
            ErrorCode.USAGE,
            "torch is not installed here, and its formats are written by it",
            fix="run this where torch is installed, or export as safetensors",
        ) from error
    return torch


class _Scratch:
    """Tensors in a mapped file without a name: it goes with this process, however that ends."""

    def __init__(self, torch: Any, manifest: Manifest, path: Path) -> None:
        self._torch = torch
        self._manifest = manifest
        self._path = path
        self._places: dict[str, int] = {}
        self._mapped: mmap.mmap | None = None
        self._made: dict[tuple[str, str], Any] = {}

    def fill(self, reader: TensorReader, tensors: Sequence[str], on_written: Callable[[int], None]) -> None:
        """Put the tensors there, verified."""
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            self._path.unlink()
            with os.fdopen(os.dup(fd), "wb") as file:
                for name in tensors:
                    file.write(b"\0" * (-file.tell() % ALIGN))
                    self._places[name] = file.tell()
                    for piece in reader.stream(name):
                        file.write(piece)
                        on_written(len(piece))
                file.write(b"\0")  # nothing cannot be mapped
            self._mapped = mmap.mmap(fd, 0)
        finally:
            os.close(fd)

    def state(self, names: Sequence[str]) -> dict[str, Any]:
        """The tracked names with their tensors; those that no name refers to are under ``tensors``."""
        objects_of = self._manifest.objects
        state = {name: objects.decode(objects_of[name].value, self._tensor) for name in names}
        used = {name for name, _ in self._made}
        loose = [name for name in self._places if name not in used]
        return {**state, "tensors": {name: self._tensor(name, "") for name in loose}} if loose else state

    def _tensor(self, name: str, original: str) -> Any:
        # Tied weights stay tied.
        if (name, original) not in self._made:
            self._made[name, original] = self._make(name, original)
        return self._made[name, original]

    def _make(self, name: str, original: str) -> Any:
        torch, entry = self._torch, self._manifest.tensors[name]
        dtype, size = _dtype(torch, TORCH_DTYPES[entry.dtype]), size_bytes(entry)
        if size == 0:
            value = torch.empty(entry.shape, dtype=dtype)
        else:
            offset = self._places[name]
            value = torch.frombuffer(self._mapped, dtype=torch.uint8, count=size, offset=offset)
            value = value.view(dtype).view(entry.shape)
        if not original:
            return value
        if original.startswith("complex"):
            return torch.view_as_complex(value).clone()
        return value.view(_dtype(torch, original))


def _dtype(torch: Any, name: str) -> Any:
    found = getattr(torch, name, None)
    if found is None:
        raise Refused(ErrorCode.USAGE, f"this torch has no dtype {name}", fix="use a newer torch")
    return found
