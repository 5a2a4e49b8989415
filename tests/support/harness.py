"""A whole cluster under test: submit jobs, look at them in etcd, wait by condition, check what is left.

Everything is read straight from etcd or from the marks that the training script
leaves, never from a component under test. Waits are generous, because machines
that run tests are loaded: what is claimed is that something happens, and times
are printed unless the time is the promise.
"""

import contextlib
import datetime
import gzip
import hashlib
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from dtrain.cli.client import Client
from dtrain.local import sweeping, weights
from dtrain.local.cluster import LocalCluster
from dtrain.protocol import codec
from dtrain.protocol.checkpoint import CommitRecord, Manifest, OpenRecord, Quarantine
from dtrain.protocol.errors import DtrainError
from dtrain.protocol.events import EventReason, EventRecord
from dtrain.protocol.ids import JobName, Rank, Uid
from dtrain.protocol.job import (
    TERMINAL_PHASES,
    CheckpointPolicy,
    Entry,
    EntryKind,
    JobPhase,
    JobSpec,
    JobStatus,
    NonFinitePolicy,
    RestartPolicy,
)
from dtrain.protocol.snapshot import RankState, WorkerPhase, WorkerSnapshot
from dtrain.storage.blobs.open import open_store
from dtrain.storage.etcd.port import KeyValue
from dtrain.testing.patience import limited, patiently
from tests.support.history import Following

T = TypeVar("T")

SCRIPTS = Path(__file__).parents[1] / "e2e" / "scripts"
LIMIT_S = 90.0
"""Longest wait for any one thing: far more than it takes on a loaded machine."""

LATE_S = 2.0
"""From submitting a job to its record, on a loaded machine."""

_BUSY = (WorkerPhase.TRAINING, WorkerPhase.CHECKPOINTING, WorkerPhase.DONE)


@dataclass(frozen=True, slots=True)
class Mark:
    """One completed step of one rank, as the rank itself wrote it down."""

    at: float
    pid: int
    attempt: int
    rank: int
    step: int


class Harness:
    """A ``LocalCluster`` and eyes on it, the auditor's among them: it judges every revision as it comes.

    Leaving a ``with`` block without an error fails if etcd's history broke a promise.
    """

    def __init__(self, folder: Path, **settings: Any) -> None:
        defaults: dict[str, Any] = {
            "name": "e2e",
            "store": "dir",
            "ttl_s": 5,
            "etcd_fsync": False,
            "agent_flags": ("--report-interval", "0.2"),
        }
        self.cluster = LocalCluster(folder / "cluster", **(defaults | settings))
        self.keys = self.cluster.keys
        self.folder = folder
        self.client: Client
        self._specs: dict[JobName, JobSpec] = {}
        self._submitted_at: dict[JobName, float] = {}
        self._env_before: dict[str, str | None] = {}
        self._auditing: Following | None = None

    def __enter__(self) -> "Harness":
        self.cluster.start()
        self._auditing = Following(self.cluster.endpoints, self.cluster.name)
        self._env_before = {name: os.environ.get(name) for name in self.cluster.store_env}
        os.environ.update(self.cluster.store_env)
        self.client = Client(self.cluster.addresses)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self._audit_the_end()
        finally:
            self._close()
        if kind is None:
            # A member sets 123 MB aside: a run of the whole suite would fill small disks. The logs stay.
            shutil.rmtree(self.folder / "cluster" / "etcd", ignore_errors=True)

    def _audit_the_end(self) -> None:
        # A test may end without an etcd; until then everything was judged.
        with contextlib.suppress(DtrainError):
            self.assert_audited()
        self.assert_audited(catch_up=False)

    def _close(self) -> None:
        if self._auditing is not None:
            self._auditing.close()
        with contextlib.suppress(AttributeError):
            self.client.close()
        self.cluster.stop()
        for name, value in self._env_before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    # Jobs ---------------------------------------------------------------------------

    def submit(
        self,
        name: str,
        args: str = "",
        *,
        script: str = "train.py",
        folder: Path = SCRIPTS,
        nnodes: int = 2,
        nnodes_min: int | None = None,
        nproc: int = 2,
        every_steps: int = 20,
        keep_every_steps: int = 0,
        keep_last: int = 3,
        timeout_s: float = 60.0,
        bandwidth_mb_s: float = 0.0,
        max_restarts: int = 10,
        shutdown_grace_s: float = 2.0,
        isolation_grace_s: float = 0.0,
        reschedule_grace_s: float = 0.0,
        spares: int = 0,
        marks: bool = True,
        await_import: bool = False,
        nonfinite: NonFinitePolicy = NonFinitePolicy(),  # noqa: B008 - immutable
        priority: int = 0,
        grow_cooldown_s: float = 60.0,
        store: str = "",
    ) -> JobName:
        """Submit a job; its ranks leave marks."""
        job = JobName(name)
        words = [*args.split(), *(["--marks", str(self._marks_folder(job))] if marks else [])]
        self._specs[job] = JobSpec(
            job,
            Uid(""),
            Entry(EntryKind.SCRIPT, script, tuple(words)),
            nnodes_min=nnodes if nnodes_min is None else nnodes_min,
            nnodes_max=nnodes,
            nproc_per_node=nproc,
            working_dir=str(folder),
            checkpoint=CheckpointPolicy(
                store=store,
                every_steps=every_steps,
                keep_last=keep_last,
                timeout_s=timeout_s,
                bandwidth_mb_s=bandwidth_mb_s,
                keep_every_steps=keep_every_steps,
                await_import=await_import,
            ),
            restarts=RestartPolicy(max_restarts=max_restarts),
            shutdown_grace_s=shutdown_grace_s,
            isolation_grace_s=isolation_grace_s,
            reschedule_grace_s=reschedule_grace_s,
            nonfinite=nonfinite,
            spares=spares,
            priority=priority,
            grow_cooldown_s=grow_cooldown_s,
        )
        self._submitted_at[job] = time.time()
        self.client.submit(codec.encode(self._specs[job]), uuid.uuid4().hex)
        return job

    def stop_file(self, name: str) -> Path:
        """What ends the training of a job that was given it as ``--stop-file``, once it exists."""
        return self.folder / f"{name}.stop"

    def start(self, name: str, args: str = "", **settings: Any) -> JobName:
        """Submit a job and return once all its ranks have done a step."""
        job = self.submit(name, args, **settings)
        self.await_training(job)
        return job

    # Eyes ---------------------------------------------------------------------------

    def status(self, job: JobName) -> JobStatus:
        found = self._range(self.keys.status(job))
        if not found:
            return JobStatus(0, Uid(""), JobPhase.QUEUED)  # type: ignore[arg-type]
        return codec.decode(JobStatus, found[0].value)

    def spec(self, job: JobName) -> JobSpec:
        """The job file as it is stored, with the uid of its submission."""
        return codec.decode(JobSpec, self._range(self.keys.spec(job))[0].value)

    def commits(self, job: JobName) -> list[CommitRecord]:
        return self._records(f"jobs/{job}/checkpoints/", CommitRecord)

    def opened(self, job: JobName) -> list[OpenRecord]:
        return self._records(f"jobs/{job}/open/", OpenRecord)

    def events(self, job: JobName, reason: EventReason | None = None) -> list[EventRecord]:
        found = self._records(f"jobs/{job}/events/", EventRecord)
        return [event for event in found if reason in (None, event.reason)]

    def bad(self, job: JobName) -> list[Quarantine]:
        return self._records(f"jobs/{job}/bad/", Quarantine)

    def manifest(self, record: CommitRecord) -> Manifest:
        """The manifest that a commit record names, verified."""
        store = open_store(self.cluster.store_uri)
        try:
            packed = store.get(record.manifest)
        finally:
            store.close()
        assert hashlib.sha256(packed).hexdigest() == record.digest
        return codec.decode(Manifest, gzip.decompress(packed), bytes_max=1 << 28)

    def snapshots(self, job: JobName) -> dict[str, WorkerSnapshot]:
        """By agent."""
        return {
            str(snapshot.agent): snapshot
            for name, snapshot in patiently(self.cluster.snapshots)
            if name == job
        }

    def training(self, job: JobName) -> dict[Rank, RankState]:
        """Ranks of the current attempt that train."""
        attempt = self.status(job).attempt
        ranks: dict[Rank, RankState] = {}
        for snapshot in self.snapshots(job).values():
            if snapshot.attempt == attempt and snapshot.phase in _BUSY:
                ranks |= {state.rank: state for state in snapshot.ranks}
        return ranks

    def pids(self, job: JobName) -> dict[Rank, int]:
        return {rank: state.pid for rank, state in self.training(job).items()}

    def term(self) -> int:
        found = self._range(self.keys.leader)
        return found[0].create_revision if found else 0

    def marks(self, job: JobName) -> list[Mark]:
        """Every step that any rank has completed, in order of time."""
        found = []
        for path in self._marks_folder(job).glob("*"):
            for line in path.read_text().splitlines():
                words = line.split()
                if len(words) == 5:
                    at, *rest = (int(word) for word in words)
                    found.append(Mark(at / 1e9, *rest))
        return sorted(found, key=lambda mark: mark.at)

    def last_step(self, job: JobName) -> int:
        """The newest completed step, by the ranks' own marks: known even without etcd."""
        last = -1
        for path in self._marks_folder(job).glob("*"):
            with path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - 200))
                lines = [line.split() for line in file.read().splitlines()]
            newest = [words for words in lines if len(words) == 5]
            if newest:
                last = max(last, int(newest[-1][4]))
        return last

    def newest_mark(self, job: JobName, rank: int, pid: int) -> float:
        """When one process of a job completed its newest step; -inf if it has done none."""
        try:
            with (self._marks_folder(job) / f"{rank}-{pid}").open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 200))
                lines = [line.split() for line in file.read().splitlines()]
        except OSError:
            return float("-inf")
        return max((int(words[0]) / 1e9 for words in lines if len(words) == 5), default=float("-inf"))

    def alive(self) -> set[int]:
        """Every live process of the cluster, ranks included."""
        return {found.pid for found in sweeping.find(self.cluster.folder)}

    def log(self, name: str) -> str:
        """What a coordinator or agent has logged."""
        return self.cluster.daemon(name).log_path.read_text(errors="replace")

    def digests(self, job: JobName) -> dict[str, str]:
        """Digest of every tensor of the newest commit, each byte verified."""
        cluster = self.cluster
        return weights.digests(cluster.etcd, cluster.name, job, prefixes=("model", "optimizer"))

    # Waiting ------------------------------------------------------------------------

    def until(self, what: str, condition: Callable[[], T], limit_s: float = LIMIT_S) -> T:
        """Wait for ``condition`` to be true and return what it returned.

        An etcd that does not answer meanwhile is no reason to fail: tests take it away.
        """
        deadline = time.monotonic() + limit_s
        problem = ""
        while True:
            try:
                with limited():
                    found = condition()
                if found:
                    return found
            except DtrainError as error:
                problem = f" ({error.message})"
            assert time.monotonic() < deadline, f"not in {limit_s:g} s: {what}{problem}\n{self._story()}"
            time.sleep(0.03)

    def await_training(self, job: JobName, *, after_attempt: int = 0, limit_s: float = LIMIT_S) -> JobStatus:
        """Wait until all ranks of an attempt after ``after_attempt`` have done a step."""

        def trains() -> JobStatus | None:
            status = self.status(job)
            assert status.phase not in TERMINAL_PHASES, f"{job} ended {status.phase}: {status.reason}"
            ranks = self.training(job)
            base = status.restore.step if status.restore else 0
            full = len(ranks) == status.world_size > 0
            moved = full and all(state.step > base for state in ranks.values())
            return status if status.attempt > after_attempt and moved else None

        what = f"{job} trains in an attempt after {after_attempt}"
        return self.until(what, trains, limit_s)  # type: ignore[return-value]

    def await_steps(self, job: JobName, more: int = 3) -> int:
        """Wait until the ranks have completed ``more`` steps from now."""
        begun = self.last_step(job)
        self.until(f"{job} does {more} more steps", lambda: self.last_step(job) >= begun + more)
        return self.last_step(job)

    def await_commit(self, job: JobName, *, after: int | None = None) -> CommitRecord:
        """Wait for a checkpoint with a number beyond ``after`` (default: the last one given out)."""
        beyond = int(self.status(job).seq_last) if after is None else after

        def newest() -> CommitRecord | None:
            return next((record for record in reversed(self.commits(job)) if record.seq > beyond), None)

        return self.until(f"{job} commits a checkpoint after {beyond}", newest)  # type: ignore[return-value]

    def await_event(self, job: JobName, reason: EventReason, text: str = "") -> EventRecord:
        def found() -> EventRecord | None:
            return next((event for event in self.events(job, reason) if text in event.message), None)

        return self.until(f"{job} has an event {reason} with {text!r}", found)  # type: ignore[return-value]

    def await_end(self, job: JobName, wanted: JobPhase = JobPhase.SUCCEEDED) -> JobStatus:
        status = self.until(
            f"{job} ends",
            lambda: s if (s := self.status(job)).phase in TERMINAL_PHASES else None,
            2 * LIMIT_S,
        )
        assert status is not None
        assert status.phase == wanted, f"{job} ended {status.phase}: {status.reason}\n{self._story()}"
        self._assert_time(job, status)
        return status

    def led_by_former_release(self, job: JobName) -> None:
        """Leaders who keep no ledger write the job's status: it begins after the last of them."""
        self._submitted_at.pop(job, None)

    def _assert_time(self, job: JobName, status: JobStatus) -> None:
        """The ledger of a job that is over has all time from its submission to its end."""
        ledger, ended_at = status.ledger, datetime.datetime.fromisoformat(status.finished_at).timestamp()
        if ledger is None or ledger.doing:
            return  # a leader of a former release wrote that it is over
        # Who submitted it otherwise knows when.
        took_s = ended_at - self._submitted_at.get(job, ledger.began_ms / 1000)
        told_s = sum(ledger.spent.values()) / 1000
        assert abs(told_s - took_s) <= 0.01 * took_s + LATE_S, f"{told_s:.1f} s of {took_s:.1f} s are told"

    def await_ready(self) -> None:
        """Wait until a leader leads and every agent and replica is registered."""
        count = len(self.cluster.agents)
        self.until("there is a leader", lambda: self.cluster.leader())
        self.until(
            "all agents are registered",
            lambda: sum(key.endswith("/node") for key in self.cluster.read("agents/")) == count,
        )
        replicas = len(self.cluster.coordinators)
        self.until("all replicas are registered", lambda: len(self.cluster.read("coordinators/")) == replicas)

    # What must be true in the end --------------------------------------------------------

    def assert_succeeded(self, job: JobName, steps: int) -> None:
        """The job ended well, with a final commit of exactly its last step, and left nothing behind."""
        status = self.await_end(job)
        last = self.commits(job)[-1]
        assert (last.final, last.step, last.attempt) == (True, steps, status.attempt), last
        self.assert_released(job)

    def assert_released(self, job: JobName) -> None:
        """Nothing of a finished job is left but its records and the blobs these name."""
        self.until(f"{job} has no snapshots left", lambda: not self.snapshots(job))
        assert not self.opened(job)
        pids = {mark.pid for mark in self.marks(job)}
        self.until(f"the ranks of {job} are gone", lambda: not pids & self.alive())
        self.until("no launcher is left", lambda: not self._launchers())
        self.until(f"orphans of {job} were collected", lambda: self.status(job).swept)
        self.until(f"garbage of {job} is collected", lambda: not self.cluster.read(f"jobs/{job}/garbage/"))
        self._assert_store(job)

    def assert_clean(self) -> None:
        """The whole history keeps every promise, and no lease is left but the daemons' own and of
        records that go by themselves."""
        self.assert_audited()
        assert self._auditing is not None
        found = self._auditing.auditor
        assert found.commits + found.terms > 0, "nothing was audited"
        # One lease per guardian, of those that run.
        daemons = [*self.cluster.coordinators.values(), *self.cluster.agents.values()]
        running = sum(daemon.is_running for daemon in daemons)
        try:
            self.until("no lease has leaked", lambda: len(self.leases()) <= running + self._timed(), 30.0)
        except AssertionError as error:
            held = [self.etcdctl("lease", "timetolive", lease, "--keys").strip() for lease in self.leases()]
            error.add_note(f"{running} daemons run, and there are:\n" + "\n".join(held))
            raise

    def assert_audited(self, *, catch_up: bool = True) -> None:
        """No revision so far has broken a promise. ``catch_up``: up to this very moment."""
        assert self._auditing is not None
        if catch_up:
            self._auditing.catch_up()
        found = self._auditing.violations()
        assert not found, "the auditor:\n" + "\n".join(str(violation) for violation in found[:20])

    def leases(self) -> list[str]:
        """Ids of all leases in etcd."""
        words = self.etcdctl("lease", "list").split()
        return words[3:] if "found" in words else []

    def _timed(self) -> int:
        """How many records have a lease of their own: blames and cordons."""
        found = [*self.cluster.read("cordons/").values(), *self.cluster.read("suspicions/").values()]
        return sum(item.lease != 0 for item in found)

    def etcdctl(self, *args: str) -> str:
        """Run stock etcdctl and return what it printed."""
        endpoints = ",".join(self.cluster.endpoints)
        command = [self.cluster.etcdctl, "--endpoints", endpoints, *args]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return done.stdout

    # Inside -----------------------------------------------------------------------------

    def _marks_folder(self, job: JobName) -> Path:
        return self.folder / "marks" / job

    def _range(self, key: str) -> tuple[KeyValue, ...]:
        return patiently(lambda: self.cluster.etcd.range(key)).items

    def _records(self, prefix: str, kind: type[T]) -> list[T]:
        found = patiently(lambda: self.cluster.read(prefix))
        return [codec.decode(kind, item.value) for _, item in sorted(found.items())]

    def launchers(self, agent: str) -> set[int]:
        """The launchers on one machine."""
        return set(self.cluster.daemon(agent).launcher_pids())

    def _launchers(self) -> list[int]:
        return [pid for daemon in self.cluster.agents.values() for pid in daemon.launcher_pids()]

    def _assert_store(self, job: JobName) -> None:
        """The store holds what the retained commits name, whole, and nothing else."""
        status = self.status(job)
        if not status.store:
            return
        store = open_store(status.store)
        try:
            root = f"{self.cluster.name}/{job}/{status.uid}"
            wanted: set[str] = set()
            allowed: list[str] = []
            for record in self.commits(job):
                manifest = self.manifest(record)
                wanted |= {record.manifest, *(blob.key for blob in manifest.blobs)}
                allowed.append(f"{root}/blobs/{record.seq:020d}/{record.attempt:06d}-{record.nonce}/")
            listed = {info.key for info in store.list(f"{root}/")}
            assert wanted <= listed, f"missing in the store: {sorted(wanted - listed)}"
            strays = [key for key in listed - wanted if not key.startswith(tuple(allowed))]
            # Beside the blobs lie the manifests of single ranks, one for each.
            strays += [key for key in listed - wanted if not key.endswith(".json.gz")]
            assert not strays, f"named by no commit: {strays}"
            # Whoever writes to the archive now may not have said yet what for.
            self.until("nothing is half written", lambda: not list(store.list_unfinished(f"{root}/")))
        finally:
            store.close()

    def _story(self) -> str:
        """What the jobs' records say, for the message of a test that failed."""
        lines = []
        with contextlib.suppress(DtrainError), limited():
            for job in self._specs:
                status = self.status(job)
                lines.append(f"{job}: {status.phase}, attempt {status.attempt}: {status.reason}")
                lines += [f"  {event.reason}: {event.message}" for event in self.events(job)[-12:]]
        return "\n".join(lines)


def say(text: str) -> None:
    """Print a measured time, for people: no test fails because of it."""
    sys.stderr.write(f"    {text}\n")
