"""One replica as it is wired, over the model of etcd."""

import time
from collections.abc import Iterator

import pytest

from dtrain.coordinator import config
from dtrain.coordinator.core.decisions import Directed
from dtrain.coordinator.core.manifest import merge
from dtrain.coordinator.core.plan import plan
from dtrain.coordinator.main import Coordinator
from dtrain.protocol.commands import Header, Start
from dtrain.protocol.ids import AgentName, Attempt, ClusterName, JobName, Term, Uid
from dtrain.runtime.clock import SystemClock
from dtrain.storage.etcd.memory import MemoryEtcd
from dtrain.storage.etcd.session import FixedSession

LEASE = 7


class Replica:
    """A replica that keeps what would have left it."""

    def __init__(self) -> None:
        self.etcd = MemoryEtcd(time.monotonic)
        self.etcd.grant(600, LEASE)
        self.session = FixedSession(LEASE)
        self.ended: list[int] = []
        self.sent: list[Directed] = []
        self.coordinator = Coordinator(
            config.load(["--listen", "127.0.0.1:0", "--id", "c1"], {}),
            self.etcd,
            self.session,
            clock=SystemClock(),
            decide=plan,
            merge_manifests=merge,
            end_process=self.ended.append,
        )
        self.coordinator._dispatcher.send = self.sent.append  # type: ignore[method-assign]
        self.coordinator.start()

    def leads(self) -> bool:
        end = time.monotonic() + 10.0
        while not self.coordinator.leadership.may_act() and time.monotonic() < end:
            time.sleep(0.005)
        return self.coordinator.leadership.may_act()


@pytest.fixture
def replica() -> Iterator[Replica]:
    made = Replica()
    yield made
    made.coordinator.resign()
    made.coordinator.close()


def test_no_command_leaves_a_replica_whose_deadline_has_passed(replica: Replica) -> None:
    header = Header(ClusterName("default"), Term(5), JobName("job"), Uid("u1"), Attempt(1), "start")
    directed = Directed(AgentName("a1"), "127.0.0.1:1", Start(header, "h:1", None))
    assert replica.leads()
    replica.coordinator.send(directed)
    assert replica.sent == [directed]
    replica.session.deadline = 0.0
    replica.coordinator.send(directed)
    assert replica.sent == [directed]
