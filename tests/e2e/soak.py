# ruff: noqa: T201 - what it prints is what it is for
"""A long time under random faults: nothing breaks, nothing is left behind, nothing grows.

    python -m tests.e2e.soak                        # one hour, a random seed
    python -m tests.e2e.soak --minutes 2 --seed 7

Three members of etcd, three coordinators, four agents. Two jobs train and are
submitted anew when they succeed; small ones come and go, half of them cancelled.
Storms of the faults of ``dtrain chaos`` alternate with calms. In each calm all
must be whole again and etcd and store hold what the jobs need and no more. All
the time every process of the cluster is weighed: memory, threads, descriptors.
Daemons are killed too often to show a slow leak, so the last quarter is
endurance: faults that end no daemon, while everything else goes on. The auditor
watches live. Exit code 0: all of it held.
"""

import argparse
import contextlib
import dataclasses
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import psutil
from tests.e2e.chaos import broken_by
from tests.support import growth
from tests.support.growth import Census, Finding, Sample
from tests.support.harness import Harness

from dtrain.local import sweeping
from dtrain.local.chaos import Chaos
from dtrain.local.chaos_plan import Settings
from dtrain.local.chaos_report import Report
from dtrain.local.faults import WEIGHTS, Kind, Part
from dtrain.local.filling import db_sizes
from dtrain.local.sight import Eyes
from dtrain.protocol.errors import Conflict, DtrainError
from dtrain.protocol.ids import JobName
from dtrain.protocol.job import TERMINAL_PHASES, JobPhase
from dtrain.storage.blobs.open import open_store

LONG = ("long-0", "long-1")
SMALL = "small"
QUOTA_BYTES = 40 * 1024 * 1024
"""Of etcd. A filling stays in its members' memory for long: as small as five minutes of history allow."""

KEEP_LAST = 3
EVENTS_MAX = 200
LIFE_S_MIN = 240.0
"""A life must have been watched for so long to tell a trend."""

DATABASE_MB_MAX = 32.0
"""Five to ten minutes of history of four agents that report twice a second, and what bbolt leaves free."""

AGE_S_MIN = 20.0
"""Younger processes are still importing, on a loaded machine."""

FATAL = tuple(
    (kind, part)
    for kind, part in WEIGHTS
    if (kind is Kind.KILL and part not in (Part.RANK, Part.LAUNCHER))
    or (kind in (Kind.FREEZE, Kind.CUT) and part in (Part.COORDINATOR, Part.LEADER))
)
"""Faults that end a daemon or a member of etcd: a replica that has lost its lease leaves."""
SETTLE_S = 180.0
"""How long a calm cluster may take to put away what is no longer needed."""


@dataclass(frozen=True, slots=True)
class Times:
    """How a run of some minutes is divided; seconds."""

    warm_up: float
    storm: float
    calm: float
    every: float
    """Between two weighings."""
    job: float
    """How long a long job trains, undisturbed."""
    endurance: float

    @classmethod
    def of(cls, minutes: float) -> "Times":
        whole_s = 60 * minutes
        return cls(
            warm_up=min(60.0, whole_s / 8),
            storm=min(150.0, whole_s / 6),
            calm=min(45.0, whole_s / 12),
            every=min(20.0, whole_s / 60),
            job=min(600.0, whole_s / 2),
            endurance=whole_s / 4,
        )


class Jobs:
    """Keeps the cluster busy, from a thread of its own; ``quiet`` lets no small job begin."""

    def __init__(self, harness: Harness, seed: int, times: Times) -> None:
        self._harness = harness
        self._rng = random.Random(seed)
        self._times = times
        self._stop = threading.Event()
        self.quiet = threading.Event()
        self.ends: Counter[str] = Counter()
        self.problems: list[str] = []
        self._cancelling: dict[str, float] = {}
        self._running: set[str] = set()
        self._death: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="jobs", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Submit nothing more."""
        self._stop.set()
        self._thread.join(60.0)
        if self._death is not None:
            raise AssertionError("the thread that submits jobs died") from self._death

    @property
    def unfinished(self) -> frozenset[str]:
        """Jobs that were submitted and whose end was not seen."""
        return frozenset(self._running)

    def _run(self) -> None:
        try:
            while not self._stop.wait(0.5):
                for name in (*LONG, SMALL):
                    # Whatever is broken just now: the next turn tries again.
                    with contextlib.suppress(DtrainError):
                        self._tend(name)
        except BaseException as error:  # noqa: BLE001 - told by close
            self._death = error

    def _tend(self, name: str) -> None:
        job = JobName(name)
        if name in self._running:
            status = self._harness.status(job)
            if status.phase in TERMINAL_PHASES:
                self._ended(name, status.phase, status.reason)
            elif name in self._cancelling and time.monotonic() > self._cancelling[name]:
                self._harness.client.set_intent(job, wanted="cancel", by="soak")
        elif name != SMALL or not self.quiet.is_set():
            self._submit(name)

    def _submit(self, name: str) -> None:
        pause_s = 0.1
        long = name in LONG
        steps = int((self._times.job if long else 3.0) / pause_s)
        with contextlib.suppress(Conflict):
            # A conflict is an earlier try of ours that was heard after all.
            self._harness.submit(
                name,
                f"--steps {steps} --pause-ms {1000 * pause_s:.0f}",
                nnodes=2 if long else 1,
                nproc=1,
                every_steps=50 if long else 10,
                keep_last=KEEP_LAST,
                max_restarts=1_000_000,
                marks=False,
            )
        self._running.add(name)
        if not long and self._rng.random() < 0.5:
            self._cancelling[name] = time.monotonic() + self._rng.uniform(0.0, 6.0)

    def _ended(self, name: str, phase: JobPhase, reason: str) -> None:
        wanted = {JobPhase.SUCCEEDED}
        if self._cancelling.pop(name, None) is not None:
            wanted.add(JobPhase.CANCELLED)
        if phase not in wanted:
            self.problems.append(f"{name} ended {phase}: {reason}")
        self.ends[f"{name} {phase}"] += 1
        self._running.discard(name)


class Scales:
    """Weighs the cluster at intervals, from a thread of its own, and writes a line for each time."""

    def __init__(self, harness: Harness, every_s: float, out: TextIO) -> None:
        self._harness = harness
        self._census = Census(harness.cluster)
        self._every_s = every_s
        self._out = out
        self._began = time.monotonic()
        self._stop = threading.Event()
        self.calm = threading.Event()
        self.samples: list[Sample] = []
        self.databases_mb: list[float] = []
        """The largest database of a member, one for each calm."""
        self.drivers: list[tuple[int, int]] = []
        """Threads and descriptors of this process, one for each calm."""
        self._death: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="scales", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Weigh no more."""
        self._stop.set()
        self._thread.join(60.0)
        if self._death is not None:
            raise AssertionError("the thread that weighs died") from self._death

    def write(self, document: dict[str, Any]) -> None:
        """Add a line to the file."""
        line = {"at_s": round(time.monotonic() - self._began, 1), **document}
        self._out.write(json.dumps(line) + "\n")
        self._out.flush()

    def _run(self) -> None:
        try:
            while not self._stop.wait(self._every_s):
                self._weigh()
        except BaseException as error:  # noqa: BLE001 - told by close
            self._death = error

    def _weigh(self) -> None:
        calm = self.calm.is_set()
        sample = Sample(time.monotonic() - self._began, calm, self._census.take())
        # A storm that has begun meanwhile: neither calm nor storm.
        if calm == self.calm.is_set():
            self.samples.append(sample)
        me = psutil.Process()
        counts: dict[str, Any] = {"etcd_db_mb": self._db_mb()}
        with contextlib.suppress(DtrainError, OSError):
            counts |= holdings(self._harness)
        self.write(
            {
                "calm": calm,
                "processes": [dataclasses.asdict(one) for one in sample.seen],
                "driver": {
                    "threads": me.num_threads(),
                    "fds": me.num_fds(),
                    "rss_mb": me.memory_info().rss >> 20,
                },
                **counts,
            }
        )

    def _db_mb(self) -> list[float]:
        sizes = db_sizes(self._harness.cluster.endpoints)
        return [round(size / 2**20, 1) for size in sizes.values()]


def holdings(harness: Harness) -> dict[str, Any]:
    """Count what etcd and the store hold, by kind."""
    keys = harness.cluster.read("")
    kinds: Counter[str] = Counter()
    for key in keys:
        parsed = harness.keys.parse(key)
        kinds["?" if parsed is None else parsed.kind] += 1
    store = open_store(harness.cluster.store_uri)
    try:
        blobs = sum(1 for _ in store.list(f"{harness.cluster.name}/"))
    finally:
        store.close()
    return {"keys": len(keys), "kinds": dict(kinds), "leases": len(harness.leases()), "blobs": blobs}


def surplus(harness: Harness) -> str:
    """Return what etcd or the store hold beyond what a calm cluster needs; "" for nothing.

    Read at one moment of a cluster that goes on training: what is between two
    states is surplus, and gone a moment later.
    """
    cluster = harness.cluster
    leases, daemons = len(harness.leases()), len(cluster.coordinators) + len(cluster.agents)
    if leases > daemons:
        return f"{leases} leases for {daemons} daemons"
    kinds: Counter[tuple[str, str]] = Counter()
    for key in cluster.read(""):
        parsed = harness.keys.parse(key)
        if parsed is not None:
            kinds[str(parsed.job), parsed.kind] += 1
    allowed = {"checkpoint": KEEP_LAST + 1, "open": 1, "event": EVENTS_MAX, "pin": 0, "garbage": 0, "bad": 0}
    for (job, kind), count in sorted(kinds.items()):
        most = allowed.get(kind, len(cluster.agents) if kind == "worker" else 1)
        if job and count > most:
            return f"{count} records {kind} of {job}"
    return _surplus_blobs(harness, sorted({job for job, _ in kinds if job}))


def _surplus_blobs(harness: Harness, jobs: list[str]) -> str:
    store = open_store(harness.cluster.store_uri)
    try:
        for name in jobs:
            job = JobName(name)
            listed = [info.key for info in store.list(f"{harness.cluster.name}/{name}/")]
            # Read after the list: what was opened since does not lie in it.
            named = {int(record.seq) for record in (*harness.commits(job), *harness.opened(job))}
            strays = [key for key in listed if _seqs(key) and not _seqs(key) & named]
            if strays:
                return f"{len(strays)} blobs of {name} that no checkpoint names, such as {min(strays)}"
    finally:
        store.close()
    return ""


def _seqs(key: str) -> set[int]:
    """The checkpoint that a blob belongs to; empty for what belongs to none."""
    return {int(word) for word in key.split("/") if len(word) == 20 and word.isdecimal()}


@dataclass
class Outcome:
    """What a soak found."""

    report: Report
    findings: list[Finding] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    ends: Counter[str] = field(default_factory=Counter)
    calms: int = 0

    def lines(self) -> list[str]:
        """The whole of it, for people."""
        ends = ", ".join(f"{count} x {what}" for what, count in sorted(self.ends.items()))
        return [
            *self.report.lines(),
            growth.HEAD,
            *(finding.line() for finding in self.findings),
            f"{self.calms} calms; jobs: {ends or 'none ended'}",
            *(f"PROBLEM: {text}" for text in self.problems),
        ]


def run(
    seed: int, minutes: float, folder: Path, out: TextIO, *, say: Callable[[str], None] = print
) -> Outcome:
    """Do the whole of it; what was found wrong is in the outcome.

    Raises:
        AssertionError: the cluster could not be brought to rest, or broke a promise.
    """
    times = Times.of(minutes)
    shape = {
        "agents": 4,
        "etcd_members": 3,
        "faults": True,
        "etcd_quota_bytes": QUOTA_BYTES,
        "auto_compaction": "5m",
        "agent_flags": ("--report-interval", "0.5"),
    }
    with Harness(folder, name="soak", **shape) as harness:
        harness.await_ready()
        jobs, scales = Jobs(harness, seed, times), Scales(harness, times.every, out)
        breaker = broken_by(harness)
        eyes = Eyes(harness.cluster.etcd, harness.keys)
        settings = Settings(seed, every_s=2.0, wait=0.6)
        members = harness.cluster.members
        chaos = Chaos(settings, eyes, breaker, members=members, say=say)
        mild = Chaos(dataclasses.replace(settings, without=FATAL), eyes, breaker, members=members, say=say)
        outcome = Outcome(Report(seed))
        jobs.start()
        scales.start()
        try:
            harness.until("both long jobs train", lambda: _train(eyes))
            end = time.monotonic() + 60 * minutes
            chaos.begin()
            scales.calm.set()
            time.sleep(times.warm_up)
            stormy = end - times.endurance - 2 * times.calm
            while time.monotonic() < stormy and not chaos.gave_up:
                _storm(chaos, min(times.storm, stormy - time.monotonic()), jobs, scales)
                _calm(chaos, times, harness, jobs, scales, outcome, say)
            outcome.report = chaos.report()
            say(f"endurance: {times.endurance:.0f} s of faults that end no daemon")
            mild.begin()
            _storm(mild, times.endurance, jobs, scales)
            _calm(mild, times, harness, jobs, scales, outcome, say)
        finally:
            breaker.close()
            jobs.close()
            scales.close()
        outcome.report = _both(outcome.report, mild.report())
        outcome.ends, outcome.problems = jobs.ends, outcome.problems + jobs.problems
        outcome.problems += outcome.report.problems
        outcome.findings = growth.judge(
            scales.samples, warm_up_s=max(AGE_S_MIN, times.warm_up), life_s_min=LIFE_S_MIN
        )
        outcome.problems += [finding.line() for finding in outcome.findings if finding.grows]
        outcome.problems += _driver_growth(scales.drivers)
        outcome.problems += [
            f"etcd's database has grown to {size_mb:.0f} MiB in calm {number}"
            for number, size_mb in enumerate(scales.databases_mb, 1)
            if size_mb > DATABASE_MB_MAX
        ]
        _end_jobs(harness, jobs)
        harness.assert_clean()
        scales.write({"kind": "Soak", "problems": outcome.problems, "report": outcome.report.to_json()})
    left = sweeping.find(harness.cluster.folder)
    if left:
        outcome.problems.append(f"processes are left over: {left}")
    return outcome


def _train(eyes: Eyes) -> bool:
    jobs = eyes.look().jobs
    return all(name in jobs and jobs[name].trains for name in LONG)


def _storm(chaos: Chaos, for_s: float, jobs: Jobs, scales: Scales) -> None:
    scales.calm.clear()
    jobs.quiet.clear()
    chaos.storm(for_s=for_s)
    jobs.quiet.set()


def _calm(
    chaos: Chaos,
    times: Times,
    harness: Harness,
    jobs: Jobs,
    scales: Scales,
    outcome: Outcome,
    say: Callable[[str], None],
) -> None:
    if not chaos.calm():
        return
    outcome.calms += 1
    scales.calm.set()
    _check_calm(harness, jobs, outcome, say)
    time.sleep(times.calm)
    # Two descriptors for each connection of a daemon run through the proxies here.
    links = [proxy for links in harness.cluster.links.values() for proxy in links.proxies]
    fds = psutil.Process().num_fds() - 2 * sum(proxy.connections for proxy in links)
    scales.drivers.append((threading.active_count(), fds))
    sizes = db_sizes(harness.cluster.endpoints)
    scales.databases_mb.append(max(sizes.values(), default=0) / 2**20)


def _both(storms: Report, endurance: Report) -> Report:
    """One report of two: the faults of the second come after those of the first."""
    later = [
        dataclasses.replace(one, number=one.number + len(storms.struck), at_s=one.at_s + storms.took_s)
        for one in endurance.struck
    ]
    return dataclasses.replace(
        storms,
        struck=[*storms.struck, *later],
        problems=[*storms.problems, *endurance.problems],
        took_s=storms.took_s + endurance.took_s,
    )


def _check_calm(harness: Harness, jobs: Jobs, outcome: Outcome, say: Callable[[str], None]) -> None:
    """Nothing is broken any more: everything that is not needed must go."""
    harness.assert_audited()
    began = time.monotonic()
    end = began + SETTLE_S
    found = "nothing was read"
    while found and time.monotonic() < end:
        try:
            found = "" if SMALL not in jobs.unfinished else f"{SMALL} has not ended"
            found = found or surplus(harness)
        except DtrainError as error:
            found = error.message
        time.sleep(0.2)
    if found:
        outcome.problems.append(f"calm {outcome.calms}: {found}")
    counts = holdings(harness)
    held = f"{counts['keys']} keys, {counts['leases']} leases, {counts['blobs']} blobs"
    took_s = time.monotonic() - began
    say(f"calm {outcome.calms}, after {took_s:.1f} s: {held}; {found or 'nothing too many'}")


def _driver_growth(drivers: list[tuple[int, int]]) -> list[str]:
    """Compare this process's threads and descriptors of the first calm with those of the last."""
    if len(drivers) < 2:
        return []
    (threads, fds), (threads_end, fds_end) = drivers[0], drivers[-1]
    if threads_end > threads + 3 or fds_end > fds + 8:
        return [f"this process went from {threads} to {threads_end} threads, {fds} to {fds_end} descriptors"]
    return []


def _end_jobs(harness: Harness, jobs: Jobs) -> None:
    """Cancel what still runs; everything of it must go."""
    for name in sorted(jobs.unfinished):
        job = JobName(name)

        def cancelled(job: JobName = job) -> bool:
            if harness.status(job).phase in TERMINAL_PHASES:
                return True
            harness.client.set_intent(job, wanted="cancel", by="soak")
            return False

        harness.until(f"{name} is cancelled", cancelled)
    harness.until("nothing is left over", lambda: not surplus(harness))
    harness.until("no launcher is left", lambda: not _launchers(harness))


def _launchers(harness: Harness) -> list[int]:
    return [pid for daemon in harness.cluster.agents.values() for pid in daemon.launcher_pids()]


def main() -> int:
    """Parse, run, and tell how it went."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, help="default: a random one")
    parser.add_argument("--folder", type=Path, help="keep everything there (default: a temporary folder)")
    parser.add_argument(
        "--out", type=Path, help="where the weighings go, as JSON lines (default: in the folder)"
    )
    args = parser.parse_args()
    seed = args.seed if args.seed is not None else random.SystemRandom().randrange(1_000_000)
    print(f"seed {seed}: python -m tests.e2e.soak --minutes {args.minutes:g} --seed {seed}", flush=True)
    with contextlib.ExitStack() as stack:
        folder = args.folder
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dtrain-soak-")))
        folder.mkdir(parents=True, exist_ok=True)
        out = stack.enter_context((args.out or folder / "soak.jsonl").open("w"))
        try:
            outcome = run(seed, args.minutes, folder, out, say=lambda text: print(text, flush=True))
        except (AssertionError, DtrainError) as error:
            print(f"\nFAILED with seed {seed}: {error}", file=sys.stderr)
            return 1
    print("\n".join(outcome.lines()), flush=True)
    if outcome.problems:
        print(f"\nFAILED with seed {seed}", file=sys.stderr)
        return 1
    print(f"\nall of it held; seed {seed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
