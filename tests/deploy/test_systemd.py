"""The systemd units: what systemd says of them, that their settings exist, and what it hears of a daemon."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dtrain.agent import config as agent_config
from dtrain.agent.__main__ import _guarded
from dtrain.coordinator import config as coordinator_config
from dtrain.local.etcd import EtcdCluster
from dtrain.storage.etcd.guardian import STOP_SLACK_S

FOLDER = Path(__file__).parents[2] / "deploy" / "systemd"
UNITS = ("dtrain-coordinator.service", "dtrain-agent.service")
SETTINGS = {"coordinator": coordinator_config.SETTINGS, "agent": agent_config.SETTINGS}
EXPOSURE_MAX = {"dtrain-coordinator.service": 1.6, "dtrain-agent.service": 5.0}
WRITABLE = (
    "ReadWritePaths",
    "StateDirectory",
    "CacheDirectory",
    "LogsDirectory",
    "RuntimeDirectory",
    "BindPaths",
)
ANALYZE = shutil.which("systemd-analyze")


def directives(path: Path) -> dict[str, list[str]]:
    """Every directive of a unit or drop-in by name, in order; sections are checked on the way."""
    found: dict[str, list[str]] = {}
    section = ""
    for line in path.read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        if line.startswith("["):
            section = line
            assert section in ("[Unit]", "[Service]", "[Install]"), line
            continue
        name, equals, value = line.partition("=")
        assert section, line
        assert equals, line
        assert re.fullmatch(r"[A-Z]\w+", name), line
        found.setdefault(name, []).append(value)
    return found


def seconds(value: str) -> float:
    return float(value)


@pytest.mark.parametrize("unit", UNITS)
def test_systemd_accepts_the_unit_and_its_drop_ins(unit: str, tmp_path: Path) -> None:
    found = directives(FOLDER / unit)
    assert found["Type"] == ["notify"]
    assert found["NotifyAccess"] == ["main"]
    for drop_in in (FOLDER / f"{unit}.d").glob("*.conf"):
        assert directives(drop_in)
    if ANALYZE is None:
        return
    # It wants to see the program: ours is elsewhere.
    program = Path(sys.executable).parent / "dtrain"
    (tmp_path / unit).write_text((FOLDER / unit).read_text().replace("/opt/dtrain/bin/dtrain", str(program)))
    shutil.copytree(FOLDER / f"{unit}.d", tmp_path / f"{unit}.d")
    done = subprocess.run(
        [ANALYZE, "verify", "--man=no", "--recursive-errors=no", str(tmp_path / unit)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr.strip(), done.stderr


@pytest.mark.parametrize("unit", UNITS)
def test_the_exposure_is_bounded(unit: str) -> None:
    found = directives(FOLDER / unit)
    assert found["NoNewPrivileges"] == ["yes"]
    assert found["CapabilityBoundingSet"] == [""]
    if ANALYZE is None:
        return
    command = [ANALYZE, "security", "--offline=true", "--no-pager", str(FOLDER / unit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    level = re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
    assert level, done.stdout + done.stderr
    sys.stdout.write(level[0])
    assert float(level[1]) <= EXPOSURE_MAX[unit], done.stdout


def test_a_coordinator_can_write_nowhere() -> None:
    found = directives(FOLDER / "dtrain-coordinator.service")
    assert found["ProtectSystem"] == ["strict"]
    assert found["ReadOnlyPaths"] == ["/run"]
    hidden = found["InaccessiblePaths"][0].split()
    assert {"-/tmp", "-/var/tmp", "-/dev/shm"} <= set(hidden)
    assert not found.keys() & set(WRITABLE)
    assert "PrivateTmp" not in found, "it would be a folder that can be written"


def test_ranks_outlive_their_agent_and_one_another() -> None:
    found = directives(FOLDER / "dtrain-agent.service")
    assert found["KillMode"] == ["process"]
    assert found["OOMPolicy"] == ["continue"]
    assert found["Delegate"] == ["yes"]
    # Each of them would take something from ranks; the unit says what.
    assert not found.keys() & {"PrivateDevices", "ProtectClock", "MemoryDenyWriteExecute", "PrivateTmp"}


def test_a_stop_has_time_for_the_drain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["agent", "--data-dir", str(tmp_path)])
    for name in [name for name in os.environ if name.startswith(("DTRAIN_", "ETCDCTL_"))]:
        monkeypatch.delenv(name)
    guarded = _guarded()
    longest_s = guarded.drain_s + guarded.grace_s + STOP_SLACK_S
    assert seconds(directives(FOLDER / "dtrain-agent.service")["TimeoutStopSec"][0]) >= longest_s


@pytest.mark.parametrize("daemon", ["coordinator", "agent"])
def test_every_setting_in_the_examples_exists(daemon: str, tmp_path: Path) -> None:
    known = {setting.env for setting in SETTINGS[daemon]}
    example = (FOLDER / f"{daemon}.env").read_text()
    named = set(re.findall(r"\bDTRAIN_[A-Z_]+", example))
    for path in (
        FOLDER / f"dtrain-{daemon}.service",
        *(FOLDER / f"dtrain-{daemon}.service.d").glob("*.conf"),
    ):
        named |= set(re.findall(r"\bDTRAIN_[A-Z_]+(?==)", path.read_text()))
    assert named - known == set()
    environ = dict(re.findall(r"^([A-Z_]+)=(.*)$", example, re.MULTILINE))
    if daemon == "coordinator":
        # Where no route leads to the example's network, this machine has no address on it.
        settings = coordinator_config.load([], environ | {"DTRAIN_ADVERTISE": "10.0.0.1:7070"})
        assert len(settings.etcd.endpoints) == 3
    else:
        environ |= {"DTRAIN_HOST": "10.0.0.1", "DTRAIN_DATA_DIR": str(tmp_path)}
        assert agent_config.load([], environ).health_listen


def test_secrets_are_credentials_and_each_is_used() -> None:
    for daemon in ("coordinator", "agent"):
        found = directives(FOLDER / f"dtrain-{daemon}.service.d" / "tls.conf")
        loaded = {value.partition(":")[0] for value in found["LoadCredential"]}
        used = set(re.findall(r"%d/([\w.-]+)", " ".join(found["Environment"])))
        assert loaded == used


# What systemd hears ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with EtcdCluster(tmp_path_factory.mktemp("etcd"), fsync=False) as servers:
        servers.start()
        servers.wait_ready()
        yield servers.endpoints[0]


class Manager:
    """systemd's end of the notify socket, and the daemon under it."""

    def __init__(self, folder: Path, daemon: str, *flags: str) -> None:
        self.heard: list[tuple[int, str]] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket.bind(str(folder / "notify"))
        self._socket.settimeout(0.2)
        env = {k: v for k, v in os.environ.items() if not k.startswith(("DTRAIN_", "ETCDCTL_"))}
        env |= {"NOTIFY_SOCKET": str(folder / "notify"), "WATCHDOG_USEC": "2000000"}
        command = [sys.executable, "-P", "-m", f"dtrain.{daemon}", "--ttl", "5", *flags]
        with (folder / "log").open("wb") as log:
            self.process = subprocess.Popen(command, env=env, stdout=log, stderr=log)

    def hear(self) -> None:
        try:
            data, ancillary, _, _ = self._socket.recvmsg(4096, socket.CMSG_SPACE(12))
        except TimeoutError:
            return
        sender = int.from_bytes(ancillary[0][2][:4], sys.byteorder)
        self.heard += [(sender, line) for line in data.decode().splitlines()]

    def until(self, line: str, timeout_s: float = 60.0) -> None:
        end = time.monotonic() + timeout_s
        while line not in [said for _, said in self.heard]:
            assert time.monotonic() < end, (line, self.heard)
            self.hear()

    def child(self) -> int:
        pids = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(pids[0])

    def close(self) -> None:
        self.process.kill()
        self.process.wait(20)
        self._socket.close()


def test_systemd_hears_of_readiness_life_and_the_end_and_from_the_main_process_alone(
    etcd: str, tmp_path: Path
) -> None:
    manager = Manager(tmp_path, "coordinator", "--id", "c1", "--listen", "127.0.0.1:0", "--endpoints", etcd)
    try:
        manager.until("READY=1")
        manager.until("STATUS=leads")
        child_env = Path(f"/proc/{manager.child()}/environ").read_text()
        assert "NOTIFY_SOCKET" not in child_env
        assert "WATCHDOG_USEC" not in child_env
        manager.heard.clear()
        manager.until("WATCHDOG=1")
        manager.process.send_signal(signal.SIGTERM)
        manager.until("STOPPING=1")
        assert manager.process.wait(30) == 0
        assert {sender for sender, _ in manager.heard} == {manager.process.pid}
    finally:
        manager.close()


def test_a_start_without_etcd_asks_for_time_and_is_not_ready(tmp_path: Path) -> None:
    flags = ("--id", "c1", "--listen", "127.0.0.1:0", "--endpoints", "http://127.0.0.1:1")
    manager = Manager(tmp_path, "coordinator", *flags)
    try:
        manager.until("EXTEND_TIMEOUT_USEC=60000000")
        manager.until("STATUS=waiting for a lease from etcd")
        manager.until("WATCHDOG=1")
        assert "READY=1" not in [said for _, said in manager.heard]
    finally:
        manager.close()


def test_a_child_whose_heart_stands_still_is_replaced_and_systemd_is_told(etcd: str, tmp_path: Path) -> None:
    flags = ("--name", "a1", "--host", "127.0.0.1", "--data-dir", str(tmp_path / "a1"), "--endpoints", etcd)
    manager = Manager(tmp_path, "agent", *flags)
    try:
        manager.until("STATUS=registered")
        frozen = manager.child()
        os.kill(frozen, signal.SIGSTOP)
        manager.heard.clear()
        manager.until("STATUS=starting")
        manager.until("STATUS=registered")
        assert manager.child() != frozen
    finally:
        manager.close()
