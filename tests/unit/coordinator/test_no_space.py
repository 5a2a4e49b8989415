"""A leader whose etcd has no space waits for it, says so once, and blames no job."""

from tests.unit.coordinator.test_driver import Harness

from dtrain.coordinator.core.decisions import Decision, PutRecord
from dtrain.coordinator.driver import CRASHES_MAX
from dtrain.coordinator.persistence import Committed, Committer, NotWritten
from dtrain.protocol.checkpoint import Latest
from dtrain.protocol.ids import ClusterName, JobName, Seq, Step, Term, Uid
from dtrain.protocol.job import Entry, EntryKind, JobSpec
from dtrain.protocol.keys import Keys
from dtrain.storage.etcd.memory import MemoryEtcd
from dtrain.storage.etcd.port import Put, Txn

CLUSTER = ClusterName("c1")
KEYS = Keys(CLUSTER)
JOB = JobName("job")


def put(term: Term) -> Decision:
    return Decision(writes=(PutRecord(KEYS.latest(JOB), Latest(term, Seq(1), Step(1)), 0),))


def test_a_refused_commit_tells_of_it_and_is_tried_again_when_there_is_space() -> None:
    etcd, told = MemoryEtcd(lambda: 0.0), []
    term = Term(etcd.txn(Txn(success=(Put(KEYS.leader, b"{}"),))).revision)
    committer = Committer(etcd, CLUSTER, may_act=lambda: True, on_no_space=lambda: told.append(1))
    etcd.out_of_space = True
    outcome = committer.commit(term, put(term))
    assert isinstance(outcome, NotWritten)
    assert outcome.retry
    assert told
    etcd.out_of_space = False
    assert isinstance(committer.commit(term, put(term)), Committed)


def test_an_hour_without_space_is_one_line_and_quarantines_no_job() -> None:
    harness = Harness(lambda _view, _fleet, _moment: put(harness.driver.term or Term(0)))
    term = harness.take_office()
    harness.sync()
    harness.driver.on_term(term, harness.now)
    harness.put(KEYS.spec(JOB), JobSpec(JOB, Uid("u1"), Entry(EntryKind.SCRIPT, "train.py")))
    harness.sync()
    full = NotWritten("DT-3005: etcd has no space left", retry=True)
    for _ in range(5 * CRASHES_MAX):
        assert harness.commits, "the decision is not tried again"
        harness.commits.clear()
        harness.driver.on_txn(JOB, full, harness.now)
        harness.now += 2.5
        harness.driver.on_tick(harness.now)
    events = [event for event, _ in harness.lines]
    assert events.count("commit failed") == 1
    assert "plan failed" not in events
