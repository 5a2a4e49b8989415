"""Under which address other agents reach this one, if ``--local-addr`` does not say it."""

import socket
from collections.abc import Sequence

from dtrain.runtime.addresses import towards


def own_address(endpoints: Sequence[str]) -> str:
    """Return this machine's address on the route to etcd.

    An etcd on this machine says nothing of the way that others take: then it is
    the machine's name, if it can be resolved.

    Raises:
        Refused: BAD_SETTING; no endpoint has an address and a route.
    """
    address = towards(endpoints, "--local-addr")
    if not address.startswith("127.") and address != "::1":
        return address
    name = socket.getfqdn()
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        return address
    return name
