"""Corners of the mirror, the transport and the lease's clock that a fault reaches once in a thousand."""

import contextlib
import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.contract.etcd.support import eventually

from dtrain.protocol.errors import OutcomeUnknown
from dtrain.storage.etcd.access import Access
from dtrain.storage.etcd.lease_client import boottime
from dtrain.storage.etcd.lease_keeper import LeaseKeeper
from dtrain.storage.etcd.memory import MemoryEtcd
from dtrain.storage.etcd.mirror import PAGE_KEYS, Change, Mirror
from dtrain.storage.etcd.port import Delete, Put, RangeResult, Txn
from dtrain.storage.etcd.transport import GatewayEtcd


@contextlib.contextmanager
def gateway(answer: Callable[[str, dict[str, Any]], dict[str, Any] | None]) -> Iterator[str]:
    """Serve what ``answer`` makes of (path, body) as a gateway; None hangs up without a word."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answered = answer(self.path, body)
            if answered is None:
                self.close_connection = True
                return
            data = json.dumps(answered).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("version", ["3.4.23", "3.5.1", "3.5.16"])
def test_a_deletion_at_the_compacted_revision_is_not_missed(version: str) -> None:
    """Before 3.5.16 etcd forgets a deletion at the very revision that is compacted."""
    model = MemoryEtcd(time.monotonic, version=version)
    model.txn(Txn((), (Put("/m/goes", b"1"), Put("/m/stays", b"1"))))
    entered, go = threading.Event(), threading.Event()
    watch = model.watch

    def gated(key: str, range_end: str | None, start_revision: int) -> object:
        entered.set()
        assert go.wait(5)
        return watch(key, range_end, start_revision)

    go.set()
    model.watch = gated  # type: ignore[assignment,method-assign]
    mirror = Mirror(model, "/m/")
    mirror.start()
    assert mirror.wait_for(2, 5)
    eventually(entered.is_set)
    entered.clear()
    go.clear()
    model.cut_watches()
    eventually(entered.is_set)
    # The very next revision is a deletion, and it is compacted before the watch is back.
    deleted = model.txn(Txn((), (Delete("/m/goes"),))).revision
    model.compact(deleted)
    go.set()
    later = model.txn(Txn((), (Put("/m/stays", b"2"),))).revision
    assert mirror.wait_for(later, 5)
    assert {kv.key: kv.value for kv in mirror.prefix("/m/")} == {"/m/stays": b"2"}
    mirror.close()


def test_a_list_in_pages_is_of_one_revision() -> None:
    model = MemoryEtcd(time.monotonic)
    names = [f"/m/{number:04}" for number in range(PAGE_KEYS + 10)]
    for at in range(0, len(names), 100):
        model.txn(Txn((), tuple(Put(name, b"old") for name in names[at : at + 100])))
    read = model.range
    pages: list[int] = []

    def range_(key: str, range_end: str | None = None, **how: Any) -> RangeResult:
        page = read(key, range_end, **how)
        if range_end is not None:
            pages.append(len(page.items))
            if len(pages) == 1:
                # Between the pages: one key is changed and another one goes.
                model.txn(Txn((), (Put(names[-1], b"new"), Delete(names[-2]))))
        return page

    model.range = range_  # type: ignore[method-assign]
    told: list[tuple[tuple[Change, ...], int]] = []
    mirror = Mirror(model, "/m/", on_changes=lambda changes, revision: told.append((changes, revision)))
    mirror.start()
    eventually(lambda: mirror.revision == model.revision)
    mirror.close()
    assert pages == [PAGE_KEYS, 10]
    (first, revision), *_ = told
    listed = {change.key: change.after for change in first}
    assert set(listed) == set(names)
    assert all(kv is not None and kv.mod_revision <= revision for kv in listed.values())


def test_a_write_is_not_sent_to_another_member_while_its_outcome_is_unknown() -> None:
    asked: list[int] = []

    def member(number: int) -> Callable[[str, dict[str, Any]], None]:
        return lambda _path, _body: asked.append(number)

    with gateway(member(1)) as one, gateway(member(2)) as two:
        etcd = GatewayEtcd([one, two])
        with pytest.raises(OutcomeUnknown):
            etcd.txn(Txn((), (Put("/k", b"v"),)), deadline_s=2.0)
        etcd.close()
    assert len(asked) == 1, "a member may have applied it: the other one must not be asked, too"


def test_deadlines_count_from_before_the_renewal_was_sent() -> None:
    arrived: list[float] = []

    def slow(path: str, _body: dict[str, Any]) -> dict[str, Any]:
        if path.endswith("keepalive"):
            arrived.append(boottime())
            # etcd starts to count when the request arrives, not when its answer does.
            time.sleep(0.3)
            return {"result": {"TTL": "4"}}
        return {"TTL": "4"}

    with gateway(slow) as endpoint:
        keeper = LeaseKeeper(
            Access((endpoint,)),
            ttl_s=4,
            renew_share=0.05,
            on_change=lambda: None,
            report=lambda *_, **__: None,
        )
        keeper.start()
        keeper.acquire()
        eventually(lambda: keeper.held().generation == 1)
        granted = keeper.held()
        eventually(lambda: keeper.held().sent_at > granted.sent_at)
        renewed = keeper.held()
        keeper.stop()
    assert renewed.sent_at <= arrived[0]
    assert renewed.view().demote_at <= arrived[0] + 0.7 * 4
