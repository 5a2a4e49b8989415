"""The dashboard's process: a mirror of etcd in a thread, an event loop that serves pages from it.

It has a mirror of its own rather than its coordinator's, so that pages cost the
leader's process nothing and stay while coordinators are restarted. Both are
copies of the same etcd: at one revision they say the same.
"""

import asyncio
import contextlib
import importlib.metadata
import os
import signal
import socket
import ssl
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import uvicorn

from dtrain.coordinator import config
from dtrain.coordinator.config import Config
from dtrain.coordinator.web import assets
from dtrain.coordinator.web.calls import Calls
from dtrain.coordinator.web.door import Door
from dtrain.coordinator.web.settings import DashboardSettings
from dtrain.coordinator.web.site import Site
from dtrain.coordinator.web.streams import Feed
from dtrain.protocol import codec
from dtrain.protocol.cluster import ReplicaRecord
from dtrain.protocol.errors import DtrainError
from dtrain.protocol.keys import Keys
from dtrain.runtime import grpc_tls, log, serving
from dtrain.runtime.clock import SystemClock
from dtrain.runtime.tls import Role
from dtrain.storage.etcd.mirror import Mirror
from dtrain.storage.etcd.open import open_etcd

EX_CONFIG = 78
EX_SOFTWARE = 70

BIND_AGAIN_S = 5.0
CONNECTIONS_MAX = 512
HEADERS_BYTES_MAX = 32 * 1024
CERTIFICATE_LOOK_S = 60.0
END_S = 1


def run(argv: Sequence[str]) -> int:
    """Serve until told to stop; return the exit code: 0, 70 for a bug, 78 if a person is needed."""
    try:
        settings = config.load(argv, os.environ)
        if settings.dashboard is None:
            return 0
        log.configure(json_lines=settings.log_json, component=f"dashboard/{settings.replica}")
        return asyncio.run(_serve(settings, settings.dashboard))
    except DtrainError as error:
        cause = f": {error.cause}" if error.cause else ""
        fix = f"\n  fix: {error.fix}" if error.fix else ""
        sys.stderr.write(f"dtrain dashboard: {error.message}{cause} ({error.code.value}){fix}\n")
        return EX_CONFIG


async def _serve(settings: Config, dashboard: DashboardSettings) -> int:
    logger = log.get("dashboard")
    clock = SystemClock()
    loop = asyncio.get_running_loop()
    ending = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ending.set)
    tls = grpc_tls.load(settings.tls, settings.cluster, Role.COORDINATOR, settings.replica, clock=clock)
    keys = Keys(settings.cluster)
    etcd = open_etcd(settings.etcd, clock)
    failed: list[str] = []

    def fail(why: str) -> None:
        failed.append(why)
        loop.call_soon_threadsafe(ending.set)

    feeds: list[Feed] = []
    mirror = Mirror(
        etcd,
        keys.root,
        on_changes=lambda _changes, _revision: _tell(loop, feeds),
        on_alarm=lambda error: fail(error.message),
        on_failure=lambda error: fail(f"the mirror died: {error}"),
        clock=clock,
    )
    feed = Feed(mirror, keys)
    feeds.append(feed)
    mirror.start()
    calls = Calls(lambda: _addresses(mirror, keys, settings.replica), tls, f"dashboard of {settings.replica}")
    who = {
        "cluster": settings.cluster,
        "replica": settings.replica,
        "version": importlib.metadata.version("dtrain"),
    }
    server = _server(dashboard, Site(dashboard, who, feed, calls, assets.load()))
    listener = await _bind(dashboard.listen, ending, logger)
    if listener is not None:
        host, port = listener.getsockname()[:2]
        logger.info("dashboard started", address=f"{host}:{port}", read_only=not dashboard.token_file)
        serving_task = asyncio.create_task(server.serve(sockets=[listener]))
        watching = asyncio.create_task(_reload(server, dashboard, logger))
        stop = asyncio.create_task(ending.wait())
        await asyncio.wait({serving_task, stop}, return_when=asyncio.FIRST_COMPLETED)
        server.should_exit = True
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await serving_task
        stop.cancel()
    for why in failed:
        logger.critical("dashboard failed", reason=why)
    sys.stderr.flush()
    # No teardown: threads that wait for etcd would hold it up.
    os._exit(EX_SOFTWARE if failed else 0)


def _tell(loop: asyncio.AbstractEventLoop, feeds: Sequence[Feed]) -> None:
    with contextlib.suppress(RuntimeError):  # the loop has ended
        for feed in feeds:
            loop.call_soon_threadsafe(feed.notify)


def _addresses(mirror: Mirror, keys: Keys, own: str) -> list[str]:
    """API addresses of the replicas that live, our own first."""
    found = []
    for kv in mirror.prefix(f"{keys.root}coordinators/"):
        with contextlib.suppress(DtrainError):
            record = codec.decode(ReplicaRecord, kv.value)
            found.append((record.replica != own, record.address))
    return [address for _, address in sorted(found)]


class _Server(uvicorn.Server):
    """Signals are ours: uvicorn would send them again to whoever handled them before. So is HTTPS's door."""

    _door: "asyncio.Task[None] | None" = None

    @contextlib.contextmanager
    def capture_signals(self):  # type: ignore[no-untyped-def]
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        context = self.config.ssl
        await super().startup(sockets if context is None else [])
        if context is not None and sockets:
            (listener,) = sockets
            self._door = asyncio.create_task(Door(listener, context, self._protocol).serve())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._door is not None:
            self._door.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._door
        await super().shutdown(sockets)

    def _protocol(self) -> asyncio.Protocol:
        kind: Any = self.config.http_protocol_class
        made: asyncio.Protocol = kind(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        return made


def _server(dashboard: DashboardSettings, site: Site) -> _Server:
    return _Server(
        uvicorn.Config(
            site.app(),
            log_config=None,
            access_log=False,
            lifespan="off",
            http="h11",
            ws="none",
            server_header=False,
            proxy_headers=False,
            limit_concurrency=CONNECTIONS_MAX,
            h11_max_incomplete_event_size=HEADERS_BYTES_MAX,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=END_S,
            ssl_certfile=dashboard.cert or None,
            ssl_keyfile=dashboard.key or None,
        )
    )


async def _bind(listen: str, ending: asyncio.Event, logger: log.Logger) -> socket.socket | None:
    """Listen, however long another program has the port; None: told to end meanwhile."""
    told = False
    while not ending.is_set():
        try:
            return serving.bind(listen)
        except DtrainError as error:
            if not told:
                logger.warning(
                    "dashboard waits for its port",
                    address=listen,
                    error=error.cause or error.message,
                    fix="choose another --dashboard-listen, or nothing for none",
                )
            told = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(ending.wait(), BIND_AGAIN_S)
    return None


async def _reload(server: uvicorn.Server, dashboard: DashboardSettings, logger: log.Logger) -> None:
    """Show a new certificate once the files have been replaced."""
    stamp = _stamp(dashboard)
    while dashboard.cert:
        await asyncio.sleep(CERTIFICATE_LOOK_S)
        found = _stamp(dashboard)
        context = server.config.ssl
        if found != stamp and context is not None:
            try:
                context.load_cert_chain(dashboard.cert, dashboard.key)
                stamp = found
            except (OSError, ssl.SSLError) as error:
                logger.warning("dashboard keeps its former certificate", error=str(error))


def _stamp(dashboard: DashboardSettings) -> object:
    try:
        return [Path(path).stat().st_mtime_ns for path in (dashboard.cert, dashboard.key) if path]
    except OSError:
        return None
