"""Measures etcd: each member's own pages, and writes that a majority has to confirm."""

import contextlib
import secrets
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from dtrain.cli.doctor import judging
from dtrain.cli.doctor.findings import Check, Verdict, passed
from dtrain.protocol.errors import DtrainError, Unavailable
from dtrain.protocol.ids import ClusterName
from dtrain.protocol.keys import Keys
from dtrain.runtime.config import EtcdOptions
from dtrain.storage.etcd import inspect
from dtrain.storage.etcd.access import certificate_ends
from dtrain.storage.etcd.endpoints import parse_endpoint
from dtrain.storage.etcd.open import open_etcd
from dtrain.storage.etcd.port import Etcd

SAMPLES = 20
LEASE_TTL_S = 10
LOCAL = ("127.0.0.1", "localhost", "::1")


def checks(cluster: ClusterName, options: EtcdOptions, ttl_s: float) -> list[Check]:
    """What to look at, for leases of ``ttl_s``."""
    facts = _Facts(options)
    return [
        Check("etcd", "members", lambda: [_members(options, facts)]),
        Check("etcd", "version", lambda: _versions(cluster, options, facts)),
        Check("etcd", "latency", lambda: _latency(facts, ttl_s)),
        Check("etcd", "disk", lambda: [judging.fsync(one.fsync_p99_s) for one in facts.well()]),
        Check("etcd", "database", lambda: _database(facts)),
        Check("etcd", "compaction", lambda: _compaction(facts)),
        Check("etcd", "clock", lambda: _clocks(facts)),
        Check("etcd", "access", lambda: _access(options)),
    ]


class _Facts:
    """What members say, asked once for all checks, and one client for all. Each check may be the first.

    The client ends with the process: a check that has not come back by the end still uses it.
    """

    def __init__(self, options: EtcdOptions) -> None:
        self._options = options
        self._lock = threading.Lock()
        self._client_lock = threading.Lock()
        self._client: Etcd | None = None
        self._found: dict[str, inspect.MemberFacts | DtrainError] = {}

    def client(self) -> Etcd:
        """Of the whole cluster.

        Raises:
            Refused: BAD_SETTING; an endpoint is no URL.
        """
        with self._client_lock:
            if self._client is None:
                self._client = open_etcd(self._options)
            return self._client

    def all(self) -> dict[str, inspect.MemberFacts | DtrainError]:
        with self._lock:
            for endpoint in self._options.endpoints:
                if endpoint not in self._found:
                    self._found[endpoint] = self._look(endpoint)
            return dict(self._found)

    def well(self) -> list[inspect.MemberFacts]:
        """Of those that answer.

        Raises:
            DtrainError: none does.
        """
        found = self.all()
        answers = [one for one in found.values() if isinstance(one, inspect.MemberFacts)]
        for error in found.values():
            if not answers and isinstance(error, DtrainError):
                raise error
        return answers

    def _look(self, endpoint: str) -> inspect.MemberFacts | DtrainError:
        try:
            return inspect.look(endpoint, self._options)
        except DtrainError as error:
            return error


def _members(options: EtcdOptions, facts: _Facts) -> Verdict:
    found = facts.all()
    gone = [
        endpoint
        for endpoint, one in found.items()
        if isinstance(one, DtrainError) or not (one.healthy or not one.version)
    ]
    return judging.etcd_quorum(len(options.endpoints), len(found) - len(gone), gone)


def _versions(cluster: ClusterName, options: EtcdOptions, facts: _Facts) -> Iterator[Verdict]:
    for_test = False
    with contextlib.suppress(DtrainError):
        for_test = bool(facts.client().range(Keys(cluster).test, deadline_s=3.0).items)
    for version in sorted({one.version for one in facts.well()}):
        yield judging.etcd_version(version, for_test=for_test, users=bool(options.user))


def _latency(facts: _Facts, ttl_s: float) -> list[Verdict]:
    """Grants and ends leases: raft has to agree on each, and no key is touched."""
    samples: list[float] = []
    etcd = facts.client()
    for _ in range(SAMPLES):
        lease = secrets.randbits(62) | 1
        begun = time.monotonic()
        etcd.grant(LEASE_TTL_S, lease)
        samples.append(time.monotonic() - begun)
        with contextlib.suppress(Unavailable):
            # Left alone, it ends by itself.
            etcd.revoke(lease)
    return [judging.commit_latency(samples, ttl_s)]


def _database(facts: _Facts) -> Iterator[Verdict]:
    status = facts.client().status(deadline_s=5.0)
    yield judging.alarms(status.alarms)
    for one in facts.well():
        yield judging.database(one.db_bytes or status.db_size_bytes, one.quota_bytes or status.db_quota_bytes)


def _compaction(facts: _Facts) -> Iterator[Verdict]:
    for one in facts.well()[:1]:
        yield judging.compaction(one.revision, one.compacted)


def _clocks(facts: _Facts) -> Iterator[Verdict]:
    for one in facts.well():
        yield judging.clock(one.clock_offset_s, f"the clock of {one.endpoint}")


def _access(options: EtcdOptions) -> Iterator[Verdict]:
    members = [parse_endpoint(endpoint) for endpoint in options.endpoints]
    yield judging.etcd_access(
        user=options.user,
        tls=all(member.scheme == "https" for member in members),
        local=all(member.host in LOCAL for member in members),
    )
    for path in (options.cacert, options.cert):
        if path:
            ends_at = certificate_ends(path)
            if ends_at is None:
                yield passed(f"{path} holds no certificate that can be read here")
            else:
                yield judging.expiry(str(Path(path)), ends_at - time.time())
