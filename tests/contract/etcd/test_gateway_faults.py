"""What the transport says when servers die, freeze, drip or lie."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from tests.contract.etcd.support import eventually

from dtrain.local import ports
from dtrain.local.etcd import EtcdCluster
from dtrain.protocol.errors import ErrorCode, OutcomeUnknown, Refused, Unavailable
from dtrain.runtime.clock import SystemClock
from dtrain.storage.etcd.endpoints import parse_endpoint
from dtrain.storage.etcd.lease_client import new_lease_id
from dtrain.storage.etcd.port import Get, Put, Txn, put_if_absent
from dtrain.storage.etcd.transport import IDLE_S, OLDER_TERM_S, GatewayEtcd


@contextlib.contextmanager
def closing(*endpoints: str) -> Iterator[GatewayEtcd]:
    etcd = GatewayEtcd(endpoints)
    try:
        yield etcd
    finally:
        etcd.close()


def serve(answer: Callable[[socket.socket], None]) -> tuple[str, socket.socket]:
    """Run a server whose every connection is handled by ``answer``, until its socket is closed."""
    listener = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=handle, args=(connection,), daemon=True).start()

    def handle(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            answer(connection)

    threading.Thread(target=accept, daemon=True).start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}", listener


def reply(connection: socket.socket, status: int, body: dict[str, object] | str) -> None:
    connection.recv(65536)
    text = (body if isinstance(body, str) else json.dumps(body)).encode()
    connection.sendall(
        b"HTTP/1.1 %d X\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % (status, len(text)) + text
    )


def headers(told: Iterable[tuple[int, int]]) -> Callable[[socket.socket], None]:
    """Answer with these raft terms and revisions, one after the other; a revocation is not counted."""
    left = iter(told)

    def answer(connection: socket.socket) -> None:
        if b"/lease/revoke" in connection.recv(65536, socket.MSG_PEEK):
            reply(connection, 404, {"code": 5, "message": "etcdserver: requested lease not found"})
            return
        term, revision = next(left)
        header = {"cluster_id": "1", "raft_term": str(term), "revision": str(revision)}
        reply(connection, 200, {"header": header})

    return answer


class Later(SystemClock):
    """The clock, turned ahead by hand."""

    ahead_s = 0.0

    def monotonic(self) -> float:
        return super().monotonic() + self.ahead_s


PUT = Txn((), (Put("/faults/k", b"x"),))


def test_a_refused_connection_means_that_nothing_happened() -> None:
    [port] = ports.reserve(1)
    with closing(f"http://127.0.0.1:{port}") as etcd:
        for call in (
            lambda: etcd.txn(PUT),
            lambda: etcd.range("/faults/k"),
            lambda: etcd.grant(10, 1),
            lambda: etcd.keepalive(1),
            lambda: etcd.revoke(1),
            lambda: etcd.watch("/faults/k", None, 1),
            lambda: etcd.status(),
        ):
            with pytest.raises(Unavailable) as caught:
                call()
            assert caught.value.code is ErrorCode.ETCD_UNAVAILABLE
    ports.release([port])


def test_a_frozen_server_leaves_writes_unknown_and_reads_unavailable(fresh_etcd: EtcdCluster) -> None:
    with closing(*fresh_etcd.endpoints) as etcd:
        before = etcd.txn(Txn((), (Get("/faults/k"),))).revision
        fresh_etcd.freeze()
        start = time.monotonic()
        with pytest.raises(OutcomeUnknown) as caught:
            etcd.txn(put_if_absent("/faults/k", b"x"), deadline_s=0.6)
        assert caught.value.code is ErrorCode.ETCD_OUTCOME_UNKNOWN
        with pytest.raises(Unavailable):
            etcd.range("/faults/k", deadline_s=0.3)
        with pytest.raises(Unavailable):
            etcd.txn(Txn((), (Get("/faults/k"),)), deadline_s=0.3)
        with pytest.raises(Unavailable):
            etcd.keepalive(1, deadline_s=0.3)
        with pytest.raises(OutcomeUnknown):
            etcd.grant(10, new_lease_id(), deadline_s=0.3)
        assert time.monotonic() - start < 2.6
        fresh_etcd.thaw()
        # Applied meanwhile or never: sending the same transaction again settles it, with one effect.
        eventually(lambda: bool(etcd.txn(put_if_absent("/faults/k", b"x"))), what="an answer")
        [kv] = etcd.range("/faults/k").items
        assert (kv.value, kv.version) == (b"x", 1)
        assert kv.mod_revision > before


def test_a_killed_server_leaves_a_write_under_way_unknown(fresh_etcd: EtcdCluster) -> None:
    with closing(*fresh_etcd.endpoints) as etcd:
        etcd.range("/faults/k")
        fresh_etcd.freeze()
        killer = threading.Timer(0.3, fresh_etcd.kill)
        killer.start()
        with pytest.raises(OutcomeUnknown):
            etcd.txn(PUT, deadline_s=5.0)
        killer.join()
        with pytest.raises(Unavailable):
            etcd.txn(PUT)
        fresh_etcd.start()
        fresh_etcd.wait_ready()
        assert etcd.txn(PUT).succeeded


def test_a_dead_member_is_passed_over_and_rests(fresh_etcd: EtcdCluster) -> None:
    dead = ports.reserve(2)
    endpoints = [*(f"http://127.0.0.1:{port}" for port in dead), fresh_etcd.endpoints[0]]
    for _ in range(5):
        with closing(*endpoints) as etcd:
            assert etcd.txn(PUT).succeeded
            start = time.monotonic()
            etcd.keepalive(_granted(etcd))
            assert time.monotonic() - start < 1.0
    ports.release(dead)


def _granted(etcd: GatewayEtcd) -> int:
    lease = new_lease_id()
    etcd.grant(10, lease)
    return lease


def test_a_frozen_member_is_left_within_its_share_of_the_time(three_members: EtcdCluster) -> None:
    with closing(*three_members.endpoints) as etcd:
        etcd.range("/faults/k")
        used = three_members.endpoints.index(str(etcd._endpoints.in_order()[0]))
        three_members.freeze(used)
        start = time.monotonic()
        assert etcd.range("/faults/k", deadline_s=5.0).revision >= 1
        assert time.monotonic() - start < 2.5
        start = time.monotonic()
        etcd.range("/faults/k", deadline_s=5.0)
        assert time.monotonic() - start < 1.0, "the frozen member is asked again"
        three_members.thaw(used)


def test_a_slow_drip_ends_at_the_deadline() -> None:
    def drip(connection: socket.socket) -> None:
        connection.recv(65536)
        for byte in b"HTTP/1.1 200 OK\r\nContent-Length: 400\r\n\r\n" + b" " * 400:
            connection.sendall(bytes([byte]))
            time.sleep(0.05)

    endpoint, listener = serve(drip)
    with closing(endpoint) as etcd:
        start = time.monotonic()
        with pytest.raises(Unavailable):
            etcd.range("/faults/k", deadline_s=0.5)
        assert time.monotonic() - start < 1.0
    listener.close()


@pytest.mark.parametrize(
    ("status", "body", "error", "code"),
    [
        (503, {"code": 14, "message": "etcdserver: no leader"}, Unavailable, ErrorCode.ETCD_UNAVAILABLE),
        (503, {"code": 14, "message": "etcdserver: request timed out"}, OutcomeUnknown, None),
        (503, {"code": 14, "message": "etcdserver: leader changed"}, OutcomeUnknown, None),
        (503, {"code": 14, "message": "etcdserver: server stopped"}, OutcomeUnknown, None),
        (504, {"code": 4, "message": "context deadline exceeded"}, OutcomeUnknown, None),
        (500, {"error": {"grpc_code": 2, "message": "context deadline exceeded"}}, OutcomeUnknown, None),
        (502, "<html>bad gateway</html>", OutcomeUnknown, None),
        (200, "{ truncated", OutcomeUnknown, None),
        (429, {"code": 8, "message": "etcdserver: too many requests"}, Unavailable, None),
        (
            429,
            {"code": 8, "message": "etcdserver: mvcc: database space exceeded"},
            Refused,
            ErrorCode.ETCD_NO_SPACE,
        ),
        (400, {"code": 3, "message": "etcdserver: request is too large"}, Refused, ErrorCode.ETCD_REFUSED),
        (403, {"code": 7, "message": "etcdserver: permission denied"}, Refused, ErrorCode.ETCD_AUTH),
        (401, {"code": 16, "message": "etcdserver: invalid auth token"}, Refused, ErrorCode.ETCD_AUTH),
        (400, {"code": 3, "message": "etcdserver: user name is empty"}, Refused, ErrorCode.ETCD_AUTH),
        (500, {"code": 15, "message": "etcdserver: corrupt cluster"}, OutcomeUnknown, None),
    ],
)
def test_answers_are_told_apart(
    status: int, body: dict[str, object] | str, error: type[Exception], code: ErrorCode | None
) -> None:
    endpoint, listener = serve(lambda connection: reply(connection, status, body))
    with closing(endpoint) as etcd:
        with pytest.raises(error) as caught:
            etcd.txn(PUT)
        assert type(caught.value) is error or issubclass(type(caught.value), Refused)
        if code is not None:
            assert getattr(caught.value, "code", None) is code
    listener.close()


def test_a_connection_closed_after_the_request_is_unknown() -> None:
    endpoint, listener = serve(lambda connection: connection.recv(65536) and None)
    with closing(endpoint) as etcd, pytest.raises(OutcomeUnknown):
        etcd.txn(PUT)
    listener.close()


def test_another_cluster_is_refused(fresh_etcd: EtcdCluster, etcd_35: EtcdCluster) -> None:
    with closing(fresh_etcd.endpoints[0], etcd_35.endpoints[0]) as etcd:
        etcd.range("/faults/k")
        used = etcd._endpoints.in_order()[0]
        etcd._endpoints.failed(used)
        with pytest.raises(Refused) as caught:
            etcd.range("/faults/k")
        assert caught.value.code is ErrorCode.ETCD_WENT_BACK


def test_a_lower_raft_term_is_refused() -> None:
    endpoint, listener = serve(headers([(7, 5), (6, 4)]))
    with closing(endpoint) as etcd:
        etcd.range("/faults/k")
        with pytest.raises(Refused) as caught:
            etcd.range("/faults/k")
        assert caught.value.code is ErrorCode.ETCD_WENT_BACK
    listener.close()


def test_a_lower_raft_term_with_the_newest_revision_is_refused_only_when_it_stays() -> None:
    clock = Later()
    endpoint, listener = serve(headers([(7, 5), (6, 5), (6, 9), (7, 9), (6, 9), (6, 9), (6, 9)]))
    with contextlib.closing(GatewayEtcd([endpoint], clock=clock)) as etcd:
        assert etcd.range("/faults/k").raft_term == 7
        with pytest.raises(Unavailable):
            etcd.range("/faults/k")
        clock.ahead_s += OLDER_TERM_S - 1.0
        with pytest.raises(OutcomeUnknown):
            etcd.txn(PUT)
        # It has caught up: what was before counts no more.
        assert etcd.range("/faults/k").raft_term == 7
        clock.ahead_s += 2.0
        with pytest.raises(Unavailable):
            etcd.range("/faults/k")
        clock.ahead_s += OLDER_TERM_S
        for call in (lambda: etcd.range("/faults/k"), lambda: etcd.txn(PUT)):
            with pytest.raises(Refused) as caught:
                call()
            assert caught.value.code is ErrorCode.ETCD_WENT_BACK
    listener.close()


def test_another_member_is_asked_when_one_tells_a_lower_raft_term() -> None:
    one, first = serve(headers([(7, 5), (7, 6)]))
    other, second = serve(headers([(6, 5)]))
    with closing(one, other) as etcd:
        etcd._endpoints.worked(parse_endpoint(one))
        assert etcd.range("/faults/k").revision == 5
        etcd._endpoints.worked(parse_endpoint(other))
        assert etcd.range("/faults/k").revision == 6
    first.close()
    second.close()


def test_a_lower_raft_term_is_fine_once_the_revision_was_raised_by_a_restoration() -> None:
    told = [(7, 5), (2, 1_000_000_005), (7, 6), (2, 1_000_000_006), (1, 1_000_000_005)]
    endpoint, listener = serve(headers(told))
    with closing(endpoint) as etcd:
        assert etcd.range("/faults/k").revision == 5
        assert etcd.range("/faults/k").revision == 1_000_000_005
        etcd.range("/faults/k")  # of the former history, read late: not believed for the terms that count
        assert etcd.range("/faults/k").revision == 1_000_000_006
        with pytest.raises(Refused) as caught:
            etcd.range("/faults/k")
        assert caught.value.code is ErrorCode.ETCD_WENT_BACK
    listener.close()


def test_an_expired_token_costs_one_login_and_no_error() -> None:
    logins: list[int] = []
    seen: list[str] = []

    def answer(connection: socket.socket) -> None:
        request = connection.recv(65536).decode()
        if "/auth/authenticate" in request:
            logins.append(1)
            text = json.dumps({"token": f"token-{len(logins)}"})
        else:
            token = next(
                (line.split(": ")[1] for line in request.split("\r\n") if line.startswith("Auth")), ""
            )
            seen.append(token)
            if token != "token-2":
                text = json.dumps({"code": 16, "message": "etcdserver: invalid auth token"})
                head = b"HTTP/1.1 401 X\r\n"
                connection.sendall(
                    head + b"Content-Length: %d\r\nConnection: close\r\n\r\n" % len(text) + text.encode()
                )
                return
            text = json.dumps({"header": {"revision": "9"}, "succeeded": True})
        connection.sendall(
            b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(text) + text.encode()
        )

    endpoint, listener = serve(answer)
    etcd = GatewayEtcd([endpoint], user="coordinator", password="secret")
    assert etcd.txn(PUT).revision == 9
    assert etcd.txn(PUT).revision == 9
    assert seen == ["token-1", "token-2", "token-2"]
    assert len(logins) == 2
    etcd.close()
    listener.close()


def test_the_environment_s_proxy_is_ignored(fresh_etcd: EtcdCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with closing(*fresh_etcd.endpoints) as etcd:
        assert etcd.txn(PUT).succeeded


def test_connections_to_members_that_nobody_turns_to_any_more_are_closed(three_members: EtcdCluster) -> None:
    clock = Later()
    members = {parse_endpoint(url).port: index for index, url in enumerate(three_members.endpoints)}

    def connections() -> dict[object, int]:
        found = psutil.Process().net_connections("tcp")
        return {
            one.laddr: members[one.raddr.port] for one in found if one.raddr and one.raddr.port in members
        }

    others = connections().keys()

    def connected() -> list[int]:
        return [member for own, member in connections().items() if own not in others]

    etcd = GatewayEtcd(three_members.endpoints, clock=clock)
    with ThreadPoolExecutor(1) as another_thread:
        try:
            another_thread.submit(etcd.range, "/x").result()
            (first,) = connected()
            three_members.freeze(first)
            etcd.range("/x", deadline_s=5.0)
            three_members.thaw(first)
            another_thread.submit(etcd.range, "/x").result()
            assert sorted(connected()).count(first) == 1, "a moment's trouble is no reason"
            clock.ahead_s += IDLE_S + 1
            another_thread.submit(etcd.range, "/x").result()
            assert len(connected()) == 2
            assert first not in connected()
        finally:
            three_members.thaw(first)
            etcd.close()
