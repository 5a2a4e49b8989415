"""Records of many jobs on many machines, written as their writers would, and kept changing."""

import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from dtrain.protocol import codec
from dtrain.protocol.checkpoint import CommitRecord, Latest
from dtrain.protocol.events import EventReason, EventRecord, EventType
from dtrain.protocol.ids import AgentName, Attempt, Incarnation, JobName, Rank, Seq, Step, Term, Uid
from dtrain.protocol.job import Entry, EntryKind, Intent, JobPhase, JobSpec, JobStatus, Member
from dtrain.protocol.keys import Keys
from dtrain.protocol.snapshot import NodeRecord, RankState, Timing, WorkerPhase, WorkerSnapshot
from dtrain.runtime.clock import iso
from dtrain.storage.etcd.port import Etcd, Put, Txn

RANKS = 8
EVENTS = 50
COMMITS = 3
STEPS = 100_000
PUTS_MAX = 100
REPORT_S = 2.0
"""Every agent writes a snapshot this often, as real ones do while steps go on."""


@dataclass(frozen=True, slots=True)
class Crowd:
    """``jobs`` jobs on ``agents`` machines, as many machines each."""

    keys: Keys
    jobs: int
    agents: int
    began: float

    @property
    def machines(self) -> int:
        """Of one job."""
        return self.agents // self.jobs

    def puts(self) -> Iterator[Put]:
        """Everything that is stored once."""
        for number in range(self.agents):
            agent = AgentName(f"gpu-{number:04d}")
            node = NodeRecord(
                agent, Incarnation("i"), "127.0.0.1:9", "127.0.0.1", RANKS, gpus=RANKS, version="0.1.0",
                since=iso(self.began),
            )  # fmt: skip
            yield Put(self.keys.node(agent), codec.encode(node))
            yield self.snapshot(number, 1000)
        for number in range(self.jobs):
            yield from self._job(number)

    def snapshot(self, number: int, step: int) -> Put:
        """What machine ``number`` says of its job at ``step``."""
        job, first = divmod(number, self.machines)
        agent = AgentName(f"gpu-{number:04d}")
        ranks = tuple(
            RankState(
                Rank(first * RANKS + local), 1000 + local, WorkerPhase.TRAINING, Step(step),
                metrics={"loss": 0.25, "lr": 1e-4}, sdk=True, timing=Timing(0.21, 0.01, 0.18),
                steps_total=Step(STEPS),
            )
            for local in range(RANKS)
        )  # fmt: skip
        snapshot = WorkerSnapshot(
            agent, Uid(f"u{job}"), Incarnation("i"), Attempt(1), WorkerPhase.TRAINING, ranks, restored=True
        )
        return Put(self.keys.worker(agent, JobName(f"job-{job:03d}")), codec.encode(snapshot))

    def _job(self, number: int) -> Iterator[Put]:
        name, uid, term = JobName(f"job-{number:03d}"), Uid(f"u{number}"), Term(1)
        spec = JobSpec(
            name, uid, Entry(EntryKind.SCRIPT, "train.py", ("--lr", "0.1")), self.machines, self.machines,
            RANKS, "/code", submitted_at=iso(self.began - 3600),
        )  # fmt: skip
        members = tuple(
            Member(
                AgentName(f"gpu-{number * self.machines + node:04d}"), node, Rank(node * RANKS), RANKS, "i"
            )
            for node in range(self.machines)
        )
        reason = f"training on {self.machines * RANKS} ranks"
        status = JobStatus(
            term, uid, JobPhase.RUNNING, reason, Attempt(1), members, step=Step(900), event_last=EVENTS,
            since=iso(self.began - 3000),
        )  # fmt: skip
        yield Put(self.keys.spec(name), codec.encode(spec))
        yield Put(self.keys.intent(name), codec.encode(Intent(uid)))
        yield Put(self.keys.status(name), codec.encode(status))
        for seq in range(1, EVENTS + 1):
            event = EventRecord(
                type=EventType.NORMAL, term=term, seq=seq, message=reason,
                reason=EventReason.ALL_RANKS_TRAINING, first=iso(self.began), last=iso(self.began),
            )  # fmt: skip
            yield Put(self.keys.event(name, seq), codec.encode(event))
        for seq in range(1, COMMITS + 1):
            commit = CommitRecord(
                term,
                uid,
                Seq(seq),
                Step(300 * seq),
                Attempt(1),
                "n",
                self.machines * RANKS,
                10**9,
                "m",
                10,
                "d",
            )
            yield Put(self.keys.checkpoint(name, Seq(seq)), codec.encode(commit))
        yield Put(self.keys.latest(name), codec.encode(Latest(term, Seq(COMMITS), Step(300 * COMMITS))))


def write(etcd: Etcd, puts: Iterable[Put]) -> int:
    """Write in as large transactions as etcd takes; return how many records there were."""
    count, batch = 0, []
    for put in puts:
        batch.append(put)
        if len(batch) == PUTS_MAX:
            etcd.txn(Txn(success=tuple(batch)))
            count, batch = count + len(batch), []
    if batch:
        etcd.txn(Txn(success=tuple(batch)))
    return count + len(batch)


class Bustle(threading.Thread):
    """Machines that report: each of them every REPORT_S."""

    def __init__(self, etcd: Etcd, crowd: Crowd) -> None:
        super().__init__(name="bustle", daemon=True)
        self._etcd, self._crowd = etcd, crowd
        self._over = threading.Event()
        self.rounds = 0

    def run(self) -> None:
        step = 1000
        batches = -(-self._crowd.agents // PUTS_MAX)
        while not self._over.is_set():
            step += 10
            for batch in range(batches):
                numbers = range(batch * PUTS_MAX, min((batch + 1) * PUTS_MAX, self._crowd.agents))
                write(self._etcd, (self._crowd.snapshot(number, step) for number in numbers))
                if self._over.wait(REPORT_S / batches):
                    return
            self.rounds += 1

    def close(self) -> None:
        """End it."""
        self._over.set()
        self.join(10.0)
