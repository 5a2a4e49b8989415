"""Which releases of dtrain may run one cluster: the same minor release, and the one before or after it.

What is further apart still works as far as it goes, because records and messages
only ever grow within a major version; nobody tests it, so that an operator is told.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping

from dtrain.protocol import codec
from dtrain.protocol.cluster import ReplicaRecord
from dtrain.protocol.errors import DtrainError
from dtrain.protocol.ids import ClusterName
from dtrain.protocol.keys import Keys
from dtrain.protocol.snapshot import NodeRecord
from dtrain.protocol.wording import some
from dtrain.storage.etcd.port import KeyValue

NAMED_MAX = 3
"""Names in one sentence."""

_NUMBERS = re.compile(r"(\d+)\.(\d+)")


class Releases:
    """What the other processes of a cluster run, as the mirror has it.

    ``listed`` returns what is under a prefix.
    """

    def __init__(self, own: str, cluster: ClusterName, listed: Callable[[str], Iterable[KeyValue]]) -> None:
        self._own = own
        self._keys = Keys(cluster)
        self._listed = listed
        # Read once per life of an agent: ten thousand records need not be decoded at every look.
        self._known: dict[str, tuple[int, str]] = {}

    def remarks(self) -> Iterator[str]:
        """Tell which of them this release does not go with."""
        agents: dict[str, str] = {}
        replicas: dict[str, str] = {}
        known: dict[str, tuple[int, str]] = {}
        for kv in (*self._listed(self._keys.agents), *self._listed(f"{self._keys.root}coordinators/")):
            parsed = self._keys.parse(kv.key)
            if parsed is None or parsed.kind not in ("node", "coordinator"):
                continue
            revision, version = self._known.get(kv.key, (0, ""))
            if revision != kv.mod_revision:
                version = _version(NodeRecord if parsed.kind == "node" else ReplicaRecord, kv.value)
            known[kv.key] = (kv.mod_revision, version)
            where, name = (agents, parsed.agent) if parsed.kind == "node" else (replicas, parsed.name)
            where[name] = version
        self._known = known
        return sentences(self._own, agents, replicas)


def sentences(own: str, agents: Mapping[str, str], replicas: Mapping[str, str]) -> Iterator[str]:
    """Tell which agents and replicas run a release that this one does not go with; by name, its version."""
    for what, versions in (("agent", agents), ("coordinator", replicas)):
        far = {name: version for name, version in versions.items() if not goes_with(own, version)}
        for version in sorted(set(far.values())):
            names = sorted(name for name in far if far[name] == version)
            yield (
                f"{what} {some(names, NAMED_MAX)} runs dtrain {version} and this replica {own}: at most one "
                "minor release may lie between them; upgrade coordinators, then agents, one minor "
                "release at a time"
            )


def goes_with(own: str, other: str) -> bool:
    """Say whether two releases may run one cluster; True where one of them cannot be read."""
    mine, theirs = _minor(own), _minor(other)
    if mine is None or theirs is None:
        return True
    return mine[0] == theirs[0] and abs(mine[1] - theirs[1]) <= 1


def _version(kind: type[NodeRecord] | type[ReplicaRecord], record: bytes) -> str:
    try:
        return codec.decode(kind, record).version
    except DtrainError:
        return ""  # of another major version: whoever needs the record says so


def _minor(version: str) -> tuple[int, int] | None:
    found = _NUMBERS.match(version)
    return (int(found[1]), int(found[2])) if found is not None else None
