"""Users and roles on real servers: an agent may do what it must, and nothing else."""

import contextlib
import http.client
import json
import secrets
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from tests.contract.etcd.secured import KEYS, Users
from tests.contract.etcd.support import binary, collect, eventually

from dtrain.local.etcd import EtcdCluster
from dtrain.protocol.errors import DtrainError, ErrorCode, Refused
from dtrain.protocol.ids import AgentName, JobName
from dtrain.storage.etcd import transport
from dtrain.storage.etcd.access import Access
from dtrain.storage.etcd.lease_client import AccessDenied, LeaseClient, new_lease_id
from dtrain.storage.etcd.mirror import Mirror
from dtrain.storage.etcd.port import Compare, Delete, Get, Put, Target, Txn, WatchStream, prefix_end
from dtrain.storage.etcd.transport import GatewayEtcd
from dtrain.storage.etcd.versions import version_warnings

CHEAP_LOGINS = ("--bcrypt-cost=4",)

A1, A2, JOB = AgentName("a1"), AgentName("a2"), JobName("train")
OWN_NODE, OTHER_NODE = KEYS.node(A1), KEYS.node(A2)
OTHER_SNAPSHOT = KEYS.worker(A2, JOB)


@pytest.fixture(scope="module", params=["3.4", "3.5"])
def users(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Users]:
    folder = tmp_path_factory.mktemp("users")
    cluster = EtcdCluster(folder / "etcd", binary=binary(request.param), fsync=False)
    cluster.flags = CHEAP_LOGINS
    with cluster:
        yield Users(cluster, folder / "passwords")


@pytest.fixture(scope="module")
def leader(users: Users) -> Iterator[GatewayEtcd]:
    with contextlib.closing(users.client("coordinator")) as client:
        for key in (KEYS.leader, OTHER_NODE, OTHER_SNAPSHOT, KEYS.spec(JOB), f"{KEYS.root}coordinators/c1"):
            client.txn(Txn((), (Put(key, b"theirs"),)))
        yield client


@pytest.fixture(scope="module")
def agent(users: Users) -> Iterator[GatewayEtcd]:
    with contextlib.closing(users.client("agent-a1")) as client:
        yield client


def write(*operations: Put | Delete | Get) -> Callable[[GatewayEtcd], object]:
    return lambda etcd: etcd.txn(Txn((), operations))


def watch(key: str, end: str | None) -> Callable[[GatewayEtcd], object]:
    return lambda etcd: collect(etcd.watch(key, end, 1), 1, 3.0)


FORBIDDEN: dict[str, Callable[[GatewayEtcd], object]] = {
    "another agent's node": write(Put(OTHER_NODE, b"mine")),
    "another agent's snapshot": write(Put(OTHER_SNAPSHOT, b"mine")),
    "another agent's node, deleted": write(Delete(OTHER_NODE)),
    "an agent that does not exist": write(Put(KEYS.node(AgentName("a10")), b"mine")),
    "an agent whose name begins with its own": write(Put(f"{KEYS.root}agents/a1x/node", b"mine")),
    "the leader key": write(Put(KEYS.leader, b"me")),
    "the leader key, deleted": write(Delete(KEYS.leader)),
    "a coordinator": write(Put(f"{KEYS.root}coordinators/c1", b"me")),
    "a job's spec": write(Put(KEYS.spec(JOB), b"mine")),
    "a job's status": write(Put(KEYS.status(JOB), b"mine")),
    "a commit record": write(Put(f"{KEYS.root}jobs/train/checkpoints/000000000001", b"mine")),
    "latest": write(Put(f"{KEYS.root}jobs/train/latest", b"mine")),
    "a cordon": write(Put(KEYS.cordon(A1), b"mine")),
    "a key of nobody's": write(Put("/elsewhere", b"mine")),
    "all agents, deleted": write(Delete(KEYS.agents, prefix_end(KEYS.agents))),
    "its own range and one key more": write(
        Delete(f"{KEYS.root}agents/a1/", prefix_end(f"{KEYS.root}agents/a1/") + "\0")
    ),
    "everything, deleted": write(Delete("\0", "\0")),
    "its own key beside another's": write(Put(OWN_NODE, b"mine"), Put(OTHER_NODE, b"mine")),
    "a deletion behind a read": write(Get(OWN_NODE), Delete(OTHER_NODE)),
    "another's key in the branch not taken": lambda etcd: etcd.txn(
        Txn((Compare(OWN_NODE, Target.VERSION, 77),), (Put(OTHER_NODE, b"mine"),), (Get(OWN_NODE),))
    ),
    "a compare of a key that it may not read": lambda etcd: etcd.txn(
        Txn((Compare(KEYS.spec(JOB), Target.VERSION, 1),), (Put(OWN_NODE, b"x"),))
    ),
    "reading a job": lambda etcd: etcd.range(KEYS.spec(JOB)),
    "reading all jobs": lambda etcd: etcd.range(KEYS.jobs, prefix_end(KEYS.jobs)),
    "reading another agent": lambda etcd: etcd.range(OTHER_NODE),
    "reading all agents": lambda etcd: etcd.range(KEYS.agents, prefix_end(KEYS.agents)),
    "watching jobs": watch(KEYS.jobs, prefix_end(KEYS.jobs)),
    "watching everything": watch(KEYS.root, prefix_end(KEYS.root)),
    "watching other agents": watch(KEYS.agents, prefix_end(KEYS.agents)),
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_an_agent_may_not_touch(what: str, agent: GatewayEtcd, leader: GatewayEtcd) -> None:
    before = theirs(leader)
    with pytest.raises(Refused) as caught:
        FORBIDDEN[what](agent)
    assert caught.value.code is ErrorCode.ETCD_AUTH
    assert "permission denied" in caught.value.message
    assert theirs(leader) == before


def theirs(leader: GatewayEtcd) -> list[tuple[str, int]]:
    found = leader.range(KEYS.root, prefix_end(KEYS.root)).items
    return [(kv.key, kv.mod_revision) for kv in found if not kv.key.startswith(f"{KEYS.root}agents/a1/")]


@pytest.mark.usefixtures("leader")
def test_an_agent_may_do_what_it_must(agent: GatewayEtcd) -> None:
    lease = new_lease_id()
    agent.grant(30, lease)
    registered = agent.txn(
        Txn((Compare(OWN_NODE, Target.CREATE, 0),), (Put(OWN_NODE, b"me", lease),), (Get(OWN_NODE),))
    )
    assert registered.succeeded
    snapshot = KEYS.worker(A1, JOB)
    fence = Compare(OWN_NODE, Target.MOD, registered.revision)
    newest = Compare(snapshot, Target.MOD, 0)
    reread = (Get(OWN_NODE), Get(snapshot))
    assert agent.txn(Txn((fence, newest), (Put(snapshot, b"ok", lease),), reread)).succeeded
    own = KEYS.workers_of(A1)
    assert [kv.key for kv in agent.range(own, prefix_end(own)).items] == [snapshot]
    assert agent.range(KEYS.leader).items
    coordinators = f"{KEYS.root}coordinators/"
    assert agent.range(coordinators, prefix_end(coordinators)).items
    assert agent.keepalive(lease) == 30.0
    assert agent.txn(Txn((fence,), (Delete(snapshot),), reread)).succeeded
    assert agent.status().version
    agent.revoke(lease)
    assert not agent.range(OWN_NODE).items


def test_the_lease_of_a_coordinator_is_not_an_agent_s_to_end(agent: GatewayEtcd, leader: GatewayEtcd) -> None:
    lease, key = new_lease_id(), f"{KEYS.root}coordinators/c9"
    leader.grant(30, lease)
    leader.txn(Txn((), (Put(key, b"me", lease),)))
    with pytest.raises(Refused):
        agent.revoke(lease)
    assert leader.range(key).items
    leader.revoke(lease)


def test_a_nested_transaction_is_no_way_round_the_role(users: Users, leader: GatewayEtcd) -> None:
    """Needs raw JSON: the port cannot even say it. Servers that let it through are warned of."""
    put = {"request_put": {"key": encoded(KEYS.leader), "value": encoded("me")}}
    status, answer = raw(users, "agent-a1", "/v3/kv/txn", {"success": [{"request_txn": {"success": [put]}}]})
    untouched = leader.range(KEYS.leader).items[0].value == b"theirs"
    leader.txn(Txn((), (Put(KEYS.leader, b"theirs"),)))
    refused = status == 403 and "permission denied" in json.dumps(answer)
    assert refused == untouched
    version = ".".join(str(part) for part in users.cluster.binary.version)
    assert refused or any("CVE-2026-33343" in text for text in version_warnings(version, auth=True))


def test_an_agent_may_not_administer(users: Users) -> None:
    for path, body in (
        ("/v3/auth/user/add", {"name": "intruder", "password": "x"}),
        ("/v3/auth/role/grant", {"name": "agent-a1", "perm": {"permType": "WRITE", "key": encoded("/")}}),
        ("/v3/auth/user/grant", {"user": "agent-a1", "role": "coordinator"}),
        ("/v3/auth/user/changepw", {"name": "coordinator", "password": "x"}),
        ("/v3/auth/disable", {}),
    ):
        status, answer = raw(users, "agent-a1", path, body)
        assert status == 403, (path, answer)
    for role in ("coordinator", "ops", "reader"):
        status, answer = raw(users, role, "/v3/auth/disable", {})
        assert status == 403, (role, answer)


@pytest.mark.usefixtures("leader")
def test_a_reader_reads_with_stock_etcdctl_and_changes_nothing(users: Users) -> None:
    listed = users.etcdctl("reader", "get", "--prefix", "--keys-only", KEYS.root)
    assert listed.returncode == 0
    assert {KEYS.leader, OTHER_NODE, KEYS.spec(JOB)} <= set(listed.stdout.split())
    for refused in (("put", KEYS.leader, "x"), ("del", "--prefix", KEYS.root), ("get", "--prefix", "/")):
        done = users.etcdctl("reader", *refused)
        assert done.returncode != 0
        assert "permission denied" in done.stderr


@pytest.mark.usefixtures("leader")
def test_a_reader_watches_and_nobody_without_a_user_does_anything(users: Users) -> None:
    with contextlib.closing(users.client("reader")) as reader:
        assert collect(reader.watch(KEYS.root, prefix_end(KEYS.root), 1), 3)
        with pytest.raises(Refused):
            reader.txn(Txn((), (Put(KEYS.leader, b"x"),)))
    with contextlib.closing(GatewayEtcd(users.cluster.endpoints)) as stranger:
        for call in (
            write(Put(OWN_NODE, b"x")),
            lambda etcd: etcd.range(KEYS.leader),
            watch(KEYS.leader, None),
        ):
            with pytest.raises(Refused) as caught:
                call(stranger)
            assert caught.value.code is ErrorCode.ETCD_AUTH


def test_agents_are_added_and_dropped_later(users: Users) -> None:
    assert "agent a3" in users.setup("agent", "a3")
    with contextlib.closing(users.client("agent-a3")) as third:
        assert third.txn(Txn((), (Put(KEYS.node(AgentName("a3")), b"x"),))).succeeded
        with pytest.raises(Refused):
            third.txn(Txn((), (Put(OTHER_NODE, b"x"),)))
        users.setup("drop", "a3")
        with pytest.raises(Refused) as caught:
            third.txn(Txn((), (Put(KEYS.node(AgentName("a3")), b"x"),)))
        assert caught.value.code is ErrorCode.ETCD_AUTH


# What changes while clients run ------------------------------------------------------------


def test_a_rotated_password_is_taken_from_the_file(users: Users) -> None:
    client = users.client("agent-a2")

    def guardian_s() -> LeaseClient:
        file = users.password_file("agent-a2")
        return LeaseClient(Access(tuple(users.cluster.endpoints), user="agent-a2", password_file=file))

    keeper = guardian_s()
    with contextlib.closing(client), contextlib.closing(keeper):
        lease = new_lease_id()
        assert client.txn(Txn((), (Put(OTHER_NODE, b"1"),))).succeeded
        assert keeper.grant(lease, 30, 3.0) == 30.0
        # First the file, then etcd: nobody notices.
        users.folder.joinpath("agent-a2").write_text(secrets.token_hex(16) + "\n")
        time.sleep(1.1)
        users.setup("passwd", "agent-a2")
        assert client.txn(Txn((), (Put(OTHER_NODE, b"2"),))).succeeded
        assert keeper.keepalive(lease, 3.0) == 30.0
        assert not client.problems()
        # First etcd, then the file: refused in between, and right again by itself.
        former = users.password("agent-a2")
        users.folder.joinpath("agent-a2").write_text(secrets.token_hex(16))
        fresh = users.password("agent-a2")
        users.setup("passwd", "agent-a2")
        users.folder.joinpath("agent-a2").write_text(former)
        with pytest.raises(Refused) as caught:
            write_until_refused(client)
        assert caught.value.code is ErrorCode.ETCD_AUTH
        assert "refuses the login of agent-a2" in caught.value.message
        with contextlib.closing(guardian_s()) as another, pytest.raises(AccessDenied):
            another.keepalive(lease, 3.0)
        assert any("refuses the login" in problem for problem in client.problems())
        users.folder.joinpath("agent-a2").write_text(fresh)
        eventually(lambda: works(lambda: client.txn(Txn((), (Put(OTHER_NODE, b"3"),)))), 5)
        with contextlib.closing(guardian_s()) as another:
            eventually(lambda: works_keeper(another, lease), 5)
        assert not client.problems()
        keeper.revoke(lease, 3.0)


def write_until_refused(client: GatewayEtcd) -> None:
    end = time.monotonic() + 5
    while time.monotonic() < end:
        client.txn(Txn((), (Put(OTHER_NODE, b"x"),)))


def works(call: Callable[[], object]) -> bool:
    try:
        call()
    except DtrainError:
        return False
    return True


def works_keeper(keeper: LeaseClient, lease: int) -> bool:
    try:
        return keeper.keepalive(lease, 1.0) == 30.0
    except AccessDenied:
        return False


def test_refused_logins_are_few(users: Users) -> None:
    """Each costs etcd a tenth of a second of CPU: a wrong password must not become a storm."""
    client = GatewayEtcd(users.cluster.endpoints, user="agent-a1", password="wrong-secret")
    logins = 0
    post = client._post

    def counted(endpoint: Any, path: str, *rest: Any) -> Any:
        nonlocal logins
        logins += path.startswith("/auth")
        return post(endpoint, path, *rest)

    client._post = counted  # type: ignore[method-assign]
    with contextlib.closing(client):
        for _ in range(50):
            with pytest.raises(Refused) as caught:
                client.range(KEYS.leader)
            assert "wrong-secret" not in str(caught.value) + repr(caught.value.__cause__)
    assert 1 <= logins <= 2


def test_a_revoked_role_denies_and_a_granted_one_allows_again(users: Users) -> None:
    with contextlib.closing(users.client("agent-a2")) as client:
        assert client.txn(Txn((), (Put(OTHER_NODE, b"1"),))).succeeded
        users.as_root("user", "revoke-role", "agent-a2", "agent-a2")
        for _ in range(3):
            with pytest.raises(Refused) as caught:
                client.txn(Txn((), (Put(OTHER_NODE, b"2"),)))
            assert caught.value.code is ErrorCode.ETCD_AUTH
        users.as_root("user", "grant-role", "agent-a2", "agent-a2")
        assert client.txn(Txn((), (Put(OTHER_NODE, b"3"),))).succeeded


def test_an_open_watch_ends_after_a_while_and_its_permission_is_checked_anew(
    users: Users, leader: GatewayEtcd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "RECHECK_S_MIN", 1.0)
    monkeypatch.setattr(transport, "RECHECK_S_MAX", 2.0)
    prefix = f"{KEYS.root}agents/a2/"
    with contextlib.closing(users.client("agent-a2")) as client:
        stream = client.watch(prefix, prefix_end(prefix), client.status().revision + 1)
        users.as_root("user", "revoke-role", "agent-a2", "agent-a2")
        leader.txn(Txn((), (Put(OTHER_NODE, b"secret"),)))
        # etcd itself goes on telling what the user may no longer read.
        assert collect(stream, 1)
        with pytest.raises(DtrainError, match="permission is to be checked again"):
            read_to_the_end(stream)
        with pytest.raises(Refused):
            collect(client.watch(prefix, prefix_end(prefix), 1), 1)
        users.as_root("user", "grant-role", "agent-a2", "agent-a2")
        assert collect(client.watch(prefix, prefix_end(prefix), 1), 1)


def test_a_mirror_loses_its_permission_says_so_once_and_goes_on_when_it_has_it_again(
    users: Users, leader: GatewayEtcd, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(transport, "RECHECK_S_MIN", 0.5)
    monkeypatch.setattr(transport, "RECHECK_S_MAX", 1.0)
    client = users.client("reader")
    failures: list[Exception] = []
    mirror = Mirror(client, KEYS.root, on_changes=lambda *_: None, on_failure=failures.append)
    mirror.start()
    try:
        eventually(lambda: mirror.get(KEYS.leader) is not None, 10)
        users.as_root("user", "revoke-role", "reader", "reader")
        said = ""

        def refused() -> bool:
            nonlocal said
            said += capsys.readouterr().out
            return "etcd refuses the mirror" in said

        eventually(refused, 15)
        revision = leader.txn(Txn((), (Put(KEYS.spec(JOB), b"newer"),))).revision
        time.sleep(3.0)
        users.as_root("user", "grant-role", "reader", "reader")
        eventually(lambda: mirror.revision >= revision, 15)
        found = mirror.get(KEYS.spec(JOB))
        assert found is not None
        assert found.value == b"newer"
        said += capsys.readouterr().out
        assert said.count("etcd refuses the mirror") == 1
        assert not failures
    finally:
        mirror.close()
        client.close()


def test_a_watch_without_users_is_not_cut(etcd_35: EtcdCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "RECHECK_S_MIN", 0.1)
    monkeypatch.setattr(transport, "RECHECK_S_MAX", 0.2)
    with contextlib.closing(GatewayEtcd(etcd_35.endpoints)) as client:
        stream = client.watch("/calm/", prefix_end("/calm/"), client.status().revision + 1)
        stream.next(0.7)
        client.txn(Txn((), (Put("/calm/k", b"x"),)))
        assert collect(stream, 1)


# Three members: a token is known to the one that gave it ------------------------------------


@pytest.fixture(scope="module", params=["3.4", "3.5"])
def three(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Users]:
    folder = tmp_path_factory.mktemp("three")
    cluster = EtcdCluster(folder / "etcd", size=3, binary=binary(request.param), fsync=False, progress_s=1)
    cluster.flags = CHEAP_LOGINS
    with cluster:
        yield Users(cluster, folder / "passwords")


def test_the_next_member_does_not_know_the_token_and_one_login_is_enough(three: Users) -> None:
    endpoints = three.cluster.endpoints
    client = three.client("agent-a1", endpoints)
    keeper = LeaseClient(
        Access(tuple(endpoints), user="agent-a1", password_file=three.password_file("agent-a1"))
    )
    lease, prefix = new_lease_id(), f"{KEYS.root}agents/a1/"
    with contextlib.closing(client), contextlib.closing(keeper):
        keeper.grant(lease, 30, 3.0)
        for round_ in range(4):
            victim = used_member(client, three)
            revision = client.txn(Txn((), (Put(OWN_NODE, b"%d" % round_, lease),))).revision
            stream = client.watch(prefix, prefix_end(prefix), revision)
            assert collect(stream, 1)
            three.cluster.kill(victim)
            # Unknown to the next member, and after the restart to this one as well.
            eventually(lambda: works(lambda: client.range(OWN_NODE, deadline_s=2.0)), 15)
            with pytest.raises(DtrainError):
                read_to_the_end(stream)
            stream = eventually_watch(client, prefix, revision)
            assert collect(stream, 1)
            stream.close()
            eventually(lambda: renewed(keeper, lease), 15)
            three.cluster.start_member(victim)
            three.cluster.wait_ready()


def read_to_the_end(stream: WatchStream) -> None:
    end = time.monotonic() + 10
    while time.monotonic() < end:
        stream.next(0.2)


def used_member(client: GatewayEtcd, users: Users) -> int:
    client.range(OWN_NODE)
    first = str(client._endpoints.in_order()[0])
    return [member.endpoint for member in users.cluster.members].index(first)


def eventually_watch(client: GatewayEtcd, prefix: str, revision: int) -> Any:
    found: list[Any] = []

    def opened() -> bool:
        with contextlib.suppress(DtrainError):
            found.append(client.watch(prefix, prefix_end(prefix), revision))
        return bool(found)

    eventually(opened, 15)
    return found[0]


def renewed(keeper: LeaseClient, lease: int) -> bool:
    try:
        return keeper.keepalive(lease, 1.5) == 30.0
    except Exception:  # noqa: BLE001 - whatever it is, the next member is next
        keeper.rotate()
        return False


def test_threads_of_one_process_share_one_login(three: Users) -> None:
    client = three.client("agent-a1", three.cluster.endpoints[:1])
    logins = 0
    post = client._post

    def counted(endpoint: Any, path: str, *rest: Any) -> Any:
        nonlocal logins
        logins += path.startswith("/auth")
        return post(endpoint, path, *rest)

    client._post = counted  # type: ignore[method-assign]
    failures: list[DtrainError] = []

    def call() -> None:
        try:
            client.range(OWN_NODE, deadline_s=10.0)
        except DtrainError as error:
            failures.append(error)

    with contextlib.closing(client):
        threads = [threading.Thread(target=call) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures
    assert logins == 1


def encoded(text: str) -> str:
    return b64encode(text.encode()).decode()


def raw(users: Users, user: str, path: str, body: dict[str, Any]) -> tuple[int, Any]:
    """What a program of an intruder's own would send."""
    url = urlsplit(users.cluster.endpoints[0])
    connection = http.client.HTTPConnection(url.hostname or "", url.port or 0, timeout=10)
    login = {"name": user, "password": users.password(user)}
    with contextlib.closing(connection):
        connection.request("POST", "/v3/auth/authenticate", json.dumps(login))
        token = json.loads(connection.getresponse().read())["token"]
        connection.request("POST", path, json.dumps(body), {"Authorization": token})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
