"""The terminal: lines in place, keys, its size, and how it was before.

Only lines that differ are written, each frame at once, so that nothing flickers. However the
program ends, but for SIGKILL, the terminal is as it was: the frame is on the alternate screen.
Escape sequences are those that every terminal since the VT220 has, and xterm's for the
alternate screen; a terminal that does not know that one shows the frame in place.
"""

import codecs
import contextlib
import os
import select
import signal
import sys
import termios
import tty
from collections.abc import Sequence
from types import FrameType
from typing import Any

from dtrain.cli import terminal
from dtrain.cli.top.frame import Line

ESCAPE_S = 0.05
"""The rest of a key's sequence follows its first byte within this; else it was Esc itself."""

READ_BYTES = 1024

_ENTER = "\x1b[?1049h\x1b[?25l\x1b[?7l\x1b[2J"
# Below the picture first, for terminals that have no other screen to go back to.
_LEAVE = "\x1b[0m\x1b[?7h\x1b[?25h\x1b[999;1H\r\n\x1b[?1049l"
# Terminals that know it show what is between at once; others pass over it.
_BEGIN, _END = "\x1b[?2026h", "\x1b[?2026l"
_CODES = {"bold": "1", "dim": "2", "selected": "7", "red": "31", "green": "32", "yellow": "33"}
_COLOURS = {"red", "green", "yellow"}

_KEYS = {
    "\x1b[A": "up",
    "\x1b[B": "down",
    "\x1b[C": "right",
    "\x1b[D": "left",
    "\x1bOA": "up",
    "\x1bOB": "down",
    "\x1bOC": "right",
    "\x1bOD": "left",
    "\x1b[H": "home",
    "\x1b[F": "end",
    "\x1bOH": "home",
    "\x1bOF": "end",
    "\x1b[1~": "home",
    "\x1b[4~": "end",
    "\x1b[7~": "home",
    "\x1b[8~": "end",
    "\x1b[5~": "pageup",
    "\x1b[6~": "pagedown",
    "\x1b[Z": "backtab",
    "\x1b": "esc",
    "\r": "enter",
    "\n": "enter",
    "\t": "tab",
    " ": "space",
    "\x7f": "backspace",
    "\x08": "backspace",
}


def usable() -> bool:
    """Whether keys can be read and lines changed in place."""
    return sys.stdin.isatty() and terminal.moves(sys.stdout)


class Keys:
    """Makes keys of what a terminal sends, however it is cut into pieces."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._text = ""

    @property
    def waiting(self) -> bool:
        """The beginning of a sequence is there, or Esc."""
        return bool(self._text)

    def feed(self, data: bytes) -> list[str]:
        """Keys that are whole now."""
        self._text += self._decoder.decode(data)
        keys = []
        while self._text:
            taken = _sequence(self._text)
            if taken is None:
                break
            found, self._text = self._text[:taken], self._text[taken:]
            # Keys that nothing is known of mean nothing; letters mean themselves.
            if (key := _KEYS.get(found, found)) and (len(found) == 1 or found in _KEYS):
                keys.append(key)
        return keys

    def rest(self) -> list[str]:
        """What waits for more that has not come: Esc."""
        text, self._text = self._text, ""
        return ["esc"] if text == "\x1b" else []


def _sequence(text: str) -> int | None:
    """Length of the first key; None: it may go on."""
    if text[0] != "\x1b":
        return 1
    if len(text) == 1:
        return None
    if text[1] == "\x1b":
        return 1
    if text[1] == "O":
        return 3 if len(text) > 2 else None
    if text[1] != "[":
        return 2
    for place, character in enumerate(text[2:], 2):
        if "\x40" <= character <= "\x7e":
            return place + 1
    return None


class Screen:
    """The terminal of this process, between ``enter`` and ``leave``; a context manager of both."""

    def __init__(self) -> None:
        self._in, self._out = sys.stdin.fileno(), sys.stdout.fileno()
        self._colours = terminal.colours(sys.stdout)
        self._before: list[Any] = []
        self._handlers: dict[int, Any] = {}
        self._shown: list[str] = []
        self._size = (0, 0)
        self._keys = Keys()
        self._wake_r, self._wake_w = os.pipe()
        os.set_blocking(self._wake_w, False)
        self.closed = False
        """The terminal has gone."""

    def __enter__(self) -> "Screen":
        self._enter()
        for number, handler in (
            (signal.SIGWINCH, self._resized),
            (signal.SIGTSTP, self._suspended),
            (signal.SIGTERM, self._ended),
            (signal.SIGHUP, self._ended),
        ):
            self._handlers[number] = signal.signal(number, handler)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._leave()

    def wake(self) -> None:
        """Let ``keys`` return at once; from any thread."""
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake_w, b"x")

    def size(self) -> tuple[int, int]:
        """Columns and lines, at least 1."""
        try:
            found = os.get_terminal_size(self._out)
        except OSError:
            return 80, 24
        return (found.columns or 80), (found.lines or 24)

    def show(self, lines: Sequence[Line], size: tuple[int, int]) -> None:
        """Make the screen, which has this size, show ``lines``."""
        text = ""
        if size != self._size:
            self._size, self._shown, text = size, [], "\x1b[0m\x1b[2J"
        now = [self._styled(line) for line in lines] + [""] * (size[1] - len(lines))
        for place, line in enumerate(now):
            if place >= len(self._shown) or self._shown[place] != line:
                text += f"\x1b[{place + 1};1H{line}\x1b[0m\x1b[K"
        self._shown = now
        if text:
            self._write(f"{_BEGIN}{text}{_END}")

    def keys(self, timeout_s: float) -> list[str]:
        """Keys that are pressed; [] after ``timeout_s``, or when something else has to be shown."""
        ready, _, _ = select.select([self._in, self._wake_r], [], [], timeout_s)
        if self._wake_r in ready:
            os.read(self._wake_r, READ_BYTES)
        if self._in not in ready:
            return []
        keys = self._read()
        while self._keys.waiting and not self.closed:
            if not select.select([self._in], [], [], ESCAPE_S)[0]:
                return keys + self._keys.rest()
            keys += self._read()
        return keys

    def _read(self) -> list[str]:
        try:
            data = os.read(self._in, READ_BYTES)
        except OSError:
            data = b""
        self.closed |= not data
        return self._keys.feed(data)

    def _styled(self, line: Line) -> str:
        code = _CODES.get(line.style, "") if self._colours or line.style not in _COLOURS else ""
        if not code:
            return line.text
        if not line.word:
            return f"\x1b[{code}m{line.text}"
        # A row's first cell is its name, which may contain the word.
        before, word, after = line.text.partition(f" {line.word}")
        return f"{before}\x1b[{code}m{word}\x1b[0m{after}"

    def _enter(self) -> None:
        self._before = termios.tcgetattr(self._in)
        tty.setcbreak(self._in)
        self._size = (0, 0)
        self._write(_ENTER)

    def _leave(self) -> None:
        with contextlib.suppress(OSError, termios.error):
            self._write(_LEAVE)
            termios.tcsetattr(self._in, termios.TCSAFLUSH, self._before)

    def _write(self, text: str) -> None:
        data = text.encode(errors="replace")
        try:
            while data:
                data = data[os.write(self._out, data) :]
        except OSError:
            self.closed = True

    # Signals: Python runs these between two steps of the main thread, whose wait goes on afterwards.

    def _resized(self, _number: int, _frame: FrameType | None) -> None:
        self.wake()

    def _suspended(self, number: int, _frame: FrameType | None) -> None:
        self._leave()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        # Here it goes on after SIGCONT.
        signal.signal(number, self._suspended)
        self._enter()
        self.wake()

    def _ended(self, number: int, _frame: FrameType | None) -> None:
        self._leave()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
