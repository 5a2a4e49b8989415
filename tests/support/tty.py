"""A command on a real pseudo terminal, and the screen that somebody would see."""

import contextlib
import fcntl
import os
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

import pyte

LIMIT_S = 60.0


class Terminal:
    """Runs a command on a terminal of its own; ``screen`` is what is on it after ``until``."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        columns: int = 80,
        lines: int = 24,
        owned: bool = False,
    ) -> None:
        """``owned``: it is the command's controlling terminal: Ctrl-C reaches whoever is in front."""
        self.screen = pyte.Screen(columns, lines)
        self._stream = pyte.ByteStream(self.screen)
        self._master, self._slave = os.openpty()
        self._resize(columns, lines)
        self.before = termios.tcgetattr(self._slave)
        self.written = b""
        """All that the command wrote, escape sequences and all."""
        self.process = subprocess.Popen(
            command,
            env={"TERM": "xterm-256color", **env},
            stdin=self._slave,
            stdout=self._slave,
            stderr=self._slave,
            # A group whose parent is in its session can be stopped, as by a shell.
            process_group=None if owned else 0,
            start_new_session=owned,
            preexec_fn=_own if owned else None,  # noqa: PLW1509 - one system call, before the command is there
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(LIMIT_S)
        for fd in (self._master, self._slave):
            with contextlib.suppress(OSError):
                os.close(fd)

    @property
    def text(self) -> str:
        """All lines, without what is blank at their ends."""
        return "\n".join(line.rstrip() for line in self.screen.display)

    @property
    def lines(self) -> list[str]:
        return self.text.split("\n")

    def until(self, what: str, condition: Callable[[], object], limit_s: float = LIMIT_S) -> None:
        """Draw what the command writes until ``condition``."""
        deadline = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < deadline, f"not in {limit_s:g} s: {what}\n{self.text}"
            self.draw(0.05)

    def shows(self, *texts: str) -> None:
        """Wait until all these are on the screen."""
        self.until(f"{texts} on the screen", lambda: all(text in self.text for text in texts))

    def lacks(self, text: str) -> None:
        self.until(f"{text!r} is gone", lambda: text not in self.text)

    def draw(self, wait_s: float = 0.0) -> None:
        """Draw what there is, or comes soon."""
        while select.select([self._master], [], [], wait_s)[0]:
            try:
                data = os.read(self._master, 65536)
            except OSError:
                return
            self.written += data
            self._stream.feed(data)
            wait_s = 0.0

    def press(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def resize(self, columns: int, lines: int) -> None:
        self.screen.resize(lines, columns)
        self._resize(columns, lines)
        # The kernel tells only the foreground group of a controlling terminal.
        os.kill(self.process.pid, signal.SIGWINCH)

    @property
    def stopped(self) -> bool:
        """The process stands still, as after Ctrl-Z."""
        stat = Path(f"/proc/{self.process.pid}/stat").read_text()
        return stat.rpartition(")")[2].split()[0] == "T"

    @property
    def restored(self) -> bool:
        """The terminal is as it was before the command."""
        return termios.tcgetattr(self._slave) == self.before and self.written.rstrip().endswith(
            b"\x1b[?1049l"
        )

    def ended(self) -> int:
        """Wait for its end; the exit code. The terminal is as it was before."""
        self.until("the command ends", lambda: self.process.poll() is not None)
        self.draw()
        assert self.restored, self.written[-200:]
        return self.process.returncode

    def hang_up(self) -> None:
        """Close the window."""
        os.close(self._slave)
        os.close(self._master)

    def _resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))


def _own() -> None:
    """Make stdin the controlling terminal of this session."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
