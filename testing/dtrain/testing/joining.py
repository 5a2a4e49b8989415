"""Taking a member out of an etcd that runs, and bringing a new one in."""

import time
from collections.abc import Callable, Sequence

from dtrain.protocol.errors import ErrorCode, Unavailable
from dtrain.testing import members

LIMIT_S = 60.0
_CALL_S = 5.0


def remove(through: Sequence[str], name: str, limit_s: float = LIMIT_S) -> None:
    """Take the member called ``name`` out; done already is fine.

    Raises:
        Unavailable: the others did not agree in time.
    """

    def once(endpoint: str) -> None:
        known = members.call(endpoint, "/v3/cluster/member/list", {}, _CALL_S).get("members", [])
        for member in known:
            if member.get("name") == name:
                members.call(endpoint, "/v3/cluster/member/remove", {"ID": member["ID"]}, _CALL_S)

    _patiently(through, f"take {name} out", limit_s, once)


def add(through: Sequence[str], peer_url: str, limit_s: float = LIMIT_S) -> None:
    """Bring in a member that will be reached at ``peer_url``; done already is fine.

    Raises:
        Unavailable: the others did not agree in time.
    """

    def once(endpoint: str) -> None:
        known = members.call(endpoint, "/v3/cluster/member/list", {}, _CALL_S).get("members", [])
        if not any(peer_url in member.get("peerURLs", ()) for member in known):
            members.call(endpoint, "/v3/cluster/member/add", {"peerURLs": [peer_url]}, _CALL_S)

    _patiently(through, f"add {peer_url}", limit_s, once)


def _patiently(through: Sequence[str], what: str, limit_s: float, once: Callable[[str], None]) -> None:
    deadline = time.monotonic() + limit_s
    while True:
        for endpoint in through:
            try:
                once(endpoint)
            except (OSError, ValueError) as error:
                # Refused until all members have been connected to each other for five seconds.
                problem = error
            else:
                return
        if time.monotonic() > deadline:
            raise Unavailable(
                ErrorCode.ETCD_UNAVAILABLE, f"etcd did not {what} in {limit_s:g} s: {problem}"
            ) from problem
        time.sleep(0.2)
