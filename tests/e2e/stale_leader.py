"""Leaders frozen beyond their lease, again and again, while they write: nothing acknowledged is ever lost.

``python -m tests.e2e.stale_leader [--freezes 50] [--no-fence]``. Three writers
(``tests.support.stale_writer``) elect a leader through a real etcd. It is stopped together
with its guardian until another has taken over and written, then thawed a moment before its
guardian, so that it goes on writing under a term that is over. In the end etcd's history is
replayed: every write that any writer was told to be done must be there, and must not have
been overwritten by one that did not know it. ``--no-fence`` is the same without the compare
of the term, and shows what is lost then.
"""

# ruff: noqa: T201 - its purpose is to print

import argparse
import bisect
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.stale_writer import CLUSTER, KEYS

from dtrain.cli.auditing import Replay
from dtrain.local.etcd import EtcdServer
from dtrain.protocol import codec
from dtrain.protocol.audit import Auditor, Change
from dtrain.protocol.cluster import LeaderRecord
from dtrain.protocol.errors import DtrainError
from dtrain.protocol.job import JobStatus
from dtrain.storage.etcd.transport import GatewayEtcd

NAMES = ("w1", "w2", "w3")
CACHE = Path(__file__).parents[2] / ".cache"
LOAD = 20
"""Writes that a leader has been promised before it is frozen, and its successor before it is thawed."""

LIMIT_S = 90.0
"""Longest wait for any one thing: far more than it takes on a loaded machine."""


@dataclass(frozen=True)
class Ack:
    job: str
    count: int
    term: int
    revision: int


@dataclass
class Outcome:
    """What a run has shown. ``late``: writes that reached etcd under a term that was over."""

    freezes: int = 0
    acknowledged: int = 0
    lost: int = 0
    late_applied: int = 0
    late_rejected: int = 0
    freezes_with_late_writes: int = 0
    terms: int = 0
    violations: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        late = self.late_applied + self.late_rejected
        return (
            f"{self.freezes} freezes, {self.terms} terms: "
            f"{self.acknowledged} acknowledged writes, {self.lost} lost; "
            f"{late} late writes in {self.freezes_with_late_writes} of the freezes, "
            f"{self.late_rejected} rejected, {self.late_applied} applied"
        )


class History:
    """A sink: every value of every writer's record, by revision."""

    def __init__(self) -> None:
        self.written: dict[str, list[tuple[int, int]]] = defaultdict(list)
        """By job: revision and count."""

    def begin_at(self, revision: int, records: Sequence[Change]) -> None:
        raise AssertionError(f"the history before {revision} is gone")

    def feed(self, revision: int, changes: Sequence[Change]) -> None:
        for change in changes:
            place = KEYS.parse(change.key)
            if place is not None and place.kind == "status" and change.value is not None:
                count = int(codec.decode(JobStatus, change.value).step)
                self.written[place.job].append((revision, count))

    def lost(self, acks: Sequence[Ack]) -> list[Ack]:
        """Acknowledged writes that are not there, or that a later write did not know of."""
        found = []
        for job, writes in self.written.items():
            there = dict(writes)
            revisions = [revision for revision, _ in writes]
            # The least count written at this place or after it.
            least = [0] * (len(writes) + 1)
            least[-1] = sys.maxsize
            for index in range(len(writes) - 1, -1, -1):
                least[index] = min(writes[index][1], least[index + 1])
            for ack in acks:
                if ack.job != job:
                    continue
                after = least[bisect.bisect_right(revisions, ack.revision)]
                if there.get(ack.revision) != ack.count or after <= ack.count:
                    found.append(ack)
        return found + [ack for ack in acks if ack.job not in self.written]


class Run:
    """One etcd, three writers, and somebody who freezes them."""

    def __init__(self, folder: Path, *, fence: bool) -> None:
        self._folder = folder
        self._fence = "fence" if fence else "no-fence"
        self._server = EtcdServer(folder / "etcd", cache_dir=CACHE, fsync=False)
        self._guardians: dict[str, subprocess.Popen[bytes]] = {}
        self._etcd: GatewayEtcd | None = None

    def __enter__(self) -> "Run":
        try:
            self._server.start()
            self._server.wait_ready()
            self._etcd = GatewayEtcd(self._server.endpoints)
            for name in NAMES:
                with (self._folder / f"{name}.log").open("ab") as log:
                    self._guardians[name] = subprocess.Popen(
                        [
                            *(sys.executable, "-m", "tests.support.stale_writer"),
                            *(name, self._server.endpoint, str(self._folder), self._fence),
                        ],
                        stdout=log,
                        stderr=log,
                    )
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for guardian in self._guardians.values():
            guardian.kill()  # its child dies with it
            guardian.wait()
        if self._etcd is not None:
            self._etcd.close()
        self._server.close()

    def freeze(self, rng: random.Random) -> bool:
        """Freeze the leader until its successor has written, and thaw it; True: it wrote late."""
        name, term = self._leader(after=0)
        self._until(lambda: len(self._acks(term)) >= LOAD, f"{name} writes under term {term}")
        time.sleep(rng.random() * 0.05)
        guardian, child = self._guardians[name].pid, self._child(name)
        os.kill(guardian, signal.SIGSTOP)
        os.kill(child, signal.SIGSTOP)
        refused = len(self._lines("rejected", term))
        try:
            successor, following = self._leader(after=term)
            self._until(lambda: len(self._acks(following)) >= LOAD, f"{successor} writes after {name}")
            known = len(self._acks(term))
        finally:
            os.kill(child, signal.SIGCONT)
            try:
                # One write for each thread, at least: the fence is asked before the guardian acts.
                with contextlib.suppress(AssertionError):
                    self._until(lambda: len(self._lines("rejected", term)) > refused + 1, "late", 0.5)
            finally:
                os.kill(guardian, signal.SIGCONT)
        self._until(lambda: not _is_alive(child), f"{name} is killed by its guardian")
        # An answer that was under way when it froze is not late: at most one for each thread.
        return len(self._lines("rejected", term)) > refused or len(self._acks(term)) > known + 2

    def judge(self) -> Outcome:
        """Stop the writers, then compare what they were told with what etcd says."""
        for guardian in self._guardians.values():
            guardian.terminate()
        for guardian in self._guardians.values():
            guardian.wait(15)
        history, auditor = History(), Auditor(CLUSTER)
        assert self._etcd is not None
        replay = Replay(self._etcd, CLUSTER, history, auditor)
        replay.catch_up(60.0)
        replay.close()
        acks = self._acks()
        late = [v for v in auditor.violations if v.invariant == "I1"]
        return Outcome(
            acknowledged=len(acks),
            lost=len(history.lost(acks)),
            late_applied=len(late) + auditor.violations_more,
            late_rejected=len(self._lines("rejected")),
            terms=auditor.terms,
            violations=[str(violation) for violation in auditor.violations[:5]],
        )

    def _leader(self, *, after: int) -> tuple[str, int]:
        found: list[tuple[str, int]] = []

        def look() -> bool:
            assert self._etcd is not None
            with contextlib.suppress(DtrainError):
                for kv in self._etcd.range(KEYS.leader).items:
                    if kv.create_revision > after:
                        found.append((codec.decode(LeaderRecord, kv.value).replica, kv.create_revision))
            return bool(found)

        self._until(look, f"there is a leader after term {after}")
        return found[0]

    def _child(self, name: str) -> int:
        tasks = Path(f"/proc/{self._guardians[name].pid}/task").glob("*/children")
        return int(" ".join(task.read_text() for task in tasks).split()[0])

    def _lines(self, kind: str, term: int | None = None) -> list[list[str]]:
        found = []
        for name in NAMES:
            path = self._folder / f"{name}.lines"
            for line in path.read_text().splitlines() if path.exists() else ():
                words = line.split()
                if words[0] == kind and (term is None or words[3] == str(term)):
                    found.append(words)
        return found

    def _acks(self, term: int | None = None) -> list[Ack]:
        return [Ack(w[1], int(w[2]), int(w[3]), int(w[4])) for w in self._lines("ack", term)]

    def _until(self, condition: Callable[[], bool], what: str, limit_s: float = LIMIT_S) -> None:
        end = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < end, f"not in {limit_s:g} s: {what}"
            time.sleep(0.02)


def _is_alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def run(
    folder: Path,
    freezes: int,
    *,
    fence: bool = True,
    seed: int = 1,
    say: Callable[[str], None] = lambda _line: None,
) -> Outcome:
    """Freeze ``freezes`` leaders and judge."""
    rng = random.Random(seed)
    late = 0
    with Run(folder, fence=fence) as it:
        for number in range(freezes):
            late += it.freeze(rng)
            if (number + 1) % 10 == 0:
                say(f"{number + 1} of {freezes} freezes")
        outcome = it.judge()
    outcome.freezes, outcome.freezes_with_late_writes = freezes, late
    return outcome


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.e2e.stale_leader", description=__doc__)
    parser.add_argument("--freezes", type=int, default=50)
    parser.add_argument("--no-fence", action="store_true", help="without the compare of the term")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dtrain-stale-") as folder:
        outcome = run(
            Path(folder),
            options.freezes,
            fence=not options.no_fence,
            seed=options.seed,
            say=lambda line: print(line, flush=True),
        )
    print(f"{'without' if options.no_fence else 'with'} the fence: {outcome}")
    for violation in outcome.violations:
        print(f"  {violation}")
    held = outcome.lost == 0 and outcome.late_applied == 0 and outcome.late_rejected >= options.freezes
    if options.no_fence:
        print(
            "writes were lost, as they must be without it"
            if outcome.lost
            else "nothing was lost: run it longer"
        )
        return 0 if outcome.lost else 1
    print("it held" if held else "IT DID NOT HOLD")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
