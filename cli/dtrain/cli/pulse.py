"""Whether the etcd of a run still answers: one that is frozen has not ended, and nobody else would say so.

A process that was stopped (SIGSTOP, a debugger, a machine that swaps) may come back, and
training goes on meanwhile; for ever it cannot, as nothing is committed and nobody may stop it.
"""

import time
from collections.abc import Callable

from dtrain.protocol.errors import ErrorCode, Unavailable

ASK_S = 2.0
"""Asked this often, and no longer waited for."""

SAID_S = 10.0
"""Silent for that long, it is said; an answer later is said, too."""

ENDED_S = 60.0
"""Silent for that long, the run ends."""


class Pulse:
    """``answers`` asks etcd, within ASK_S; ``say`` tells people."""

    def __init__(
        self,
        answers: Callable[[], bool],
        say: Callable[[str], None],
        *,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._answers, self._say, self._monotonic = answers, say, monotonic
        self._asked_at = self._heard_at = monotonic()
        self._told = False

    def check(self) -> None:
        """Ask, if it was not asked a moment ago. To be called often.

        Raises:
            Unavailable: it has been silent for too long.
        """
        if self._monotonic() - self._asked_at < ASK_S:
            return
        answered = self._answers()
        now = self._asked_at = self._monotonic()
        if answered:
            if self._told:
                self._say(f"etcd answers again, after {now - self._heard_at:.0f} s")
            self._heard_at, self._told = now, False
            return
        silent_s = now - self._heard_at
        if silent_s >= ENDED_S:
            raise Unavailable(
                ErrorCode.ETCD_UNAVAILABLE,
                f"the cluster of this run has broken: etcd runs, but has not answered for {silent_s:.0f} s",
                fix="run it again; look for what froze it: a debugger, SIGSTOP, a disk that hangs, swapping",
            )
        if silent_s >= SAID_S and not self._told:
            self._told = True
            self._say(
                f"etcd runs, but has not answered for {silent_s:.0f} s: nothing is saved or decided "
                f"meanwhile; the run ends if it stays silent for {ENDED_S:.0f} s"
            )
