"""What a coordinator of an older release could not read if it led next, and what is therefore not done yet.

While coordinators are upgraded one by one, leaders of both releases may alternate. Phases and kinds of
failure that the older one does not know would have it leave the job alone. Agents of both take part, too.
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
        if is_former(version):
            return f"coordinator {replica} runs dtrain {version}"
    return ""


def is_former(version: str) -> bool:
    """Whether this is a release before SINCE, as far as it says."""
    found = _NUMBERS.match(version)
    return found is not None and (int(found[1]), int(found[2])) < SINCE
