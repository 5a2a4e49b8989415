"""A file that appears when the machine is about to go, written by whatever knows of it.

Its first word may say when: a number of seconds, counted from when it was
written, or a time such as 2026-01-02T03:04:05Z. The rest is the reason.
"""

import re
import stat
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from dtrain.agent.notice_value import Notice, epoch_s, one_line
from dtrain.protocol.errors import ErrorCode, Refused

READ_BYTES_MAX = 4096


@dataclass(frozen=True, slots=True)
class FileSource:
    """Looks whether ``path`` is there."""

    path: Path

    @classmethod
    def of(cls, text: str) -> "FileSource":
        """Parse ``/path``, ``file:/path`` or ``file:///path``.

        Raises:
            Refused: BAD_SETTING; it is no absolute path.
        """
        found = urlsplit(text)
        path = text if text.startswith("/") else unquote(found.path)
        if found.netloc or not path.startswith("/") or path == "/":
            raise Refused(
                ErrorCode.BAD_SETTING,
                f"--preemption-notice cannot be {text!r}: that is no absolute path",
                fix="name the file that will appear, such as file:/run/preempted",
            )
        return cls(Path(path))

    def look(self, wall: float) -> Notice | None:
        """See ``notices.Source``; a file that cannot be read is a notice without details."""
        try:
            found = self.path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        text = ""
        # A pipe or a device would be waited for.
        if stat.S_ISREG(found.st_mode):
            try:
                with self.path.open("rb") as file:
                    text = file.read(READ_BYTES_MAX).decode(errors="replace")
            except OSError:
                text = ""
        word, _, rest = " ".join(text.split()).partition(" ")
        until = found.st_mtime + float(word) if re.fullmatch(r"\d{1,6}(\.\d+)?", word) else epoch_s(word)
        why = one_line(text if until is None else rest)
        reason = f"preemption notice: {why or self.path}"
        return Notice(reason, None if until is None else until - wall)
