"""Certificates over time: replaced without a restart, refused when they do not fit, announced in time."""

import datetime
import socket
import ssl
import threading
from pathlib import Path

import pytest
from cryptography import x509

from dtrain.agent import config as agent_config
from dtrain.cli import context
from dtrain.cli.answers import ReplicaInfo
from dtrain.cli.client import Client, closing
from dtrain.cli.globals import Settings
from dtrain.coordinator import config as coordinator_config
from dtrain.coordinator.core.decisions import Directed
from dtrain.coordinator.dispatch import Channels, Dispatcher
from dtrain.protocol.errors import ErrorCode, Refused
from dtrain.protocol.ids import AgentName
from dtrain.runtime import grpc_tls
from dtrain.runtime.tls import TlsFiles
from tests.security.services import STOP, Machine, Replica
from tests.support.certificates import DAY_S, Authority, arguments, authority, write


class HandClock:
    """Moves when told to."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.wall_offset = datetime.datetime.now(datetime.UTC).timestamp() - self.now

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return self.now + self.wall_offset


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
def ca(tmp_path: Path) -> Authority:
    return authority(tmp_path / "ca")


def serial_shown(address: str, mine: TlsFiles) -> int:
    """Serial number of the certificate that a server shows to somebody who connects now."""
    host, _, port = address.rpartition(":")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(mine.cacert)
    context.load_cert_chain(mine.cert, mine.key)
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection((host, int(port)), timeout=30) as raw,
        context.wrap_socket(raw, server_hostname="gpu-1.agent.c1.dtrain") as secured,
    ):
        shown = secured.getpeercert(binary_form=True)
    assert shown
    return x509.load_der_x509_certificate(shown).serial_number


def serial_in(files: TlsFiles) -> int:
    return x509.load_pem_x509_certificate(Path(files.cert).read_bytes()).serial_number


def send(channels: Channels, address: str) -> tuple[bool, str]:
    answers: list[tuple[bool, str]] = []
    got = threading.Event()

    def on_done(_directed: Directed, ok: bool, problem: str) -> None:
        answers.append((ok, problem))
        got.set()

    dispatcher = Dispatcher(channels, on_done, deadline_s=30.0)
    dispatcher.send(Directed(AgentName("gpu-1"), address, STOP))
    assert got.wait(60)
    return answers[0]


def test_a_server_shows_its_new_certificate_without_a_restart(
    ca: Authority, clock: HandClock, tmp_path: Path
) -> None:
    files = ca.issue("agent", "gpu-1")
    machine = Machine(tmp_path / "logs", grpc_tls.Credentials(files, clock=clock))
    me = ca.issue("coordinator", "r1")
    try:
        before = serial_in(files)
        assert serial_shown(machine.address, me) == before
        ca.issue("agent", "gpu-1")
        assert serial_in(files) != before
        clock.now += grpc_tls.CHECK_EVERY_S
        assert serial_shown(machine.address, me) == serial_in(files)
    finally:
        machine.server.stop()


def test_an_authority_is_replaced_under_a_running_leader_and_agent(
    ca: Authority, clock: HandClock, tmp_path: Path
) -> None:
    """Both trust both, then both show the new one, then nobody trusts the old one: every command arrives."""
    fresh = authority(tmp_path / "fresh")
    leader_files, agent_files = ca.issue("coordinator", "r1"), ca.issue("agent", "gpu-1")
    leader = grpc_tls.Credentials(leader_files, clock=clock)
    machine = Machine(tmp_path / "logs", grpc_tls.Credentials(agent_files, clock=clock))
    channels = Channels(leader, clock=clock)
    try:
        assert send(channels, machine.address) == (True, "")
        write(ca.file, ca.file.read_bytes() + fresh.file.read_bytes())
        clock.now += grpc_tls.CHECK_EVERY_S
        assert send(channels, machine.address) == (True, "")
        for files, role, name in ((agent_files, "agent", "gpu-1"), (leader_files, "coordinator", "r1")):
            new = fresh.issue(role, name)
            write(Path(files.key), Path(new.key).read_bytes())
            write(Path(files.cert), Path(new.cert).read_bytes())
            clock.now += grpc_tls.CHECK_EVERY_S
            assert send(channels, machine.address) == (True, "")
        write(ca.file, fresh.file.read_bytes())
        clock.now += grpc_tls.CHECK_EVERY_S
        assert send(channels, machine.address) == (True, "")
        assert leader.generation == 4
        assert len(machine.taken) == 5
        # Somebody who still shows what the old authority signed is out.
        old = grpc_tls.Credentials(ca.issue("coordinator", "r1", file="old"), clock=clock)
        outsider = Channels(old, clock=clock)
        assert send(outsider, machine.address)[0] is False
        outsider.close()
    finally:
        channels.close()
        machine.server.stop()


def test_a_call_under_way_survives_the_replacement(ca: Authority, clock: HandClock, tmp_path: Path) -> None:
    files = ca.issue("coordinator", "r1")
    channels = Channels(grpc_tls.Credentials(files, clock=clock), clock=clock)
    first = channels.get(AgentName("gpu-1"), "127.0.0.1:1")
    ca.issue("coordinator", "r1")
    clock.now += grpc_tls.CHECK_EVERY_S
    assert channels.get(AgentName("gpu-1"), "127.0.0.1:1") is not first
    # Still open: a closed channel raises here.
    first.unary_unary("/x").future(b"").cancel()
    clock.now += 61.0
    channels.get(AgentName("gpu-1"), "127.0.0.1:1")
    with pytest.raises(ValueError, match="closed"):
        first.unary_unary("/x").future(b"")
    channels.close()


def test_a_long_lived_client_takes_up_a_new_certificate(
    ca: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpc_tls, "CHECK_EVERY_S", 0.0)
    fresh = authority(tmp_path / "fresh")
    files, server = ca.issue("operator", "ann"), ca.issue("coordinator", "r1")
    replica = Replica(grpc_tls.Credentials(server))
    try:
        with closing(Client([replica.server.address], timeout_s=30.0, tls=files)) as client:
            assert client.info().replica == "r1"
            new = fresh.issue("operator", "ann")
            write(ca.file, ca.file.read_bytes() + fresh.file.read_bytes())
            write(Path(files.key), Path(new.key).read_bytes())
            write(Path(files.cert), Path(new.cert).read_bytes())
            for _ in range(3):
                assert client.info().replica == "r1"
            answer = client.info_each()[replica.server.address]
            assert isinstance(answer, ReplicaInfo)
    finally:
        replica.close()


def test_half_replaced_files_are_waited_for(ca: Authority, clock: HandClock) -> None:
    files = ca.issue("agent", "gpu-1")
    credentials = grpc_tls.Credentials(files, clock=clock)
    other = ca.issue("agent", "gpu-1", file="next")
    write(Path(files.cert), Path(other.cert).read_bytes())
    clock.now += grpc_tls.CHECK_EVERY_S
    assert credentials.generation == 1
    assert "is not the key of" in credentials.problems()[0]
    write(Path(files.key), Path(other.key).read_bytes())
    Path(files.key).chmod(0o600)
    clock.now += grpc_tls.CHECK_EVERY_S
    assert (credentials.generation, credentials.problems()) == (2, [])


@pytest.mark.parametrize(
    "damage", [b"", b"garbage", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"]
)
def test_a_damaged_certificate_changes_nothing_and_is_announced(
    damage: bytes, ca: Authority, clock: HandClock
) -> None:
    files = ca.issue("agent", "gpu-1")
    credentials = grpc_tls.Credentials(files, clock=clock)
    write(Path(files.cert), damage)
    clock.now += grpc_tls.CHECK_EVERY_S
    assert "not in use" in credentials.problems()[0]
    assert credentials.generation == 1
    with pytest.raises(Refused):
        grpc_tls.Credentials(files, clock=clock)
    Path(files.cert).unlink()
    clock.now += grpc_tls.CHECK_EVERY_S
    assert "cannot be read" in credentials.problems()[0]


def test_a_certificate_of_somebody_else_is_not_taken_up(ca: Authority, clock: HandClock) -> None:
    files = ca.issue("agent", "gpu-1")
    credentials = grpc_tls.Credentials(files, clock=clock)
    ca.issue("coordinator", "r1", file="agent-gpu-1")
    clock.now += grpc_tls.CHECK_EVERY_S
    assert credentials.generation == 1
    assert credentials.peer.uri == "dtrain://c1/agent/gpu-1"
    assert "is now of coordinator r1" in credentials.problems()[0]


@pytest.mark.parametrize(
    ("days", "words"),
    [(15, ""), (13.5, "expires in 13 days"), (1.5, "expires in 1 day:"), (-1.0, "has expired")],
)
def test_people_hear_of_the_end_of_a_certificate_in_time(
    days: float, words: str, ca: Authority, clock: HandClock
) -> None:
    credentials = grpc_tls.Credentials(ca.issue("agent", "gpu-1", valid_s=days * DAY_S), clock=clock)
    problems = credentials.problems()
    assert (words in problems[0]) if words else (problems == [])


def test_a_replica_tells_its_clients_of_the_end_of_its_certificate(ca: Authority) -> None:
    from dtrain.protocol.pb import coordinator_pb2 as pb
    from dtrain.protocol.pb.coordinator_pb2_grpc import CoordinatorStub

    replica = Replica(grpc_tls.Credentials(ca.issue("coordinator", "r1", valid_s=3.5 * DAY_S)))
    reader = grpc_tls.Credentials(ca.issue("reader", "bob"))
    try:
        with grpc_tls.to_coordinator(replica.server.address, reader, ()) as channel:
            reply = CoordinatorStub(channel).Info(pb.InfoRequest(), timeout=30)  # type: ignore[no-untyped-call]
        assert "expires in 3 days" in reply.problems[0]
    finally:
        replica.close()


def test_a_key_that_everybody_can_read_is_announced(ca: Authority, clock: HandClock) -> None:
    files = ca.issue("agent", "gpu-1")
    Path(files.key).chmod(0o644)
    assert "chmod 600" in grpc_tls.Credentials(files, clock=clock).problems()[0]


def test_an_unusable_key_is_not_quoted(ca: Authority, clock: HandClock) -> None:
    files = ca.issue("agent", "gpu-1")
    text = Path(files.key).read_text()
    secret = text.splitlines()[1]
    Path(files.key).write_text(text.replace("BEGIN", "BEGUN"))
    with pytest.raises(Refused) as caught:
        grpc_tls.Credentials(files, clock=clock)
    assert secret not in f"{caught.value!r} {caught.value.__cause__!r} {caught.value.cause}"


ETCD_SETTINGS = ["--endpoints", "http://127.0.0.1:2379"]


@pytest.mark.parametrize("load", [agent_config.load, coordinator_config.load])
def test_a_daemon_takes_all_three_files_or_none(load, ca: Authority) -> None:  # type: ignore[no-untyped-def]
    files = ca.issue("agent", "gpu-1")
    assert load(ETCD_SETTINGS, {}).tls is None
    assert load([*ETCD_SETTINGS, *arguments(files)], {}).tls == files
    variables = {
        "DTRAIN_TLS_CERT": files.cert,
        "DTRAIN_TLS_KEY": files.key,
        "DTRAIN_TLS_CACERT": files.cacert,
    }
    assert load(ETCD_SETTINGS, variables).tls == files
    with pytest.raises(Refused) as caught:
        load([*ETCD_SETTINGS, "--tls-cert", files.cert], {})
    assert caught.value.code is ErrorCode.BAD_SETTING
    assert "--tls-key and --tls-cacert" in caught.value.message
    with pytest.raises(Refused, match="cannot be read"):
        load([*ETCD_SETTINGS, *arguments(TlsFiles(files.cert, "/nowhere/key", files.cacert))], {})


def test_the_command_line_takes_them_from_options_or_from_the_context(
    ca: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    files = ca.issue("operator", "ann")
    given = Settings(tls_cert=files.cert, tls_key=files.key, tls_cacert=files.cacert)
    assert context.tls_of(given) == files
    assert context.tls_of(Settings()) is None
    context.remember(
        context.Known("prod", ("h:1",), tls_cert=files.cert, tls_key=files.key, tls_cacert=files.cacert)
    )
    assert context.tls_of(Settings()) == files
    # Addresses that somebody typed are another cluster's, perhaps: its own files do not go there.
    assert context.tls_of(Settings(coordinators="elsewhere:7070")) is None
    with pytest.raises(Refused):
        context.tls_of(Settings(tls_cert=files.cert))
