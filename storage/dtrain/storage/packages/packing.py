"""A folder as one archive whose bytes are a function of the packed files alone.

Names, contents, the executable bit and links count; owners, times, other modes and
the order in which a disk lists things do not. So the same sources have the same
digest on every machine, and are stored once.
"""

import contextlib
import gzip
import hashlib
import os
import stat
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import IO, cast

from dtrain.protocol.errors import ErrorCode, Refused
from dtrain.protocol.package import PACKAGE_BYTES_MAX, PACKAGE_FILES_MAX
from dtrain.protocol.wording import more
from dtrain.storage.packages.ignoring import DTRAINIGNORE, Rules, rules_of
from dtrain.storage.packages.links import leads

MTIME = 315_532_800
"""Of every entry: the first moment of 1980. Zip files, such as wheels, hold nothing older."""

PLAIN, EXECUTABLE = 0o644, 0o755
SHOWN_MAX = 10
NAME_BYTES_MAX = 4096
SEEN_MAX = 1_000_000
"""Names looked at, those that are left out included: what has more is not a folder of sources."""

_COPY_BYTES = 1024 * 1024
_COMPRESSION = 6

OnProgress = Callable[[int, int], None]


class Kind(StrEnum):
    """What an entry is."""

    FOLDER = "folder"
    FILE = "file"
    LINK = "link"


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing that is packed; ``path`` is relative, with slashes. ``target`` is a link's."""

    path: str
    kind: Kind
    size_bytes: int = 0
    executable: bool = False
    target: str = ""


@dataclass(frozen=True, slots=True)
class Listing:
    """What of a folder is packed, in the order of the archive."""

    root: Path
    entries: tuple[Entry, ...]

    @property
    def size_bytes(self) -> int:
        return sum(entry.size_bytes for entry in self.entries)


@dataclass(frozen=True, slots=True)
class Archive:
    """A written archive: the SHA-256 of its bytes in hex, and their number."""

    path: Path
    digest: str
    size_bytes: int
    listing: Listing


class CannotPackError(Refused):
    """A folder that cannot be packed; ``details`` has one line for each reason, or for each large file."""

    def __init__(self, message: str, details: Sequence[str], fix: str) -> None:
        super().__init__(ErrorCode.CANNOT_PACK, message, fix=fix)
        self.details = tuple(details)


def look(root: Path, *, bytes_max: int = PACKAGE_BYTES_MAX, files_max: int = PACKAGE_FILES_MAX) -> Listing:
    """List what of ``root`` would be packed.

    Raises:
        CannotPackError: links lead out of it, it has things that are no files, or it is too large.
        Refused: CANNOT_PACK; a file of rules cannot be read.
    """
    root = root.resolve()
    if not root.is_dir():
        raise CannotPackError(f"{root} is no folder", (), "give the folder that holds the script")
    problems: list[str] = []
    entries = sorted(_walk(root, rules_of(root), problems), key=lambda entry: entry.path.encode())
    links = {entry.path: entry.target for entry in entries if entry.kind is Kind.LINK}
    problems += [
        f"{path} is a link to {target!r}, which is not inside the folder"
        for path, target in links.items()
        if leads(links, path) is None
    ]
    problems += _clashes([entry.path for entry in entries], links)
    if problems:
        raise _odd(root, problems)
    listing = Listing(root, tuple(entries))
    if len(entries) > files_max or listing.size_bytes > bytes_max:
        raise _too_large(listing, bytes_max, files_max)
    return listing


def pack(listing: Listing, target: Path, on_progress: OnProgress = lambda _done, _total: None) -> Archive:
    """Write the archive of ``listing`` to the file ``target``, which must not exist.

    Raises:
        CannotPackError: a file was changed or taken away meanwhile, or cannot be read.
    """
    total, done = listing.size_bytes, 0
    with target.open("xb") as raw:
        tee = _Tee(raw)
        # No name and no time: the header of gzip would carry them.
        with (
            gzip.GzipFile("", "wb", _COMPRESSION, cast("IO[bytes]", tee), mtime=0) as packed,
            tarfile.open(fileobj=packed, mode="w|", format=tarfile.PAX_FORMAT, encoding="utf-8") as tar,
        ):
            for entry in listing.entries:
                if entry.kind is Kind.FILE:
                    with _opened(listing.root, entry) as file:
                        _add(tar, entry, file)
                else:
                    tar.addfile(_header(entry))
                done += entry.size_bytes
                on_progress(done, total)
    return Archive(target, tee.digest.hexdigest(), tee.size_bytes, listing)


def biggest(entries: Sequence[Entry], count: int = SHOWN_MAX) -> list[Entry]:
    """The largest files, the largest first."""
    files = [entry for entry in entries if entry.kind is Kind.FILE]
    return sorted(files, key=lambda entry: (-entry.size_bytes, entry.path))[:count]


# Looking ------------------------------------------------------------------------


def _walk(root: Path, rules: Rules, problems: list[str]) -> Iterator[Entry]:
    todo: list[tuple[str, Rules]] = [("", rules)]
    seen = 0
    while todo:
        folder, rules = todo.pop()
        try:
            # Names first: thousands of folders must not hold thousands of descriptors.
            with os.scandir(root / folder) as found:
                names = sorted(item.name for item in found)
        except OSError as error:
            problems.append(f"{folder or root} cannot be read: {error.strerror}")
            continue
        seen += len(names)
        if seen > SEEN_MAX:
            raise CannotPackError(
                f"{root} has more than {SEEN_MAX} files",
                (),
                f"give a folder that holds sources alone, or leave folders out in {DTRAINIGNORE}",
            )
        for name in names:
            path = f"{folder}/{name}" if folder else name
            try:
                about = (root / path).lstat()
            except FileNotFoundError:
                continue  # gone since: what is packed is what is there then
            is_folder = stat.S_ISDIR(about.st_mode)
            if rules.leaves_out(path, folder=is_folder):
                continue
            if problem := _bad_name(path):
                problems.append(problem)
                continue
            if is_folder:
                yield Entry(path, Kind.FOLDER)
                todo.append((path, rules.within(root, path)))
            elif stat.S_ISLNK(about.st_mode):
                yield Entry(path, Kind.LINK, target=_target(root, path))
            elif stat.S_ISREG(about.st_mode):
                executable = bool(about.st_mode & 0o100)
                yield Entry(path, Kind.FILE, about.st_size, executable)
            else:
                problems.append(f"{path} is {_what(about.st_mode)}")


def _bad_name(path: str) -> str:
    try:
        size = len(path.encode())
    except UnicodeEncodeError:
        return f"{path.encode(errors='surrogateescape')!r} is a name that is not UTF-8"
    if size > NAME_BYTES_MAX:
        return f"{path[:80]}… has a name of {size} bytes, the limit is {NAME_BYTES_MAX}"
    return ""


def _target(root: Path, path: str) -> str:
    """A link's target; an absolute one that stays inside the folder is made relative."""
    target = os.readlink(root / path)  # noqa: PTH115  the text itself, not a path
    if not target.startswith("/"):
        return target
    try:
        inside = Path(os.path.normpath(target)).relative_to(root)
    except ValueError:
        return target
    up = "../" * path.count("/")
    return f"{up}{inside.as_posix()}"


def _what(mode: int) -> str:
    kinds = ((stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket"))
    return next((name for test, name in kinds if test(mode)), "a device")


def _clashes(paths: Sequence[str], links: dict[str, str]) -> list[str]:
    """Names below a link that differs from their folder in case alone: on some disks they are the same."""
    folded = {path.casefold(): path for path in links}
    found = []
    for path in paths:
        parts = path.split("/")
        for count in range(1, len(parts) + 1):
            above = "/".join(parts[:count])
            link = folded.get(above.casefold())
            if link is not None and link != above:
                found.append(f"{path} and the link {link} differ in upper and lower case alone")
                break
    return found


def _odd(root: Path, problems: Sequence[str]) -> CannotPackError:
    shown = list(problems[:SHOWN_MAX])
    if left_out := more(len(problems), SHOWN_MAX):
        shown.append(left_out.strip())
    return CannotPackError(
        f"{root} cannot be packed: {len(problems)} of its entries would not be the same elsewhere",
        shown,
        f"name them in {DTRAINIGNORE} (written like a .gitignore), or set pack: false to run from a "
        "folder that all machines have",
    )


def _too_large(listing: Listing, bytes_max: int, files_max: int) -> CannotPackError:
    lines = [f"{_mb(entry.size_bytes):>10}  {entry.path}" for entry in biggest(listing.entries)]
    tops: dict[str, list[int]] = {}
    for entry in listing.entries:
        top, slash, _ = entry.path.partition("/")
        if slash:
            sums = tops.setdefault(top, [0, 0])
            sums[0] += entry.size_bytes
            sums[1] += 1
    folders = sorted(tops.items(), key=lambda item: (-item[1][0], -item[1][1]))[:5]
    lines += [f"{_mb(size):>10}  {top}/ ({count} entries)" for top, (size, count) in folders]
    return CannotPackError(
        f"{listing.root} has {len(listing.entries)} entries of {_mb(listing.size_bytes)}; a package holds "
        f"at most {files_max} of {_mb(bytes_max)}",
        lines,
        f"leave out what is no code in {DTRAINIGNORE} (written like a .gitignore) and read data from where "
        "all machines reach it, or set pack: false to run from a folder that all machines have",
    )


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.1f} MB"


# Writing ------------------------------------------------------------------------


class _Tee:
    """A file that is hashed as it is written."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.size_bytes = 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.size_bytes += len(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def _header(entry: Entry) -> tarfile.TarInfo:
    info = tarfile.TarInfo(entry.path)
    info.mtime = MTIME
    info.mode = EXECUTABLE if entry.executable or entry.kind is Kind.FOLDER else PLAIN
    if entry.kind is Kind.FOLDER:
        info.type = tarfile.DIRTYPE
    elif entry.kind is Kind.LINK:
        info.type, info.linkname, info.mode = tarfile.SYMTYPE, entry.target, 0o777
    else:
        info.size = entry.size_bytes
    return info


@contextlib.contextmanager
def _opened(root: Path, entry: Entry) -> Iterator[IO[bytes]]:
    try:
        # Without O_NOFOLLOW a file that became a link since could be any file of this machine.
        descriptor = os.open(root / entry.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise _changed(entry, error.strerror or str(error)) from error
    with os.fdopen(descriptor, "rb") as file:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode) or about.st_size != entry.size_bytes:
            raise _changed(entry, "it was changed while it was packed")
        yield file


def _add(tar: tarfile.TarFile, entry: Entry, file: IO[bytes]) -> None:
    try:
        tar.addfile(_header(entry), file)
    except OSError as error:
        # It became shorter; tarfile says "unexpected end of data".
        raise _changed(entry, str(error)) from error


def _changed(entry: Entry, why: str) -> CannotPackError:
    return CannotPackError(
        f"{entry.path} could not be packed: {why}", (), f"try again, or name it in {DTRAINIGNORE}"
    )
