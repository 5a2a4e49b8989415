"""TLS and users on a real etcd: the transport and the guardian's client alike."""

import contextlib
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tests.contract.etcd.support import binary, collect, eventually

from dtrain.local import ports
from dtrain.local.etcd import EtcdCluster
from dtrain.protocol.errors import ErrorCode, Refused, Unavailable
from dtrain.storage.etcd.lease_client import Access, LeaseClient, LeaseGone, NotAnswered, new_lease_id
from dtrain.storage.etcd.port import Get, Put, Txn, prefix_end
from dtrain.storage.etcd.transport import GatewayEtcd, Tls


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    """A CA, a server certificate for loopback and a client certificate without a CN."""
    folder = tmp_path_factory.mktemp("tls")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    new_key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl(
        "req", "-x509", *new_key, "-keyout", "ca.key", "-out", "ca.pem", "-days", "2", "-subj", "/CN=test-ca"
    )
    for name, usage in (("server", "serverAuth,clientAuth"), ("client", "clientAuth")):
        (folder / f"{name}.ext").write_text(
            f"subjectAltName=IP:127.0.0.1,DNS:localhost\nextendedKeyUsage={usage}\n", "ascii"
        )
        openssl("req", *new_key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", "/O=dtrain")
        openssl(
            "x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial",
            "-days", "2", "-extfile", f"{name}.ext", "-out", f"{name}.pem",
        )  # fmt: skip
    return Tls(*(str(folder / name) for name in ("ca.pem", "client.pem", "client.key")))


@pytest.fixture(scope="module")
def tls_etcd(certificates: Tls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("secure")
    found = binary("3.5")
    client, peer = ports.reserve(2)
    pki = Path(certificates.ca or "").parent
    endpoint = f"https://127.0.0.1:{client}"
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                found.path,
                f"--data-dir={folder / 'data'}",
                f"--listen-client-urls={endpoint}",
                f"--advertise-client-urls={endpoint}",
                f"--listen-peer-urls=http://127.0.0.1:{peer}",
                f"--initial-advertise-peer-urls=http://127.0.0.1:{peer}",
                f"--initial-cluster=default=http://127.0.0.1:{peer}",
                f"--cert-file={pki / 'server.pem'}",
                f"--key-file={pki / 'server.key'}",
                f"--trusted-ca-file={pki / 'ca.pem'}",
                "--client-cert-auth",
                "--logger=zap",
            ],
            stdout=log,
            stderr=log,
        )
    try:
        with contextlib.closing(GatewayEtcd([endpoint], tls=certificates)) as etcd:
            eventually(lambda: _answers(etcd), 20, "etcd with TLS")
        yield endpoint
    finally:
        process.kill()
        process.wait()
        ports.release([client, peer])


def _answers(etcd: GatewayEtcd) -> bool:
    try:
        return etcd.txn(Txn((), (Put("/tls/ready", b""),)), deadline_s=1.0).succeeded
    except Unavailable:
        return False


def test_every_call_works_over_tls(tls_etcd: str, certificates: Tls) -> None:
    with contextlib.closing(GatewayEtcd([tls_etcd], tls=certificates)) as etcd:
        lease = new_lease_id()
        etcd.grant(10, lease)
        stream = etcd.watch("/tls/", prefix_end("/tls/"), etcd.status().revision + 1)
        etcd.txn(Txn((), (Put("/tls/k", bytes(300_000), lease),)))
        assert len(collect(stream, 1)[0].events[0].kv.value) == 300_000
        etcd.revoke(lease)
        assert collect(stream, 1)[0].events[0].kind == "delete"
        stream.close()


def test_who_shows_no_certificate_or_trusts_nobody_is_turned_away(tls_etcd: str, certificates: Tls) -> None:
    for tls in (Tls(ca=certificates.ca), Tls()):
        with contextlib.closing(GatewayEtcd([tls_etcd], tls=tls)) as etcd:
            with pytest.raises(Unavailable):
                etcd.range("/tls/k")
            with pytest.raises(Unavailable):
                etcd.watch("/tls/k", None, 1)


def test_the_guardian_s_client_speaks_tls(tls_etcd: str, certificates: Tls) -> None:
    access = Access((tls_etcd,), certificates.ca or "", certificates.cert or "", certificates.key or "")
    client = LeaseClient(access)
    lease = new_lease_id()
    assert client.grant(lease, 10, 3.0) == 10.0
    assert client.keepalive(lease, 3.0) == 10.0
    client.revoke(lease, 3.0)
    with pytest.raises(LeaseGone):
        client.keepalive(lease, 3.0)
    client.close()
    stranger = LeaseClient(replace(access, ca=""))
    with pytest.raises(NotAnswered):
        stranger.keepalive(lease, 3.0)


@pytest.fixture
def guarded_etcd(tmp_path: Path) -> Iterator[EtcdCluster]:
    """Users root, coordinator (all of /a/) and nobody; authentication on."""
    with EtcdCluster(tmp_path / "users", binary=binary("3.5"), fsync=False) as cluster:
        [endpoint] = cluster.endpoints
        control = [cluster.binary.etcdctl or "etcdctl", f"--endpoints={endpoint}"]
        for arguments in (
            "user add root --new-user-password root",
            "user grant-role root root",
            "role add a",
            "role grant-permission a readwrite /a/ --prefix",
            "user add coordinator --new-user-password one",
            "user grant-role coordinator a",
            "user add nobody --new-user-password none",
            "auth enable",
        ):
            subprocess.run(
                [*control, *arguments.split()], check=True, capture_output=True, env={"ETCDCTL_API": "3"}
            )
        yield cluster


def test_users_get_what_their_role_allows_and_clear_refusals(guarded_etcd: EtcdCluster) -> None:
    etcd = GatewayEtcd(guarded_etcd.endpoints, user="coordinator", password="one")
    assert etcd.txn(Txn((), (Put("/a/k", b"x"),))).succeeded
    stream = etcd.watch("/a/", prefix_end("/a/"), 1)
    assert collect(stream, 1)
    stream.close()
    etcd.status()
    for call in (
        lambda: etcd.txn(Txn((), (Put("/b/k", b"x"),))),
        lambda: etcd.range("/b/k"),
        lambda: collect(etcd.watch("/b/", prefix_end("/b/"), 1), 1),
    ):
        with pytest.raises(Refused) as caught:
            call()
        assert caught.value.code is ErrorCode.ETCD_AUTH
    etcd.close()
    for user, password in (("", ""), ("coordinator", "wrong"), ("nobody", "none")):
        stranger = GatewayEtcd(guarded_etcd.endpoints, user=user, password=password)
        with pytest.raises(Refused) as caught:
            stranger.txn(Txn((), (Get("/a/k"),)))
        assert caught.value.code is ErrorCode.ETCD_AUTH
        assert "wrong" not in str(caught.value) + repr(caught.value.__cause__)
        stranger.close()


def test_tokens_forgotten_by_a_restarted_member_are_renewed_unseen(guarded_etcd: EtcdCluster) -> None:
    etcd = GatewayEtcd(guarded_etcd.endpoints, user="coordinator", password="one")
    client = LeaseClient(Access(tuple(guarded_etcd.endpoints), user="coordinator", password="one"))
    lease = new_lease_id()
    assert etcd.txn(Txn((), (Put("/a/k", b"1"),))).succeeded
    assert client.grant(lease, 30, 3.0) == 30.0
    guarded_etcd.kill()
    guarded_etcd.start()
    eventually(lambda: _came_back(etcd))
    assert etcd.txn(Txn((), (Put("/a/k", b"2"),))).succeeded
    assert client.keepalive(lease, 3.0) == 30.0
    client.revoke(lease, 3.0)
    etcd.close()
    client.close()


def _came_back(etcd: GatewayEtcd) -> bool:
    try:
        return bool(etcd.range("/a/k", deadline_s=1.0).items)
    except Unavailable:
        return False
