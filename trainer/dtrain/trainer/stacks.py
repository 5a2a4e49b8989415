"""What a rank can tell of itself when it stands still: its stacks, and its newest collective."""

import contextlib
import faulthandler
import json
import os
import sys
from typing import Any

from dtrain.protocol.ranklink import ENV_STACKS, STACKS_SIGNAL
from dtrain.trainer.session import Session

STILL_S = 1.0
"""A step that takes longer is worth a look into the flight recorder, once in so long."""
NAME_CHARS_MAX = 48


def write_on_signal() -> None:
    """Have the stacks of all threads written to the rank's log folder on a signal of the agent's.

    The launcher has seen to it in a rank that it forked; one that was started by another program has not.
    """
    path = os.environ.get(ENV_STACKS)
    if path:
        with contextlib.suppress(OSError, ValueError):
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            faulthandler.register(STACKS_SIGNAL, file, all_threads=True)


class Recorder:
    """Follows torch's flight recorder while the step stands still. For the link thread."""

    def __init__(self) -> None:
        self._step = -1
        self._looked_at = 0.0

    def follow(self, session: Session, now: float) -> None:
        """Look, if it is time, and tell the session."""
        if session.step != self._step:
            self._step, self._looked_at = session.step, now
            session.set_collective("")
        elif now - self._looked_at >= STILL_S:
            self._looked_at = now
            session.set_collective(newest_collective())


def newest_collective() -> str:
    """Number and name of the newest collective of the default process group, "" if nothing tells."""
    # Never the first to import it: that takes seconds, and a lock that the training thread may hold.
    torch_c10d: Any = sys.modules.get("torch._C._distributed_c10d")
    dump = getattr(torch_c10d, "_dump_fr_trace_json", None)
    if dump is None:
        return ""
    try:
        document = json.loads(dump(True, True))
        number = int(document["pg_status"]["0"]["last_enqueued_collective"])
        names = [entry.get("profiling_name", "") for entry in document.get("entries", ())]
    except Exception:  # noqa: BLE001 - a private function of another library's: whatever it does, no harm
        return ""
    if number < 0:
        return ""
    return f"{number} {names[-1] if names else ''}".strip()[:NAME_CHARS_MAX]
