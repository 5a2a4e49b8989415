"""Cordons: which machines get no new ranks. Written by whichever replica is asked, for an operator."""

import difflib
import secrets

from dtrain.coordinator.api.errors import contended
from dtrain.protocol import codec
from dtrain.protocol.cluster import Cordon
from dtrain.protocol.errors import ErrorCode, NotFound, OutcomeUnknown, Refused
from dtrain.protocol.ids import AgentName, ClusterName, parse_name
from dtrain.protocol.keys import Keys
from dtrain.runtime.clock import Clock, iso
from dtrain.storage.etcd.port import (
    Compare,
    Delete,
    Etcd,
    Get,
    KeyValue,
    Put,
    Target,
    Txn,
    flatten,
    prefix_end,
)

TRIES_MAX = 5
TEXT_CHARACTERS_MAX = 200
TTL_S_MIN, TTL_S_MAX = 5, 30 * 86_400
LEASE_BITS = 62
DEFAULT_REASON = "cordoned by an operator"


class Cordons:
    """Writes cordons. Safe for several threads."""

    def __init__(self, etcd: Etcd, cluster: ClusterName, clock: Clock) -> None:
        self._etcd = etcd
        self._keys = Keys(cluster)
        self._clock = clock

    def put(self, agent: str, reason: str, *, by: str, ttl_s: int, drain: bool) -> tuple[Cordon, int]:
        """Keep new ranks off a machine; with ``drain`` what runs there goes on elsewhere.

        ``ttl_s`` 0: until it is lifted. A cordon that is there is replaced: the newest word counts.

        Raises:
            NotFound: no such agent is registered, cordoned or suspected.
            Refused: a time that cannot be.
            Conflict: others kept changing it.
        """
        name = AgentName(parse_name(agent, "agent"))
        if ttl_s and not TTL_S_MIN <= ttl_s <= TTL_S_MAX:
            raise Refused(
                ErrorCode.USAGE,
                f"a cordon cannot last {ttl_s} s",
                fix=f"use {TTL_S_MIN} s to {TTL_S_MAX // 86_400} days, or no time at all: until it is lifted",
            )
        unknown: OutcomeUnknown | None = None
        for _ in range(TRIES_MAX):
            found = self._read(name)
            if not found:
                raise self._missing(name)
            now = self._clock.wall()
            record = Cordon(
                name,
                reason[:TEXT_CHARACTERS_MAX] or DEFAULT_REASON,
                by[:TEXT_CHARACTERS_MAX],
                iso(now + ttl_s) if ttl_s else "",
                drain,
            )
            lease = 0
            if ttl_s:
                lease = secrets.randbits(LEASE_BITS) or 1
                self._etcd.grant(ttl_s, lease)
            key = self._keys.cordon(name)
            guard = Compare(key, Target.MOD, found[key].mod_revision if key in found else 0)
            try:
                result = self._etcd.txn(Txn((guard,), (Put(key, codec.encode(record), lease),)))
            except OutcomeUnknown as error:
                # Written again, whatever came of it: the record is the same but for its end.
                unknown = error
                continue
            if result.succeeded:
                return record, result.revision
        raise unknown or contended(f"the cordon of {name}")

    def remove(self, agent: str) -> tuple[bool, int]:
        """Let ranks on a machine again, and forget what spoke against it; False: it was not cordoned.

        Raises:
            NotFound: no such agent is registered, cordoned or suspected.
        """
        name = AgentName(parse_name(agent, "agent"))
        found = self._read(name)
        if not found:
            raise self._missing(name)
        cordon, suspicion = self._keys.cordon(name), self._keys.suspicion(name)
        # Somebody has looked at it: the next blame is the first one again.
        gone = tuple(Delete(key) for key in (cordon, suspicion) if key in found)
        if not gone:
            return False, max(kv.mod_revision for kv in found.values())
        return cordon in found, self._etcd.txn(Txn(success=gone)).revision

    def _read(self, name: AgentName) -> dict[str, KeyValue]:
        keys = (self._keys.node(name), self._keys.cordon(name), self._keys.suspicion(name))
        return flatten(self._etcd.txn(Txn(success=tuple(Get(key) for key in keys))).responses)

    def _missing(self, name: AgentName) -> NotFound:
        prefix = self._keys.agents
        found = flatten(self._etcd.txn(Txn(success=(Get(prefix, prefix_end(prefix)),))).responses)
        known = {parsed.agent for key in found if (parsed := self._keys.parse(key)) is not None}
        near = difflib.get_close_matches(name, sorted(known), n=1)
        return NotFound(
            ErrorCode.NOT_FOUND,
            f"there is no agent {name}",
            fix=f"did you mean {near[0]}?" if near else "list them: dtrain get agents",
        )
