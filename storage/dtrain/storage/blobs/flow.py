"""How a caller steers a write while it runs: its pace, how far it is, and its end.

A store asks before each piece leaves and says what has become durable; the
caller may end the write at any moment, also while a thread waits for a socket.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator

PIECE_BYTES = 1024 * 1024
"""What leaves between two looks at the pace: small enough for a smooth cap and for a slow line's timeout,
large enough that lanes do not spend their time on taking turns."""

PATIENCE_S = 60.0


class Stopped(Exception):
    """The caller ended the write: nothing more is sent, and nobody waits for it."""


class Flow:
    """One write, or several with one end; safe for the threads of a store's lanes.

    Args:
        pace: told how many bytes are about to leave, returns for how many seconds
            they have to wait.
        patience_s: how long one part of a blob is sent again and again while the
            store does not answer, before the write fails as a whole.
        on_trouble: told, on some thread, why something has to be sent again.
    """

    def __init__(
        self,
        pace: Callable[[int], float] = lambda _size: 0.0,
        *,
        patience_s: float = PATIENCE_S,
        on_trouble: Callable[[str], None] = lambda _why: None,
    ) -> None:
        self.patience_s = patience_s
        self.troubled = on_trouble
        self._pace = pace
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._durable_bytes = 0
        self._taken_bytes = 0
        self._breakers: set[Callable[[], None]] = set()

    @property
    def durable_bytes(self) -> int:
        """What stores have confirmed so far."""
        return self._durable_bytes

    @property
    def taken_bytes(self) -> int:
        """What stores have taken so far, durable or not yet; what was sent twice counts twice."""
        return max(self._taken_bytes, self._durable_bytes)

    def admit(self, size: int) -> None:
        """Return once ``size`` more bytes may leave.

        Raises:
            Stopped: they may not.
        """
        self.wait(self._pace(size))

    def wait(self, seconds: float) -> None:
        """Wait, unless the write is over.

        Raises:
            Stopped: it is.
        """
        if self._stop.wait(seconds) if seconds > 0 else self._stop.is_set():
            raise Stopped

    def taken(self, size: int) -> None:
        """Take note of ``size`` more bytes that the store has and does not vouch for yet.

        For stores that confirm a blob as a whole: of the others ``confirmed`` says enough.
        """
        with self._lock:
            self._taken_bytes += size

    def confirmed(self, size: int) -> None:
        """Take note that the store holds ``size`` more bytes."""
        with self._lock:
            self._durable_bytes += size

    def stop(self) -> None:
        """End the write: whoever sends or waits for it raises ``Stopped``, at once."""
        with self._lock:
            self._stop.set()
            breakers = list(self._breakers)
        for breaker in breakers:
            breaker()

    def branch(self) -> "Flow":
        """Return a flow of the same pace with an end of its own, for a part of the write."""
        return Flow(self._pace, patience_s=self.patience_s)

    @contextlib.contextmanager
    def breaking(self, breaker: Callable[[], None]) -> Iterator[None]:
        """Have ``breaker`` called, on another thread, if the write is stopped inside the block.

        Raises:
            Stopped: it was before, or meanwhile.
        """
        with self._lock:
            self._breakers.add(breaker)
        try:
            self.wait(0)
            yield
        except Exception:
            # Whatever a broken socket looks like, this is why.
            self.wait(0)
            raise
        finally:
            with self._lock:
                self._breakers.discard(breaker)
