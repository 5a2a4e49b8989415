"""A leader that does nothing but write, in the product's own parts: guardian, session, election, committer.

``python -m tests.support.stale_writer <name> <endpoint> <folder> <fence|no-fence>`` is the guardian,
which starts the same module again as its child. The child campaigns, and while it leads
each of its threads writes one record as fast as etcd answers. Every acknowledged write
becomes a line of a file before the next is sent; so does every write that was refused.

Two belts of the product are off on purpose, so that the fence alone has to hold: the
question ``may_act`` before each write, and the compare of each record's revision.
"""

import os
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from dtrain.coordinator import persistence
from dtrain.coordinator.core.decisions import Decision, PutRecord
from dtrain.coordinator.leadership.lease import Leadership
from dtrain.coordinator.persistence import Committed, Committer, Deposed
from dtrain.protocol import codec
from dtrain.protocol.cluster import ReplicaRecord
from dtrain.protocol.ids import Attempt, ClusterName, JobName, ReplicaId, Step, Term, Uid
from dtrain.protocol.job import JobPhase, JobStatus
from dtrain.protocol.keys import Keys
from dtrain.runtime.clock import SystemClock
from dtrain.storage.etcd.guardian import GuardianConfig, Policy, run
from dtrain.storage.etcd.port import Etcd, Txn
from dtrain.storage.etcd.session import attach
from dtrain.storage.etcd.session_memory import FD_VARIABLE
from dtrain.storage.etcd.transport import GatewayEtcd

CLUSTER = ClusterName("stale")
KEYS = Keys(CLUSTER)
JOBS = tuple(JobName(f"w{index}") for index in range(2))
"""One per thread: as many as a coordinator commits with."""

TTL_S = 2
LATE_PAUSE_S = 0.02
"""Between writes that are refused: a deposed leader that goes on trying."""


class Lines:
    """What a writer knows, outside of it: whole lines, in order, there even after SIGKILL."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def add(self, *words: object) -> None:
        os.write(self._fd, (" ".join(str(word) for word in words) + "\n").encode())


class Writer:
    """The threads of one leadership."""

    def __init__(self, etcd: Etcd, lines: Lines, name: str) -> None:
        self._etcd = etcd
        self._lines = lines
        self._name = name
        self._committer = Committer(etcd, CLUSTER, may_act=lambda: True)

    def lead(self, term: Term) -> None:
        """Begin to write under ``term``; called once."""
        self._lines.add("term", term)
        for job in JOBS:
            threading.Thread(target=self._write, args=(job, term), daemon=True).start()

    def _write(self, job: JobName, term: Term) -> None:
        # Read after the term was won: everything that a predecessor was promised is in it.
        found = self._etcd.range(KEYS.status(job)).items
        count = int(codec.decode(JobStatus, found[0].value).step) if found else 0
        while True:
            count += 1
            record = JobStatus(
                term, Uid("u"), JobPhase.RUNNING, self._name, attempt=Attempt(1), step=Step(count)
            )
            # Without a compare of its revision: only the fence protects it.
            write = PutRecord(KEYS.status(job), record, None)  # type: ignore[arg-type]
            outcome = self._committer.commit(term, Decision(writes=(write,)))
            if isinstance(outcome, Committed):
                self._lines.add("ack", job, count, term, outcome.revision)
            elif isinstance(outcome, Deposed):
                self._lines.add("rejected", job, count, term)
                count -= 1
                time.sleep(LATE_PAUSE_S)
            else:
                self._lines.add("unknown", job, count, term, type(outcome).__name__)
                count -= 1


def unfence() -> None:
    """Make every transaction of a leader hold, whoever leads."""
    fenced = persistence.fenced

    def unfenced(*args: Any) -> Txn:
        return replace(fenced(*args), compares=())

    persistence.fenced = unfenced


def child(name: str, endpoint: str, folder: Path, fence: bool) -> None:
    """Campaign, write, and go on until the guardian ends it."""
    if not fence:
        unfence()
    session = attach()
    clock = SystemClock()
    etcd = GatewayEtcd([endpoint])
    writer = Writer(etcd, Lines(folder / f"{name}.lines"), name)
    leadership = Leadership(
        etcd,
        session,
        CLUSTER,
        ReplicaRecord(ReplicaId(name), "127.0.0.1:1", pid=os.getpid()),
        clock=clock,
        on_term=writer.lead,
        # The product ends here. This one stays to write late, until its guardian kills it.
        on_over=lambda _why: None,
        answers=lambda _address: False,
    )
    told = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: told.set())
    threading.Thread(target=leadership.run, daemon=True).start()
    session.set_started()
    while not told.wait(0.05):
        session.beat()
    session.set_clean_stop()
    os._exit(0)


def main() -> int:
    name, endpoint, folder, fence = sys.argv[1:]
    if FD_VARIABLE in os.environ:
        child(name, endpoint, Path(folder), fence == "fence")
    argv = (sys.executable, "-m", "tests.support.stale_writer", *sys.argv[1:])
    return run(
        GuardianConfig(
            argv,
            (endpoint,),
            Policy.COORDINATOR,
            f"writer/{name}",
            ttl_s=TTL_S,
            grace_s=2.0,
            allow_short_ttl=True,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
