"""Watch streams that are cut into bytes, garbled, too long, half-open or one-way.

A proxy stands before each member, so that what a test does to the network is done to real answers.
"""

import itertools
import secrets
import time
from collections.abc import Callable, Iterator

import pytest
from tests.contract.etcd.members import Seen, Writer, settle
from tests.contract.etcd.support import binary, eventually

from dtrain.local.etcd import EtcdCluster
from dtrain.local.proxy import TcpProxy, http_chunk
from dtrain.protocol.errors import OutcomeUnknown, Unavailable
from dtrain.storage.etcd.framing import LINE_BYTES_MAX
from dtrain.storage.etcd.lease_client import new_lease_id
from dtrain.storage.etcd.port import Put, Txn, prefix_end, put_if_absent
from dtrain.storage.etcd.transport import GatewayEtcd

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdCluster]:
    folder = tmp_path_factory.mktemp("streams")
    with EtcdCluster(folder / "etcd", size=3, binary=binary("3.5"), fsync=False, progress_s=1) as cluster:
        yield cluster


@pytest.fixture
def proxies(three: EtcdCluster) -> Iterator[list[TcpProxy]]:
    made = [TcpProxy(endpoint) for endpoint in three.endpoints]
    yield made
    for proxy in made:
        proxy.close()


@pytest.fixture
def through(proxies: list[TcpProxy]) -> Iterator[GatewayEtcd]:
    """A client that reaches etcd through the proxies only."""
    client = GatewayEtcd([proxy.endpoint for proxy in proxies])
    yield client
    client.close()


@pytest.fixture
def direct(three: EtcdCluster) -> Iterator[GatewayEtcd]:
    client = GatewayEtcd(three.endpoints)
    yield client
    client.close()


@pytest.fixture
def prefix() -> str:
    return f"/streams/{secrets.token_hex(4)}/"


def on_watch(head: bytes) -> bool:
    return b"/v3/watch" in head


def agrees(seen: Seen, direct: GatewayEtcd) -> None:
    """The mirror holds what etcd holds, at the same revision."""
    end = direct.range(seen.prefix, prefix_end(seen.prefix))
    newest = max(kv.mod_revision for kv in end.items)
    assert seen.mirror.wait_for(newest, 30.0), "the mirror does not catch up"
    assert tuple(seen.mirror.prefix(seen.prefix)) == end.items


@pytest.mark.parametrize("size", [1, 7, 1460])
def test_a_stream_cut_into_pieces_of_any_size_reads_the_same(
    proxies: list[TcpProxy], through: GatewayEtcd, direct: GatewayEtcd, prefix: str, size: int
) -> None:
    for proxy in proxies:
        proxy.rechunk(size, to_server=True)
    with Seen(through, prefix) as seen:
        for number in range(60):
            value = b"line\nfeeds \r\n and 0\r\n\r\n %d" % number
            direct.txn(Txn((), (Put(f"{prefix}a", value), Put(f"{prefix}{number}", value))))
        agrees(seen, direct)
        assert seen.relisted == 0
        assert seen.versions(f"{prefix}a") == list(range(1, 61))


def test_a_line_of_ten_mebibytes_is_read(
    proxies: list[TcpProxy], through: GatewayEtcd, direct: GatewayEtcd, prefix: str
) -> None:
    """What a watch has missed comes as one message: a mirror that was away must survive it."""
    with Seen(through, prefix) as seen:
        for proxy in proxies:
            proxy.cut()
        eventually(lambda: not any(proxy.connections for proxy in proxies))
        for number in range(6):
            settle(direct, Txn((), (Put(f"{prefix}{number}", b"x" * 1_300_000),)))
        for proxy in proxies:
            proxy.passing()
        agrees(seen, direct)
        assert seen.relisted == 0


def test_a_backlog_longer_than_the_longest_line_is_listed_instead(
    proxies: list[TcpProxy], through: GatewayEtcd, direct: GatewayEtcd, prefix: str
) -> None:
    with Seen(through, prefix) as seen:
        for proxy in proxies:
            proxy.cut()
        eventually(lambda: not any(proxy.connections for proxy in proxies))
        # In base64 18 MiB: no watch from here on can be read, however often it is opened.
        for number in range(11):
            settle(direct, Txn((), (Put(f"{prefix}{number % 4}", b"%02d" % number * 650_000),)))
        for proxy in proxies:
            proxy.passing()
        agrees(seen, direct)
        assert seen.relisted == 1


@pytest.mark.parametrize(
    "garbage",
    [
        lambda: http_chunk(b"this is no JSON\n"),
        lambda: http_chunk(b'{"result": 7}\n'),
        lambda: http_chunk(b'{"result": {"events": [{"kv": {"key": "?"}}]}}\n'),
        lambda: http_chunk(b'{"error": {"grpc_code": 14, "message": "x"}}\n'),
        lambda: http_chunk(secrets.token_bytes(4096)) + http_chunk(b"\n"),
        lambda: b"zz\r\nno chunk at all",
        lambda: http_chunk(b"x" * 1_000_000) * (LINE_BYTES_MAX // 1_000_000 + 2),
        lambda: b"0\r\n\r\n",
    ],
    ids=["text", "wrong type", "half an event", "error", "random", "no chunk", "endless line", "end"],
)
def test_garbage_in_the_stream_costs_a_reconnection(
    proxies: list[TcpProxy],
    through: GatewayEtcd,
    direct: GatewayEtcd,
    prefix: str,
    garbage: Callable[[], bytes],
) -> None:
    with Seen(through, prefix) as seen:
        writer = Writer(direct, f"{prefix}counter")
        eventually(lambda: len(seen.versions(writer._key)) > 5)
        for _ in range(3):
            before = len(seen.versions(writer._key))
            [proxy] = [p for p in proxies if p.inject(garbage(), where=on_watch)] or proxies[:1]
            assert proxy
            eventually(lambda n=before: len(seen.versions(writer._key)) > n + 10, 20.0, "events go on")  # type: ignore[misc]
        writer.stop()
        agrees(seen, direct)
        assert seen.relisted == 0
        assert seen.versions(writer._key) == list(range(1, writer.written + 1))


def test_a_stream_that_ends_after_every_few_bytes_loses_nothing(
    proxies: list[TcpProxy], through: GatewayEtcd, direct: GatewayEtcd, prefix: str
) -> None:
    with Seen(through, prefix) as seen:
        writer = Writer(direct, f"{prefix}counter", pause_s=0.02)
        for _ in range(15):
            before = len(seen.changes)
            for proxy in proxies:
                proxy.close_after(2500)
            eventually(lambda n=before: len(seen.changes) > n, 20.0, "events go on")  # type: ignore[misc]
        for proxy in proxies:
            proxy.passing()
        writer.stop()
        agrees(seen, direct)
        seen.assert_exactly_once(writer._key)


def test_a_half_open_connection_is_noticed_by_its_silence(
    proxies: list[TcpProxy], through: GatewayEtcd, direct: GatewayEtcd, prefix: str
) -> None:
    """Accepted, alive to the kernel, and nothing comes: three silent intervals are the limit."""
    interval_s = 1.0
    with Seen(through, prefix, progress_interval_s=interval_s) as seen:
        direct.txn(Txn((), (Put(f"{prefix}k", b"1"),)))
        agrees(seen, direct)
        [watched] = [proxy for proxy in proxies if proxy.inject(b"", where=on_watch)] or [proxies[0]]
        start = time.monotonic()
        watched.black_hole()
        direct.txn(Txn((), (Put(f"{prefix}k", b"2"),)))
        agrees(seen, direct)
        assert time.monotonic() - start < 3 * interval_s + 4.0
        assert seen.relisted == 0


@pytest.mark.parametrize("way", ["only_to_server", "only_to_client"])
def test_a_one_way_partition_leaves_writes_unknown_and_applies_them_once(
    proxies: list[TcpProxy], direct: GatewayEtcd, prefix: str, way: str
) -> None:
    client = GatewayEtcd([proxies[0].endpoint])
    client.range(prefix)
    getattr(proxies[0], way)()
    key = f"{prefix}k"
    with pytest.raises(OutcomeUnknown):
        client.txn(put_if_absent(key, b"mine"), deadline_s=0.6)
    with pytest.raises(Unavailable):
        client.range(key, deadline_s=0.4)
    lease = new_lease_id()
    with pytest.raises(OutcomeUnknown):
        client.grant(5, lease, deadline_s=0.4)
    with pytest.raises(Unavailable):
        client.keepalive(lease, deadline_s=0.4)
    applied = bool(direct.range(key).items)
    assert applied == (way == "only_to_server"), "what leaves arrives, what cannot leave does not"
    proxies[0].passing()
    # Sent again as it was: whichever of the two was applied, it was applied once.
    settle(client, put_if_absent(key, b"mine"))
    [kv] = direct.range(key).items
    assert (kv.value, kv.version) == (b"mine", 1)
    client.close()


def test_a_network_that_comes_and_goes_each_second_loses_no_event(
    proxies: list[TcpProxy], through: GatewayEtcd, direct: GatewayEtcd, prefix: str
) -> None:
    with Seen(through, prefix, progress_interval_s=1.0) as seen:
        writer = Writer(direct, f"{prefix}counter", pause_s=0.02)
        for away in itertools.islice(itertools.cycle([True, False]), 10):
            for proxy in proxies:
                proxy.black_hole() if away else proxy.passing()
            time.sleep(1.0)
        writer.stop()
        agrees(seen, direct)
        assert seen.relisted == 0
        seen.assert_exactly_once(writer._key)


def test_a_slow_link_delays_and_loses_nothing(
    proxies: list[TcpProxy], through: GatewayEtcd, direct: GatewayEtcd, prefix: str
) -> None:
    for proxy in proxies:
        proxy.drip(20_000)
    with Seen(through, prefix) as seen:
        for number in range(40):
            direct.txn(Txn((), (Put(f"{prefix}k", b"%0500d" % number),)))
        agrees(seen, direct)
        assert seen.versions(f"{prefix}k") == list(range(1, 41))
