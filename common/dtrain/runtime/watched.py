"""Values made of files that may be replaced while the process runs. Standard library only.

Certificates, passwords and lists of servers change on disk, by hand or by a
tool. Nobody is told: whoever needs the value asks here, which looks at the disk
at most once a second. What cannot be used, such as a certificate whose key has
not been copied yet, changes nothing: the last good value stays, and one line a
minute says so until the files fit again.
"""

import hashlib
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

T = TypeVar("T")

POLL_S = 1.0
COMPLAIN_EVERY_S = 60.0
BYTES_MAX = 1024 * 1024


class Watched(Generic[T]):
    """What ``load`` makes of the files at ``paths``; empty paths are left out. Safe for several threads.

    ``load`` raises OSError or ValueError for files that cannot be used. ``report``
    is told an event and its fields: the value was replaced, or could not be.
    ``initial`` is the last good value until the files have been read.
    """

    def __init__(
        self,
        what: str,
        paths: Sequence[str],
        load: Callable[[], T],
        *,
        monotonic: Callable[[], float],
        report: Callable[..., Any],
        initial: T | None = None,
        poll_s: float = POLL_S,
    ) -> None:
        self._what = what
        self._paths = tuple(path for path in paths if path)
        self._load = load
        self._monotonic = monotonic
        self._report = report
        self._poll_s = poll_s
        self._lock = threading.Lock()
        self._values: list[T] = [] if initial is None else [initial]
        self._version = len(self._values)
        self._look_at = float("-inf")
        self._stamp: tuple[Any, ...] = ()
        self._digest = b""
        self._error: Exception | None = None
        self._complained_at = float("-inf")

    @property
    def problem(self) -> str:
        """What is wrong with the files at present, "" for nothing."""
        with self._lock:
            if self._version:
                self._look_if_due()
            return f"{self._what}: {_text(self._error)}" if self._error is not None else ""

    def get(self) -> tuple[T, int]:
        """Return the value and its version, which rises with each other content of the files.

        Raises:
            OSError, ValueError: the files have never been usable.
        """
        with self._lock:
            self._look_if_due()
            if not self._values:
                assert self._error is not None
                raise self._error
            return self._values[0], self._version

    def _look_if_due(self) -> None:
        now = self._monotonic()
        if now >= self._look_at:
            self._look_at = now + self._poll_s
            self._look(now)

    def _look(self, now: float) -> None:
        if not self._paths and self._values:
            return
        try:
            # The stamp before the content: what changes in between is seen at the next look.
            stamp = tuple(_stamp(path) for path in self._paths)
            if self._values and self._error is None and stamp == self._stamp:
                return
            digest = _digest(self._paths)
            if not self._values or digest != self._digest:
                self._take(self._load())
        except (OSError, ValueError) as error:
            self._complain(error, now)
            return
        self._stamp, self._digest = stamp, digest
        self._error, self._complained_at = None, float("-inf")

    def _take(self, value: T) -> None:
        if self._values and value == self._values[0]:
            return
        self._values = [value]
        self._version += 1
        if self._version > 1:
            self._report(f"{self._what} replaced", files=list(self._paths))

    def _complain(self, error: Exception, now: float) -> None:
        self._error = error
        if now - self._complained_at >= COMPLAIN_EVERY_S:
            self._complained_at = now
            kept = "the former one stays in use" if self._values else "there is none to use"
            self._report(
                f"{self._what} not usable", files=list(self._paths), error=_text(error), outcome=kept
            )


def _stamp(path: str) -> tuple[int, ...]:
    found = os.stat(path)  # noqa: PTH116 - follows the links by which mounted secrets are switched
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _digest(paths: Sequence[str]) -> bytes:
    whole = hashlib.sha256()
    for path in paths:
        whole.update(read_bounded(path) + b"\0")
    return whole.digest()


def read_bounded(path: str) -> bytes:
    """Return a small file's content.

    Raises:
        OSError: it cannot be read.
        ValueError: it is larger than ``BYTES_MAX``.
    """
    with open(path, "rb") as file:  # noqa: PTH123 - the guardian's start is measured in milliseconds
        content = file.read(BYTES_MAX + 1)
    if len(content) > BYTES_MAX:
        raise ValueError(f"{path} is larger than {BYTES_MAX} bytes")
    return content


def read_password(path: str) -> str:
    """Return the password in a file, without the line's end.

    Raises:
        OSError, ValueError: it cannot be read, or is empty.
    """
    password = _read_text(path).strip()
    if not password:
        raise ValueError(f"{path} is empty")
    return password


def read_endpoints(path: str) -> tuple[str, ...]:
    """Return the URLs in a file: one or more a line, with commas between; ``#`` begins a comment.

    Raises:
        OSError, ValueError: it cannot be read, or names none.
    """
    words = [word.strip() for line in _read_text(path).splitlines() for word in line.split("#")[0].split(",")]
    found = tuple(dict.fromkeys(word for word in words if word))
    if not found:
        raise ValueError(f"{path} names no endpoint")
    return found


def _read_text(path: str) -> str:
    try:
        return read_bounded(path).decode()
    except UnicodeDecodeError:
        # Not chained: the original quotes the content, which may be a secret.
        raise ValueError(f"{path} is no text") from None


def _text(error: Exception | None) -> str:
    return str(error)[:300] or type(error).__name__
