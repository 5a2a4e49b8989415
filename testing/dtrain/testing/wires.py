"""Who is cut off from whom, and the commands that let packets vanish.

A packet to a node that is cut off is sent to an address of the network card that
nobody has. Unlike a route that refuses, the sender learns nothing: connections
stay open, new ones time out, as when a switch drops everything. Both sides do so.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence

NOBODY = "02:00:00:00:00:01"
"""A locally administered address: no network card has it."""


class Cuts:
    """Which pairs of nodes do not reach each other."""

    def __init__(self) -> None:
        self._pairs: set[tuple[str, str]] = set()

    def cut(self, side_a: Iterable[str], side_b: Iterable[str]) -> None:
        """Cut every node of one side off from every node of the other."""
        side_b = list(side_b)
        for one in side_a:
            for other in side_b:
                if one != other:
                    self._pairs |= {(one, other), (other, one)}

    def peers(self, node: str) -> set[str]:
        """Whom ``node`` does not reach."""
        return {other for one, other in self._pairs if one == node}

    def heal(self) -> dict[str, set[str]]:
        """Forget all cuts; return whom each node did not reach."""
        found: dict[str, set[str]] = defaultdict(set)
        for one, other in self._pairs:
            found[one].add(other)
        self._pairs.clear()
        return dict(found)


def cut_script(subnet: str, addresses: Sequence[str]) -> str:
    """Return the shell commands that let packets to ``addresses`` vanish."""
    lines = [f"ip neigh replace {address} lladdr {NOBODY} nud permanent dev $dev" for address in addresses]
    return "\n".join([_device(subnet), *lines])


def mend_script(subnet: str, addresses: Sequence[str]) -> str:
    """Return the shell commands that let them through again."""
    # Gone with the card where the node was disconnected meanwhile.
    lines = [f"ip neigh del {address} dev $dev || true" for address in addresses]
    return "\n".join([_device(subnet), *lines])


def _device(subnet: str) -> str:
    # Its number changes when a node is disconnected and connected again.
    return f'set -- $(ip -4 route show {subnet}); dev=$3; test -n "$dev"'
