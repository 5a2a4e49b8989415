"""What a soak keeps going and weighs: jobs, the scales, and what etcd and the store may hold.

``Jobs`` and ``Scales`` run in threads of their own beside the storms; read
``tests.e2e.soak`` first.
"""

import contextlib
import dataclasses
import json
import random
import threading
import time
from collections import Counter
from typing import Any, TextIO

import psutil

from dtrain.local.filling import db_sizes
from dtrain.protocol.errors import Conflict, DtrainError
from dtrain.protocol.ids import JobName
from dtrain.protocol.job import TERMINAL_PHASES, JobPhase
from dtrain.storage.blobs.open import open_store
from tests.support.growth import Census, Sample
from tests.support.harness import Harness

LONG = ("long-0", "long-1")
SMALL = "small"
KEEP_LAST = 3
EVENTS_MAX = 200
ORPHANS_MAX = 60
"""Blobs of a job that trains which no checkpoint names: some ten saves that were interrupted."""


class Jobs:
    """Keeps the cluster busy, from a thread of its own; ``quiet`` lets no small job begin."""

    def __init__(self, harness: Harness, seed: int, long_s: float) -> None:
        self._harness = harness
        self._rng = random.Random(seed)
        self._long_s = long_s
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
            if status.uid != self._harness.spec(job).uid:
                # Of the job that had this name before: the leader has not decided about ours yet.
                return
            if status.phase in TERMINAL_PHASES:
                self._ended(name, status.phase, status.reason)
            elif name in self._cancelling and time.monotonic() > self._cancelling[name]:
                self._harness.client.set_intent(job, wanted="cancel", by="soak")
        elif name != SMALL or not self.quiet.is_set():
            self._submit(name)

    def _submit(self, name: str) -> None:
        pause_s = 0.1
        long = name in LONG
        steps = int((self._long_s if long else 3.0) / pause_s)
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
            named = {int(record.seq) for record in harness.commits(job)}
            named |= {int(record.seq) for record in harness.opened(job)}
            strays = [key for key in listed if _seqs(key) and not _seqs(key) & named]
            # What a save that was aborted uploaded late is swept now and then, and when the job ends.
            ended = harness.status(job).phase in TERMINAL_PHASES
            if len(strays) > (0 if ended else ORPHANS_MAX):
                return f"{len(strays)} blobs of {name} that no checkpoint names, such as {min(strays)}"
    finally:
        store.close()
    return ""


def _seqs(key: str) -> set[int]:
    """The checkpoint that a blob belongs to; empty for what belongs to none."""
    return {int(word) for word in key.split("/") if len(word) == 20 and word.isdecimal()}
