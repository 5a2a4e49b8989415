"""This machine's addresses, as others may reach it. Standard library only."""

import socket
from collections.abc import Sequence
from urllib.parse import urlsplit

from dtrain.protocol.errors import ErrorCode, Refused

_WILDCARDS = ("", "0.0.0.0", "::")  # noqa: S104


def is_wildcard(listen: str) -> bool:
    """Tell whether ``listen`` (host:port) means every address of this machine, and so none to call."""
    return listen.rpartition(":")[0].strip("[]") in _WILDCARDS


def bracketed(host: str) -> str:
    """Return the host as it stands before a port."""
    return f"[{host}]" if ":" in host else host


def towards(endpoints: Sequence[str], setting: str) -> str:
    """Return this machine's address on the route to etcd: peers most likely share that network.

    ``setting`` is the flag that would have said it.

    Raises:
        Refused: BAD_SETTING; no endpoint has an address and a route.
    """
    for endpoint in endpoints:
        try:
            url = urlsplit(endpoint if "://" in endpoint else f"http://{endpoint}")
            found = socket.getaddrinfo(url.hostname, url.port or 2379, type=socket.SOCK_DGRAM)
        except (OSError, ValueError):
            continue
        for family, kind, protocol, _, address in found:
            try:
                # No packet is sent: connecting a datagram socket only picks the route.
                with socket.socket(family, kind, protocol) as probe:
                    probe.connect(address)
                    return str(probe.getsockname()[0])
            except OSError:
                continue
    raise Refused(
        ErrorCode.BAD_SETTING,
        "no etcd endpoint can be resolved, so this machine's address is not known",
        fix=f"check --endpoints, or say {setting}",
    )
