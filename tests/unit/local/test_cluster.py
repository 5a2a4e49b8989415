"""A whole local cluster, with real servers: readiness, refusals, nothing left behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dtrain.local import sweeping
from dtrain.local.cluster import LocalCluster
from dtrain.protocol.errors import Conflict, ErrorCode, NotFound, Refused, Unavailable


def small(folder: Path, **more: object) -> LocalCluster:
    settings: dict[str, object] = {"coordinators": 2, "agents": 0, "store": "dir", "etcd_fsync": False}
    return LocalCluster(folder, **(settings | more))  # type: ignore[arg-type]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[LocalCluster]:
    with small(tmp_path / "cluster") as cluster:
        yield cluster


def gone(pids: list[int]) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


def pids_of(cluster: LocalCluster) -> list[int]:
    servers = [member.process.pid for member in cluster.etcd_servers.members if member.process]
    return [*servers, *(pid for daemon in cluster.coordinators.values() for pid in daemon.pids())]


def term_of(cluster: LocalCluster) -> int:
    """The term that is led; 0: none is."""
    found = cluster.etcd.range(cluster.keys.leader).items
    return found[0].create_revision if found else 0


def test_it_starts_loses_its_leader_elects_again_and_leaves_nothing(tmp_path: Path) -> None:
    parts: list[str] = []
    cluster = small(tmp_path / "cluster")
    cluster.start(parts.append)
    try:
        assert [part.split()[0] for part in parts[:2]] == ["etcd", "store"]
        assert {"coordinator c1", "coordinator c2"} <= set(parts)
        pids = pids_of(cluster)
        assert len(pids) == 5, "etcd, two guardians, two coordinators"
        term = term_of(cluster)
        lost = cluster.kill_leader_process()
        guardian = cluster.coordinators[lost].guardian_pid
        end = time.monotonic() + 15
        # Most often it is the other one, unless that has only just begun to watch.
        while term_of(cluster) in (0, term):
            assert time.monotonic() < end, f"{cluster.leader()} still leads term {term}"
            time.sleep(0.05)
        assert cluster.coordinators[lost].guardian_pid == guardian
        with pytest.raises(NotFound):
            cluster.kill_rank(0)
        with pytest.raises(NotFound):
            cluster.daemon("c9")
    finally:
        cluster.stop()
    assert gone(pids)
    assert sweeping.find(tmp_path / "cluster") == []
    cluster.stop()


def test_a_folder_in_use_is_refused_by_name_of_its_owner(cluster: LocalCluster) -> None:
    with pytest.raises(Conflict) as caught:
        small(cluster.folder).start()
    assert caught.value.code is ErrorCode.ALREADY_EXISTS
    assert f"process {os.getpid()}" in caught.value.message
    assert cluster.leader() is not None


def test_a_port_in_use_is_refused_and_nothing_stays(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(Refused) as caught:
            small(tmp_path / "cluster", port=port).start()
    assert caught.value.code is ErrorCode.PORT_IN_USE
    assert str(port) in caught.value.message
    assert sweeping.find(tmp_path / "cluster") == []


def test_a_daemon_that_ends_at_once_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = small(tmp_path / "cluster", ttl_s=1)
    with pytest.raises(Unavailable) as caught:
        cluster.start()
    assert "exit code" in caught.value.message
    assert "TTL" in caught.value.cause
    assert sweeping.find(tmp_path / "cluster") == []


def test_three_members_come_back_with_their_data_and_their_ports(tmp_path: Path) -> None:
    folder = tmp_path / "cluster"
    with small(folder, coordinators=1, etcd_members=3) as cluster:
        endpoints, term = cluster.endpoints, cluster.etcd.range(cluster.keys.leader).items[0].create_revision
    with small(folder, coordinators=1, etcd_members=3) as cluster:
        assert cluster.endpoints == endpoints
        assert cluster.etcd.range(cluster.keys.leader).items[0].create_revision > term
    with pytest.raises(Conflict, match="an etcd with 3 members, not 1"):
        small(folder).start()


OWNER = """
import sys, time
from pathlib import Path
from dtrain.local.cluster import LocalCluster
settings = dict(coordinators=1, agents=0, store="dir", etcd_fsync=False, remove=True)
cluster = LocalCluster(Path(sys.argv[1]), **settings)
cluster.start()
servers = [member.process.pid for member in cluster.etcd_servers.members]
print(*servers, *cluster.coordinators["c1"].pids(), flush=True)
time.sleep(600)
"""


def test_nothing_survives_when_the_owner_is_killed(tmp_path: Path) -> None:
    folder = tmp_path / "cluster"
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(folder)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    with owner.stdout:
        pids = [int(word) for word in owner.stdout.readline().split()]
    assert len(pids) == 3
    owner.kill()
    owner.wait()
    end = time.monotonic() + 10
    while not gone(pids) or folder.exists():
        assert time.monotonic() < end, sweeping.find(folder)
        time.sleep(0.05)


def test_up_writes_the_context_and_ctrl_c_ends_everything(tmp_path: Path) -> None:
    env = os.environ | {"XDG_CONFIG_HOME": str(tmp_path / "config"), "PYTHONUNBUFFERED": "1"}
    command = [
        sys.executable,
        "-m",
        "dtrain.cli",
        "up",
        "--agents",
        "1",
        "--coordinators",
        "1",
        "--store",
        "dir",
    ]
    up = subprocess.Popen(
        [*command, "--folder", str(tmp_path / "cluster")], env=env, stdout=subprocess.PIPE, text=True
    )
    assert up.stdout is not None
    try:
        lines = [up.stdout.readline() for _ in range(6)]
        assert "is ready" in lines[0], lines
        assert any("watch --prefix /dtrain/local/" in line for line in lines)
        known = json.loads((tmp_path / "config" / "dtrain" / "context.json").read_text())
        assert (known["current"], known["clusters"]["local"]["pid"]) == ("local", up.pid)
        got = subprocess.run(
            [sys.executable, "-m", "dtrain.cli", "get", "agents", "-o", "name"],
            env=env,
            capture_output=True,
            text=True,
            check=True,
        )
        assert got.stdout == "agent/a1\n"
    finally:
        up.send_signal(signal.SIGINT)
        try:
            assert up.wait(20) == 0
        finally:
            up.kill()
            up.stdout.close()
    assert sweeping.find(tmp_path / "cluster") == []
    known = json.loads((tmp_path / "config" / "dtrain" / "context.json").read_text())
    assert known["clusters"] == {}
