"""What a coordinator of an older release could not read if it led next, and what is therefore not done yet.

While coordinators are upgraded one by one, leaders of both releases may alternate. Phases and kinds of
failure that the older one does not know would have it leave the job alone.
"""

import re
from collections.abc import Mapping
from enum import Enum

from dtrain.protocol.ids import ReplicaId
from dtrain.protocol.job import JobPhase, Wanted
from dtrain.protocol.snapshot import FailureKind

SINCE = (0, 2)

UNREAD_BEFORE: frozenset[Enum] = frozenset(
    {
        JobPhase.SUSPENDING,
        JobPhase.SUSPENDED,
        Wanted.SUSPEND,
        FailureKind.HANG,
        FailureKind.NONFINITE,
    }
)
"""Values of records that releases before SINCE refuse."""

_NUMBERS = re.compile(r"(\d+)\.(\d+)")


def withheld(versions: Mapping[ReplicaId, str]) -> str:
    """Say which coordinator is too old for UNREAD_BEFORE; "": all know it, as far as they say."""
    for replica, version in sorted(versions.items()):
        found = _NUMBERS.match(version)
        if found is not None and (int(found[1]), int(found[2])) < SINCE:
            return f"coordinator {replica} runs dtrain {version}"
    return ""
