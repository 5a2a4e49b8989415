"""From an archive to a folder. What the archive says is checked as if an enemy had written it.

Only folders, plain files and links that stay inside exist in a package. Files are created, never
opened; links come last, so that nothing is ever written through one; modes are one of two; and no
more is written than the package's record says. Whoever calls this has verified the archive's digest.
"""

import gzip
import os
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, cast

from dtrain.protocol.errors import ErrorCode, Refused
from dtrain.protocol.package import ENTRY_BYTES_MAX, Package
from dtrain.storage.packages.links import leads
from dtrain.storage.packages.packing import EXECUTABLE, MTIME, PLAIN

_COPY_BYTES = 1024 * 1024
_SLACK_BYTES = 1024 * 1024
"""The archive's end: zeros up to a full record."""


def unpack(archive: IO[bytes], target: Path, package: Package) -> None:
    """Fill ``target``, a new and empty folder, with what ``archive`` holds.

    Raises:
        Refused: PACKAGE_DAMAGED; it is not an archive, or holds what no package does. What was
            written until then stays.
        OSError: of the disk.
    """
    limit = package.files_bytes + (package.files + 1) * ENTRY_BYTES_MAX + _SLACK_BYTES
    try:
        with gzip.GzipFile(fileobj=archive, mode="rb") as packed:
            bounded = cast("IO[bytes]", _Bounded(packed, limit))
            tar = tarfile.open(fileobj=bounded, mode="r|", encoding="utf-8")  # noqa: SIM115  it owns nothing
            _Unpacking(target, package).run(tar)
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, UnicodeError, ValueError) as error:
        raise unsafe(f"is no archive of a package ({error})") from error


def unsafe(what: str) -> Refused:
    """The error for a package that is not what it should be."""
    return Refused(
        ErrorCode.PACKAGE_DAMAGED,
        f"the package {what}",
        fix="submit the job again: the folder is packed anew",
    )


class _Bounded:
    """A reader that ends what unpacks to more than it may."""

    def __init__(self, packed: gzip.GzipFile, limit: int) -> None:
        self._packed = packed
        self._left = limit

    def read(self, size: int) -> bytes:
        data = self._packed.read(min(size, self._left + 1))
        self._left -= len(data)
        if self._left < 0:
            raise unsafe("unpacks to more than its record says")
        return data


def _link(to: str) -> Callable[[Path], None]:
    return lambda place: place.symlink_to(to)


class _Unpacking:
    def __init__(self, target: Path, package: Package) -> None:
        self._target = target
        self._package = package
        self._folders = {""}
        self._links: dict[str, str] = {}
        self._count = 0
        self._bytes = 0

    def run(self, tar: tarfile.TarFile) -> None:
        for member in tar:
            self._count += 1
            self._bytes += member.size
            if self._count > self._package.files or self._bytes > self._package.files_bytes:
                raise unsafe("holds more than its record says")
            path = self._path(member.name)
            if member.isdir():
                self._create(path, lambda place: place.mkdir(mode=EXECUTABLE))
                self._folders.add(path)
            elif member.issym():
                self._links[path] = member.linkname
            elif member.isreg() and not member.issparse():
                self._file(tar, member, path)
            else:
                raise unsafe(f"holds {path!r}, which is neither a file, a folder nor a link")
        if (self._count, self._bytes) != (self._package.files, self._package.files_bytes):
            raise unsafe("holds less than its record says")
        for path, to in self._links.items():
            if "\0" in to or leads(self._links, path) is None:
                raise unsafe(f"holds a link {path!r} that leads out of it")
            self._create(path, _link(to))

    def _path(self, name: str) -> str:
        parts = name.split("/")
        if any(part in ("", ".", "..") for part in parts) or "\0" in name:
            raise unsafe(f"holds the name {name!r}, which could lie outside of it")
        above = "/".join(parts[:-1])
        # Folders come before what is in them: what lies below a link, or nowhere, is not ours.
        if above not in self._folders:
            raise unsafe(f"holds {name!r} without its folder")
        return name

    def _file(self, tar: tarfile.TarFile, member: tarfile.TarInfo, path: str) -> None:
        source = tar.extractfile(member)
        assert source is not None, "a plain file has contents"
        mode = EXECUTABLE if member.mode & 0o100 else PLAIN

        def write(place: Path) -> None:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            with os.fdopen(os.open(place, flags, 0o600), "wb") as file:
                while data := source.read(_COPY_BYTES):
                    file.write(data)
                file.flush()
                # Not by the process's umask: what is executable here is so on every machine.
                os.fchmod(file.fileno(), mode)
                os.utime(file.fileno(), (MTIME, MTIME))

        self._create(path, write)

    def _create(self, path: str, make: Callable[[Path], None]) -> None:
        try:
            make(self._target / path)
        except FileExistsError as error:
            # Twice in the archive, or two names that are one to this disk.
            raise unsafe(f"holds {path!r} twice, in upper and lower case perhaps") from error
