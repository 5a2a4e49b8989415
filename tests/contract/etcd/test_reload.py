"""Certificates and lists of members that change under running clients: no restart, nothing lost."""

import contextlib
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from tests.contract.etcd.secured import HOSTS, KEYS, Users, holder, make_certs, server_tls
from tests.contract.etcd.support import binary, collect, eventually

from dtrain.local.etcd import EtcdCluster
from dtrain.protocol.errors import DtrainError, ErrorCode, Refused, Unavailable
from dtrain.storage.etcd.access import Access
from dtrain.storage.etcd.endpoints import Tls
from dtrain.storage.etcd.lease_client import LeaseClient, NotAnswered, new_lease_id
from dtrain.storage.etcd.lease_keeper import LeaseKeeper
from dtrain.storage.etcd.port import Put, Txn, WatchStream
from dtrain.storage.etcd.transport import GatewayEtcd

SECONDS = 6.0
"""Within this the former files are out of use: a look each second, and two to spread."""


@pytest.fixture
def pki(tmp_path: Path) -> Path:
    return tmp_path / "pki"


@pytest.fixture
def tls_etcd(pki: Path, tmp_path: Path) -> Iterator[EtcdCluster]:
    with EtcdCluster(
        tmp_path / "tls", binary=binary("3.5"), fsync=False, tls=server_tls(pki), progress_s=1
    ) as cluster:
        yield cluster


def put(etcd: GatewayEtcd, key: str = "/k") -> int:
    return etcd.txn(Txn((), (Put(key, b"x"),)), deadline_s=3.0).revision


def works(call: Callable[[], object]) -> bool:
    try:
        call()
    except (DtrainError, NotAnswered):
        return False
    return True


def read_to_the_end(stream: WatchStream, timeout_s: float = 10.0) -> str:
    """Return why the stream ended."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        try:
            stream.next(0.2)
        except DtrainError as error:
            return error.message
    raise AssertionError(f"the watch did not end in {timeout_s} s")


# Certificates ------------------------------------------------------------------------------


def test_a_client_outlives_the_authority_that_it_started_with(tls_etcd: EtcdCluster, pki: Path) -> None:
    """A new CA, new certificates for all, then the old CA withdrawn: nobody is restarted but etcd."""
    client = GatewayEtcd(tls_etcd.endpoints, tls=holder(pki, "agent", "a1"))
    certificates = holder(pki, "agent", "a2")
    keeper = LeaseClient(
        Access(
            tuple(tls_etcd.endpoints), certificates.ca or "", certificates.cert or "", certificates.key or ""
        )
    )
    lease = new_lease_id()
    with contextlib.closing(client), contextlib.closing(keeper):
        keeper.grant(lease, 60, 3.0)
        revision = put(client)
        stream = client.watch("/k", None, revision)
        assert collect(stream, 1)
        make_certs(pki, "new-ca")
        make_certs(pki, "renew")
        make_certs(pki, "drop-ca")
        assert "TLS files have been replaced" in read_to_the_end(stream)
        # etcd reads its CA at the start only.
        tls_etcd.kill()
        tls_etcd.start()
        eventually(lambda: works(lambda: put(client)), 15)
        stream = client.watch("/k", None, revision + 1)
        assert collect(stream, 1)
        stream.close()
        eventually(lambda: works(lambda: keeper.keepalive(lease, 2.0)), 10)
        # And the former certificates are worth nothing.
        assert not client.problems()


def test_certificates_of_an_authority_that_was_dropped_are_refused(
    tls_etcd: EtcdCluster, pki: Path, tmp_path: Path
) -> None:
    former = tmp_path / "former"
    shutil.copytree(pki / "agent" / "a1", former)
    make_certs(pki, "new-ca")
    make_certs(pki, "renew")
    make_certs(pki, "drop-ca")
    tls_etcd.kill()
    tls_etcd.start()
    tls_etcd.wait_ready()
    ca = str(pki / "agent" / "a1" / "etcd-ca.crt")
    with (
        contextlib.closing(
            GatewayEtcd(tls_etcd.endpoints, tls=Tls(ca, str(former / "etcd.crt"), str(former / "etcd.key")))
        ) as stale,
        pytest.raises(Unavailable),
    ):
        stale.range("/k")


def test_a_pair_that_does_not_fit_changes_nothing_until_it_fits(
    tls_etcd: EtcdCluster, pki: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, renewed = pki / "agent" / "a1", tmp_path / "renewed"
    client = GatewayEtcd(tls_etcd.endpoints, tls=holder(pki, "agent", "a1"))
    with contextlib.closing(client):
        stream = client.watch("/k", None, put(client))
        shutil.copytree(pki, renewed)
        make_certs(renewed, "renew", "agent:a1")
        version = client._access.context()[1]
        shutil.copy(renewed / "agent" / "a1" / "etcd.crt", folder / "etcd.crt")
        eventually(lambda: bool(client.problems()), 3)
        for _ in range(3):
            put(client)
            time.sleep(0.5)
        assert client._access.context()[1] == version
        assert stream.next(0.1) is not None
        said = capsys.readouterr().out
        assert said.count("TLS files for etcd not usable") == 1
        assert "the former one stays in use" in said
        shutil.copy(renewed / "agent" / "a1" / "etcd.key", folder / "etcd.key")
        eventually(lambda: client._access.context()[1] == version + 1, 3)
        assert "TLS files have been replaced" in read_to_the_end(stream)
        put(client)
        assert not client.problems()


def test_a_start_with_a_pair_that_does_not_fit_is_put_right_by_the_files(
    tls_etcd: EtcdCluster, pki: Path
) -> None:
    key = pki / "agent" / "a1" / "etcd.key"
    good = key.read_bytes()
    key.write_bytes((pki / "agent" / "a2" / "etcd.key").read_bytes())
    client = GatewayEtcd(tls_etcd.endpoints, tls=holder(pki, "agent", "a1"))
    with contextlib.closing(client):
        with pytest.raises(Unavailable, match="TLS files for etcd cannot be used"):
            put(client)
        key.write_bytes(good)
        eventually(lambda: works(lambda: put(client)), 5)


def validity(pki: Path, role: str, name: str, ends: datetime) -> None:
    """Sign a holder's certificate again, to end at that moment: openssl x509 knows whole days only."""
    folder, ca = pki / role / name, pki / "ca"
    request, database = folder / "csr", folder / "db"
    database.write_text("")
    config = folder / "ca.cnf"
    config.write_text(
        f"[ca]\ndefault_ca=c\n[c]\ndatabase={database}\nnew_certs_dir={folder}\nrand_serial=yes\n"
        "default_md=sha256\npolicy=p\nunique_subject=no\n[p]\norganizationName=optional\n"
        "organizationalUnitName=optional\n[e]\nextendedKeyUsage=clientAuth\n"
    )
    subprocess.run(
        [
            "openssl", "req", "-new", "-key", str(folder / "etcd.key"), "-subj", "/O=dtrain",
            "-out", str(request),
        ],
        check=True,
        capture_output=True,
    )  # fmt: skip
    start = min(datetime.now(UTC), ends) - timedelta(days=2)
    made = folder / "made.crt"
    subprocess.run(
        [
            "openssl", "ca", "-batch", "-notext", "-config", str(config), "-extensions", "e",
            "-cert", str(ca / "etcd-client.crt"), "-keyfile", str(ca / "etcd-client.key"),
            "-in", str(request), "-out", str(made),
            "-startdate", f"{start:%Y%m%d%H%M%SZ}", "-enddate", f"{ends:%Y%m%d%H%M%SZ}",
        ],
        check=True,
        capture_output=True,
    )  # fmt: skip
    made.replace(folder / "etcd.crt")


def test_a_certificate_is_announced_before_it_expires_and_replaced_after(
    tls_etcd: EtcdCluster, pki: Path
) -> None:
    validity(pki, "agent", "a1", datetime.now(UTC) + timedelta(days=3))
    client = GatewayEtcd(tls_etcd.endpoints, tls=holder(pki, "agent", "a1"))
    with contextlib.closing(client):
        put(client)
        assert any("expires in 3 days or less" in problem for problem in client.problems())
        validity(pki, "agent", "a1", datetime.now(UTC) - timedelta(hours=1))
        eventually(lambda: not works(lambda: put(client)), SECONDS)
        with pytest.raises(Unavailable, match="expired"):
            client.range("/k", deadline_s=2.0)
        assert any("has expired" in problem for problem in client.problems())
        make_certs(pki, "renew", "agent:a1")
        eventually(lambda: works(lambda: put(client)), SECONDS)
        assert not client.problems()


def test_a_server_of_another_name_is_not_trusted(tls_etcd: EtcdCluster, pki: Path) -> None:
    make_certs(pki, "etcd:etcd-0=elsewhere.example")
    with contextlib.closing(GatewayEtcd(tls_etcd.endpoints, tls=holder(pki, "agent", "a1"))) as client:
        with pytest.raises(Unavailable, match="not valid for"):
            put(client)
        with pytest.raises(Unavailable):
            client.watch("/k", None, 1)
        # etcd takes up its certificate with the next connection; so do we.
        make_certs(pki, f"etcd:etcd-0={HOSTS}")
        eventually(lambda: works(lambda: put(client)), SECONDS)


@pytest.mark.parametrize("version", ["3.4", "3.5"])
def test_users_and_client_certificates_go_together_if_those_name_nobody(
    version: str, pki: Path, tmp_path: Path
) -> None:
    tls = server_tls(pki)
    cluster = EtcdCluster(tmp_path / "both", binary=binary(version), fsync=False, tls=tls)
    cluster.flags = ("--bcrypt-cost=4",)
    with cluster:
        users = Users(cluster, tmp_path / "passwords", tls.client)
        users.tls = holder(pki, "agent", "a1")
        with contextlib.closing(users.client("agent-a1")) as agent:
            node = f"{KEYS.root}agents/a1/node"
            stream = agent.watch(node, None, put(agent, node))
            assert collect(stream, 1)
            with pytest.raises(Refused) as caught:
                put(agent, f"{KEYS.root}agents/a2/node")
            assert caught.value.code is ErrorCode.ETCD_AUTH
        # The trap: with a CN, etcd's gateway refuses what comes with a token.
        folder = pki / "agent" / "a1"
        subprocess.run(
            [
                "openssl", "req", "-x509", "-new", "-key", str(folder / "etcd.key"),
                "-subj", "/CN=coordinator", "-CA", str(pki / "ca" / "etcd-client.crt"),
                "-CAkey", str(pki / "ca" / "etcd-client.key"),
                "-days", "1", "-addext", "extendedKeyUsage=clientAuth", "-out", str(folder / "etcd.crt"),
            ],
            check=True,
            capture_output=True,
        )  # fmt: skip
        with contextlib.closing(users.client("agent-a1")) as named:
            assert not works(lambda: put(named, f"{KEYS.root}agents/a2/node"))
            assert not works(lambda: put(named, KEYS.leader))


# Members -----------------------------------------------------------------------------------


def test_clients_follow_the_list_while_every_member_is_replaced(
    three_members: EtcdCluster, tmp_path: Path
) -> None:
    """Lease, watch and writes go on through the replacement of all three members, one after the other."""
    listed = tmp_path / "endpoints"

    def publish() -> None:
        urls = "".join(f"{member.endpoint}  # {member.name}\n" for member in three_members.members)
        (tmp_path / "new").write_text(f"# members\n\n{urls}")
        (tmp_path / "new").replace(listed)

    publish()
    lines: list[tuple[str, dict[str, Any]]] = []
    client = GatewayEtcd(three_members.endpoints, endpoints_file=str(listed))
    keeper = LeaseKeeper(
        Access(tuple(three_members.endpoints), endpoints_file=str(listed)),
        ttl_s=10,
        renew_share=0.1,
        on_change=lambda: None,
        report=lambda event, **fields: lines.append((event, fields)),
    )
    keeper.start()
    keeper.acquire()
    with contextlib.closing(client):
        eventually(lambda: keeper.held().lease != 0, 10)
        first = put(client)
        written, seen, next_ = [first], set[int](), first
        stream: WatchStream | None = None
        former = set(three_members.endpoints)
        for number in range(3):
            three_members.replace_member(number, 60.0)
            publish()
            end = time.monotonic() + 4
            while time.monotonic() < end:
                with contextlib.suppress(DtrainError):
                    written.append(put(client))
                try:
                    if stream is None:
                        stream = client.watch("/k", None, next_)
                    batch = stream.next(0.1)
                except DtrainError:
                    stream = None
                    continue
                for event in batch.events if batch else ():
                    assert event.kv.mod_revision not in seen
                    seen.add(event.kv.mod_revision)
                    next_ = event.kv.mod_revision + 1
        assert former.isdisjoint(three_members.endpoints)
        eventually(lambda: {str(one) for one in client._endpoints.in_order()} == set(three_members.endpoints))
        last = put(client)
        stream = stream or client.watch("/k", None, next_)
        while last not in seen:
            batch = stream.next(1.0)
            seen |= {event.kv.mod_revision for event in batch.events} if batch else set()
        assert set(written) <= seen
        assert not [event for event, _ in lines if event == "lease lost"]
        assert sum(event == "etcd endpoints file replaced" for event, _ in lines) == 3
        assert keeper.held().kill_at > time.clock_gettime(time.CLOCK_BOOTTIME)
    keeper.stop()


def test_a_member_that_leaves_the_list_is_left_at_once(three_members: EtcdCluster, tmp_path: Path) -> None:
    listed = tmp_path / "endpoints"
    listed.write_text(",".join(three_members.endpoints))
    client = GatewayEtcd(three_members.endpoints, endpoints_file=str(listed))
    keeper = LeaseClient(Access(tuple(three_members.endpoints), endpoints_file=str(listed)))
    lease = new_lease_id()
    with contextlib.closing(client), contextlib.closing(keeper):
        stream = client.watch("/k", None, put(client))
        keeper.grant(lease, 30, 3.0)
        used = str(client._endpoints.in_order()[0])
        rest = [url for url in three_members.endpoints if url != used]
        listed.write_text("\n".join(rest))
        assert "no longer configured" in read_to_the_end(stream)
        put(client)
        assert str(client._endpoints.in_order()[0]) in rest
        assert all(str(session.endpoint) in rest for session in client._sessions if not session.retired)
        time.sleep(1.1)
        assert keeper.keepalive(lease, 3.0) == 30.0
        assert f"http://{keeper._members[keeper._current][1]}:{keeper._members[keeper._current][2]}" in rest


@pytest.mark.parametrize(
    "content", [None, "", "# nobody\n , \n", "ftp://x:1\n", "http://a:1/path", b"\xff\xfe"]
)
def test_a_list_that_cannot_be_used_changes_nothing(
    content: str | bytes | None,
    etcd_35: EtcdCluster,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    listed = tmp_path / "endpoints"
    listed.write_text(etcd_35.endpoints[0])
    client = GatewayEtcd(etcd_35.endpoints, endpoints_file=str(listed))
    with contextlib.closing(client):
        put(client)
        if content is None:
            listed.unlink()
        elif isinstance(content, bytes):
            listed.write_bytes(content)
        else:
            listed.write_text(content)
        eventually(lambda: works(lambda: put(client)) and bool(client.problems()), 3)
        put(client)
        said = capsys.readouterr().out
        assert said.count("etcd endpoints file not usable") == 1
        listed.write_text(f"{etcd_35.endpoints[0]}\n# again\n")
        eventually(lambda: works(lambda: put(client)) and not client.problems(), 3)


def test_another_cluster_in_the_list_is_refused(
    etcd_35: EtcdCluster, etcd_34: EtcdCluster, tmp_path: Path
) -> None:
    listed = tmp_path / "endpoints"
    listed.write_text(etcd_35.endpoints[0])
    client = GatewayEtcd(etcd_35.endpoints, endpoints_file=str(listed))
    keeper = LeaseClient(Access(tuple(etcd_35.endpoints), endpoints_file=str(listed)))
    lease = new_lease_id()
    with contextlib.closing(client), contextlib.closing(keeper):
        put(client)
        assert keeper.grant(lease, 30, 3.0) == 30.0
        listed.write_text(etcd_34.endpoints[0])
        time.sleep(1.1)
        with pytest.raises(Refused) as caught:
            client.range("/k")
        assert caught.value.code is ErrorCode.ETCD_WENT_BACK
        with pytest.raises(Refused):
            client.watch("/k", None, 1)
        # It knows nothing of our lease, which says nothing about it.
        with pytest.raises(NotAnswered, match="another etcd cluster"):
            keeper.keepalive(lease, 3.0)
        listed.write_text(etcd_35.endpoints[0])
        time.sleep(1.1)
        put(client)
        assert keeper.keepalive(lease, 3.0) == 30.0
        keeper.revoke(lease, 3.0)
