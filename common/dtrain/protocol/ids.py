"""Names and numbers that identify things, as types.

``parse_name`` is the only way from a string of the outside world to a name:
what it returns is safe inside an etcd key, a store path and a log line.
"""

import re
from typing import NewType

from dtrain.protocol.errors import ErrorCode, Refused

ClusterName = NewType("ClusterName", str)
JobName = NewType("JobName", str)
AgentName = NewType("AgentName", str)
ReplicaId = NewType("ReplicaId", str)

Uid = NewType("Uid", str)
"""One submission of a job; a name used again gets a new uid."""

Term = NewType("Term", int)
"""Create revision of the leader key: strictly increasing, one per leadership."""

Attempt = NewType("Attempt", int)
"""Number of a (re)start of a job; 0 means that none has begun."""

Rank = NewType("Rank", int)
Step = NewType("Step", int)
"""Steps completed: a checkpoint of step 40 holds the state after 40 steps."""

Seq = NewType("Seq", int)
"""Number of a checkpoint of one job; never used twice, aborted ones included."""

Incarnation = NewType("Incarnation", str)
"""One life of an agent process; tells a restarted agent from its former self."""

Revision = NewType("Revision", int)
"""An etcd revision."""

RESTORE_BUMP_LEAST = 100_000_000
"""A leap of etcd's revision by so much is a restored backup whose revisions were raised, as they must be:
no revision of the former history, and so no term, can occur again. Nobody writes that much unnoticed."""

_NAME = re.compile(r"[a-z0-9](?:[-a-z0-9]{0,61}[a-z0-9])?")


_TOKEN = re.compile(r"[A-Za-z0-9][-A-Za-z0-9_]{0,63}")


def parse_token(text: str, what: str) -> str:
    """Return ``text`` if it may be a uid or nonce: part of a path, chosen by a machine.

    Raises:
        Refused: it is not 1 to 64 letters, digits, hyphens and underscores.
    """
    if _TOKEN.fullmatch(text):
        return text
    raise Refused(
        ErrorCode.BAD_NAME,
        f"{text[:80]!r} is no {what}",
        fix="these are chosen by dtrain: 1 to 64 letters, digits, hyphens and underscores",
    )


def is_name(text: str) -> bool:
    """Tell whether ``parse_name`` accepts ``text``."""
    return _NAME.fullmatch(text) is not None


def parse_name(text: str, what: str) -> str:
    """Return ``text`` if it may name a ``what``; names become keys and paths.

    Raises:
        Refused: the text is not 1 to 63 lower-case letters, digits and inner
            hyphens, so ``..``, ``/``, control characters and Unicode never
            reach a key or a path.
    """
    if is_name(text):
        return text
    raise Refused(
        ErrorCode.BAD_NAME,
        f"{text[:80]!r} cannot name a {what}",
        fix="use 1 to 63 lower-case letters, digits and inner hyphens, such as train-7b",
    )
