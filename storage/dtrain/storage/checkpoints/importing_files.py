"""What is in a file or folder that somebody wants to import: safetensors here, torch beside it.

The format is told from the first bytes, never from the name alone. Headers and
indexes are checked as what strangers wrote: every offset, every size.
"""

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dtrain.protocol.errors import ErrorCode, Refused
from dtrain.storage.checkpoints.exporting import Format
from dtrain.storage.checkpoints.importing import Contents, Tensor
from dtrain.storage.checkpoints.objects import ABOUT_FILE
from dtrain.storage.checkpoints.reading import ITEM_BYTES
from dtrain.storage.checkpoints.safetensors_files import INDEX

HEADER_BYTES_MAX = 100 * 1000**2
"""What the safetensors library itself reads."""

JSON_BYTES_MAX = 256 * 1024**2
SUFFIX = ".safetensors"
_ZIP, _OLD_TORCH = b"PK\x03\x04", b"\x80"
_DCP_METADATA = ".metadata"


def guess(path: Path) -> Format:
    """Tell the format of a file or folder.

    Raises:
        Refused: it is none that can be imported, or is not there.
    """
    try:
        if path.is_dir():
            if (path / _DCP_METADATA).is_file():
                return Format.DCP
            if any(path.glob(f"*{SUFFIX}")):
                return Format.SAFETENSORS
            raise _refused(
                f"{path} is a folder without safetensors files and without DCP's {_DCP_METADATA}",
                "name the file or folder that holds the state",
            )
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise _unreadable(path, error) from error
    if start.startswith((_ZIP, _OLD_TORCH)):
        return Format.TORCH
    if len(start) == 9 and start[8:] == b"{":
        return Format.SAFETENSORS
    raise _refused(
        f"{path} is neither a safetensors file nor one of torch.save",
        "convert it to one of these; other pickles are never read",
    )


def read(path: Path, wanted: Format | None = None) -> Contents:
    """Return what is in a safetensors file, a folder of them, or a file of ``torch.save``.

    Tensors are read later, when they are asked for: ``close`` the result after that.

    Raises:
        Refused: it cannot be read, is malformed, or is of another format than ``wanted``.
    """
    found = guess(path)
    if wanted is not None and found is not wanted:
        raise _refused(f"{path} is {found.value}, not {wanted.value}", f"use --format {found.value}, or none")
    if found is Format.TORCH:
        from dtrain.storage.checkpoints import importing_torch

        return importing_torch.read(path)
    if found is Format.DCP:
        raise _refused(
            f"{path} is a folder of torch.distributed.checkpoint, whose {_DCP_METADATA} is a pickle: reading "
            "it runs whatever code is in it",
            "if you trust whoever wrote it, give --trust, which has torch convert it in a process of its own",
        )
    try:
        return _safetensors(path)
    except OSError as error:
        raise _unreadable(path, error) from error


def _safetensors(path: Path) -> Contents:
    files = _parts(path) if path.is_dir() else [path]
    descriptors: list[int] = []

    def close() -> None:
        while descriptors:
            os.close(descriptors.pop())

    tensors: dict[str, Tensor] = {}
    origin: Mapping[str, Any] = {}
    try:
        for file in files:
            descriptors.append(os.open(file, os.O_RDONLY | os.O_CLOEXEC))
            found, metadata = _header(file, descriptors[-1])
            twice = sorted(found.keys() & tensors.keys())
            if twice:
                raise _refused(f"{file} has {twice[0]} once more", "remove what does not belong here")
            tensors |= found
            origin = origin or _origin(metadata)
        about = _about(path)
        if about is None:
            return Contents(Format.SAFETENSORS.value, tensors, None, origin, close)
        objects = about.get("objects")
        if not isinstance(objects, dict) or about.get("v") != 1:
            raise _refused(f"{path / ABOUT_FILE} is not what an export writes", "export it again")
        origin = {key: value for key, value in about.items() if key not in ("v", "objects")}
        return Contents(Format.SAFETENSORS.value, tensors, objects, origin, close)
    except BaseException:
        close()
        raise


def read_converted(path: Path, folder: Path) -> Contents:
    """Return what torch made of a DCP folder: the file of ``torch.save`` at ``path``."""
    from dtrain.storage.checkpoints import importing_torch

    return importing_torch.read(path, _about(folder), converted=True)


def _about(folder: Path) -> dict[str, Any] | None:
    path = folder / ABOUT_FILE
    return _json(path) if folder.is_dir() and path.is_file() else None


def _parts(folder: Path) -> list[Path]:
    """Files of a folder: those in its index, if it has one, else all."""
    indexes = sorted(folder.glob(f"*{SUFFIX}.index.json"))
    if not indexes:
        return sorted(folder.glob(f"*{SUFFIX}"))
    if len(indexes) > 1:
        raise _refused(f"{folder} has several indexes", "name one file, or keep one index")
    weights = _json(indexes[0]).get("weight_map")
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights.values()):
        raise _refused(f"{indexes[0]} has no weight_map", f"see {INDEX} of an export")
    names = sorted(set(weights.values()))
    for name in names:
        if name != Path(name).name or not (folder / name).is_file():
            raise _refused(f"{indexes[0]} names {name!r}, which is not there", "copy the whole folder")
    return [folder / name for name in names]


def _json(path: Path) -> dict[str, Any]:
    if path.stat().st_size > JSON_BYTES_MAX:
        raise _refused(f"{path} is too large to be an index", "look whether it is the right folder")
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise _refused(f"{path} is not JSON: {error}", "export or download it again") from error
    if not isinstance(found, dict):
        raise _refused(f"{path} is no JSON object", "export or download it again")
    return found


def _header(path: Path, descriptor: int) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    size = os.fstat(descriptor).st_size
    length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    if size < 8 or not 2 <= length <= min(HEADER_BYTES_MAX, size - 8):
        raise _refused(f"{path} is cut short, or no safetensors file", "copy or download it again")
    try:
        table = json.loads(os.pread(descriptor, length, 8))
    except (ValueError, RecursionError) as error:
        raise _refused(f"the header of {path} is not JSON: {error}", "copy or download it again") from error
    if not isinstance(table, dict):
        raise _refused(f"the header of {path} is no JSON object", "copy or download it again")
    metadata = table.pop("__metadata__", {})
    tensors: dict[str, Tensor] = {}
    end = 8 + length
    for name, entry in sorted(table.items(), key=lambda item: _begin(path, item[0], item[1])):
        dtype, shape, begin, stop = _entry(path, name, entry)
        if 8 + length + begin != end:
            raise _refused(f"{name} of {path} does not begin where the one before it ends", "save it again")
        end = 8 + length + stop
        tensors[name] = Tensor(dtype, shape, _reader(path, descriptor, 8 + length + begin))
    if end != size:
        raise _refused(f"{path} has {size} bytes, its header tells of {end}", "copy or download it again")
    return tensors, metadata if isinstance(metadata, dict) else {}


def _begin(path: Path, name: str, entry: Any) -> tuple[int, int]:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or any(type(one) is not int or one < 0 for one in offsets)
    ):
        raise _refused(f"the header of {path} has no place for {name}", "copy or download it again")
    return offsets[0], offsets[1]


def _entry(path: Path, name: str, entry: dict[str, Any]) -> tuple[str, tuple[int, ...], int, int]:
    begin, stop = _begin(path, name, entry)
    dtype, shape = entry.get("dtype"), entry.get("shape")
    if dtype not in ITEM_BYTES:
        raise _refused(
            f"{name} of {path} has the type {dtype!r}, which checkpoints do not keep",
            f"convert it to one of {', '.join(sorted(ITEM_BYTES))}",
        )
    if not isinstance(shape, list) or any(type(one) is not int or one < 0 for one in shape):
        raise _refused(f"{name} of {path} has the shape {shape!r}", "copy or download it again")
    if math.prod(shape) * ITEM_BYTES[dtype] != stop - begin:
        raise _refused(f"{name} of {path} has {stop - begin} bytes for {dtype}{shape}", "save it again")
    return dtype, tuple(shape), begin, stop


def _reader(path: Path, descriptor: int, start: int) -> Callable[[int, int], bytes]:
    def read(offset: int, length: int) -> bytes:
        pieces = []
        at = start + offset
        while length:
            piece = os.pread(descriptor, length, at)
            if not piece:
                raise _refused(f"{path} became shorter while it was read", "import a file that nobody writes")
            pieces.append(piece)
            at += len(piece)
            length -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    return read


def _origin(metadata: Mapping[str, Any]) -> Mapping[str, Any]:
    """Which checkpoint was exported to the file: its header's words, numbers as numbers."""
    if not {"job", "uid", "seq", "step"} <= metadata.keys():
        return {}
    known = ("cluster", "job", "uid", "seq", "step", "world")
    return {
        key: int(text) if text.isascii() and text.isdecimal() and key in ("seq", "step", "world") else text
        for key in known
        if isinstance(text := metadata.get(key), str)
    }


def _unreadable(path: Path, error: OSError) -> Refused:
    return _refused(f"cannot read {path}: {error.strerror or error}", "look at its name and its permissions")


def _refused(message: str, fix: str) -> Refused:
    return Refused(ErrorCode.USAGE, message, fix=fix)
