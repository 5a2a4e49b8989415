"""Both services behind real TLS, for tests."""

from pathlib import Path

from dtrain.agent.core.decisions import Answer
from dtrain.agent.link import AgentServer, AgentServicer
from dtrain.agent.logs import RankLogs
from dtrain.coordinator.api.checkpoints import CheckpointDesk
from dtrain.coordinator.api.cordons import Cordons
from dtrain.coordinator.api.records import Operators
from dtrain.coordinator.api.server import Server, waiting_slots
from dtrain.coordinator.api.servicers import CoordinatorServicer, Identity
from dtrain.coordinator.dispatch import Channels
from dtrain.coordinator.work import Orphans, Stores
from dtrain.protocol.commands import Command, Header, Stop
from dtrain.protocol.ids import Attempt, ClusterName, JobName, ReplicaId, Term, Uid
from dtrain.protocol.keys import Keys
from dtrain.runtime import grpc_tls
from dtrain.runtime.clock import SystemClock
from dtrain.storage.etcd.memory import MemoryEtcd
from dtrain.storage.etcd.mirror import Mirror

CLUSTER = ClusterName("c1")
KEYS = Keys(CLUSTER)
SPEC = {"v": 1, "name": "train", "entry": {"kind": "script", "target": "train.py"}}
STOP = Stop(Header(CLUSTER, Term(5), JobName("train"), Uid("u1"), Attempt(1), "id-1"), 1.0, True, "test")


class Replica:
    """A coordinator's API behind TLS, on the model of etcd."""

    def __init__(self, tls: grpc_tls.Credentials | None) -> None:
        self.etcd = MemoryEtcd(lambda: 0.0)
        self.mirror = Mirror(self.etcd, KEYS.root)
        self.channels = Channels(tls)
        self.server = Server("127.0.0.1:0", tls)
        servicer = CoordinatorServicer(
            Identity(CLUSTER, ReplicaId("r1"), "0.0.0"),
            self.mirror,
            Operators(self.etcd, CLUSTER, SystemClock()),
            self.channels,
            Stores(),
            checkpoints=CheckpointDesk(self.etcd, CLUSTER, SystemClock(), lambda _work: Orphans()),
            cordons=Cordons(self.etcd, CLUSTER, SystemClock()),
            term=lambda: None,
            waiting=waiting_slots(),
            problems=tls.problems if tls else tuple,
        )
        self.mirror.start()
        assert self.mirror.wait_for(1, 5)
        self.server.start(servicer)

    def close(self) -> None:
        self.server.stop(0)
        self.server.close()
        self.mirror.close()
        self.channels.close()


class Machine:
    """An agent's service behind TLS."""

    def __init__(self, folder: Path, tls: grpc_tls.Credentials | None) -> None:
        self.taken: list[Command] = []
        self.server = AgentServer("127.0.0.1:0", tls)
        self.address = f"127.0.0.1:{self.server.port}"
        self.server.start(AgentServicer(self._execute, RankLogs(folder), lambda *_: True, lambda: Term(5)))

    def _execute(self, command: Command) -> Answer:
        self.taken.append(command)
        return Answer(True, "")
