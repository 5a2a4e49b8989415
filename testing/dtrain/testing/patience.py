"""Reading from an etcd that a test has just hurt: the next election answers, seconds later."""

import contextlib
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import TypeVar

from dtrain.protocol.errors import Unavailable

T = TypeVar("T")

PATIENCE_S = 30.0
"""How long a read is repeated: several elections, with a frozen member asked first each time."""

_PAUSE_S = 0.05

_limited: ContextVar[bool] = ContextVar("limited", default=False)


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """In this block ``patiently`` asks once: whoever waits in it has a limit of its own."""
    before = _limited.set(True)
    try:
        yield
    finally:
        _limited.reset(before)


def patiently(read: Callable[[], T], limit_s: float = PATIENCE_S) -> T:
    """Return what ``read`` returns, called again for as long as etcd does not answer.

    Raises:
        Unavailable: etcd has not answered for ``limit_s``, or once in a ``limited`` block.
    """
    deadline = time.monotonic() + limit_s
    while True:
        try:
            return read()
        except Unavailable:
            if _limited.get() or time.monotonic() > deadline:
                raise
        time.sleep(_PAUSE_S)
