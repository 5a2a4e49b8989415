"""A whole cluster on this machine: etcd, a store, coordinators and agents.

Everything lives in one folder and on loopback. ``start`` returns once a leader
is elected and every agent has registered; ``stop`` leaves no process behind, and
neither does our own death: servers die with us, the reaper ends the rest. The
``kill_*`` methods are what the end-to-end tests and the demo break things with.
"""

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from dtrain.local import marks, ports, reaper, sweeping
from dtrain.local.breaker import LocalBreaker
from dtrain.local.breaking import Breakable
from dtrain.local.daemons import Daemon, Keeper
from dtrain.local.etcd import EtcdCluster, Member, SecureEtcd
from dtrain.local.fault_port import FaultServer
from dtrain.local.links import Links
from dtrain.local.weed import WeedServer
from dtrain.protocol.errors import Conflict, ErrorCode, Refused, Unavailable
from dtrain.protocol.ids import AgentName, ClusterName, parse_name
from dtrain.protocol.keys import Keys
from dtrain.storage.etcd.transport import GatewayEtcd

STOP_S = 5.0
"""How long daemons get to stop cleanly before everything is killed."""

_LOCK = "cluster.lock"
_ONE_MACHINE = {"DTRAIN_DRAIN_GRACE": "0", "DTRAIN_CORDON_FOR": "0"}
"""The cluster ends as a whole, so nothing can move, and all of its machines are this one: none is worse
than the others. For daemons of this release: another may refuse it."""
_KEPT = ("DTRAIN_ETCD_BIN", "DTRAIN_ETCDCTL_BIN", "DTRAIN_WEED_BIN")


class LocalCluster(Breakable):
    """One cluster in ``folder``; coordinators are c1, c2, ..., agents a1, a2, ...

    ``store``: ``s3`` (an S3 server of its own) or ``dir`` (a folder). ``port``:
    the first coordinator's, the others follow; 0 picks free ones. ``remove``:
    the folder is deleted at the end, also at a violent one. ``etcd_fsync=False``
    is for tests, where no machine loses power. ``agent_flags`` and ``coordinator_flags``
    are added to each daemon's command line, with its name in place of ``{name}``, ``env`` to
    its environment. ``faults``
    marks it as a test cluster, gives each daemon links of its own to etcd, which can be
    cut and slowed, and serves ``dtrain chaos``. ``auto_compaction``: how long etcd keeps
    history ("10m"; "": for ever). ``secure``: etcd with TLS and users. ``python_of``: the interpreter
    that runs a daemon, by its name; one of another environment brings another release of dtrain.
    ``slots``: of each agent, or of one after the other; the last number is that of all further ones.
    ``dashboards``: each coordinator serves one; ``dashboard_port``: the first one's, as ``port``.
    """

    def __init__(
        self,
        folder: Path,
        *,
        coordinators: int = 3,
        agents: int = 3,
        slots: int | Sequence[int] = 2,
        store: str = "s3",
        ttl_s: int = 5,
        etcd_members: int = 1,
        name: str = "local",
        port: int = 0,
        remove: bool = False,
        etcd_fsync: bool = True,
        ready_timeout_s: float = 60.0,
        agent_flags: Sequence[str] = (),
        coordinator_flags: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        faults: bool = False,
        etcd_quota_bytes: int = 0,
        auto_compaction: str = "",
        secure: SecureEtcd | None = None,
        python_of: Callable[[str], str] = lambda _name: sys.executable,
        dashboards: bool = False,
        dashboard_port: int = 0,
    ) -> None:
        if store not in ("s3", "dir"):
            raise Refused(ErrorCode.BAD_SETTING, f"{store!r} is no kind of local store", fix="use s3 or dir")
        self.name = ClusterName(parse_name(name, "cluster"))
        self.folder = folder.resolve()
        self.keys = Keys(self.name)
        self._counts = (coordinators, agents)
        self._slots = (slots,) if isinstance(slots, int) else tuple(slots)
        self._ttl_s = ttl_s
        self._port, self._remove = port, remove
        self._etcd_members = etcd_members
        self._ready_timeout_s = ready_timeout_s
        self._agent_flags = tuple(agent_flags)
        self._coordinator_flags = tuple(coordinator_flags)
        self._env = dict(env or {})
        self._faults = faults
        self._python_of = python_of
        self._dashboards = dashboards
        self._dashboard_port = dashboard_port
        self.etcd_servers = EtcdCluster(
            self.folder / "etcd",
            size=etcd_members,
            fsync=etcd_fsync,
            auto_compaction=auto_compaction,
            quota_bytes=etcd_quota_bytes,
            tls=secure.tls if secure is not None else None,
        )
        self._secure = secure
        self.weed = WeedServer(self.folder / "weed") if store == "s3" else None
        self.coordinators: dict[str, Daemon] = {}
        self.agents: dict[str, Daemon] = {}
        self.links: dict[str, Links] = {}
        self.addresses: tuple[str, ...] = ()
        self.dashboards: dict[str, str] = {}
        """URLs by coordinator."""
        self._ports: list[int] = []
        self._keepers: list[Keeper] = []
        self._reaper: subprocess.Popen[bytes] | None = None
        self._lock_fd: int | None = None
        self._client: GatewayEtcd | None = None
        self._fault_server: FaultServer | None = None

    def __enter__(self) -> "LocalCluster":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # Life -------------------------------------------------------------------------

    def start(self, progress: Callable[[str], None] = lambda _: None) -> None:
        """Return once the cluster is ready to take jobs; ``progress`` hears of each part.

        Raises:
            Conflict: the folder is in use by a running cluster.
            Refused: a port is in use, or etcd or the S3 server is not installed.
            Unavailable: a part did not get ready; the message has the end of its log.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._take_folder()
        try:
            self._start(progress)
        except BaseException:
            self.stop(clean=False)
            raise

    def stop(self, *, clean: bool = True) -> None:
        """End everything; ``clean`` gives the daemons a moment to do it in order. May be repeated."""
        if self._fault_server is not None:
            # First: what it heals now would be started behind our back.
            self._fault_server.close()
            self._fault_server = None
        daemons = [*self.agents.values(), *self.coordinators.values()]
        if clean:
            for links in self.links.values():
                links.heal()
            for daemon in daemons:
                daemon.terminate()
            deadline = time.monotonic() + STOP_S
            for daemon in daemons:
                daemon.wait(deadline - time.monotonic())
        if self._lock_fd is not None:
            sweeping.end_all(self.folder)
        for daemon in daemons:
            daemon.send(signal.SIGKILL)
            daemon.wait(5.0)
        for links in self.links.values():
            links.close()
        self.links = {}
        if self._client is not None:
            self._client.close()
            self._client = None
        if self.weed is not None:
            self.weed.close()
        self.etcd_servers.close()
        for keeper in self._keepers:
            keeper.close()
        self._keepers = []
        ports.release(self._ports)
        self._ports = []
        if self._lock_fd is not None and self._remove:
            shutil.rmtree(self.folder, ignore_errors=True)
        # Last: until here, our own death would leave something for it to do.
        if self._reaper is not None:
            self._reaper.kill()
            self._reaper.wait()
            self._reaper = None
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None

    def ended(self) -> tuple[str, str] | None:
        """Which part has ended and is started again by nobody, and the end of its log; None: none has."""
        for member in self.etcd_servers.members:
            if member.process is not None and (code := member.process.poll()) is not None:
                return f"etcd ended ({_how(code)})", self.etcd_servers.log_tail(member)
        for kind, daemons in (("coordinator", self.coordinators), ("agent", self.agents)):
            for daemon in daemons.values():
                if (code := daemon.exit_code) is not None:
                    return f"{kind} {daemon.name} ended ({_how(code)})", daemon.log_tail()
        return None

    # What a client needs -------------------------------------------------------------

    @property
    def endpoints(self) -> tuple[str, ...]:
        """Client URLs of etcd."""
        return tuple(self.etcd_servers.endpoints)

    @property
    def store_uri(self) -> str:
        """The default store of jobs."""
        return self.weed.store_uri() if self.weed is not None else (self.folder / "store").as_uri()

    @property
    def store_env(self) -> Mapping[str, str]:
        """Credentials of the store, as environment variables."""
        return self.weed.env if self.weed is not None else {}

    @property
    def dashboard_token(self) -> Path:
        """The file with the token that lets a browser change things."""
        return self.folder / "dashboard.token"

    @property
    def etcdctl(self) -> str:
        """The ``etcdctl`` beside the etcd that runs, or just its name."""
        return self.etcd_servers.binary.etcdctl or "etcdctl"

    @property
    def warning(self) -> str:
        """What to tell the user about the etcd that runs, "" for nothing."""
        return self.etcd_servers.binary.warning or ""

    @property
    def etcd(self) -> GatewayEtcd:
        """A client of the cluster's etcd."""
        if self._client is None:
            opened = self._secure.open if self._secure is not None else GatewayEtcd
            self._client = opened(self.endpoints)
        return self._client

    # Inside --------------------------------------------------------------------------

    def _start(self, progress: Callable[[str], None]) -> None:
        count, agent_count = self._counts
        self._ports = self._choose_ports(count, agent_count)
        self.addresses = tuple(f"127.0.0.1:{port}" for port in self._ports[:count])
        self._choose_dashboards(count)
        keeper, store_keeper = Keeper("daemons"), Keeper("store")
        self._keepers = [keeper, store_keeper]
        self._start_reaper(keeper)
        # The store takes longest: it starts beside everything else.
        weed = self.weed
        store_ready = store_keeper.begin(weed.start) if weed is not None else self._make_folder_store
        self._recall_etcd()
        keeper.call(self.etcd_servers.start)
        self.etcd_servers.wait_ready(self._ready_timeout_s)
        if self._secure is not None:
            self._secure.prepare(self.endpoints)
        self._mark()
        progress(f"etcd {'.'.join(map(str, self.etcd_servers.binary.version))} at {','.join(self.endpoints)}")
        for index in range(agent_count):
            self._add_agent(f"a{index + 1}", self._ports[count + index], keeper)
        store_ready()
        progress(f"store {self.store_uri}")
        for index in range(count):
            self._add_coordinator(f"c{index + 1}", self._ports[index], keeper)
        self._await_ready(progress)

    def _add_coordinator(self, name: str, port: int, keeper: Keeper) -> None:
        command = (
            *(self._python_of(name), "-m", "dtrain.coordinator"),
            *("--cluster", self.name, "--id", name, "--listen", f"127.0.0.1:{port}"),
            *("--endpoints", ",".join(self._endpoints_of(name)), "--ttl", str(self._ttl_s)),
            *("--default-store", self.store_uri),
            *self._dashboard_flags(name),
            *_named(self._coordinator_flags, name),
        )
        self._add(self.coordinators, name, command, self.folder / "coordinators" / name, keeper)

    def _add_agent(self, name: str, port: int, keeper: Keeper) -> None:
        folder = self.folder / "agents" / name
        slots = self._slots[min(len(self.agents), len(self._slots) - 1)]
        command = (
            *(self._python_of(name), "-m", "dtrain.agent"),
            *("--cluster", self.name, "--name", name, "--listen", f"127.0.0.1:{port}"),
            *("--host", "127.0.0.1", "--slots", str(slots), "--data-dir", str(folder)),
            *("--endpoints", ",".join(self._endpoints_of(name)), "--ttl", str(self._ttl_s)),
            *_named(self._agent_flags, name),
        )
        self._add(self.agents, name, command, folder, keeper)

    def _notices_of(self, name: str) -> dict[str, str]:
        """Where an agent looks whether its machine goes: where ``preempt`` says so."""
        path = self.folder / "notices" / name
        path.unlink(missing_ok=True)
        return {"DTRAIN_PREEMPTION_NOTICE": f"file:{quote(str(path))}", "DTRAIN_PREEMPTION_INTERVAL": "0.5"}

    def _mark(self) -> None:
        """Say in etcd whether this cluster may be broken; a mark of an earlier start counts no more."""
        if self._faults:
            self._fault_server = FaultServer(self.folder, lambda: LocalBreaker(self))
            mark = marks.make(pid=os.getpid(), faults=str(self._fault_server.path))
            marks.put(self.etcd, self.keys, mark)
        else:
            marks.remove(self.etcd, self.keys)

    def _endpoints_of(self, name: str) -> tuple[str, ...]:
        """Where a daemon finds etcd: with ``faults``, behind links of its own."""
        if not self._faults:
            return self.endpoints
        self.links[name] = Links(self.endpoints)
        return self.links[name].endpoints

    def _add(
        self,
        where: dict[str, Daemon],
        name: str,
        command: tuple[str, ...],
        folder: Path,
        keeper: Keeper,
    ) -> None:
        # Settings of whoever starts us are for other clusters.
        env = {
            key: value
            for key, value in os.environ.items()
            if key in _KEPT or not key.startswith(("DTRAIN_", "ETCDCTL_"))
        }
        own = dict(_ONE_MACHINE) if command[0] == sys.executable else {}
        if own and self._faults and where is self.agents:
            own |= self._notices_of(name)
        daemon = Daemon(
            name,
            command,
            folder=folder,
            log_path=self.folder / "logs" / f"{name}.log",
            env=env | {"PYTHONUNBUFFERED": "1", **own, **self.store_env, **self._env},
            keeper=keeper,
        )
        where[name] = daemon
        daemon.start()

    def _await_ready(self, progress: Callable[[str], None]) -> None:
        deadline = time.monotonic() + self._ready_timeout_s
        missing = {"a leader", *(f"coordinator {name}" for name in self.coordinators)}
        missing |= {f"agent {name}" for name in self.agents}
        while missing:
            self._check_alive()
            with contextlib.suppress(Unavailable):
                for part in sorted(missing & self._present()):
                    missing.discard(part)
                    progress(f"{part}: {self.leader()}" if part == "a leader" else part)
            if missing and time.monotonic() > deadline:
                raise Unavailable(
                    ErrorCode.COORDINATOR_UNAVAILABLE,
                    f"not ready after {self._ready_timeout_s:g} s: {', '.join(sorted(missing))}",
                    cause=self._tail_of(missing),
                    fix=f"look into {self.folder / 'logs'}",
                )
            if missing:
                time.sleep(0.05)

    def _present(self) -> set[str]:
        found = set()
        for key in self.read(""):
            parsed = self.keys.parse(key)
            if parsed is None:
                continue
            match parsed.kind:
                case "leader":
                    found.add("a leader")
                case "coordinator":
                    found.add(f"coordinator {parsed.name}")
                case "node":
                    found.add(f"agent {AgentName(parsed.agent)}")
        return found

    def _check_alive(self) -> None:
        for daemon in (*self.coordinators.values(), *self.agents.values()):
            if daemon.exit_code is not None:
                raise Unavailable(
                    ErrorCode.COORDINATOR_UNAVAILABLE,
                    f"{daemon.name} ended at once with exit code {daemon.exit_code}",
                    cause=daemon.log_tail(),
                    fix=f"look into {daemon.log_path}",
                )

    def _tail_of(self, missing: set[str]) -> str:
        names = [part.rpartition(" ")[2] for part in sorted(missing)]
        known = [self.coordinators.get(name) or self.agents.get(name) for name in names]
        return next((daemon.log_tail() for daemon in known if daemon is not None), "")

    def _choose_ports(self, coordinators: int, agents: int) -> list[int]:
        if not self._port:
            return ports.reserve(coordinators + agents)
        wanted = list(range(self._port, self._port + coordinators))
        for port in wanted:
            if not _is_free(port):
                raise Refused(
                    ErrorCode.PORT_IN_USE,
                    f"port {port} on 127.0.0.1 cannot be used: another program listens there",
                    fix="choose another --port, or 0 for any free one",
                )
        return wanted + ports.reserve(agents)

    def _choose_dashboards(self, count: int) -> None:
        if not self._dashboards:
            return
        if self._dashboard_port:
            found = list(range(self._dashboard_port, self._dashboard_port + count))
        else:
            found = ports.reserve(count)
            self._ports += found
        self.dashboards = {f"c{index + 1}": f"http://127.0.0.1:{port}" for index, port in enumerate(found)}
        if not self.dashboard_token.exists():
            descriptor = os.open(self.dashboard_token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(secrets.token_hex(24) + "\n")

    def _dashboard_flags(self, name: str) -> tuple[str, ...]:
        if self._python_of(name) != sys.executable:
            return ()  # another release may know no dashboard
        if name not in self.dashboards:
            return ("--dashboard-listen", "")
        listen = self.dashboards[name].removeprefix("http://")
        return ("--dashboard-listen", listen, "--dashboard-token-file", str(self.dashboard_token))

    def _recall_etcd(self) -> None:
        """Give etcd's members the ports they had: they know each other by them."""
        file = self.folder / "etcd" / "members.json"
        saved = json.loads(file.read_text()) if file.exists() else []
        size = self._etcd_members
        if saved and len(saved) != size:
            raise Conflict(
                ErrorCode.CONFLICT,
                f"{self.folder} holds the data of an etcd with {len(saved)} members, not {size}",
                fix=f"use --etcd-members {len(saved)}, or another --folder",
            )
        taken = [port for pair in saved for port in pair if not _is_free(port)]
        if taken and size > 1:
            raise Refused(
                ErrorCode.PORT_IN_USE,
                f"port {taken[0]} of this cluster's etcd is in use by another program",
                fix="stop that program, or choose another --folder",
            )
        if saved and not taken:
            folder = self.folder / "etcd"
            self.etcd_servers.members = [
                Member(f"etcd-{index}", client, peer, folder) for index, (client, peer) in enumerate(saved)
            ]
        # Asking for the endpoints chooses ports where there are none yet.
        assert self.etcd_servers.endpoints
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps([[m.client_port, m.peer_port] for m in self.etcd_servers.members]))

    def _take_folder(self) -> None:
        fd = os.open(self.folder / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.pread(fd, 20, 0).decode(errors="replace").strip()
            os.close(fd)
            raise Conflict(
                ErrorCode.ALREADY_EXISTS,
                f"a cluster runs in {self.folder} already (process {owner or 'unknown'})",
                fix="use it, stop it with Ctrl-C, or choose another --folder",
            ) from error
        os.ftruncate(fd, 0)
        os.pwrite(fd, str(os.getpid()).encode(), 0)
        self._lock_fd = fd

    def _start_reaper(self, keeper: Keeper) -> None:
        # A former owner's reaper may still be at work; what we start now it would end, too.
        fd = os.open(self.folder / reaper.LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            deadline = time.monotonic() + 15.0
            while True:
                with contextlib.suppress(OSError):
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                if time.monotonic() > deadline:
                    raise Conflict(
                        ErrorCode.CONFLICT,
                        f"processes of an earlier cluster in {self.folder} are still being ended",
                        fix="try again in a moment, or choose another --folder",
                    )
                time.sleep(0.05)
        finally:
            os.close(fd)
        sweeping.end_all(self.folder)
        command = [sys.executable, "-m", "dtrain.local.reaper", str(os.getpid()), str(self.folder)]

        def spawn() -> "subprocess.Popen[bytes]":
            return subprocess.Popen(
                [*command, *(["remove"] if self._remove else [])],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )

        self._reaper = keeper.call(spawn)
        assert self._reaper.stdout is not None
        # Nothing that could outlive us is started before somebody watches.
        with self._reaper.stdout as answer:
            answer.readline()

    def _make_folder_store(self) -> None:
        (self.folder / "store").mkdir(parents=True, exist_ok=True)


def _how(code: int) -> str:
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"


def _named(flags: Sequence[str], name: str) -> list[str]:
    return [flag.replace("{name}", name) for flag in flags]


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError):
            return False
    return True
