"""Several agents asked at once on behalf of one client."""

from collections.abc import Sequence
from typing import Any

from dtrain.protocol.ids import AgentName


def cancel(calls: Sequence[tuple[AgentName, Any]]) -> None:
    """Give up what is still under way: a client that hangs up must leave no call behind at an agent."""
    for _, call in calls:
        call.cancel()
