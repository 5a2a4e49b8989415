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
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import psutil
from tests.e2e.chaos import broken_by
from tests.support import growth
from tests.support.growth import Finding
from tests.support.harness import Harness
from tests.support.soaking import LONG, SMALL, Jobs, Scales, holdings, surplus

from dtrain.local import sweeping
from dtrain.local.chaos import Chaos
from dtrain.local.chaos_plan import Settings
from dtrain.local.chaos_report import Report
from dtrain.local.faults import WEIGHTS, Kind, Part
from dtrain.local.filling import db_sizes
from dtrain.local.sight import Eyes
from dtrain.protocol.errors import DtrainError
from dtrain.protocol.ids import JobName
from dtrain.protocol.job import TERMINAL_PHASES

QUOTA_BYTES = 40 * 1024 * 1024
"""Of etcd. A filling stays in its members' memory for long: as small as five minutes of history allow."""

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
    or kind is Kind.PREEMPT
)
"""Faults that end a daemon or a member of etcd: a replica that has lost its lease leaves."""
SETTLE_S = 180.0
"""How long a calm cluster may take to put away what is no longer needed."""
LEFT_S = 180.0
"""The same for ended jobs: machines get a minute to let go of one before its last sweep."""


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
        jobs, scales = Jobs(harness, seed, times.job), Scales(harness, times.every, out)
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
    # A loaded machine's etcd may take longer to answer than any call waits.
    harness.until("the auditor has seen everything", lambda: harness.assert_audited() is None)
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
    counts = harness.until("etcd and the store are counted", lambda: holdings(harness))
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
    try:
        harness.until("nothing is left over", lambda: not surplus(harness), LEFT_S)
    except AssertionError as error:
        raise AssertionError(f"left over: {surplus(harness)}\n{error}") from error
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
