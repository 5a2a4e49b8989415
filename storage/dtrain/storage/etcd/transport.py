"""etcd over its JSON gateway: the port on real servers.

Unary calls go through etcd3gw's thin HTTP layer (the only place that imports
it), with three things of ours beneath it: a total deadline per call, knowledge
of whether a request had begun to leave (before that nothing can have happened,
after it everything can), and one session per thread and member. Which answer
means what is in ``outcomes``; the watch has a reader of its own in ``watching``.

A call asks each member at most once, and a transaction stops at the first
member that may have applied it. Waiting and trying again is the caller's.
"""

import contextlib
import http.client
import random
import ssl
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import TypeVar

import etcd3gw
import etcd3gw.exceptions
import requests

from dtrain.protocol.errors import DtrainError, ErrorCode, NotFound, OutcomeUnknown, Refused, Unavailable
from dtrain.protocol.ids import RESTORE_BUMP_LEAST
from dtrain.runtime import log
from dtrain.runtime.clock import Clock, SystemClock
from dtrain.storage.etcd import wire
from dtrain.storage.etcd.access import Access, LiveAccess, LoginRefused
from dtrain.storage.etcd.endpoints import Endpoint, Endpoints, Tls
from dtrain.storage.etcd.exchange import Exchange, HttpSession
from dtrain.storage.etcd.outcomes import LeaseExists, LoginNeeded, classify, parse_error, read_error
from dtrain.storage.etcd.port import Delete, Put, RangeResult, Status, Txn, TxnResult
from dtrain.storage.etcd.watching import GatewayWatch, open_stream
from dtrain.storage.etcd.wire import Json, header_int

T = TypeVar("T")

CONNECT_S = 0.5
TRY_S_MIN = 1.0
"""A member gets at least this long to answer while others are left to ask."""

IDLE_S = 30.0
"""A connection that its thread has not used for so long is closed when it turns to another member."""

RECHECK_S_MIN, RECHECK_S_MAX = 300.0, 600.0
"""With users, a watch is opened anew after so long: etcd checks permissions only then."""

OLDER_TERM_S = 10.0
"""All who answer may tell an older raft term for so long without being taken for a restored etcd."""

CUT_SPREAD_S = 2.0
"""Watches whose certificates were replaced end within this time, not all at once."""

_HEADERS = {
    # A member cut off from the quorum answers "no leader" at once instead of after 7 s.
    "Grpc-Metadata-Hasleader": "true",
}


class GatewayEtcd:
    """``port.Etcd`` over the members at ``endpoints``. Safe for several threads.

    Every file named here (``tls``, ``password_file``, ``endpoints_file``) may be
    replaced at any time; within seconds nothing uses the former content.
    Threads that end leave their connections to the garbage collector.
    """

    def __init__(
        self,
        endpoints: Sequence[str],
        *,
        tls: Tls | None = None,
        user: str = "",
        password: str = "",
        password_file: str = "",
        endpoints_file: str = "",
        clock: Clock | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self._clock = clock or SystemClock()
        self._rng = rng or random.Random()  # noqa: S311 - jitter only
        self._endpoints = Endpoints(endpoints, self._clock, self._rng)
        tls = tls or Tls()
        self._access = LiveAccess(
            Access(
                tuple(endpoints),
                tls.ca or "",
                tls.cert or "",
                tls.key or "",
                user,
                password,
                password_file,
                endpoints_file,
            ),
            self._clock.monotonic,
            log.get("etcd").warning,
        )
        self._user = user
        self._local = threading.local()
        self._sessions: weakref.WeakSet[_Session] = weakref.WeakSet()
        self._watches: weakref.WeakSet[GatewayWatch] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._tokens: dict[Endpoint, str] = {}
        self._dropped: set[Endpoint] = set()
        self._login_locks: dict[Endpoint, threading.Lock] = {}
        self._list_version = 1
        self._tls_version = 0
        self._cluster_id = 0
        self._raft_term = 0
        self._revision = 0
        self._older_since: float | None = None
        self._closed = False

    def txn(self, txn: Txn, *, deadline_s: float = 5.0) -> TxnResult:
        body = wire.txn_body(txn)
        writes = any(isinstance(operation, Put | Delete) for operation in txn.success + txn.failure)
        answer = self._call(
            "/kv/txn", body, deadline_s, resend=not writes, linearizable=True, reads=not writes
        )
        return wire.txn_result(answer)

    def range(
        self,
        key: str,
        range_end: str | None = None,
        *,
        revision: int = 0,
        limit: int = 0,
        deadline_s: float = 5.0,
    ) -> RangeResult:
        body = wire.range_body(key, range_end, revision, limit)
        answer = self._call("/kv/range", body, deadline_s, resend=True, linearizable=True, reads=True)
        return wire.range_result(answer, revision)

    def grant(self, ttl_s: int, lease: int, *, deadline_s: float = 5.0) -> float:
        end = self._clock.monotonic() + deadline_s
        body: Json = {"TTL": str(ttl_s), "ID": str(lease)}
        while True:
            try:
                return float(self._call("/lease/grant", body, self._left(end), resend=True).get("TTL", 0))
            except LeaseExists:
                # An earlier try of ours was applied. The renewal tells the TTL; if the lease
                # ended in between, granting it again is the only way to know.
                with contextlib.suppress(NotFound):
                    return self.keepalive(lease, deadline_s=self._left(end))

    def keepalive(self, lease: int, *, deadline_s: float = 1.5) -> float:
        answer = self._call("/lease/keepalive", {"ID": str(lease)}, deadline_s, resend=True, reads=True)
        ttl_s = float(answer.get("TTL", 0))
        if ttl_s <= 0:
            raise NotFound(ErrorCode.LEASE_NOT_FOUND, "the lease has expired or was revoked")
        return ttl_s

    def revoke(self, lease: int, *, deadline_s: float = 5.0) -> None:
        with contextlib.suppress(NotFound):
            self._call("/lease/revoke", {"ID": str(lease)}, deadline_s, resend=True)

    def status(self, *, deadline_s: float = 5.0) -> Status:
        end = self._clock.monotonic() + deadline_s
        answer = self._call("/maintenance/status", {}, deadline_s, resend=True, reads=True)
        alarms: set[str] = set()
        # Older servers let only some users ask; the status itself then names alarms, from 3.4 on.
        with contextlib.suppress(Refused):
            listed = self._call(
                "/maintenance/alarm", {"action": "GET"}, self._left(end), resend=True, reads=True
            )
            alarms.update(str(alarm.get("alarm", "NONE")) for alarm in listed.get("alarms", ()))
        for text in answer.get("errors", ()):
            alarms.update(name for name in ("NOSPACE", "CORRUPT") if name in str(text))
        return Status(
            cluster_id=header_int(answer, "cluster_id"),
            member_id=header_int(answer, "member_id"),
            raft_term=header_int(answer, "raft_term"),
            revision=header_int(answer, "revision"),
            version=str(answer.get("version", "")),
            alarms=tuple(sorted(alarms)),
            db_size_bytes=int(answer.get("dbSize", 0)),
            db_quota_bytes=int(answer.get("dbSizeQuota", 0)),
        )

    def watch(self, key: str, range_end: str | None, start_revision: int) -> GatewayWatch:
        body = {
            "create_request": wire.range_body(key, range_end)
            | {"start_revision": str(start_revision), "progress_notify": True}
        }

        def attempt(endpoint: Endpoint, limit_s: float) -> GatewayWatch:
            headers = _HEADERS | self._authorization(endpoint, limit_s)
            context, tls_version = self._context(endpoint)
            stream = open_stream(
                endpoint,
                body,
                headers,
                context=context,
                connect_s=min(CONNECT_S, limit_s),
                open_s=limit_s,
                accept=self._accept_watch_header,
                on_dead=lambda: self._endpoints.failed(endpoint),
                why_end=self._lifetime(endpoint, tls_version),
            )
            self._watches.add(stream)
            return stream

        return self._on_members(attempt, deadline_s=5.0, resend=True, reads=True)

    def problems(self) -> tuple[str, ...]:
        """Return what a person should know of the files and the user that etcd is reached with."""
        return self._access.problems(self._clock.wall())

    def close(self) -> None:
        self._closed = True
        for stream in list(self._watches):
            stream.close()
        for session in list(self._sessions):
            session.close()

    # Below: one call on one or more members.

    def _call(
        self,
        path: str,
        body: Json,
        deadline_s: float,
        *,
        resend: bool,
        linearizable: bool = False,
        reads: bool = False,
    ) -> Json:
        def attempt(endpoint: Endpoint, limit_s: float) -> Json:
            headers = _HEADERS | self._authorization(endpoint, limit_s)
            with self._lock:
                known = (self._raft_term if linearizable else 0, self._revision)
            answer = self._post(endpoint, path, body, headers, limit_s)
            try:
                self._check_identity(answer, *known, reads=reads)
            except (Unavailable, OutcomeUnknown):
                # There is no lease 0: its revocation is an entry that all members apply, and changes nothing.
                with contextlib.suppress(DtrainError):
                    self._post(endpoint, "/lease/revoke", {"ID": "0"}, headers, TRY_S_MIN)
                raise
            return answer

        return self._on_members(attempt, deadline_s=deadline_s, resend=resend, reads=reads)

    def _on_members(
        self, attempt: Callable[[Endpoint, float], T], *, deadline_s: float, resend: bool, reads: bool
    ) -> T:
        """Ask the members in turn until one answers.

        ``resend``: asking again after an unknown outcome does no harm.
        ``reads``: there is no outcome that could be unknown.
        """
        self.look_at_files()
        end = self._clock.monotonic() + deadline_s
        unknown: DtrainError | None = None
        last: DtrainError | None = None
        members = self._endpoints.in_order()
        for position, endpoint in enumerate(members):
            left_s = self._left(end)
            if self._closed or (last and left_s <= 0):
                break
            others = len(members) - position - 1
            # With nobody else to ask, a member gets all the time there is.
            limit_s = min(left_s, max(TRY_S_MIN, left_s / (others + 1))) if others else left_s
            try:
                answer = self._with_login(endpoint, attempt, limit_s)
            except Unavailable as error:
                last = error
            except OutcomeUnknown as error:
                last = unknown = error
                if not resend:
                    self._endpoints.failed(endpoint)
                    raise
            except Refused:
                self._endpoints.worked(endpoint)
                raise
            else:
                self._endpoints.worked(endpoint)
                return answer
            self._endpoints.failed(endpoint)
        if unknown and not reads:
            raise unknown
        raise Unavailable(
            ErrorCode.ETCD_UNAVAILABLE,
            f"no etcd member at {self._endpoints} answered: {last or 'the client is closed'}",
            fix="check that etcd runs, has a quorum and is reachable from here",
        ) from last

    def _with_login(self, endpoint: Endpoint, attempt: Callable[[Endpoint, float], T], limit_s: float) -> T:
        end = self._clock.monotonic() + limit_s
        try:
            return attempt(endpoint, limit_s)
        except LoginNeeded:
            if not self._user:
                raise
            # Tokens are per member and end with the member: one login, then the same request again.
            with self._lock:
                if self._tokens.pop(endpoint, None):
                    self._dropped.add(endpoint)
            return attempt(endpoint, self._left(end))

    def _authorization(self, endpoint: Endpoint, limit_s: float) -> dict[str, str]:
        if not self._user:
            return {}
        token = self._tokens.get(endpoint)
        if token is None:
            end = self._clock.monotonic() + limit_s
            with self._lock:
                turn = self._login_locks.setdefault(endpoint, threading.Lock())
            # One login serves all threads of this process: each costs etcd a tenth of a second of CPU.
            if not turn.acquire(timeout=limit_s):
                raise Unavailable(ErrorCode.ETCD_UNAVAILABLE, f"the login at {endpoint} takes too long")
            try:
                token = self._tokens.get(endpoint) or self._log_in(endpoint, end)
            finally:
                turn.release()
        return {"Authorization": token}

    def _log_in(self, endpoint: Endpoint, end: float) -> str:
        logins = self._access.logins
        try:
            password, version = self._access.password()
            logins.check(version)
        except (OSError, ValueError) as error:
            raise Unavailable(
                ErrorCode.ETCD_UNAVAILABLE, f"the password for etcd cannot be read: {error}"
            ) from error
        except LoginRefused as error:
            raise _denied(self._user, str(error)) from error
        if endpoint in self._dropped:
            # Whoever used that member lost its token with us.
            time.sleep(logins.spread_s(self._left(end)))
        login = {"name": self._user, "password": password}
        try:
            answer = self._post(endpoint, "/auth/authenticate", login, _HEADERS, self._left(end))
        except OutcomeUnknown as error:
            raise Unavailable(ErrorCode.ETCD_UNAVAILABLE, f"etcd login did not end: {error}") from error
        except Refused as error:
            logins.refused(version, error.message)
            raise _denied(self._user, error.message) from error
        logins.accepted()
        token = str(answer.get("token", ""))
        with self._lock:
            self._tokens[endpoint] = token
            self._dropped.discard(endpoint)
        return token

    def _post(
        self, endpoint: Endpoint, path: str, body: Json, headers: dict[str, str], limit_s: float
    ) -> Json:
        client, exchange = self._client(endpoint)
        exchange.begin(limit_s, CONNECT_S)
        try:
            answer = client.post(client.get_url(path), json=body, headers=headers)
        except (etcd3gw.exceptions.Etcd3Exception, requests.RequestException, OSError, ValueError) as error:
            raise self._translate(error, exchange, endpoint) from error
        if isinstance(answer, dict) and isinstance(answer.get("error"), dict):
            # A streaming call (keepalive) says 200 and fails inside.
            raise classify(http.client.OK, *read_error(answer))
        if not isinstance(answer, dict):
            raise OutcomeUnknown(
                ErrorCode.ETCD_OUTCOME_UNKNOWN, f"etcd at {endpoint} answered no JSON object"
            )
        inner_answer = answer.get("result")
        return inner_answer if isinstance(inner_answer, dict) else answer

    def _translate(self, error: Exception, exchange: Exchange, endpoint: Endpoint) -> DtrainError:
        text = error.detail_text if isinstance(error, etcd3gw.exceptions.Etcd3Exception) else None
        if exchange.http_status and exchange.http_status != http.client.OK:
            code, message = parse_error(text or "")
            return classify(exchange.http_status, code, message)
        reason = self._access.explain(_first_cause(error))[:300]
        if not exchange.sent:
            return Unavailable(ErrorCode.ETCD_UNAVAILABLE, f"etcd at {endpoint} cannot be reached: {reason}")
        return OutcomeUnknown(ErrorCode.ETCD_OUTCOME_UNKNOWN, f"etcd at {endpoint} did not answer: {reason}")

    def _client(self, endpoint: Endpoint) -> tuple[etcd3gw.Etcd3Client, Exchange]:
        clients: dict[Endpoint, tuple[_Session, etcd3gw.Etcd3Client, Exchange]]
        clients = self._local.__dict__.setdefault("clients", {})
        now = self._clock.monotonic()
        for known in [known for known, (session, _, _) in clients.items() if session.retired]:
            del clients[known]
        for known in [known for known in clients if known != endpoint]:
            if now - clients[known][0].used_at > IDLE_S:
                clients.pop(known)[0].close()
        if endpoint not in clients:
            _, tls_version = self._context(endpoint)
            exchange = Exchange(self._clock)
            session = _Session(exchange, lambda: self._access.context()[0], endpoint, tls_version)
            self._sessions.add(session)
            client = etcd3gw.Etcd3Client(
                endpoint.host, endpoint.port, endpoint.scheme, api_path="/v3/", session=session
            )
            clients[endpoint] = session, client, exchange
        clients[endpoint][0].used_at = now
        return clients[endpoint][1:]

    def look_at_files(self) -> None:
        """Let go of what was made with files that have been replaced since; cheap."""
        try:
            urls, list_version = self._access.endpoints()
            tls_version = self._access.context()[1] if self._tls_version else 0
        except (OSError, ValueError):
            # Never usable: the call itself says so.
            return
        if list_version == self._list_version and tls_version == self._tls_version:
            return
        with self._lock:
            if list_version != self._list_version:
                self._list_version = list_version
                for gone in self._endpoints.replace(urls):
                    self._tokens.pop(gone, None)
            self._tls_version = tls_version
            sessions = list(self._sessions)
        for session in sessions:
            if session.endpoint not in self._endpoints or session.tls_version not in (0, tls_version):
                session.retire()

    def _lifetime(self, endpoint: Endpoint, tls_version: int) -> Callable[[], str]:
        """Return a function that tells why a watch opened now is to end, "" for not yet."""
        now = self._clock.monotonic()
        recheck_at = now + self._rng.uniform(RECHECK_S_MIN, RECHECK_S_MAX) if self._user else float("inf")
        spread_s = self._rng.uniform(0.0, CUT_SPREAD_S)
        cut_at = float("inf")

        def why_end() -> str:
            nonlocal cut_at
            self.look_at_files()
            now = self._clock.monotonic()
            if endpoint not in self._endpoints:
                return "its member is no longer configured"
            if tls_version != self._tls_version and tls_version:
                cut_at = min(cut_at, now + spread_s)
            if now >= cut_at:
                return "the TLS files have been replaced"
            return "its permission is to be checked again" if now >= recheck_at else ""

        return why_end

    def _context(self, endpoint: Endpoint) -> tuple[ssl.SSLContext | None, int]:
        """Return the TLS context for a connection and its version; (None, 0) for plain text."""
        if endpoint.scheme != "https":
            return None, 0
        try:
            context, version = self._access.context()
        except (OSError, ValueError) as error:
            raise Unavailable(
                ErrorCode.ETCD_UNAVAILABLE,
                f"the TLS files for etcd cannot be used: {error}",
                fix="check --cacert, --cert and --key",
            ) from error
        self._tls_version = self._tls_version or version
        return context, version

    def _check_identity(self, answer: Json, term_at_send: int, revision_at_send: int, *, reads: bool) -> None:
        """Refuse another cluster, and a cluster restored from an older state.

        Terms are compared only where the member must have heard of the newest
        leader to answer at all: elsewhere a lagging member is no suspect, and even
        there an older term alone is no proof (``_older``). A restored cluster counts
        its raft terms anew; if its revisions were raised far above all that were
        seen, nothing of its past can be mistaken for its present, and it is as good
        as the old one.
        """
        self._accept_cluster(answer)
        term, revision = header_int(answer, "raft_term"), header_int(answer, "revision")
        raised = 0 < revision_at_send <= revision - RESTORE_BUMP_LEAST
        if 0 < term < term_at_send and not raised:
            what = f"the raft term went back from {term_at_send} to {term}"
            raise self._older(what, certain=revision < revision_at_send, reads=reads)
        with self._lock:
            if term_at_send:
                self._older_since = None
            if 0 < self._revision <= revision - RESTORE_BUMP_LEAST:
                self._raft_term = term
            elif revision > self._revision - RESTORE_BUMP_LEAST:
                # An answer from before a restoration, read late, says nothing of the present terms.
                self._raft_term = max(self._raft_term, term)
            self._revision = max(self._revision, revision)

    def _older(self, what: str, *, certain: bool, reads: bool) -> DtrainError:
        """Return what to raise instead of believing an answer of an older raft term.

        A member tells the term of the last entry that it applied. One that has just
        caught up by a snapshot holds the newest revision, and tells an older term
        until the next entry comes. Only a revision that is older, too, or terms that
        stay older in spite of new entries, are an etcd that was restored.
        """
        now = self._clock.monotonic()
        with self._lock:
            since = self._older_since = now if self._older_since is None else self._older_since
        if certain or now - since >= OLDER_TERM_S:
            return _went_back(what)
        if reads:
            return Unavailable(ErrorCode.ETCD_UNAVAILABLE, what)
        return OutcomeUnknown(ErrorCode.ETCD_OUTCOME_UNKNOWN, what)

    def _accept_cluster(self, answer: Json) -> None:
        cluster_id = header_int(answer, "cluster_id")
        if not cluster_id:
            return
        with self._lock:
            self._cluster_id = self._cluster_id or cluster_id
        if cluster_id != self._cluster_id:
            raise _went_back(f"another etcd cluster answers: {cluster_id:x} instead of {self._cluster_id:x}")

    def _accept_watch_header(self, answer: Json) -> None:
        """Leave a member whose raft term is behind: it may serve a stale past."""
        self._accept_cluster(answer)
        term, revision = header_int(answer, "raft_term"), header_int(answer, "revision")
        if 0 < term < self._raft_term and revision < self._revision + RESTORE_BUMP_LEAST:
            raise Unavailable(
                ErrorCode.ETCD_UNAVAILABLE, f"the member is at raft term {term}, not {self._raft_term}"
            )

    def _left(self, end: float) -> float:
        return max(0.0, end - self._clock.monotonic())


class _Session(HttpSession):
    """The connection of one thread to one member. ``retired``: the thread makes itself another one."""

    def __init__(
        self, exchange: Exchange, context: Callable[[], ssl.SSLContext], endpoint: Endpoint, tls_version: int
    ) -> None:
        super().__init__(exchange, context)
        self.endpoint = endpoint
        self.tls_version = tls_version
        self.retired = False
        self.used_at = 0.0

    def retire(self) -> None:
        """Close it, when a call that is under way has ended."""
        self.retired = True
        self.close()


def _first_cause(error: BaseException) -> BaseException:
    """Return what the socket raised, beneath three libraries' wrappers."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return error


def _denied(user: str, said: str) -> Refused:
    return Refused(
        ErrorCode.ETCD_AUTH,
        f"etcd refuses the login of {user}: {said}",
        fix="check the etcd user, its password and its role",
    )


def _went_back(what: str) -> Refused:
    return Refused(
        ErrorCode.ETCD_WENT_BACK,
        what,
        fix="etcd was restored or replaced: check its data, then restart the coordinators and agents",
    )
