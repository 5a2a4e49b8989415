"""The driver with a real journal, the model of etcd, and processes that are played."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from dtrain.agent.core.decisions import JournalWrite
from dtrain.agent.core.events import (
    LauncherReported,
    RankConnected,
    RankLook,
    RankReported,
    SessionRenewed,
    SessionSeen,
    Tick,
)
from dtrain.agent.core.events import TransferReported as FromTransfer
from dtrain.agent.core.state import AgentState
from dtrain.agent.driver import AgentDriver, Ports
from dtrain.agent.journal import Journal
from dtrain.agent.launching import (
    ClearBelow,
    Cleared,
    Forked,
    ForkRanks,
    LauncherReady,
    LauncherState,
    LaunchSettings,
    ProcessId,
    RankEnded,
    ServeStore,
    StoreReady,
)
from dtrain.agent.reporter import Reporter
from dtrain.agent.transferring import TransferEnded, Upload, Uploaded
from dtrain.protocol import codec
from dtrain.protocol.errors import ErrorCode, Unavailable
from dtrain.protocol.ids import Attempt, Incarnation, JobName, Rank, Step, Term, Uid
from dtrain.protocol.keys import Keys
from dtrain.protocol.ranklink import Hello, Message, Report
from dtrain.protocol.snapshot import NodeRecord, WorkerPhase, WorkerSnapshot
from dtrain.storage.etcd.memory import MemoryEtcd
from dtrain.storage.etcd.port import Put, Txn
from dtrain.storage.etcd.session import FixedSession

from .core_builder import JOB, Table, machine, part, sealed
from .test_reporter import FakeClock

KEYS = Keys(machine().cluster)


class PlayedLaunchers:
    """Answers every order at once, through ``post``."""

    def __init__(self) -> None:
        self.post: Callable[[Any], Any] = lambda _event: None
        self.alive: dict[ProcessId, tuple[JobName, Uid]] = {}
        self.orders: list[Any] = []
        self.fail = False
        self.answers: list[Any] = []

    def start(self, job: JobName, uid: Uid, settings: LaunchSettings) -> ProcessId:
        if self.fail:
            raise Unavailable(ErrorCode.LAUNCHER_FAILED, "no more processes")
        process = ProcessId(100 + len(self.alive), 1, "boot")
        self.alive[process] = (job, uid)
        self._answer(job, uid, LauncherState(process, ready=True), LauncherReady())
        return process

    def attach(self, job: JobName, uid: Uid, folder: str, process: ProcessId) -> bool:
        return process in self.alive

    def send(self, job: JobName, uid: Uid, order: Any) -> None:
        self.orders.append(order)
        if isinstance(order, ClearBelow):
            self._answer(job, uid, Cleared(order.attempt))
        if isinstance(order, ServeStore):
            self._answer(job, uid, StoreReady(order.attempt, 29500))
        if isinstance(order, ForkRanks):
            self._answer(job, uid, Forked(order.attempt, Table().live(order.attempt)))

    def kill(self, process: ProcessId) -> None:
        self.alive.pop(process, None)

    def is_alive(self, process: ProcessId) -> bool:
        return process in self.alive

    def waits_in(self, process: ProcessId) -> str:
        return ""

    def _answer(self, job: JobName, uid: Uid, *reports: Any) -> None:
        self.answers += [LauncherReported(job, uid, report) for report in reports]


class Recorder:
    """Any port that only takes things."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.ends = 0

    def send(self, *what: Any) -> None:
        self.sent.append(what if len(what) > 1 else what[0])

    def drop(self, connection: int) -> None:
        self.sent.append(("drop", connection))

    def ended(self) -> None:
        self.ends += 1

    def prepare(
        self, job: JobName, uid: Uid, attempt: Attempt, first_rank: Rank, *, ranks: int, store: str
    ) -> None:
        self.sent.append((job, attempt, first_rank))

    def look(self, rank: Rank, process: ProcessId) -> RankLook:
        return RankLook(rank, "S")

    def collect(self, *what: Any) -> None:
        self.sent.append(what)


class FailingJournal:
    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self.broken = False

    def apply(self, writes: Sequence[JournalWrite]) -> None:
        if self.broken and writes:
            raise Unavailable(ErrorCode.AGENT_UNAVAILABLE, "disk full")
        self.journal.apply(writes)


class World:
    """One machine over several lives of its agent."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clock = FakeClock()
        self.etcd = MemoryEtcd(self.clock.monotonic)
        self.etcd.grant(3600, 11)
        self.launchers = PlayedLaunchers()
        self.table = Table()
        self.term = self.etcd.txn(Txn(success=(Put(KEYS.leader, b"{}"),))).revision
        self.asked: list[Term] = []
        self.lives = 0
        self.begin_life()

    def begin_life(self) -> None:
        self.lives += 1
        self.journal = FailingJournal(Journal.open(self.folder / "journal"))
        remembered = self.journal.journal.load()
        self.transfers, self.ranks, self.logs = Recorder(), Recorder(), Recorder()
        self.watch = Recorder()
        self.reporter = Reporter(
            self.etcd,
            KEYS,
            FixedSession(11),
            NodeRecord(machine().agent, Incarnation(""), "a:1", "a", 2),
            self.clock,
            new_incarnation=lambda: Incarnation(f"life-{self.lives}"),
            on_registered=lambda generation, mine: (
                self.driver.handle(SessionRenewed(generation, mine)) and None
            ),
            on_taken=lambda _other, _waited_s: None,
        )
        state = AgentState(machine(), Incarnation("none"), remembered.term, remembered.jobs, remembered.seen)
        ports = Ports(
            self.journal, self.launchers, self.transfers, self.ranks, self.reporter, self.logs, self.watch
        )
        self.driver = AgentDriver(state, ports, self.clock, confirm_term=self._confirm)
        self.driver.adopt()
        self.settle()

    def _confirm(self, term: Term) -> bool:
        self.asked.append(term)
        return self.etcd.range(KEYS.leader).items[0].create_revision == term

    def settle(self) -> None:
        while self.launchers.answers:
            self.driver.handle(self.launchers.answers.pop(0))
        self.reporter.work()
        self.reporter.work()

    def execute(self, command: Any, *, term: int | None = None) -> bool:
        import dataclasses

        header = dataclasses.replace(command.header, term=Term(self.term if term is None else term))
        answer = self.driver.execute(dataclasses.replace(command, header=header))
        self.settle()
        return answer.accepted

    def stored(self) -> WorkerSnapshot | None:
        items = self.etcd.range(KEYS.worker(machine().agent, JOB)).items
        return codec.decode(WorkerSnapshot, items[0].value) if items else None

    def train(self, attempt: int = 1) -> None:
        assert self.execute(self.table.prepare(attempt))
        assert self.execute(self.table.start(attempt))
        self.join(attempt)

    def join(self, attempt: int = 1, first_connection: int = 1) -> None:
        for rank in range(2):
            hello = Hello(1, JOB, Uid("u1"), Attempt(attempt), Rank(rank), rank, 200 + rank)
            self.driver.handle(RankConnected(first_connection + rank, hello))
            self.driver.handle(RankReported(first_connection + rank, Report(WorkerPhase.TRAINING, Step(5))))
        self.settle()


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_job_comes_up_and_etcd_shows_it(world: World) -> None:
    assert world.execute(world.table.prepare())
    found = world.stored()
    assert found is not None
    assert (found.phase, found.rendezvous) == (WorkerPhase.READY, "10.0.0.1:29500")
    assert world.execute(world.table.start())
    world.join()
    found = world.stored()
    assert found is not None
    assert (found.phase, found.restored, found.incarnation) == (WorkerPhase.TRAINING, True, "life-1")
    assert world.logs.sent == [(JOB, 1, 0)]


def test_a_new_term_is_confirmed_once_and_a_false_one_never_taken(world: World) -> None:
    assert world.execute(world.table.prepare())
    assert world.execute(world.table.start())
    assert world.asked == [world.term]
    assert not world.execute(world.table.stop(), term=world.term + 1000)
    assert world.driver.state.term == world.term


def test_a_restarted_agent_adopts_its_job_and_publishes_it_as_its_own(world: World) -> None:
    world.train()
    (process,) = world.launchers.alive
    world.begin_life()
    live = Table().live()
    world.driver.handle(LauncherReported(JOB, Uid("u1"), LauncherState(process, True, live)))
    world.join(first_connection=11)
    found = world.stored()
    assert found is not None
    assert (found.phase, found.incarnation, found.attempt) == (WorkerPhase.TRAINING, "life-2", 1)
    orders = len(world.launchers.orders)
    assert world.execute(world.table.start())
    assert len(world.launchers.orders) == orders
    assert world.driver.state.term == world.term


def test_a_launcher_that_died_with_the_agent_is_a_failed_attempt(world: World) -> None:
    world.train()
    world.launchers.alive.clear()
    world.begin_life()
    found = world.stored()
    assert found is not None
    assert found.phase is WorkerPhase.ERROR
    assert found.failure is not None
    assert "launcher" in found.failure.message


def test_a_launcher_that_cannot_be_started_is_reported(world: World) -> None:
    world.launchers.fail = True
    assert world.execute(world.table.prepare())
    found = world.stored()
    assert found is not None
    assert found.failure is not None
    assert "no more processes" in found.failure.message


def test_without_a_journal_no_command_is_taken(world: World) -> None:
    world.journal.broken = True
    assert not world.execute(world.table.prepare())
    assert not world.launchers.orders
    assert JOB not in world.driver.state.jobs


def test_facts_are_journaled_later_if_they_cannot_be_now(world: World) -> None:
    world.train()
    world.journal.broken = True
    world.driver.handle(LauncherReported(JOB, Uid("u1"), RankEnded(Attempt(1), Rank(0), 200, 7, 1.0)))
    assert world.driver.state.jobs[JOB].phase is WorkerPhase.ERROR
    world.journal.broken = False
    world.driver.handle(Tick())
    assert world.journal.journal.load().jobs[JOB].phase is WorkerPhase.ERROR


def test_an_upload_is_handed_to_the_next_transfer_process(world: World) -> None:
    world.train()
    assert world.execute(world.table.begin())
    world.driver.handle(RankReported(1, Report(WorkerPhase.TRAINING, Step(10), sealed=sealed())))
    world.driver.handle(FromTransfer(TransferEnded(-9)))
    assert [type(order) for order in world.transfers.sent] == [Upload, Upload]
    assert world.transfers.ends == 1
    world.driver.handle(FromTransfer(Uploaded(JOB, part(0))))
    world.settle()
    found = world.stored()
    assert found is not None
    assert found.durable == (part(0),)


def test_messages_go_to_connections(world: World) -> None:
    world.train()
    sent: list[tuple[int, Message]] = world.ranks.sent
    assert {connection for connection, _ in sent} == {1, 2}


def test_each_change_of_the_link_to_etcd_is_one_sentence_in_the_log(tmp_path: Path) -> None:
    world = World(tmp_path)
    said: list[str] = []
    world.driver._log = lambda event, **fields: (
        said.append(f"{fields['state']}: {fields['reason']}") if (event == "etcd link") else None
    )
    good, bad = SessionSeen(11, 10.0, float("inf")), SessionSeen(11, 10.0, world.clock.now + 7.0)
    for _ in range(3):
        world.driver.see_session(good)
    assert said == []
    for seconds in (6.0, 0.1, 1.5, 0.1, 30.0):
        world.clock.now += seconds
        world.driver.see_session(bad)
    world.driver.see_session(good)
    assert [line.split(":")[0] for line in said] == ["suspect", "isolated", "ok"]
    assert said[-1] == "ok: etcd answers again after 32 s"
