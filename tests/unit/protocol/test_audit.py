"""The auditor accepts a good history and names what is wrong with bad ones."""

import dataclasses

import pytest

from dtrain.protocol import codec
from dtrain.protocol.audit import PHASE_CHANGES, Auditor, Change
from dtrain.protocol.checkpoint import CommitRecord, Garbage, Latest, OpenRecord
from dtrain.protocol.ids import AgentName, Attempt, ClusterName, Incarnation, JobName, Seq, Step, Term, Uid
from dtrain.protocol.job import TERMINAL_PHASES, JobPhase, JobStatus
from dtrain.protocol.keys import Keys
from dtrain.protocol.snapshot import WorkerPhase, WorkerSnapshot

KEYS = Keys(ClusterName("c"))
JOB, UID, AGENT = JobName("j"), Uid("u1"), AgentName("a")
TERM = 10


def status(phase=JobPhase.RUNNING, attempt=1, seq_last=1, term=TERM, uid=UID):
    return JobStatus(Term(term), uid, phase, attempt=Attempt(attempt), seq_last=Seq(seq_last))


def opened(seq=1, attempt=1, step=5, nonce="n", term=TERM):
    return OpenRecord(Term(term), UID, Seq(seq), Attempt(attempt), Step(step), nonce, 2, 60.0)


def commit(seq=1, attempt=1, step=5, nonce="n", term=TERM):
    return CommitRecord(Term(term), UID, Seq(seq), Step(step), Attempt(attempt), nonce, 2, 9, "m", 9, "d")


class History:
    def __init__(self):
        self.auditor = Auditor(ClusterName("c"))
        self.revision = TERM
        self.auditor.feed(TERM, [Change(KEYS.leader, b"{}", TERM)])

    def write(self, **records):
        places = {
            "status": KEYS.status(JOB),
            "open": KEYS.open(JOB, Seq(1)),
            "checkpoint": KEYS.checkpoint(JOB, Seq(1)),
            "latest": KEYS.latest(JOB),
            "garbage": KEYS.garbage(JOB, Seq(1)),
            "worker": KEYS.worker(AGENT, JOB),
            "leader": KEYS.leader,
        }
        self.revision += 1
        self.auditor.feed(
            self.revision,
            [
                Change(places[name], None if record is None else codec.encode(record))
                for name, record in records.items()
            ],
        )
        return self

    def committed(self):
        self.write(status=status(JobPhase.QUEUED, 0, 0)).write(status=status(JobPhase.STARTING))
        self.write(status=status()).write(open=opened())
        return self.write(checkpoint=commit(), latest=Latest(Term(TERM), Seq(1), Step(5)), open=None)

    def broken(self):
        return {violation.invariant for violation in self.auditor.violations}


def test_a_commit_and_its_retirement_are_a_good_history():
    history = History().committed()
    history.write(checkpoint=None, garbage=Garbage(Term(TERM), Seq(1), "m", "d")).write(garbage=None)
    assert history.broken() == set()
    assert history.auditor.commits == 1


BAD = {
    "a record of a term that does not lead": ("I1", lambda h: h.write(status=status(term=9))),
    "a record while nobody leads": ("I1", lambda h: h.write(leader=None).write(status=status())),
    "a leader key that was overwritten": ("I2", lambda h: h.write(leader=status())),
    "a commit that disappears without a tombstone": ("I3", lambda h: h.committed().write(checkpoint=None)),
    "a commit written twice": (
        "I3",
        lambda h: h.committed().write(open=opened()).write(checkpoint=commit(), open=None),
    ),
    "latest going back": (
        "I4",
        lambda h: h.committed().write(latest=Latest(Term(TERM), Seq(0), Step(0))),
    ),
    "latest pointing at nothing": ("I4", lambda h: h.write(latest=Latest(Term(TERM), Seq(3), Step(0)))),
    "an attempt that skips a number": (
        "I5",
        lambda h: h.write(status=status(attempt=1)).write(status=status(JobPhase.STARTING, attempt=3)),
    ),
    "a commit without an intent": ("I5", lambda h: h.write(checkpoint=commit())),
    "a commit of another step than was opened": (
        "I5",
        lambda h: h.write(open=opened(step=4)).write(checkpoint=commit(step=5), open=None),
    ),
    "a commit that leaves its intent behind": (
        "I5",
        lambda h: h.write(open=opened()).write(checkpoint=commit()),
    ),
    "a zombie's commit": (
        "I5",
        lambda h: (
            h.write(status=status())
            .write(open=opened())
            .write(status=status(JobPhase.STARTING, attempt=2))
            .write(checkpoint=commit(), open=None)
        ),
    ),
    "a job that leaves a terminal phase": (
        "I9",
        lambda h: h.write(status=status(JobPhase.SUCCEEDED)).write(status=status(JobPhase.STARTING, 2)),
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_the_auditor_names(name):
    invariant, build = BAD[name]
    history = History()
    build(history)
    assert invariant in history.broken()


def test_a_snapshot_never_goes_back_to_an_older_attempt():
    snapshot = WorkerSnapshot(AGENT, UID, Incarnation("i"), Attempt(2), WorkerPhase.TRAINING)
    history = History().write(worker=snapshot).write(worker=dataclasses.replace(snapshot, attempt=Attempt(1)))
    assert history.broken() == {"I6"}


def test_every_phase_has_a_way_out_unless_it_is_terminal():
    assert set(PHASE_CHANGES) == set(JobPhase)
    assert {phase for phase, exits in PHASE_CHANGES.items() if not exits} == TERMINAL_PHASES
