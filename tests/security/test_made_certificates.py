"""What ``deploy/etcd/make-certs.sh`` makes is what both sides of gRPC expect."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from dtrain.cli.client import Client, closing
from dtrain.coordinator.dispatch import Channels
from dtrain.protocol.errors import Refused
from dtrain.runtime import grpc_tls
from dtrain.runtime.tls import Role, TlsFiles
from tests.security.services import Machine, Replica
from tests.security.test_certificates import send

SCRIPT = Path(__file__).parents[2] / "deploy" / "etcd" / "make-certs.sh"
HOLDERS = ["coordinator:r1", "agent:gpu-1", "agent:gpu-2", "operator:ann@lab", "reader:bob"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TlsFiles]:
    folder = tmp_path_factory.mktemp("pki")
    run(folder, "--cluster", "c1", *HOLDERS)

    def files(holder: str) -> TlsFiles:
        place = folder / holder.replace(":", "/")
        return TlsFiles(str(place / "grpc.crt"), str(place / "grpc.key"), str(place / "grpc-ca.crt"))

    return files


def run(folder: Path, *words: str) -> None:
    subprocess.run(["sh", SCRIPT, folder, *words], check=True, capture_output=True, timeout=60)


def test_each_certificate_names_its_holder(made: Callable[[str], TlsFiles]) -> None:
    for holder in HOLDERS:
        role, _, name = holder.partition(":")
        found = grpc_tls.Credentials(made(holder))
        assert found.peer.uri == f"dtrain://c1/{role}/{name}"
        assert found.problems() == []
    with pytest.raises(Refused):
        grpc_tls.load(made("agent:gpu-1"), "c1", Role.AGENT, "gpu-2")


def test_a_cluster_with_them_works_and_keeps_roles_apart(
    made: Callable[[str], TlsFiles], tmp_path: Path
) -> None:
    machine = Machine(tmp_path, grpc_tls.Credentials(made("agent:gpu-1")))
    replica = Replica(grpc_tls.Credentials(made("coordinator:r1")))
    channels = Channels(grpc_tls.Credentials(made("coordinator:r1")))
    other = Channels(grpc_tls.Credentials(made("operator:ann@lab")))
    try:
        assert send(channels, machine.address) == (True, "")
        assert send(other, machine.address)[0] is False
        with closing(Client([replica.server.address], tls=made("operator:ann@lab"))) as client:
            assert client.info().cluster == "c1"
        with (
            closing(Client([replica.server.address], tls=made("reader:bob"))) as client,
            pytest.raises(Refused),
        ):
            client.set_intent("job", wanted="cancel")
    finally:
        channels.close()
        other.close()
        machine.server.stop()
        replica.close()
