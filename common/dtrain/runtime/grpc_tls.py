"""TLS on every gRPC link, and the one table of who may call what.

Servers ask for a certificate and derive the caller's role from it; callers
verify that the other side is the one they mean. Both take up new files without
a restart: servers with the next connection, callers with the next call. An rpc
without a row in ``RULES`` is refused, with TLS and without: whoever adds one
has to say who may call it.

Never imported by the guardian: it needs the standard library only.
"""

import contextlib
import datetime
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import grpc

from dtrain.protocol.errors import DtrainError, ErrorCode, Refused
from dtrain.runtime.clock import Clock, SystemClock
from dtrain.runtime.tls import (
    SCHEME,
    Peer,
    Role,
    TlsFiles,
    agent_server_name,
    coordinator_server_name,
    parse_peer,
)

if TYPE_CHECKING:
    from dtrain.runtime import log

CHECK_EVERY_S = 2.0
"""The files are looked at no more often than this."""

FILE_BYTES_MAX = 1024 * 1024
EXPIRY_ALARM_S = 14 * 86_400.0
REPEAT_ALARM_S = 3600.0

SERVER_OPTIONS = (
    # Without it two processes bind one port without an error, and each gets half of the calls.
    ("grpc.so_reuseport", 0),
    # Those who connect and say nothing, or say it byte by byte, are shown out.
    ("grpc.server_handshake_timeout_ms", 5_000),
    ("grpc.max_connection_idle_ms", 300_000),
    # A certificate is looked at when a connection begins: one that was replaced or has expired
    # must not live on in an old connection for ever.
    ("grpc.max_connection_age_ms", 600_000),
    ("grpc.max_connection_age_grace_ms", 60_000),
    ("grpc.max_metadata_size", 16 * 1024),
    ("grpc.absolute_max_metadata_size", 32 * 1024),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
)
"""Of every gRPC server here; sizes of messages and numbers of calls are each one's own."""

REQUEST_S_MAX = 5.0
"""How long a caller may take to send its request once it has announced the call."""

_COORDINATOR, _AGENT = "/dtrain.v1.Coordinator/", "/dtrain.v1.Agent/"


@dataclass(frozen=True, slots=True)
class Rule:
    """Who may make a call; with ``own``, only with the caller's own name in that field of the request."""

    roles: frozenset[Role]
    own: str = ""


_OPERATORS = Rule(frozenset({Role.OPERATOR}))
_BY_DASHBOARDS = Rule(frozenset({Role.OPERATOR, Role.COORDINATOR}))
"""A coordinator may ask for who has its dashboard's token: it could write all of it to etcd itself."""
_ALL = Rule(frozenset(Role))
_COORDINATORS = Rule(frozenset({Role.COORDINATOR}))

RULES: Mapping[str, Rule] = {
    f"{_COORDINATOR}Submit": _OPERATORS,
    f"{_COORDINATOR}SetIntent": _BY_DASHBOARDS,
    f"{_COORDINATOR}Read": _ALL,
    f"{_COORDINATOR}List": _ALL,
    f"{_COORDINATOR}Changes": _ALL,
    f"{_COORDINATOR}ReadLog": _ALL,
    f"{_COORDINATOR}ListLogs": _ALL,
    f"{_COORDINATOR}ReadArchive": _ALL,
    f"{_COORDINATOR}Info": _ALL,
    f"{_COORDINATOR}PinCheckpoint": _OPERATORS,
    f"{_COORDINATOR}UnpinCheckpoint": _OPERATORS,
    f"{_COORDINATOR}DeleteCheckpoint": _OPERATORS,
    f"{_COORDINATOR}ReportDamage": _OPERATORS,
    f"{_COORDINATOR}CollectGarbage": _OPERATORS,
    f"{_COORDINATOR}ImportCheckpoint": _OPERATORS,
    f"{_COORDINATOR}ReviewGarbage": _OPERATORS,
    f"{_COORDINATOR}Stacks": _OPERATORS,
    f"{_COORDINATOR}Cordon": _BY_DASHBOARDS,
    f"{_COORDINATOR}Uncordon": _BY_DASHBOARDS,
    f"{_COORDINATOR}Consult": Rule(frozenset({Role.AGENT}), own="agent"),
    f"{_AGENT}Execute": _COORDINATORS,
    f"{_AGENT}ReadLog": _COORDINATORS,
    f"{_AGENT}Stacks": _COORDINATORS,
    f"{_AGENT}Series": _COORDINATORS,
    f"{_COORDINATOR}Series": _ALL,
}
"""What is not in here is refused to everybody."""


@dataclass(frozen=True, slots=True)
class _Material:
    cert: bytes
    key: bytes
    cacert: bytes
    peer: Peer
    not_after: float
    """Epoch seconds at which the first of certificate and CAs expires."""


def _logger(name: str) -> "log.Logger":
    # Whoever only lists jobs logs nothing, and would wait 50 ms for it.
    from dtrain.runtime import log

    return log.get(name)


class Credentials:
    """Certificate, key and CAs of this process, read again when the files change. Thread-safe.

    New files that cannot be used, or that name somebody else, are not taken up:
    the former ones stay in use and ``problems`` says so.
    """

    def __init__(
        self, files: TlsFiles, *, clock: Clock | None = None, logger: "log.Logger | None" = None
    ) -> None:
        """Read the files.

        Raises:
            Refused: BAD_SETTING; they are no certificate, do not fit together,
                or name nobody.
        """
        self._files = files
        self._clock = clock or SystemClock()
        self._lock = threading.Lock()
        self._log = logger or _logger("tls")
        self._stamp: Any = _stamp(files)
        self._material = _read(files)
        self._checked_at = self._clock.monotonic()
        self._told: dict[str, float] = {}
        self._unusable = ""
        self._generation = 1
        self.problems()

    @property
    def peer(self) -> Peer:
        """Who this process is, by its certificate; the same in all later ones."""
        return self._material.peer

    @property
    def generation(self) -> int:
        """A number that rises when other files have been taken up."""
        with self._lock:
            self._refresh()
            return self._generation

    def problems(self) -> list[str]:
        """Sentences on what a person should see to: certificates that expire or cannot be used."""
        with self._lock:
            self._refresh()
            found = [self._unusable] if self._unusable else []
            left_s = self._material.not_after - self._clock.wall()
            if left_s < EXPIRY_ALARM_S:
                found.append(_expiry(self._files.cert, left_s))
            if _is_open(self._files.key):
                found.append(f"the key {self._files.key} can be read by all users here: chmod 600")
            now = self._clock.monotonic()
            for sentence in found:
                # By its beginning: the days that are left must not make it another one.
                subject = sentence[:60]
                if now - self._told.get(subject, -REPEAT_ALARM_S) >= REPEAT_ALARM_S:
                    self._told[subject] = now
                    self._log.warning("certificate", problem=sentence)
            return found

    def for_server(self) -> grpc.ServerCredentials:
        """Credentials of a server that asks everyone for a certificate."""
        shown = self.generation

        def fetch() -> Any:
            # Before each handshake, on grpc's threads: what it raised would refuse the connection.
            nonlocal shown
            self.problems()
            with self._lock:
                if shown == self._generation:
                    # Never the same again: handing out a configuration while another handshake
                    # begins is a race inside grpc, which crashed within a hundred connections.
                    return None
                shown = self._generation
            return self._configuration()

        return grpc.dynamic_ssl_server_credentials(
            self._configuration(), fetch, require_client_authentication=True
        )

    def for_channel(self) -> grpc.ChannelCredentials:
        """Credentials of a new channel, from the files as they are now."""
        with self._lock:
            self._refresh()
            now = self._material
        return grpc.ssl_channel_credentials(now.cacert, now.key, now.cert)

    def _configuration(self) -> Any:
        now = self._material
        return grpc.ssl_server_certificate_configuration([(now.key, now.cert)], now.cacert)

    def _refresh(self) -> None:
        now = self._clock.monotonic()
        if now - self._checked_at < CHECK_EVERY_S:
            return
        self._checked_at = now
        stamp = _stamp(self._files)
        if stamp == self._stamp:
            return
        try:
            fresh = _read(self._files)
            if fresh.peer != self._material.peer:
                raise _bad(f"{self._files.cert} is now of {fresh.peer}, and this is {self._material.peer}")
        except DtrainError as error:
            # Perhaps only half replaced yet: the stamp stays, so that the next look tries again.
            self._unusable = f"the new certificate is not in use: {error.message}"
            return
        self._stamp, self._unusable = stamp, ""
        if fresh != self._material:
            self._material = fresh
            self._generation += 1
            self._log.info("certificate taken up", peer=fresh.peer.uri)


def load(
    files: TlsFiles | None, cluster: str, role: Role, name: str, *, clock: Clock | None = None
) -> Credentials | None:
    """Return a daemon's credentials, None if TLS is off.

    Raises:
        Refused: BAD_SETTING; the certificate cannot be used, or is somebody else's.
    """
    if files is None:
        return None
    found = Credentials(files, clock=clock)
    wanted = Peer(cluster, role, name)
    if found.peer != wanted:
        raise _bad(f"{files.cert} is the certificate of {found.peer.uri}, and this is {wanted.uri}")
    return found


def open_channel(
    address: str, server_name: str, tls: Credentials | None, options: Sequence[tuple[str, Any]]
) -> grpc.Channel:
    """Return a channel whose other side must have a certificate for ``server_name``."""
    if tls is None:
        return grpc.insecure_channel(address, options=options)
    return grpc.secure_channel(
        address, tls.for_channel(), options=(*options, ("grpc.ssl_target_name_override", server_name))
    )


def to_agent(
    agent: str, address: str, tls: Credentials | None, options: Sequence[tuple[str, Any]]
) -> grpc.Channel:
    """Return a channel to an agent: to it and to no other, whatever listens at ``address``."""
    return open_channel(address, agent_server_name(tls.peer.cluster, agent) if tls else "", tls, options)


def to_coordinator(address: str, tls: Credentials | None, options: Sequence[tuple[str, Any]]) -> grpc.Channel:
    """Return a channel to a replica of this certificate's own cluster."""
    return open_channel(address, coordinator_server_name(tls.peer.cluster) if tls else "", tls, options)


def bind(server: grpc.Server, listen: str, tls: Credentials | None) -> int:
    """Bind a server and return its port.

    Raises:
        Refused: PORT_IN_USE.
    """
    cause = ""
    try:
        if tls is None:
            port = server.add_insecure_port(listen)
        else:
            port = server.add_secure_port(listen, tls.for_server())
    except RuntimeError as error:
        port, cause = 0, str(error)
    if not port:
        raise Refused(
            ErrorCode.PORT_IN_USE,
            f"{listen} cannot be listened on",
            cause=cause,
            fix="choose another address with --listen, or stop what listens there",
        )
    return port


def caller(context: grpc.ServicerContext) -> Peer | None:
    """Return who makes a call, by the certificate; None on a link without TLS.

    Raises:
        Refused: NOT_PERMITTED; the certificate names nobody, or two.
    """
    found: Mapping[str, Sequence[bytes]] = context.auth_context()  # type: ignore[assignment]
    if found.get("transport_security_type", [b"insecure"])[0] not in (b"ssl", b"tls"):
        return None
    uris = [uri.decode(errors="replace") for uri in found.get("peer_uri", ())]
    ours = [uri for uri in uris if uri.startswith(SCHEME)]
    if len(ours) != 1:
        raise _not_permitted(f"a certificate must name its holder once, and this one has {len(ours)} names")
    try:
        return parse_peer(ours[0])
    except DtrainError as error:
        raise _not_permitted(error.message) from error


class Gate(grpc.ServerInterceptor):
    """Lets calls pass that ``RULES`` allow. ``tls`` None: rows are looked up, roles cannot be.

    The caller is known before its request is read, and gets REQUEST_S_MAX to send
    that: a call that is announced and never made would hold a thread for ever.
    """

    def __init__(
        self, tls: Credentials | None, abort: Callable[[grpc.ServicerContext, DtrainError], NoReturn]
    ) -> None:
        self._tls = tls
        self._abort = abort
        self._log = _logger("gate")
        self._patience = _Patience(REQUEST_S_MAX)

    def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        handler = continuation(handler_call_details)
        if handler is None:
            return None
        method: str = handler_call_details.method
        rule = RULES.get(method)
        behavior = handler.unary_unary
        if rule is None or behavior is None:
            return grpc.unary_unary_rpc_method_handler(
                lambda _request, context: self._refuse(context, None, f"nobody may call {method}")
            )
        call = method.rpartition("/")[2]

        def checked(requests: Iterator[Any], context: grpc.ServicerContext) -> Any:
            peer = self._admit(call, rule, context) if self._tls is not None else None
            with self._patience.with_caller(context):
                request = next(requests, None)
            if request is None:
                self._refuse(context, peer, f"{call} came without a request")
            if rule.own and peer is not None and getattr(request, rule.own) != peer.name:
                self._refuse(context, peer, f"{peer} may call {call} for itself only")
            return behavior(request, context)

        # On the wire a call with one request and one with a stream of them are the same.
        return grpc.stream_unary_rpc_method_handler(
            checked, handler.request_deserializer, handler.response_serializer
        )

    def _admit(self, call: str, rule: Rule, context: grpc.ServicerContext) -> Peer:
        assert self._tls is not None
        try:
            peer = caller(context)
        except DtrainError as error:
            self._refuse(context, None, error.message)
        if peer is None:
            self._refuse(context, None, f"{call} needs a certificate")
        if peer.cluster != self._tls.peer.cluster:
            self._refuse(context, peer, f"{peer} is of cluster {peer.cluster}, not of this one")
        if peer.role not in rule.roles:
            allowed = " and ".join(sorted(f"{role.value}s" for role in rule.roles))
            self._refuse(context, peer, f"{peer} may not call {call}: it is for {allowed}")
        return peer

    def _refuse(self, context: grpc.ServicerContext, peer: Peer | None, why: str) -> NoReturn:
        self._log.warning("call refused", caller=peer.uri if peer else "", why=why)
        self._abort(context, _not_permitted(why))


class _Patience:
    """Cancels calls whose request does not come. One thread, and only while there are such calls."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()
        self._waiting: dict[int, tuple[float, grpc.ServicerContext]] = {}
        self._last = 0
        self._watched = False

    @contextlib.contextmanager
    def with_caller(self, context: grpc.ServicerContext) -> Iterator[None]:
        with self._lock:
            self._last += 1
            number = self._last
            self._waiting[number] = (time.monotonic() + self._seconds, context)
            if not self._watched:
                self._watched = True
                threading.Thread(target=self._run, name="gate", daemon=True).start()
        try:
            yield
        finally:
            with self._lock:
                del self._waiting[number]

    def _run(self) -> None:
        while True:
            time.sleep(self._seconds / 10)
            now = time.monotonic()
            with self._lock:
                over = [context for end, context in self._waiting.values() if end <= now]
                if not self._waiting:
                    self._watched = False
                    return
            for context in over:
                context.cancel()


def _not_permitted(why: str) -> Refused:
    return Refused(
        ErrorCode.NOT_PERMITTED,
        why,
        fix="use a certificate of the role that may do this; docs/security.md lists them",
    )


def _read(files: TlsFiles) -> _Material:
    # Loaded where TLS is on: it takes a tenth of a second.
    from cryptography import x509
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization

    cert, key, cacert = (_bytes(path) for path in (files.cert, files.key, files.cacert))
    what = files.cert
    try:
        leaf = x509.load_pem_x509_certificates(cert)[0]
        public = leaf.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        what = files.cacert
        authorities = x509.load_pem_x509_certificates(cacert)
        what = files.key
        mine = (
            serialization.load_pem_private_key(key, None)
            .public_key()
            .public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        )
    except (ValueError, TypeError, IndexError, UnsupportedAlgorithm) as error:
        # Without the library's words: they may quote the file, and that may be a key.
        raise _bad(f"{what} is not PEM that can be used (a key must not be encrypted)") from error
    if mine != public:
        raise _bad(f"{files.key} is not the key of {files.cert}")
    try:
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    except (x509.ExtensionNotFound, ValueError) as error:
        raise _bad(f"{files.cert} has no names") from error
    ours = [uri for uri in uris if uri.startswith(SCHEME)]
    if len(ours) != 1:
        raise _bad(f"{files.cert} has {len(ours)} URIs {SCHEME}<cluster>/<role>/<name> and needs one")
    ends = [found.not_valid_after_utc for found in (leaf, *authorities)]
    return _Material(cert, key, cacert, parse_peer(ours[0]), min(ends).timestamp())


def _bytes(path: str) -> bytes:
    try:
        with Path(path).open("rb") as file:
            return file.read(FILE_BYTES_MAX)
    except OSError as error:
        raise _bad(f"{path} cannot be read: {error.strerror}") from error


def _stamp(files: TlsFiles) -> Any:
    found = []
    for path in (files.cert, files.key, files.cacert):
        try:
            # Through links: mounted secrets are replaced by turning one.
            stat = Path(path).stat()
            found.append((stat.st_mtime_ns, stat.st_ino, stat.st_size))
        except OSError:
            found.append((0, 0, 0))
    return tuple(found)


def _is_open(path: str) -> bool:
    try:
        return bool(Path(path).stat().st_mode & 0o004)
    except OSError:
        return False


def _expiry(path: str, left_s: float) -> str:
    if left_s <= 0:
        at = datetime.timedelta(seconds=int(-left_s))
        return f"the certificate {path}, or its CA, has expired: nobody can connect (since {at})"
    days = int(left_s // 86_400)
    return f"the certificate {path}, or its CA, expires in {days} day{'s' if days != 1 else ''}: replace it"


def _bad(message: str) -> Refused:
    return Refused(ErrorCode.BAD_SETTING, message, fix="docs/security.md says how certificates are made")
