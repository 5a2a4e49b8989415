"""A committed checkpoint written out in a format that other programs read.

Whatever is written appears under its name in one move, whole and synced: a
killed export leaves nothing that could be taken for a checkpoint. Every byte is
verified on the way.
"""

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from dtrain.protocol.checkpoint import Manifest
from dtrain.protocol.errors import Conflict, ErrorCode, Refused
from dtrain.storage.blobs.port import BlobStore
from dtrain.storage.checkpoints import objects, safetensors_files
from dtrain.storage.checkpoints.reading import TensorReader, size_bytes

SHARD_BYTES = 5 * 1000**3
"""Of one safetensors file in a folder of several."""


class Format(StrEnum):
    """What can be written."""

    SAFETENSORS = "safetensors"
    TORCH = "torch"
    DCP = "dcp"


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written, and where."""

    path: str
    format: str
    tensors: int
    bytes: int
    """Of the tensors."""


def export(
    store: BlobStore,
    manifest: Manifest,
    to: Path,
    kind: Format,
    *,
    only: Iterable[str] = (),
    shard_bytes: int = SHARD_BYTES,
    full: bool = False,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Exported:
    """Write the tracked names in ``only`` (default: all) to ``to``, which must not exist yet.

    ``safetensors``: one file if ``to`` ends in ``.safetensors``, else a folder of
    files with an index. ``torch``: one file for ``torch.load(weights_only=True)``.
    ``dcp``: a folder for ``torch.distributed.checkpoint.load``. The states of the
    ranks' random generators are left out unless ``full``: only who imports them uses them.

    Raises:
        DamageFound: the checkpoint is damaged; nothing is left of the export.
        Conflict: ALREADY_EXISTS.
        Refused: it cannot be written there, or not in this format.
    """
    names = objects.chosen(manifest, only, full=full)
    tensors = objects.tensor_names(manifest, names, everything=not list(only))
    total = sum(size_bytes(manifest.tensors[name]) for name in tensors)
    done = 0

    def on_written(count: int) -> None:
        nonlocal done
        done += count
        on_progress(done, total)

    with _replacing(to) as partial, TensorReader(store, manifest, tensors) as reader:
        if kind is Format.SAFETENSORS:
            safetensors_files.write(
                reader,
                manifest,
                names,
                tensors,
                partial,
                single=to.suffix == ".safetensors",
                shard_bytes=shard_bytes,
                on_written=on_written,
            )
        else:
            from dtrain.storage.checkpoints import torch_files

            write = torch_files.write_torch if kind is Format.TORCH else torch_files.write_dcp
            write(reader, manifest, names, tensors, partial, scratch=_beside(to), on_written=on_written)
    return Exported(str(to), kind.value, len(tensors), total)


def _beside(to: Path) -> Path:
    return to.with_name(f".{to.name}.{secrets.token_hex(4)}.partial")


@contextlib.contextmanager
def _replacing(to: Path) -> Iterator[Path]:
    if to.exists() or to.is_symlink():
        raise Conflict(
            ErrorCode.ALREADY_EXISTS, f"{to} exists already", fix="choose another name, or remove it first"
        )
    partial = _beside(to)
    try:
        try:
            to.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            _sync(partial)
            partial.rename(to)
            _sync_one(to.parent)
        finally:
            if partial.is_dir() and not partial.is_symlink():
                shutil.rmtree(partial, ignore_errors=True)
            else:
                partial.unlink(missing_ok=True)
    except OSError as error:
        raise Refused(
            ErrorCode.USAGE,
            f"cannot write {to}: {error.strerror or error}",
            fix="choose a folder that this user may write to, with space enough",
        ) from error


def _sync(path: Path) -> None:
    if path.is_dir():
        for inner in path.rglob("*"):
            _sync_one(inner)
    _sync_one(path)


def _sync_one(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
