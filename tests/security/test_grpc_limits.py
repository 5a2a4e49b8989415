"""Those who connect and do nothing, do it slowly, or do too much: others are still served."""

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from dtrain.agent import link
from dtrain.cli.client import Client, closing
from dtrain.coordinator.api import lookup, server
from dtrain.protocol import codec
from dtrain.protocol.errors import Refused
from dtrain.protocol.pb import agent_pb2
from dtrain.runtime import grpc_tls
from dtrain.storage.etcd.port import Put, Txn
from tests.security.services import KEYS, SPEC, Machine, Replica
from tests.support.certificates import Authority, authority

ROOT = Path(__file__).parents[2]
OWN = (("grpc.use_local_subchannel_pool", 1),)
"""A connection of its own."""


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(params=["plain", "tls"])
def tls(request: pytest.FixtureRequest, ca: Authority) -> grpc_tls.Credentials | None:
    return grpc_tls.Credentials(ca.issue("agent", "gpu-1")) if request.param == "tls" else None


@pytest.fixture
def machine(
    tls: grpc_tls.Credentials | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Machine]:
    monkeypatch.setattr(grpc_tls, "REQUEST_S_MAX", 1.0)
    made = Machine(tmp_path, tls)
    yield made
    made.server.stop()


@pytest.fixture
def leader(tls: grpc_tls.Credentials | None, ca: Authority) -> grpc_tls.Credentials | None:
    return grpc_tls.Credentials(ca.issue("coordinator", "r1")) if tls else None


def read_log(machine: Machine, leader: grpc_tls.Credentials | None, timeout_s: float) -> grpc.StatusCode:
    """Make a call over a connection of its own."""
    request = agent_pb2.ReadLogRequest(job="none", uid="u1", stream="stdout")
    with grpc_tls.to_agent(
        "gpu-1", machine.address, leader, (("grpc.use_local_subchannel_pool", 1),)
    ) as channel:
        call = channel.unary_unary(
            "/dtrain.v1.Agent/ReadLog", request_serializer=lambda message: message.SerializeToString()
        )
        try:
            call(request, timeout=timeout_s, wait_for_ready=True)
        except grpc.RpcError as error:
            return error.code()
    return grpc.StatusCode.OK


def open_sockets(address: str, count: int) -> list[socket.socket]:
    host, _, port = address.rpartition(":")
    return [socket.create_connection((host, int(port)), timeout=15) for _ in range(count)]


def ends_within(sockets: list[socket.socket], seconds: float) -> bool:
    """Whether the other side closes all of these, whatever is sent meanwhile."""
    end = time.monotonic() + seconds
    for sock in sockets:
        sock.settimeout(max(0.1, end - time.monotonic()))
        try:
            while sock.recv(4096):
                pass
        except TimeoutError:
            return False
        except OSError:
            pass
    return True


def test_silent_connections_are_closed_and_hold_up_nobody(
    machine: Machine, leader: grpc_tls.Credentials | None
) -> None:
    sockets = open_sockets(machine.address, 100)
    try:
        began = time.monotonic()
        assert read_log(machine, leader, 30.0) is grpc.StatusCode.NOT_FOUND
        assert time.monotonic() - began < 30.0
        assert ends_within(sockets, 60.0)
    finally:
        for sock in sockets:
            sock.close()


def test_a_connection_that_trickles_bytes_is_closed_too(machine: Machine) -> None:
    """A slow-loris sends one byte at a time, and never the whole of anything."""
    (sock,) = open_sockets(machine.address, 1)
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    closed = False
    try:
        for index in range(120):
            sock.sendall(preface[index % len(preface) :][:1])
            time.sleep(0.25)
            if closed := ends_within([sock], 0.01):
                break
    except OSError:
        closed = True
    finally:
        sock.close()
    assert closed


def test_more_connections_than_allowed_take_no_descriptors(machine: Machine) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    sockets = open_sockets(machine.address, link.CONNECTIONS_MAX + 100)
    try:
        time.sleep(0.5)
        # Each is one descriptor of ours, and one of the server's if it took it.
        taken = len(list(Path("/proc/self/fd").iterdir())) - before - len(sockets)
        assert taken <= link.CONNECTIONS_MAX + 20
    finally:
        for sock in sockets:
            sock.close()


def test_calls_that_are_announced_and_never_made_are_ended(
    machine: Machine, leader: grpc_tls.Credentials | None
) -> None:
    """A slow-loris above HTTP/2: headers, and then no message. Each would hold a thread for ever."""

    def never() -> Iterator[bytes]:
        time.sleep(60)
        yield b""

    channels = [grpc_tls.to_agent("gpu-1", machine.address, leader, OWN) for _ in range(2)]
    calls = [
        channel.stream_unary("/dtrain.v1.Agent/Execute").future(never())
        for channel in channels
        for _ in range(link.THREADS_ANSWERING + link.THREADS_WAITING)
    ]
    try:
        time.sleep(0.5)
        # Two rounds of waiting stand before it: as many calls as there are threads, twice.
        code = read_log(machine, leader, 60.0)
        assert code is grpc.StatusCode.NOT_FOUND
        codes = {call.exception(timeout=60).code() for call in calls}
        assert codes == {grpc.StatusCode.CANCELLED}
        assert machine.taken == []
    finally:
        for channel in channels:
            channel.close()


def test_a_message_of_more_than_4_mib_is_refused_by_both_servers(tmp_path: Path) -> None:
    machine, replica = Machine(tmp_path, None), Replica(None)
    try:
        for address, method in (
            (machine.address, "/dtrain.v1.Agent/Execute"),
            (replica.server.address, "/dtrain.v1.Coordinator/Submit"),
        ):
            with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary(method)(b"\0" * (4 * 1024 * 1024 + 1), timeout=30)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    finally:
        machine.server.stop()
        replica.close()


def test_metadata_of_unreasonable_size_is_refused(tmp_path: Path) -> None:
    machine = Machine(tmp_path, None)
    try:
        with grpc.insecure_channel(machine.address) as channel, pytest.raises(grpc.RpcError):
            channel.unary_unary("/dtrain.v1.Agent/ReadLog")(
                b"", timeout=30, metadata=(("x", "y" * (64 * 1024)),)
            )
        assert read_log(machine, None, 5.0) is grpc.StatusCode.NOT_FOUND
    finally:
        machine.server.stop()


def test_an_answer_too_large_to_send_is_an_error_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "READ_BYTES_MAX", 1000)
    replica = Replica(None)
    try:
        puts = tuple(Put(f"{KEYS.jobs}j{i}/spec", b'{"v":1}' * 10) for i in range(20))
        revision = replica.etcd.txn(Txn(success=puts)).revision
        assert replica.mirror.wait_for(revision, 5)
        with closing(Client([replica.server.address])) as client:
            with pytest.raises(Refused) as caught:
                client.read("jobs/")
            assert "more than one answer may" in caught.value.message
            assert "jobs/NAME/" in caught.value.fix
            assert len(client.read("jobs/j1/").items) == 1
    finally:
        replica.close()


def test_a_request_id_cannot_make_a_job_unreadable() -> None:
    replica = Replica(None)
    try:
        with closing(Client([replica.server.address])) as client:
            spec = codec.canonical(SPEC)
            for request_id in ("x" * 5000, "a\nb", "\x1b[2J"):
                with pytest.raises(Refused):
                    client.submit(spec, request_id)
            large = codec.canonical({**SPEC, "env": {f"V{i}": "x" * 90 for i in range(600)}})
            assert client.submit(large, "fits").created
            words = {"kind": "script", "target": "t.py", "args": ["x" * 90] * 2770}
            with pytest.raises(Refused, match="the limit is"):
                client.submit(codec.canonical({**SPEC, "name": "big", "entry": words}), "q2")
    finally:
        replica.close()


@pytest.mark.parametrize(
    "method",
    [
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        "/grpc.channelz.v1.Channelz/GetServers",
    ],
)
def test_servers_do_not_describe_themselves(method: str, tmp_path: Path) -> None:
    machine = Machine(tmp_path, None)
    try:
        with grpc.insecure_channel(machine.address) as channel, pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(method)(b"", timeout=5)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    finally:
        machine.server.stop()


def test_both_servers_have_every_limit() -> None:
    served = (*server.OPTIONS, ("grpc.max_allowed_incoming_connections", server._room_for_connections()))
    for options in (dict(link.OPTIONS), dict(served)):
        for name in (
            "grpc.max_receive_message_length",
            "grpc.max_send_message_length",
            "grpc.max_concurrent_streams",
            "grpc.max_allowed_incoming_connections",
            "grpc.server_handshake_timeout_ms",
            "grpc.max_connection_idle_ms",
            "grpc.max_connection_age_ms",
            "grpc.max_connection_age_grace_ms",
            "grpc.max_metadata_size",
        ):
            assert options[name] > 0, name
        assert options["grpc.max_receive_message_length"] == 4 * 1024 * 1024
