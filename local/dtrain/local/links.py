"""The network between one daemon and etcd: a proxy in front of each member, all treated alike.

Links of different daemons do not share a proxy, so that one can be cut off
while the others, and whoever watches from outside, notice nothing.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from dtrain.local import ports
from dtrain.local.proxy import BLACK_HOLE, CUT, ONLY_TO_CLIENT, ONLY_TO_SERVER, Behaviour, TcpProxy
from dtrain.protocol.errors import ErrorCode, Refused

Way = Literal["both", "to etcd", "from etcd", "refused"]
"""What does not get through: everything; requests; answers. ``refused``: connections are reset at once."""

WAYS: tuple[Way, ...] = get_args(Way)

_BEHAVIOURS: Mapping[str, Behaviour] = {
    "both": BLACK_HOLE,
    "to etcd": ONLY_TO_CLIENT,
    "from etcd": ONLY_TO_SERVER,
    "refused": CUT,
}


class Links:
    """One daemon's links to the etcd members at ``endpoints``, in their order. ``close`` them."""

    def __init__(self, endpoints: Sequence[str]) -> None:
        self._ports = ports.reserve(len(endpoints))
        self._proxies = [
            TcpProxy(endpoint, port=port) for endpoint, port in zip(endpoints, self._ports, strict=True)
        ]

    @property
    def endpoints(self) -> tuple[str, ...]:
        """Client URLs for the daemon."""
        return tuple(proxy.endpoint for proxy in self._proxies)

    @property
    def proxies(self) -> tuple[TcpProxy, ...]:
        """One per member, for finer faults than these."""
        return tuple(self._proxies)

    def cut(self, way: Way = "both") -> None:
        """Let nothing pass, or nothing in one direction; connections stay open unless ``refused``.

        Raises:
            Refused: there is no such way.
        """
        if way not in _BEHAVIOURS:
            known = ", ".join(WAYS)
            raise Refused(ErrorCode.BAD_SETTING, f"links cannot be cut {way!r}", fix=f"use one of {known}")
        for proxy in self._proxies:
            proxy.set(_BEHAVIOURS[way])

    def slow(self, delay_s: float) -> None:
        """Deliver everything ``delay_s`` late, in each direction."""
        for proxy in self._proxies:
            proxy.delay(delay_s)

    def heal(self) -> None:
        """Let everything pass; what was held arrives now, late."""
        for proxy in self._proxies:
            proxy.passing()

    def close(self) -> None:
        """End the proxies and give their ports back."""
        for proxy in self._proxies:
            proxy.close()
        self._proxies = []
        ports.release(self._ports)
        self._ports = []
