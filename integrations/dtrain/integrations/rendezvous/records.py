"""Keys and values of a run in etcd: JSON that one can read with etcdctl.

::

    <prefix>/<run>/state          RunState; bound to a lease that the run's nodes renew together
    <prefix>/<run>/nodes/<node>   one living node; bound to its own lease

``<run>`` is the run's id, percent-encoded where it is not a plain word.
"""

import dataclasses
import json
from typing import Any
from urllib.parse import quote

from dtrain.integrations.rendezvous.core import RunState
from dtrain.protocol.errors import ErrorCode, Refused

VERSION = 1
STATE_BYTES_MAX = 1024 * 1024
"""etcd takes 1.5 MiB in one request; 8,000 nodes with long names fit."""


@dataclasses.dataclass(frozen=True, slots=True)
class Keys:
    """Where one run is kept."""

    prefix: str
    """Ends with a slash: two runs of which one's id begins with the other's do not meet."""

    @property
    def state(self) -> str:
        return f"{self.prefix}state"

    @property
    def nodes(self) -> str:
        return f"{self.prefix}nodes/"

    def node(self, node: str) -> str:
        """Return the key of a node."""
        return self.nodes + node


def keys_of(prefix: str, run_id: str) -> Keys:
    """Return the keys of the run with that id below ``prefix``."""
    return Keys(f"{prefix.rstrip('/')}/{quote(run_id, safe='')}/")


def encode(state: RunState) -> bytes:
    """Return the state's value.

    Raises:
        Refused: BAD_RECORD; it has outgrown what etcd takes.
    """
    text = json.dumps({"v": VERSION, **dataclasses.asdict(state)}, separators=(",", ":")).encode()
    if len(text) > STATE_BYTES_MAX:
        raise Refused(
            ErrorCode.BAD_RECORD,
            f"the state of the run has {len(text)} bytes, more than the {STATE_BYTES_MAX} that are kept",
            fix="use fewer agents, or give them shorter names with --local-addr",
        )
    return text


def decode(value: bytes) -> RunState:
    """Read a state's value; fields that are not known are left out.

    Raises:
        Refused: BAD_RECORD.
    """
    try:
        fields: dict[str, Any] = json.loads(value)
        if fields["v"] != VERSION:
            raise Refused(
                ErrorCode.BAD_RECORD,
                f"the state of the run has version {fields['v']}, this release reads {VERSION}",
                fix="use one release of dtrain for all agents of a run",
            )
        state = RunState(
            round=_int(fields["round"]),
            complete=fields["complete"] is True,
            closed=fields["closed"] is True,
            participants=_names(fields["participants"]),
            world=_names(fields["world"]),
            waiting=_names(fields["waiting"]),
            standby=_names(fields["standby"]),
            store=str(fields["store"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise Refused(
            ErrorCode.BAD_RECORD,
            f"the state of the run is damaged: {error!r}"[:300],
            fix="delete the run's keys and start its agents again",
        ) from error
    if state.complete and not set(state.participants) <= set(state.world):
        raise Refused(
            ErrorCode.BAD_RECORD,
            "the state of the run is damaged: a participant has no rank",
            fix="delete the run's keys and start its agents again",
        )
    return state


def _int(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{value!r} is no integer")
    return value


def _names(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{value!r} is no list of names"[:200])
    return tuple(value)
