"""What the verbs ``cordon``, ``uncordon`` and ``drain`` share."""

import math
from typing import TYPE_CHECKING

from dtrain.protocol.cluster import Cordon
from dtrain.protocol.errors import ErrorCode, Refused, TimedOut

if TYPE_CHECKING:
    from dtrain.cli.client import Client

POLL_S = 5.0


def put(client: "Client", agent: str, *, reason: str, for_s: float, drain: bool) -> Cordon:
    """Cordon the agent that ``agent`` names, or is the unique beginning of.

    Raises:
        NotFound, Refused: no such agent, or several; or a time below a second.
    """
    from dtrain.cli.identity import whoami

    if 0 < for_s < 1:
        raise Refused(ErrorCode.USAGE, "a cordon lasts at least a second", fix="such as --for 2h")
    found = name(client, agent)
    return client.cordon(found, reason=reason, ttl_s=math.ceil(for_s), drain=drain, by=whoami())


def lift(client: "Client", agent: str) -> tuple[str, bool]:
    """Lift the cordon of an agent; the name, and whether there was one."""
    found = name(client, agent)
    return found, client.uncordon(found)


def await_empty(client: "Client", agent: str, *, timeout_s: float) -> None:
    """Return once no rank runs on ``agent``.

    Raises:
        TimedOut: some still do.
    """
    import time

    from dtrain.cli import records

    deadline = time.monotonic() + timeout_s
    revision = 0
    while True:
        wait_s = max(0.0, min(POLL_S, deadline - time.monotonic())) if revision else 0.0
        reading = client.read(f"agents/{agent}/", after_revision=revision, wait_s=wait_s)
        revision = reading.revision
        found = records.group(reading).agents.get(agent)
        workers = {} if found is None else found.workers
        left = sorted(
            job for job, snapshot in workers.items() if any(rank.exit_code is None for rank in snapshot.ranks)
        )
        if not left:
            return
        if time.monotonic() >= deadline:
            raise TimedOut(
                ErrorCode.WAIT_TIMED_OUT,
                f"{', '.join(left)} still has ranks on {agent}",
                fix=f"dtrain describe job {left[0]} says what it waits for",
            )


def document(record: Cordon, kind: str) -> dict[str, object]:
    """The record for ``-o json``."""
    return {
        "v": 1,
        "kind": kind,
        "name": record.agent,
        "reason": record.reason,
        "by": record.by,
        "until": record.until,
        "drain": record.drain,
    }


def name(client: "Client", wanted: str) -> str:
    """The full name of an agent, given it or its unique beginning."""
    from dtrain.cli import naming, records

    cluster = records.group(client.read("agents/"), client.read("cordons/"))
    return naming.find(cluster.agents, wanted, "agent")
