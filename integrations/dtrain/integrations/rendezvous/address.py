"""Under which address other agents reach this one, if ``--local-addr`` does not say it."""

import socket
from collections.abc import Sequence

from dtrain.storage.etcd.access import split_endpoint


def own_address(endpoints: Sequence[str]) -> str:
    """Return the address of the interface that leads to etcd.

    Other agents are where etcd is, more often than they can resolve this host's
    name. An etcd on this machine says nothing: then it is the name, if there is
    one that resolves, and the loopback address otherwise.
    """
    found = {address for endpoint in endpoints if (address := _towards(endpoint))}
    outward = sorted(address for address in found if not _is_loopback(address))
    if outward:
        return outward[0]
    name = socket.getfqdn()
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        return next(iter(sorted(found)), "127.0.0.1")
    return name


def _towards(endpoint: str) -> str:
    try:
        _, host, port = split_endpoint(endpoint)
        family, kind, protocol, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            # Of a datagram socket this only asks the routing table; nothing is sent.
            probe.connect(target)
            return str(probe.getsockname()[0])
    except (OSError, ValueError):
        return ""


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"
