"""Who talks to a bucket: boto3's client with our settings, renewed credentials and the store's pace.

Requests are not retried here, with two exceptions: credentials that have expired
are looked up once more, where they came from; and boto3 follows a bucket to its
region. The pace is one for the whole store: a "slow down" said to one lane slows
all of them.
"""

import contextlib
import os
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from dtrain.protocol.errors import ErrorCode, Refused
from dtrain.runtime import log
from dtrain.storage.blobs import s3_errors
from dtrain.storage.blobs.flow import Flow
from dtrain.storage.blobs.pace import AdaptiveRate
from dtrain.storage.blobs.s3_settings import S3Settings
from dtrain.storage.blobs.s3_wire import Body, Plain, Target, Wire

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

T = TypeVar("T")

RENEW_S = 10.0
"""Credentials younger than this are not looked up again: the store means these."""

_log = log.get("store.s3")


class _Connected:
    """One process's client: connections and their locks do not survive a fork."""

    def __init__(self, client: "S3Client", wire: Wire) -> None:
        self.client = client
        self.wire = wire
        self.since = time.monotonic()


class S3Access:
    """Makes requests to one bucket; safe for several threads, and in a child after a fork."""

    def __init__(
        self, uri: str, bucket: str, settings: S3Settings, credentials: tuple[str, str] | None
    ) -> None:
        self._uri = uri
        self._bucket = bucket
        self._settings = settings
        self._credentials = credentials
        self._lock = threading.Lock()
        self._connected: dict[int, _Connected] = {}
        self._rate = AdaptiveRate()
        self._rate_lock = threading.Lock()

    def call(
        self,
        doing: str,
        request: "Callable[[Any], T]",
        *,
        writing: bool = False,
        key: str = "",
        flow: Flow | None = None,
    ) -> T:
        """Make a request with the client that it is given.

        ``doing`` completes "cannot ... in <uri>"; ``writing``: a lost answer may hide a change; ``key``: a
        "404" is about it. Waits end with the ``flow`` of the write that the request belongs to.

        Raises:
            Refused, Unavailable, OutcomeUnknown: or one of the signals of ``s3_errors``.
            Stopped: the flow was.
        """
        while True:
            self._admit(flow or Flow())
            connected = self._connect()
            try:
                with (
                    s3_errors.Translated(self._uri, self._bucket, doing, writing=writing, key=key),
                    connected.wire.carrying(Plain(flow) if flow is not None else None),
                ):
                    return request(connected.client)
            except s3_errors.Busy as busy:
                self._slow_down(busy)
                raise
            except s3_errors.Stale:
                if not self._renew(connected):
                    raise

    def carrying(self, load: Body | Target) -> AbstractContextManager[None]:
        """Let the request that is made in the block send or fill ``load``."""
        return self._connect().wire.carrying(load)

    def close(self) -> None:
        """Close this process's connections; the next call makes new ones."""
        with self._lock:
            connected = self._connected.pop(os.getpid(), None)
        if connected is not None:
            connected.wire.close()
            connected.client.close()

    def _admit(self, flow: Flow) -> None:
        with self._rate_lock:
            wait_s = self._rate.take(time.monotonic())
        flow.wait(wait_s)

    def _slow_down(self, busy: s3_errors.Busy) -> None:
        with self._rate_lock:
            now = time.monotonic()
            self._rate.slowed(now, busy.hint_s)
            rate = self._rate.rate(now)
        _log.warning(
            "store_slowed", store=self._uri, requests_per_s=round(rate, 1), pause_s=round(busy.hint_s, 1)
        )

    def _renew(self, stale: _Connected) -> bool:
        """Forget a client whose credentials are refused; False: they have just been looked up."""
        if self._credentials is not None or time.monotonic() - stale.since < RENEW_S:
            return False
        with self._lock:
            if self._connected.get(os.getpid()) is stale:
                # Not closed: other threads may be in the middle of a request.
                del self._connected[os.getpid()]
                _log.info("store_credentials_renewed", store=self._uri)
        return True

    def _connect(self) -> _Connected:
        with self._lock:
            connected = self._connected.get(os.getpid())
            if connected is None:
                connected = self._connected[os.getpid()] = self._make()
            return connected

    def _make(self) -> _Connected:
        try:
            import boto3
            from botocore.awsrequest import AWSResponse
            from botocore.config import Config
            from botocore.httpsession import get_cert_path
            from botocore.utils import get_environ_proxies
        except ImportError as error:
            raise Refused(
                ErrorCode.STORE_REFUSED,
                f"{self._uri} needs boto3, which is not installed here",
                fix="pip install 'dtrain[s3]'",
            ) from error
        settings = self._settings
        if settings.ca_bundle and not Path(settings.ca_bundle).exists():
            raise Refused(
                ErrorCode.BAD_SETTING,
                f"the certificates {settings.ca_bundle} of {self._uri} are not on this machine",
                fix="copy them to the same path on every machine that uses the store",
            )
        with s3_errors.Translated(self._uri, self._bucket, "connect", writing=False, key=""):
            session = boto3.Session(profile_name=settings.profile or None)
            client = self._client(session, Config, settings.addressing)
            if settings.addressing == "auto" and not _is_aws(client.meta.endpoint_url):
                # A bucket's name in front of the host needs DNS for it, which only AWS is sure to have.
                client = self._client(session, Config, "path")
            verify: Any = settings.ca_bundle or session._session.get_config_variable("ca_bundle") or True
        wire = Wire(
            lambda url, status, headers, rest: AWSResponse(url, status, headers, rest),  # type: ignore[arg-type]
            # A proxy cannot reach this machine's loopback.
            proxied=lambda url: not _is_loopback(url) and urlsplit(url).scheme in get_environ_proxies(url),
            tls=lambda: _tls(get_cert_path(verify)),
            connect_timeout_s=settings.connect_timeout_s,
            timeout_s=settings.timeout_s,
        )
        client.meta.events.register("before-send.s3", wire.before_send)
        return _Connected(client, wire)

    def _client(self, session: Any, config: Any, addressing: str) -> "S3Client":
        settings = self._settings
        key, secret = self._credentials or (None, None)
        try:
            client: S3Client = session.client(
                "s3",
                endpoint_url=settings.endpoint or None,
                region_name=settings.region or session.region_name or "us-east-1",
                aws_access_key_id=key,
                aws_secret_access_key=secret,
                verify=settings.ca_bundle or None,
                config=config(
                    # Our own CRCs are sent: a second one in a trailer costs CPU and breaks some servers.
                    request_checksum_calculation="when_required",
                    response_checksum_validation="when_required",
                    retries={"total_max_attempts": 1, "mode": "standard"},
                    connect_timeout=settings.connect_timeout_s,
                    read_timeout=settings.timeout_s,
                    max_pool_connections=4 * settings.lanes,
                    tcp_keepalive=True,
                    proxies={} if settings.endpoint and _is_loopback(settings.endpoint) else None,
                    s3={
                        "addressing_style": addressing,
                        # The CRC header is signed; hashing the body with SHA-256 costs more than sending it.
                        "payload_signing_enabled": False,
                    },
                ),
            )
        except ValueError as error:
            raise Refused(
                ErrorCode.BAD_SETTING,
                f"{self._uri} cannot be used: {error}",
                fix="correct the endpoint in the store's URI",
            ) from error
        return client


def _is_aws(endpoint: str) -> bool:
    host = urlsplit(endpoint).hostname or ""
    return host.endswith((".amazonaws.com", ".amazonaws.com.cn"))


def _is_loopback(url: str) -> bool:
    return urlsplit(url).hostname in ("127.0.0.1", "::1", "localhost")


def _tls(verify: str | bool | None) -> ssl.SSLContext:
    """Return what boto3 would use: the certificates at a path."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    with contextlib.suppress(AttributeError):
        context.minimum_version = ssl.TLSVersion.TLSv1_2
    path = str(verify)
    if Path(path).is_dir():
        context.load_verify_locations(capath=path)
    else:
        context.load_verify_locations(cafile=path)
    return context
