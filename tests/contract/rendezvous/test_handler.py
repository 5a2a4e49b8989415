"""What torch expects of a rendezvous handler, asked of ours on a real etcd: one thread is one agent."""

import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from tests.contract.etcd.secured import Users, server_tls
from tests.contract.etcd.support import binary
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousGracefulExitError,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStateError,
    RendezvousTimeoutError,
)
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler, handler_registry

from dtrain.integrations.rendezvous.handler import EtcdRendezvousHandler, open_handler
from dtrain.integrations.rendezvous.plugin import get_handler
from dtrain.integrations.rendezvous.records import keys_of
from dtrain.local.etcd import EtcdCluster
from dtrain.storage.etcd.port import Put, Txn, prefix_end
from dtrain.storage.etcd.transport import GatewayEtcd

LIMIT_S = 30.0
QUICK = {"last_call_timeout": "0.2", "close_timeout": "5", "ttl": "2"}


class World:
    """Agents of one run, each with its own handler and thread."""

    def __init__(self, cluster: EtcdCluster) -> None:
        self.cluster = cluster
        self.run_id = f"run/{secrets.token_hex(4)}"
        self.etcd = GatewayEtcd(cluster.endpoints)
        self.keys = keys_of("/dtrain-rdzv", self.run_id)
        self.handlers: list[EtcdRendezvousHandler] = []
        self._threads = ThreadPoolExecutor(16)

    def agent(self, least: int = 1, most: int = 1, **conf: object) -> EtcdRendezvousHandler:
        made = open_handler(
            RendezvousParameters(
                "dtrain",
                ",".join(self.cluster.endpoints),
                self.run_id,
                least,
                most,
                local_addr="127.0.0.1",
                **(QUICK | conf),
            )
        )
        assert isinstance(made, EtcdRendezvousHandler)
        self.handlers.append(made)
        return made

    def join(self, handler: EtcdRendezvousHandler) -> "Future[RendezvousInfo]":
        return self._threads.submit(handler.next_rendezvous)

    def meet(self, *handlers: EtcdRendezvousHandler) -> list[RendezvousInfo]:
        return [each.result(LIMIT_S) for each in [self.join(handler) for handler in handlers]]

    def die(self, handler: EtcdRendezvousHandler) -> None:
        """What SIGKILL does: renewals end, nothing is said. The lease is ended here to save its time."""
        handler._me._stop.set()
        self.etcd.revoke(handler._me.lease)

    def left(self) -> list[str]:
        return [kv.key for kv in self.etcd.range(self.keys.prefix, prefix_end(self.keys.prefix)).items]

    def end(self) -> None:
        # Together: who holds a store waits a moment for the others.
        list(self._threads.map(lambda handler: handler.shutdown(), self.handlers))
        self._threads.shutdown(cancel_futures=True)
        self.etcd.close()


@pytest.fixture
def world(rdzv_etcd: EtcdCluster) -> Iterator[World]:
    made = World(rdzv_etcd)
    yield made
    made.end()


def await_true(holds: Callable[[], object], limit_s: float = LIMIT_S) -> None:
    end = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < end, "it does not come true"
        time.sleep(0.02)


def waits(world: World) -> Callable[[], bool]:
    return lambda: any(handler.num_nodes_waiting() for handler in world.handlers)


def test_torch_finds_it_by_its_name(world: World) -> None:
    if "dtrain" not in handler_registry._registry:
        handler_registry.register("dtrain", get_handler())
    made = get_rendezvous_handler(
        RendezvousParameters("dtrain", world.cluster.endpoints[0], world.run_id, 1, 1, "127.0.0.1")
    )
    assert made.get_backend() == "dtrain"
    assert made.get_run_id() == world.run_id
    assert made.shutdown()


def test_all_get_a_rank_one_size_and_one_store(world: World) -> None:
    infos = world.meet(*[world.agent(3, 3) for _ in range(3)])
    assert sorted(info.rank for info in infos) == [0, 1, 2]
    assert {info.world_size for info in infos} == {3}
    infos[0].store.set("key", "value")
    assert [info.store.get("key") for info in infos] == [b"value"] * 3
    shared = {
        (info.bootstrap_store_info.master_addr, info.bootstrap_store_info.master_port) for info in infos
    }
    assert len(shared) == 1
    assert all(handler.use_agent_store for handler in world.handlers)


def test_workers_get_a_store_of_their_own_if_asked(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    handlers = [world.agent(2, 2) for _ in range(2)]
    infos = world.meet(*handlers)
    assert not handlers[0].use_agent_store
    ports = {info.bootstrap_store_info.master_port for info in infos}
    server = next(handler._server for handler in handlers if handler._server)
    assert len(ports) == 1
    assert server[1].port not in ports


def test_each_round_has_a_store_without_a_past(world: World) -> None:
    handlers = [world.agent(2, 2) for _ in range(2)]
    before = world.meet(*handlers)
    before[0].store.set("stale", "1")
    after = world.meet(*handlers)
    assert not after[0].store.check(["stale"])
    assert [info.rank for info in after] == [info.rank for info in before], "ranks stay"
    assert before[0].bootstrap_store_info.master_port != after[0].bootstrap_store_info.master_port


def test_the_last_call_gathers_more_than_the_minimum(world: World) -> None:
    handlers = [world.agent(1, 3, last_call_timeout="2") for _ in range(2)]
    assert [info.world_size for info in world.meet(*handlers)] == [2, 2]


def test_too_few_time_out_and_leave_nothing_that_counts(world: World) -> None:
    lonely = world.agent(2, 2, join_timeout="0.5")
    with pytest.raises(RendezvousTimeoutError, match="1 of 2 nodes"):
        lonely.next_rendezvous()
    assert world.handlers[0]._board.look().state.participants == ()
    assert lonely.shutdown()
    assert [info.world_size for info in world.meet(world.agent(2, 2), world.agent(2, 2))] == [2, 2], (
        "who never got in closes nothing"
    )


def test_a_latecomer_is_counted_and_gets_into_the_next_round(world: World) -> None:
    first, late = world.agent(1, 2), world.agent(1, 2)
    world.meet(first)
    assert first.num_nodes_waiting() == 0
    joining = world.join(late)
    await_true(lambda: first.num_nodes_waiting() == 1)
    assert [info.world_size for info in world.meet(first)] == [2]
    assert joining.result(LIMIT_S).rank == 1
    assert first.num_nodes_waiting() == 0


def test_a_latecomer_that_gives_up_is_not_counted_any_more(world: World) -> None:
    first, late = world.agent(1, 2), world.agent(1, 2, join_timeout="1")
    world.meet(first)
    joining = world.join(late)
    await_true(lambda: first.num_nodes_waiting() == 1)
    with pytest.raises(RendezvousTimeoutError):
        joining.result(LIMIT_S)
    await_true(lambda: first.num_nodes_waiting() == 0)
    late.shutdown()
    assert not first.is_closed()


def test_one_too_many_stands_by_beyond_any_timeout_and_exits_gracefully(world: World) -> None:
    first, spare = world.agent(1, 1), world.agent(1, 1, join_timeout="0.3")
    world.meet(first)
    standing = world.join(spare)
    await_true(lambda: first._board.look().state.standby)
    time.sleep(0.6)
    assert not standing.done()
    assert first.num_nodes_waiting() == 0
    assert first.shutdown()
    with pytest.raises(RendezvousGracefulExitError, match="not needed"):
        standing.result(LIMIT_S)


def test_a_spare_takes_the_place_of_a_dead_node(world: World) -> None:
    first, second, spare = (world.agent(2, 2) for _ in range(3))
    world.meet(first, second)
    joining = world.join(spare)
    await_true(lambda: first._board.look().state.standby)
    world.die(second)
    await_true(lambda: first.num_nodes_waiting() > 0)
    assert [info.world_size for info in world.meet(first)] == [2]
    assert joining.result(LIMIT_S).world_size == 2


def test_a_dead_node_is_missed_by_the_end_of_its_lease(world: World) -> None:
    first, second = world.agent(1, 2), world.agent(1, 2)
    world.meet(first, second)
    second._me._stop.set()
    began = time.monotonic()
    await_true(lambda: first.num_nodes_waiting() > 0)
    assert time.monotonic() - began < 2 + 5, "ttl is 2 s; etcd looks for ended leases every half second"
    assert [info.world_size for info in world.meet(first)] == [1]


def test_rank_0_may_die_and_another_one_gets_the_store(world: World) -> None:
    handlers = [world.agent(2, 3) for _ in range(3)]
    infos = world.meet(*handlers)
    [dead] = [handler for handler, info in zip(handlers, infos, strict=True) if info.rank == 0]
    rest = [handler for handler in handlers if handler is not dead]
    world.die(dead)
    dead._server = None
    await_true(lambda: all(handler.num_nodes_waiting() > 0 for handler in rest))
    after = world.meet(*rest)
    assert sorted(info.rank for info in after) == [0, 1]
    after[0].store.set("key", "value")
    assert after[1].store.get("key") == b"value"
    assert len({info.bootstrap_store_info.master_port for info in after}) == 1


def test_who_lost_its_lease_restarts_and_joins_under_a_new_name(world: World) -> None:
    first, second = world.agent(2, 2), world.agent(2, 2)
    world.meet(first, second)
    name = second._me.node
    world.etcd.revoke(second._me.lease)
    await_true(lambda: first.num_nodes_waiting() > 0 and second.num_nodes_waiting() > 0)
    assert [info.world_size for info in world.meet(first, second)] == [2, 2]
    assert second._me.node != name


def test_a_state_that_is_gone_begins_anew(world: World) -> None:
    first, second = world.agent(2, 2), world.agent(2, 2)
    world.meet(first, second)
    world.etcd.revoke(first._board.look().state_lease)
    await_true(lambda: first.num_nodes_waiting() > 0 and second.num_nodes_waiting() > 0)
    assert [info.world_size for info in world.meet(first, second)] == [2, 2]


def test_a_closed_run_takes_nobody(world: World) -> None:
    first, late = world.agent(1, 2), world.agent(1, 2)
    world.meet(first)
    assert not late.is_closed()
    first.set_closed()
    await_true(late.is_closed)
    with pytest.raises(RendezvousClosedError, match="takes no more agents"):
        late.next_rendezvous()
    first.set_closed()
    assert first.num_nodes_waiting() == 0


def test_a_run_can_be_closed_before_anybody_joined(world: World) -> None:
    one = world.agent()
    one.set_closed()
    with pytest.raises(RendezvousClosedError):
        world.agent().next_rendezvous()


def test_shutdown_closes_and_may_be_called_twice(world: World) -> None:
    first, second = world.agent(2, 2), world.agent(2, 2)
    world.meet(first, second)
    assert first.shutdown()
    assert first.shutdown()
    await_true(second.is_closed)


def test_nothing_is_left_after_the_last_lease(world: World) -> None:
    handlers = [world.agent(2, 2) for _ in range(2)]
    world.meet(*handlers)
    assert len(world.left()) == 3
    with ThreadPoolExecutor() as threads:
        list(threads.map(lambda handler: handler.shutdown(), handlers))
    assert [key for key in world.left() if key.startswith(world.keys.nodes)] == []
    await_true(lambda: not world.left(), 15)
    assert world.meet(world.agent())[0].world_size == 1, "the id is free again"


def test_a_damaged_state_is_an_error_of_its_own(world: World) -> None:
    one = world.agent()
    world.etcd.txn(Txn((), (Put(world.keys.state, b"\x80\x04N."),)))
    await_true(lambda: one._board._mirror.get(world.keys.state))
    with pytest.raises(RendezvousStateError, match="damaged"):
        one.next_rendezvous()


def test_of_two_who_saw_the_same_one_writes(world: World) -> None:
    first, second = world.agent(2, 2), world.agent(2, 2)
    seen = [first._board.look(), second._board.look()]
    assert first._board.replace(seen[0], replace(seen[0].state, round=7))
    assert not second._board.replace(seen[1], replace(seen[1].state, round=8))
    assert second._board.look().state.round == 7


def test_who_was_taken_for_dead_writes_nothing(world: World) -> None:
    one = world.agent()
    world.meet(one)
    view, node, lease = one._board.look(), one._me.node, one._me.lease
    world.etcd.revoke(lease)
    assert not one._board.replace(view, replace(view.state, round=7), node, lease)


def test_many_at_once_agree(world: World) -> None:
    infos = world.meet(*[world.agent(8, 8) for _ in range(8)])
    assert sorted(info.rank for info in infos) == list(range(8))


def test_etcd_that_does_not_answer_is_told_within_the_time_allowed() -> None:
    began = time.monotonic()
    with pytest.raises(RendezvousConnectionError, match=r"DT-3001.*127\.0\.0\.1:1"):
        open_handler(RendezvousParameters("dtrain", "127.0.0.1:1", "x", 1, 1, connect_timeout="1"))
    assert time.monotonic() - began < 5


def test_a_wrong_setting_is_told_before_etcd_is_asked() -> None:
    with pytest.raises(ValueError, match="did you mean ttl"):
        open_handler(RendezvousParameters("dtrain", "127.0.0.1:1", "x", 1, 1, tttl="3"))


def test_etcd_may_be_away_while_workers_run(rdzv_etcd: EtcdCluster, world: World) -> None:
    handlers = [world.agent(2, 2) for _ in range(2)]
    world.meet(*handlers)
    for member in rdzv_etcd.members:
        os.kill(member.process.pid, 19)  # type: ignore[union-attr]
    try:
        end = time.monotonic() + 4
        while time.monotonic() < end:
            assert [handler.num_nodes_waiting() for handler in handlers] == [0, 0]
            time.sleep(0.1)
    finally:
        for member in rdzv_etcd.members:
            os.kill(member.process.pid, 18)  # type: ignore[union-attr]
    assert [info.world_size for info in world.meet(*handlers)] == [2, 2]


def test_an_agent_waits_for_etcd_to_come_back_while_it_joins(rdzv_etcd: EtcdCluster, world: World) -> None:
    first, second = world.agent(2, 2), world.agent(2, 2)
    joining = world.join(first)
    await_true(lambda: first._board.look().state.participants)
    for member in rdzv_etcd.members:
        os.kill(member.process.pid, 19)  # type: ignore[union-attr]
    threading.Timer(
        2.0,
        lambda: [os.kill(member.process.pid, 18) for member in rdzv_etcd.members],  # type: ignore[union-attr]
    ).start()
    assert world.meet(second)[0].world_size == 2
    assert joining.result(LIMIT_S).world_size == 2


def test_a_user_of_one_prefix_meets_over_tls(tmp_path: Path) -> None:
    tls = server_tls(tmp_path / "pki")
    with EtcdCluster(tmp_path / "etcd", binary=binary("3.5"), fsync=False, tls=tls) as cluster:
        users = Users(cluster, tmp_path / "passwords", tls.client)
        users.as_root("user", "add", "rdzv:secret", "--interactive=false")
        users.as_root("role", "add", "rdzv")
        users.as_root("role", "grant-permission", "rdzv", "--prefix=true", "readwrite", "/dtrain-rdzv/")
        users.as_root("user", "grant-role", "rdzv", "rdzv")
        (tmp_path / "password").write_text("secret\n")
        (tmp_path / "wrong").write_text("guess\n")
        conf = {"cacert": tls.client.ca, "cert": tls.client.cert, "key": tls.client.key, "user": "rdzv"}
        world = World(cluster)
        try:
            with pytest.raises(RendezvousConnectionError, match="DT-3006"):
                world.agent(**conf, password_file=str(tmp_path / "wrong"))
            agents = [world.agent(2, 2, **conf, password_file=str(tmp_path / "password")) for _ in range(2)]
            assert [info.world_size for info in world.meet(*agents)] == [2, 2]
            assert agents[0].num_nodes_waiting() == 0
        finally:
            world.end()
