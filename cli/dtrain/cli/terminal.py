r"""What a terminal can do and wants; and what others wrote, made harmless for it.

Names, reasons and messages come from other people's jobs and machines: a line
break in one would forge a second line, and an escape sequence would move the
cursor, set the clipboard or the window's title. They are shown as ``\n`` and
``\x1b``. Programs get everything as it is, from ``-o json``.
"""

import os
import re
from typing import TextIO

_UNSAFE = re.compile(
    # Controls but for the tab, marks that turn the direction of text, line separators, lone surrogates
    r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
_UNSAFE_BYTES = re.compile(
    # Colours, tabs, and the carriage returns of progress bars are what logs are full of.
    rb"\x1b(?!\[[0-9;]{0,20}m)|[\x00-\x08\x0b\x0c\x0e-\x1a\x1c-\x1f\x7f]|\xc2[\x80-\x9f]"
)


def colours(stream: TextIO) -> bool:
    """Whether what goes there may be coloured.

    ``NO_COLOR`` (not empty) says never, then ``FORCE_COLOR`` (neither empty nor 0) always;
    else only a terminal gets them, and none that says it is a dumb one.
    """
    if os.environ.get("NO_COLOR"):
        return False
    return colours_forced() or moves(stream)


def colours_forced() -> bool:
    """Somebody wants colours in pipes and files, too."""
    return not os.environ.get("NO_COLOR") and os.environ.get("FORCE_COLOR", "") not in ("", "0")


def moves(stream: TextIO) -> bool:
    """Whether it is a terminal on which a line can be changed in place."""
    return stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown")


def text(line: str) -> str:
    """One line of prose without anything that a terminal would act on."""
    return line if line.isascii() and line.isprintable() else _UNSAFE.sub(_escape, line)


def log(data: bytes) -> bytes:
    """A piece of a log for a terminal: colours stay, every other escape sequence is shown as text."""
    return _UNSAFE_BYTES.sub(lambda found: "".join(f"\\x{byte:02x}" for byte in found[0]).encode(), data)


def _escape(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()
