"""A lease's deadlines count from before the request was sent, on a clock that counts sleep."""

import time
from collections.abc import Iterator

import pytest
from tests.contract.etcd.support import eventually

from dtrain.local.etcd import EtcdCluster
from dtrain.local.proxy import TcpProxy
from dtrain.runtime.clock import SystemClock
from dtrain.storage.etcd.lease_client import Access, boottime
from dtrain.storage.etcd.lease_keeper import DEMOTE_SHARE, KILL_SHARE, LeaseKeeper
from dtrain.storage.etcd.transport import GatewayEtcd

TTL_S = 10
DELAY_S = 0.4


@pytest.fixture
def slow_link(etcd_35: EtcdCluster) -> Iterator[TcpProxy]:
    """Every request and every answer takes ``DELAY_S``."""
    with TcpProxy(etcd_35.endpoints[0]) as proxy:
        proxy.delay(DELAY_S)
        yield proxy


@pytest.fixture
def keeper(slow_link: TcpProxy) -> Iterator[LeaseKeeper]:
    made = LeaseKeeper(
        Access((slow_link.endpoint,)),
        ttl_s=TTL_S,
        renew_share=0.1,
        on_change=lambda: None,
        report=lambda *_args, **_fields: None,
    )
    made.start()
    yield made
    lease = made.drop()
    if lease:
        made.revoke(lease)
    made.stop()


def test_deadlines_count_from_before_the_grant_and_before_each_renewal_was_sent(keeper: LeaseKeeper) -> None:
    asked_at = boottime()
    keeper.acquire()
    eventually(lambda: keeper.held().lease, what="a lease")
    answered_at = boottime()
    granted = keeper.held()
    assert answered_at - asked_at >= 2 * DELAY_S
    # From when it was asked for: half a way earlier than etcd can have begun to count.
    assert granted.sent_at < asked_at + DELAY_S / 2
    assert granted.view().demote_at == pytest.approx(granted.sent_at + DEMOTE_SHARE * TTL_S)
    assert granted.kill_at == pytest.approx(granted.sent_at + KILL_SHARE * TTL_S)
    eventually(lambda: keeper.held().sent_at > granted.sent_at, what="a renewal")
    assert boottime() - keeper.held().sent_at >= 2 * DELAY_S


def test_a_lease_that_is_lost_is_nothing_to_act_on(
    keeper: LeaseKeeper, slow_link: TcpProxy, etcd_35: EtcdCluster
) -> None:
    slow_link.passing()
    keeper.acquire()
    eventually(lambda: keeper.held().lease, what="a lease")
    etcd = GatewayEtcd(etcd_35.endpoints)
    etcd.revoke(keeper.held().lease)
    etcd.close()
    eventually(lambda: keeper.held().lost, what="the loss")
    assert keeper.held().view().demote_at == 0.0


def test_deadlines_are_on_a_clock_that_counts_suspension() -> None:
    """CLOCK_MONOTONIC stands still while a machine sleeps; its lease does not."""
    for clock in (boottime, SystemClock().monotonic):
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        assert now <= clock() < now + 1.0
