"""Measures coordinators and agents: what replicas say, and whether addresses answer from here."""

import contextlib
import socket
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version

from dtrain.cli import listing
from dtrain.cli.answers import ReplicaInfo
from dtrain.cli.client import Client, closing
from dtrain.cli.doctor import judging
from dtrain.cli.doctor.findings import Check, Verdict, warn
from dtrain.protocol.errors import DtrainError

CONNECT_S = 2.0
CONNECTS_AT_ONCE = 32
CONNECTED_MAX = 256
"""Of a larger fleet so many agents are connected to: what is wrong with addresses is wrong with many."""

Open = Callable[[], Client]


def checks(connect: Open) -> list[Check]:
    """What to look at, through clients that ``connect`` makes."""
    return [
        Check("coordinators", "leader", lambda: _replicas(connect)),
        Check("coordinators", "versions", lambda: _versions(connect)),
        Check("agents", "fleet", lambda: _fleet(connect)),
        Check("agents", "addresses", lambda: _addresses(connect), limit_s=30.0),
    ]


def _replicas(connect: Open) -> Iterator[Verdict]:
    with closing(connect()) as client:
        told = client.info_each(timeout_s=CONNECT_S)
    well = [one for one in told.values() if isinstance(one, ReplicaInfo)]
    leaders = [(one.replica, one.term) for one in well if one.leader]
    gone = [address for address, one in told.items() if isinstance(one, DtrainError)]
    yield judging.leadership([one.replica for one in well], leaders, gone)
    for one in well:
        yield judging.mirror(one.replica, one.mirror_age_s)
        for problem in one.problems:
            yield warn(f"{one.replica}: {problem}", "dtrain get coordinators shows when it is over")


def _versions(connect: Open) -> Iterator[Verdict]:
    found: dict[str, list[str]] = defaultdict(list)
    found[version("dtrain")].append("this client")
    with closing(connect()) as client:
        for address, one in client.info_each(timeout_s=CONNECT_S).items():
            if isinstance(one, ReplicaInfo):
                found[one.version].append(one.replica or address)
        for row in listing.agents(client).rows:
            if row.version:
                found[row.version].append(row.name)
    yield judging.versions(found)


def _fleet(connect: Open) -> Iterator[Verdict]:
    with closing(connect()) as client:
        rows = listing.agents(client).rows
    blocked = {row.name: row.reason or row.status for row in rows if row.status == "Blocked"}
    cordoned = [row.name for row in rows if row.status in ("Cordoned", "Draining")]
    free = sum(row.slots - row.busy for row in rows if row.status == "Ready")
    yield judging.agents(len(rows), blocked, cordoned, free, sum(row.slots for row in rows))


def _addresses(connect: Open) -> Iterator[Verdict]:
    with closing(connect()) as client:
        rows = [row for row in listing.agents(client).rows if row.address][:CONNECTED_MAX]
    with ThreadPoolExecutor(CONNECTS_AT_ONCE) as pool:
        refused = [said for said in pool.map(lambda row: _refusal(row.name, row.address), rows) if said]
    yield judging.links(len(rows), refused)


def _refusal(name: str, address: str) -> str:
    host, _, port = address.rpartition(":")
    try:
        with contextlib.closing(socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S)):
            return ""
    except (OSError, ValueError) as error:
        return f"{name} at {address} ({error})"


def slots(connect: Open) -> tuple[Sequence[int], Sequence[int]]:
    """Free slots, and all slots, of each agent that takes ranks."""
    with closing(connect()) as client:
        rows = [row for row in listing.agents(client).rows if row.status == "Ready"]
    return [row.slots - row.busy for row in rows], [row.slots for row in rows]
