"""Signals of a command that owns processes: the first ends it in order, the second at once."""

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _Interrupted(BaseException):
    """A signal asked this command to end; not an Exception, so that no handler swallows it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number

    @property
    def exit_code(self) -> int:
        """128 + n, as shells say it."""
        return 128 + self.number


class Foreground:
    """While entered, the first signal raises ``Interrupted`` in the main thread.

    The second calls ``at_once``, in a thread of its own because the main thread
    may be in the middle of anything, and leaves without looking back.
    """

    Interrupted = _Interrupted

    def __init__(self, at_once: Callable[[], None]) -> None:
        self._at_once = at_once
        self._first = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Foreground":
        for number in _SIGNALS:
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def wait(self) -> None:
        """Do nothing until a signal comes."""
        while True:
            signal.pause()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del frame
        if not self._first:
            self._first = number
            raise _Interrupted(number)
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        threading.Thread(target=self._leave, args=(number,), daemon=True).start()

    def _leave(self, number: int) -> None:
        try:
            self._at_once()
        finally:
            sys.stdout.flush()
            os._exit(128 + number)
