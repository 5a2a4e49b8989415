"""How a job or a machine stands, said in one way by whoever says it: CLI, dashboard, metrics. Pure."""

from collections.abc import Iterable

from dtrain.protocol.cluster import Cordon
from dtrain.protocol.job import JobStatus
from dtrain.protocol.snapshot import NodeRecord


def reported_step(stored: int, reported: Iterable[int]) -> int:
    """Return the newest step that every reporting rank has completed.

    ``stored``: as the leader last wrote it down; ``reported``: of the current
    attempt's ranks. Right after a restart ranks stand behind what was stored.
    """
    steps = list(reported)
    return max(stored, min(steps)) if steps else stored


def agent_status(node: NodeRecord | None, cordon: Cordon | None, *, has_work: bool) -> str:
    """Ready, Draining, Cordoned, Blocked (something on it does not die), or Lost (no lease).

    Draining: it is about to end, or an operator wants it empty and it is not yet.
    """
    if node is None:
        return "Lost"
    if node.draining is not None:
        return "Draining"
    if node.problem:
        return "Blocked"
    if cordon is None:
        return "Ready"
    return "Draining" if cordon.drain and has_work else "Cordoned"


def sentences(status: JobStatus | None) -> list[str]:
    """What the leader says of a job: its decision's sentence, then what it has noticed about its ranks."""
    if status is None:
        return ["waiting for a leader to look at it"]
    noticed = ("NonFinite", "Straggling")
    return [status.reason] + [
        one.message for one in status.conditions if one.type in noticed and one.status == "True"
    ]
