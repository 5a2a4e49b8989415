"""etcd without space, on purpose: fill it up to its quota, and bring it back.

Bringing it back is what an operator does: delete, compact, defragment each
member, disarm. It needs nothing but etcd, so it also works for what an earlier
run, killed in the middle, has left behind.
"""

import secrets
from collections.abc import Callable, Sequence
from typing import Any

from dtrain.protocol.errors import DtrainError, ErrorCode, Refused, Unavailable
from dtrain.protocol.keys import Keys
from dtrain.storage.etcd.port import Delete, Put, Txn, prefix_end
from dtrain.storage.etcd.transport import GatewayEtcd

PIECE_BYTES = 1024 * 1024
BYTES_MAX = 1024 * 1024 * 1024
"""A larger quota is not filled: that would take minutes and somebody's disk."""

_PREFIX = "/dtrain-chaos/"


class _Member(GatewayEtcd):
    """One member, with the maintenance calls that the port does not have."""

    def maintain(self, path: str, body: dict[str, Any], deadline_s: float) -> Any:
        """POST and return the answer."""
        return self._call(path, body, deadline_s, resend=True)


class Filling:
    """Fills and frees the etcd at ``endpoints``.

    ``compact_up_to`` returns the revision up to which nobody needs history any
    more, given the present one: whoever audits the cluster must have seen it.
    ``access`` is what ``GatewayEtcd`` takes beside endpoints.
    """

    def __init__(
        self,
        endpoints: Sequence[str],
        keys: Keys,
        *,
        compact_up_to: Callable[[int], int] = lambda revision: revision,
        **access: Any,
    ) -> None:
        self._endpoints = tuple(endpoints)
        self._keys = keys
        self._marker = f"{keys.root}test/fill"
        self._compact_up_to = compact_up_to
        self._access = access

    def fill(self) -> int:
        """Write until etcd refuses for lack of space; return the bytes written.

        Raises:
            Refused: the quota is too large to be filled.
            Unavailable: etcd does not answer; what was written is to be freed.
        """
        etcd = _Member(self._endpoints, **self._access)
        written = 0
        try:
            # Below the cluster's root: whoever watches it sees where the filling ends.
            etcd.txn(Txn((), (Put(self._marker, b'{"v":1}'),)))
            while written < BYTES_MAX:
                key = f"{_PREFIX}{self._keys.cluster}/{written:012d}"
                try:
                    etcd.txn(Txn((), (Put(key, secrets.token_bytes(PIECE_BYTES)),)), deadline_s=10.0)
                except DtrainError as error:
                    if error.code is ErrorCode.ETCD_NO_SPACE:
                        return written
                    raise
                written += PIECE_BYTES
        finally:
            etcd.close()
        self.free()
        raise Refused(
            ErrorCode.BAD_SETTING,
            f"etcd took {BYTES_MAX >> 20} MiB and is not full: its quota is too large to be filled",
            fix="leave out fill, or give the test cluster's etcd a --quota-backend-bytes of some 100 MB",
        )

    def is_filled(self) -> bool:
        """Whether a filling, of whomever, was not freed."""
        etcd = _Member(self._endpoints, **self._access)
        try:
            return bool(etcd.range(self._marker).items)
        finally:
            etcd.close()

    def free(self) -> None:
        """Delete the filling, compact, defragment every member and disarm the alarm.

        Raises:
            Unavailable: a member does not answer; to be done again when it does.
        """
        prefix = f"{_PREFIX}{self._keys.cluster}/"
        members = [_Member([endpoint], **self._access) for endpoint in self._endpoints]
        etcd = _Member(self._endpoints, **self._access)
        try:
            # Deletes first and in one revision: the marker's end shows that all of it was seen.
            done = etcd.txn(Txn((), (Delete(prefix, prefix_end(prefix)), Delete(self._marker))))
            self._compact(etcd, self._compact_up_to(done.revision))
            for member in members:
                member.maintain("/maintenance/defragment", {}, 30.0)
            for alarm in etcd.maintain("/maintenance/alarm", {"action": "GET"}, 5.0).get("alarms", ()):
                if alarm.get("alarm") == "NOSPACE":
                    body = {"action": "DEACTIVATE", "memberID": alarm["memberID"], "alarm": "NOSPACE"}
                    etcd.maintain("/maintenance/alarm", body, 5.0)
            etcd.txn(Txn((), (Put(self._marker, b'{"v":1}'),)))
            etcd.txn(Txn((), (Delete(self._marker),)))
        except Refused as error:
            if error.code is not ErrorCode.ETCD_NO_SPACE:
                raise
            raise Unavailable(ErrorCode.ETCD_NO_SPACE, "etcd is still full") from error
        finally:
            for client in (etcd, *members):
                client.close()

    def _compact(self, etcd: _Member, revision: int) -> None:
        try:
            etcd.maintain("/kv/compaction", {"revision": str(revision), "physical": True}, 30.0)
        except Refused as error:
            if error.code is not ErrorCode.ETCD_COMPACTED:
                raise


def db_sizes(endpoints: Sequence[str]) -> dict[str, int]:
    """Return the size of each member's database in bytes; members that do not answer are left out."""
    sizes = {}
    for endpoint in endpoints:
        member = _Member([endpoint])
        try:
            sizes[endpoint] = int(member.maintain("/maintenance/status", {}, 2.0).get("dbSize", 0))
        except DtrainError:
            continue
        finally:
            member.close()
    return sizes
