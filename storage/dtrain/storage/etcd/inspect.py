"""One member of etcd, looked at from outside: what it says on its plain pages, which need no user.

For people who ask what is wrong. Nothing is decided by it: ``/metrics`` may be served elsewhere
(``--listen-metrics-urls``) and then is not known here.
"""

import email.utils
import http.client
import json
import re
import ssl
import time
from dataclasses import dataclass

from dtrain.protocol.errors import ErrorCode, Refused, Unavailable
from dtrain.runtime.config import EtcdOptions
from dtrain.storage.etcd.endpoints import parse_endpoint

BODY_BYTES_MAX = 4 * 1024 * 1024
_SAMPLE = re.compile(r"^(?P<name>\w+)(?:\{(?P<labels>[^}]*)\})? (?P<value>\S+)$")


@dataclass(frozen=True, slots=True)
class MemberFacts:
    """What one member says. Times in s, sizes in bytes; None: it does not say."""

    endpoint: str
    version: str
    healthy: bool
    why: str = ""
    """With ``healthy`` False: its own words."""
    clock_offset_s: float | None = None
    """Its wall clock less ours, to the second."""
    quota_bytes: float | None = None
    db_bytes: float | None = None
    fsync_p99_s: float | None = None
    """Of its write-ahead log, since the member began."""
    revision: float | None = None
    compacted: float | None = None


def look(endpoint: str, options: EtcdOptions, *, limit_s: float = 3.0) -> MemberFacts:
    """Ask the member at ``endpoint``.

    Raises:
        Refused: BAD_SETTING, it is no URL, or a TLS file cannot be used.
        Unavailable: ETCD_UNAVAILABLE, nobody answers there, or TLS fails.
    """
    member = parse_endpoint(endpoint)
    context = _context(options) if member.scheme == "https" else None
    try:
        version, offset_s = _get(member.host, member.port, context, "/version", limit_s)
        health, _ = _get(member.host, member.port, context, "/health", limit_s)
        samples = _samples(_get(member.host, member.port, context, "/metrics", limit_s)[0])
    except (OSError, http.client.HTTPException) as error:
        raise Unavailable(
            ErrorCode.ETCD_UNAVAILABLE,
            f"etcd at {member} does not answer: {error}",
            fix="see that it runs, and that its port and certificates are reachable from here",
        ) from error
    told = _json(health)
    return MemberFacts(
        endpoint=str(member),
        version=str(_json(version).get("etcdserver", "")),
        healthy=str(told.get("health", "")).lower() == "true",
        why=str(told.get("reason", "")),
        clock_offset_s=offset_s,
        quota_bytes=samples.get("etcd_server_quota_backend_bytes"),
        db_bytes=samples.get("etcd_mvcc_db_total_size_in_bytes"),
        fsync_p99_s=_quantile(samples, "etcd_disk_wal_fsync_duration_seconds", 0.99),
        revision=samples.get("etcd_debugging_mvcc_current_revision"),
        compacted=samples.get("etcd_debugging_mvcc_compact_revision"),
    )


def _context(options: EtcdOptions) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=options.cacert or None)
        if options.cert:
            context.load_cert_chain(options.cert, options.key or None)
    except (OSError, ssl.SSLError) as error:
        raise Refused(
            ErrorCode.BAD_SETTING,
            f"the TLS files for etcd cannot be used: {error}",
            fix="check --cacert, --cert and --key",
        ) from error
    return context


def _get(
    host: str, port: int, context: ssl.SSLContext | None, path: str, limit_s: float
) -> tuple[bytes, float | None]:
    if context is None:
        connection = http.client.HTTPConnection(host, port, timeout=limit_s)
    else:
        connection = http.client.HTTPSConnection(host, port, timeout=limit_s, context=context)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        # Taken before the body: a page of metrics takes its time.
        here, there = time.time(), answer.getheader("Date")
        body = answer.read(BODY_BYTES_MAX)
        # /health answers 503 with its reason; whatever else is no page of etcd's.
        return (body if answer.status in (200, 503) else b""), _offset_s(there, here)
    finally:
        connection.close()


def _offset_s(there: str | None, here: float) -> float | None:
    try:
        return None if there is None else email.utils.parsedate_to_datetime(there).timestamp() - here
    except ValueError:
        return None


def _json(body: bytes) -> dict[str, object]:
    try:
        found = json.loads(body)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _samples(body: bytes) -> dict[str, float]:
    """By name, with the labels where there are any: ``name{le="0.1"}``."""
    found: dict[str, float] = {}
    for line in body.decode("utf-8", "replace").splitlines():
        match = _SAMPLE.match(line)
        if match is not None:
            labels = f"{{{match['labels']}}}" if match["labels"] else ""
            found[match["name"] + labels] = float(match["value"])
    return found


def _quantile(samples: dict[str, float], name: str, quantile: float) -> float | None:
    """The upper bound of the bucket that the quantile falls in."""
    total = samples.get(f"{name}_count", 0.0)
    if not total:
        return None
    bounds = sorted(
        (float(match[1]), count)
        for key, count in samples.items()
        if (match := re.fullmatch(rf'{name}_bucket{{le="([^"]+)"}}', key))
    )
    return next((bound for bound, count in bounds if count >= quantile * total), None)
