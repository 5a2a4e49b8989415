"""The model of etcd does what real servers do, and real servers say what the transport takes them to say.

500 random programs per server; ``DTRAIN_DIFFERENTIAL_SEQUENCES`` and ``DTRAIN_DIFFERENTIAL_SEED`` change it,
``python -m tests.contract.etcd.differential`` runs as many as there is time for.
"""

import contextlib
import json
import os
import secrets
from base64 import b64encode
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.contract.etcd.differential import SERVERS, Pair, Raw, server, server_binary
from tests.contract.etcd.program import Compact, Drain, Grant, Program, Range, Watch
from tests.contract.etcd.support import eventually

from dtrain.local.etcd import EtcdCluster
from dtrain.protocol.errors import DtrainError, OutcomeUnknown, Unavailable
from dtrain.storage.etcd import memory, semantics
from dtrain.storage.etcd.outcomes import classify, parse_error
from dtrain.storage.etcd.port import Compare, Delete, KeyValue, Put, Target, Txn
from dtrain.storage.etcd.transport import GatewayEtcd

SEQUENCES = int(os.environ.get("DTRAIN_DIFFERENTIAL_SEQUENCES", "500"))
SEED = int(os.environ.get("DTRAIN_DIFFERENTIAL_SEED", "1"))

PINNED: dict[str, Program] = {
    "a deletion at the compacted revision": (
        Txn((), (Put("a", b"1"),)),
        Txn((), (Put("b", b"1"),)),
        Txn((), (Delete("a"), Put("c", b"1"))),
        Compact(3),
        Watch(1, "a", "~", 3),
        Range("a", "~", 3),
        Drain(1),
    ),
    "TTLs at the edges": (Grant(1, 1), Grant(2, 2), Grant(3, 0), Grant(1, 60), Grant(4, 9_000_000_001)),
}


@pytest.fixture(scope="module", params=SERVERS)
def cluster(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EtcdCluster]:
    with server(request.param, tmp_path_factory.mktemp("differential")) as running:
        yield running


@pytest.fixture
def pair(cluster: EtcdCluster) -> Iterator[Pair]:
    with contextlib.closing(Pair(cluster, secrets.token_hex(4))) as running:
        yield running


@pytest.fixture
def raw(cluster: EtcdCluster) -> Iterator[Raw]:
    with contextlib.closing(Raw(cluster.endpoints[0])) as connection:
        yield connection


@pytest.mark.timeout(600)
def test_the_model_and_a_server_agree_on_random_programs(pair: Pair) -> None:
    # The oldest of its line adds little to the newest: it gets a third.
    count = SEQUENCES if pair.version != "3.5.1" else SEQUENCES // 3
    assert not (found := pair.check(range(SEED, SEED + count))), found


@pytest.mark.parametrize("name", PINNED)
def test_the_model_and_a_server_agree_on(pair: Pair, name: str) -> None:
    assert not (found := pair.difference(PINNED[name])), found


def test_a_wrong_model_is_found_and_the_program_made_small(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lenient(compare: Compare, found: list[KeyValue]) -> bool:
        return compare.target is Target.LEASE or semantics.holds(compare, found)

    monkeypatch.setattr(memory, "holds", lenient)
    found = pair.check(range(1, 200))
    assert "Target.LEASE" in found
    statements = found.partition("PROGRAM = (\n")[2].splitlines()[:-1]
    assert 1 <= len(statements) <= 3, found


# What the transport's tables rest on.


def text(data: str) -> str:
    return b64encode(data.encode()).decode()


def put(key: str, value: str = "v", **fields: Any) -> dict[str, Any]:
    return {"request_put": {"key": text(key), "value": text(value), **fields}}


def observed(raw: Raw, path: str, body: dict[str, Any]) -> tuple[int, int, str]:
    """Return (HTTP status, gRPC code, message)."""
    status, answer = raw.post(path, body)
    return status, answer.get("code", 0), answer.get("message", answer.get("error", ""))


def test_errors_have_the_codes_of_the_table(raw: Raw) -> None:
    raw.must("/kv/txn", {"success": [put("raw/a")]})
    old = raw.must("/kv/txn", {"success": [put("raw/a")]})["header"]["revision"]
    new = raw.must("/kv/txn", {"success": [put("raw/a")]})["header"]["revision"]
    raw.compact(int(new))
    range_ = {"key": text("raw/a")}
    for path, body, expected in [
        ("/kv/range", range_ | {"revision": old}, (400, 11, "compacted")),
        ("/kv/compaction", {"revision": old}, (400, 11, "compacted")),
        ("/kv/range", range_ | {"revision": str(int(new) + 1000)}, (400, 11, "future revision")),
        ("/kv/txn", {"success": [put("raw/a", "x" * 1_600_000)]}, (400, 3, "too large")),
        ("/kv/txn", {"success": [put(f"raw/{i}") for i in range(129)]}, (400, 3, "too many operations")),
        ("/kv/txn", {"success": [put("raw/a"), put("raw/a")]}, (400, 3, "duplicate key")),
        ("/kv/txn", {"success": [put("")]}, (400, 3, "key is not provided")),
        ("/kv/txn", {"success": [put("raw/a", lease="77")]}, (404, 5, "lease not found")),
        ("/lease/revoke", {"ID": "77"}, (404, 5, "lease not found")),
        ("/lease/grant", {"ID": "78", "TTL": "9000000001"}, (400, 11, "too large lease TTL")),
    ]:
        status, code, message = observed(raw, path, body)
        assert (status, code) == expected[:2], (path, message)
        assert expected[2] in message
    raw.must("/lease/grant", {"ID": "79", "TTL": "60"})
    # FailedPrecondition is 400 in newer gateways, 412 in older ones: only the words are relied on.
    status, code, message = observed(raw, "/lease/grant", {"ID": "79", "TTL": "60"})
    assert status != 200
    assert "lease already exists" in message
    raw.must("/lease/revoke", {"ID": "79"})


def test_zeros_are_absent_and_numbers_are_strings(raw: Raw) -> None:
    never = [{"key": text("raw/none"), "target": "CREATE", "create_revision": "9"}]
    failed = raw.must("/kv/txn", {"compare": never, "failure": [put("raw/z", "")]})
    assert "succeeded" not in failed
    assert isinstance(failed["header"]["revision"], str)
    (found,) = raw.must("/kv/range", {"key": text("raw/z")})["kvs"]
    assert "value" not in found
    assert "lease" not in found
    assert isinstance(found["mod_revision"], str)
    empty = raw.must("/kv/range", {"key": text("raw/none")})
    assert "kvs" not in empty
    assert "more" not in empty
    # A lease that is gone answers 200, without a TTL.
    status, answer = raw.post("/lease/keepalive", {"ID": "77"})
    assert status == 200
    assert "TTL" not in answer["result"]
    granted = raw.must("/lease/grant", {"ID": "80", "TTL": "60"})
    assert granted["TTL"] == "60"
    raw.must("/lease/revoke", {"ID": "80"})


def test_without_space_only_new_data_is_turned_down(raw: Raw) -> None:
    raw.must("/lease/grant", {"ID": "81", "TTL": "60"})
    raw.must("/kv/txn", {"success": [put("raw/s"), put("raw/l", lease="81")]})
    raw.alarm(True)
    try:
        for path, body in [
            ("/kv/txn", {"success": [put("raw/s")]}),
            ("/kv/txn", {"success": [{"request_range": {"key": text("raw/s")}}], "failure": [put("raw/s")]}),
            ("/lease/grant", {"ID": "82", "TTL": "60"}),
        ]:
            status, code, message = observed(raw, path, body)
            assert (status, code) == (429, 8), (path, body, message)
            assert "database space exceeded" in message
        assert raw.must("/kv/txn", {"success": [{"request_range": {"key": text("raw/s")}}]})["succeeded"]
        assert raw.must("/lease/keepalive", {"ID": "81"})["result"]["TTL"] == "60"
        raw.must("/kv/txn", {"success": [{"request_delete_range": {"key": text("raw/s")}}]})
        raw.must("/lease/revoke", {"ID": "81"})
        assert raw.must("/maintenance/alarm", {"action": "GET"})["alarms"][0]["alarm"] == "NOSPACE"
    finally:
        raw.alarm(False)
    raw.must("/kv/txn", {"success": [put("raw/s")]})


def test_a_watch_from_a_compacted_revision_is_canceled_with_that_revision(
    cluster: EtcdCluster, raw: Raw
) -> None:
    first = raw.must("/kv/txn", {"success": [put("raw/w")]})["header"]["revision"]
    last = raw.must("/kv/txn", {"success": [put("raw/w")]})["header"]["revision"]
    raw.compact(int(last))
    lines = raw.stream(
        "/watch",
        {"create_request": {"key": text("raw/w"), "start_revision": first}},
        until=lambda line: "canceled" in line["result"],
    )
    assert lines[-1]["result"]["canceled"] is True
    assert lines[-1]["result"]["compact_revision"] == last


def test_users_are_told_apart_by_code(cluster: EtcdCluster, raw: Raw) -> None:
    status, code, message = observed(raw, "/auth/authenticate", {"name": "root", "password": "r"})
    assert "authentication is not enabled" in message
    for path, body in [
        ("/auth/user/add", {"name": "root", "password": "r"}),
        ("/auth/role/add", {"name": "root"}),
        ("/auth/user/grant", {"user": "root", "role": "root"}),
        ("/auth/user/add", {"name": "weak", "password": "w"}),
        ("/auth/enable", {}),
    ]:
        raw.must(path, body)
    try:
        read = {"key": text("raw/a")}
        status, code, message = observed(raw, "/kv/range", read)
        assert (status, code) == (400, 3)
        assert "user name is empty" in message
        status, code, message = observed(raw, "/auth/authenticate", {"name": "root", "password": "wrong"})
        assert (status, code) == (400, 3)
        assert "authentication failed" in message
        raw.token = "made-up"
        status, code, message = observed(raw, "/kv/range", read)
        assert (status, code) == (401, 16)
        assert "invalid auth token" in message
        raw.token = ""
        raw.token = raw.must("/auth/authenticate", {"name": "weak", "password": "w"})["token"]
        status, code, message = observed(raw, "/kv/range", read)
        assert (status, code) == (403, 7)
        assert "permission denied" in message
    finally:
        raw.token = ""
        raw.token = raw.must("/auth/authenticate", {"name": "root", "password": "r"})["token"]
        raw.must("/auth/disable", {})
        raw.token = ""
    with contextlib.closing(GatewayEtcd(cluster.endpoints)) as etcd:
        assert etcd.txn(Txn((), (Put("raw/a", b"v"),))).succeeded


@pytest.mark.parametrize("name", ["3.4", "3.5"])
def test_a_member_without_a_quorum_says_whether_anything_may_have_happened(name: str, tmp_path: Path) -> None:
    lease = {"ID": "5", "TTL": "60"}
    calls: dict[str, dict[str, Any]] = {
        "/kv/txn": {"success": [put("raw/q")]},
        "/kv/range": {"key": text("raw/q")},
        "/lease/keepalive": lease,
        "/lease/grant": {"ID": "6", "TTL": "60"},
        "/lease/revoke": lease,
    }
    with EtcdCluster(tmp_path, size=3, binary=server_binary(name), fsync=False) as three:
        with contextlib.closing(Raw(three.endpoints[0])) as raw:
            raw.must("/lease/grant", lease)
            three.kill(1)
            three.kill(2)
            eventually(
                lambda: raw.post("/kv/range", calls["/kv/range"])[0] == 503, 20, "the loss of the leader"
            )
            # Told that a leader is wanted, it answers at once that nothing has happened.
            for path, body in calls.items():
                status, answer = raw.post(path, body)
                error = classify(status, *parse_error(json.dumps(answer)))
                assert type(error) is Unavailable, (path, status, answer)
                assert "no leader" in json.dumps(answer)
        # Not told, it waits for seconds, and a write may come true when the quorum is back.
        with ThreadPoolExecutor(len(calls)) as pool:
            waiting = {path: pool.submit(patient, three.endpoints[0], path, calls[path]) for path in calls}
            errors = {path: waiting[path].result() for path in calls}
        for path in ("/kv/txn", "/lease/grant", "/lease/revoke"):
            assert type(errors[path]) is OutcomeUnknown, errors[path]
        assert type(errors["/lease/keepalive"]) is Unavailable
        assert isinstance(errors["/kv/range"], (OutcomeUnknown, Unavailable))


def patient(endpoint: str, path: str, body: dict[str, Any]) -> DtrainError:
    """What the transport would raise if it did not ask for a leader."""
    with contextlib.closing(Raw(endpoint, has_leader=False)) as raw:
        status, answer = raw.post(path, body)
    return classify(status, *parse_error(json.dumps(answer)))
