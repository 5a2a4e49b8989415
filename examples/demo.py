"""A training job on real data survives the loss of its leader, of a rank and of a whole machine.

    make demo            # or: python -m examples.demo

Starts etcd, an S3 server, three coordinators and three agents on loopback,
trains ``examples/digits`` once undisturbed and once while things are killed
with ``kill -9``, and compares the final weights bit by bit. Exits with 0 only
if everything held.
"""

import argparse
import contextlib
import os
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from dtrain.cli import jobfile
from dtrain.cli.client import Client
from dtrain.local import sweeping, weights
from dtrain.local.cluster import LocalCluster
from dtrain.protocol import codec
from dtrain.protocol.checkpoint import CommitRecord
from dtrain.protocol.events import EventRecord
from dtrain.protocol.ids import JobName
from dtrain.protocol.job import TERMINAL_PHASES, JobPhase, JobStatus
from dtrain.protocol.snapshot import RankState, WorkerPhase, WorkerSnapshot
from dtrain.storage.etcd.mirror import Change, Mirror

JOB_FILE = Path(__file__).parent / "digits" / "job.yaml"
LIMIT_S = 120.0
"""Longest wait for any one thing; then the demo has failed."""


class Failed(Exception):
    """Something that should have held did not."""


@dataclass
class Fault:
    """One row of the table at the end."""

    what: str
    recovered: str
    seconds: float
    steps_lost: str


@dataclass
class Story:
    """Prints what happens as it happens, in plain lines that survive a pipe."""

    began: float = field(default_factory=time.monotonic)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def say(self, text: str, mark: str = " ") -> None:
        with self.lock:
            print(f"{time.monotonic() - self.began:6.1f}s {mark} {text}", flush=True)


class Demo:
    """The cluster, what is seen of it, and the faults."""

    def __init__(self, folder: Path, steps: int, pause_ms: float, keep: bool) -> None:
        self.cluster = LocalCluster(
            folder, name="demo", remove=not keep, agent_flags=("--report-interval", "0.2")
        )
        self.story = Story()
        self.steps, self.pause_ms = steps, pause_ms
        self.faults: list[Fault] = []
        self.mirror: Mirror
        self.client: Client

    def run(self) -> None:
        self.story.say("starting etcd, an S3 server, 3 coordinators and 3 agents on loopback")
        self.cluster.start(lambda part: self.story.say(f"  {part}"))
        os.environ.update(self.cluster.store_env)  # to compare the weights at the end
        if self.cluster.warning:
            self.story.say(f"warning: {self.cluster.warning}")
        self.client = Client(self.cluster.addresses)
        self.mirror = Mirror(self.cluster.etcd, self.cluster.keys.root, on_changes=self._on_changes)
        self.mirror.start()
        endpoints = ",".join(self.cluster.endpoints)
        self.story.say("watch it yourself:")
        self.story.say(f"  {self.cluster.etcdctl} --endpoints {endpoints} watch --prefix /dtrain/demo/jobs/")

        self.story.say("first, digits undisturbed: this is what the weights should be", "=")
        calm = self._submit("digits-calm")
        self._await_end(calm)
        accuracy = self._accuracy(calm)

        self.story.say("now the same job while things are killed", "=")
        job = self._submit("digits")
        self._await("the job to run", lambda: self._status(job).phase == JobPhase.RUNNING)
        self._await("the first commit", lambda: len(self._commits(job)) > 0)
        self._kill_leader(job)
        self._await("another commit", lambda: self._committed_in(job, self._status(job).attempt))
        self._kill_rank(job)
        self._await("another commit", lambda: self._committed_in(job, self._status(job).attempt))
        self._cut_power(job)
        self._await_end(job)
        self._report(calm, job, accuracy)

    # Faults --------------------------------------------------------------------------

    def _kill_leader(self, job: JobName) -> None:
        before = self._training(job)
        term = self._term()
        began = time.monotonic()
        name = self.cluster.kill_leader_process()
        self.story.say(f"kill -9 of the leader's process ({name})", "!")
        self._await("a new leader", lambda: self._term() not in (0, term))
        took = time.monotonic() - began
        self._await(
            "training to go on",
            lambda: min(r.step for r in self._training(job).values()) > max(r.step for r in before.values()),
        )
        after = self._training(job)
        if {rank: r.pid for rank, r in before.items()} != {rank: r.pid for rank, r in after.items()}:
            raise Failed("ranks were restarted because a leader died")
        self.story.say(
            f"a new leader after {took * 1000:.0f} ms; every rank kept its process and went on", "+"
        )
        self.faults.append(Fault(f"leader {name} killed", "new leader", took, "0"))

    def _kill_rank(self, job: JobName) -> None:
        attempt, step = self._status(job).attempt, self._step(job)
        began = time.monotonic()
        pid = self.cluster.kill_rank(3, job=job)
        self.story.say(f"kill -9 of rank 3 (pid {pid}) at step {step}", "!")
        self._await_recovery(job, attempt, step, began, "rank 3 killed")

    def _cut_power(self, job: JobName) -> None:
        status = self._status(job)
        agent, step = status.members[1].agent, self._step(job)
        began = time.monotonic()
        self.cluster.power_cut(agent)
        self.story.say(
            f"power cut: guardian, agent, launcher and ranks of {agent} are gone at step {step}", "!"
        )
        self._await_recovery(job, status.attempt, step, began, f"machine {agent} lost")
        members = [member.agent for member in self._status(job).members]
        if agent in members:
            raise Failed(f"{agent} is dead and still a member")
        self.story.say(f"the job runs on {' and '.join(members)}", "+")

    def _await_recovery(self, job: JobName, attempt: int, step: int, began: float, what: str) -> None:
        def first_step() -> bool:
            status = self._status(job)
            ranks = self._training(job)
            base = status.restore.step if status.restore else 0
            full = len(ranks) == status.world_size > 0
            return status.attempt > attempt and full and min(r.step for r in ranks.values()) > base

        self._await("training again", first_step)
        took = time.monotonic() - began
        status = self._status(job)
        base = status.restore.step if status.restore else 0
        self.story.say(f"all ranks train again after {took:.1f} s, from step {base}", "+")
        self.faults.append(Fault(what, "training again", took, str(max(0, step - base))))

    # What is seen ----------------------------------------------------------------------

    def _status(self, job: JobName) -> JobStatus:
        found = self.mirror.get(self.cluster.keys.status(job))
        if found is None:
            return JobStatus(0, "", JobPhase.QUEUED)  # type: ignore[arg-type]
        return codec.decode(JobStatus, found.value)

    def _commits(self, job: JobName) -> list[CommitRecord]:
        found = self.mirror.prefix(f"{self.cluster.keys.job(job)}checkpoints/")
        return [codec.decode(CommitRecord, item.value) for item in found]

    def _committed_in(self, job: JobName, attempt: int) -> bool:
        return any(record.attempt == attempt for record in self._commits(job))

    def _training(self, job: JobName) -> dict[int, RankState]:
        """Ranks of the current attempt that train."""
        attempt = self._status(job).attempt
        ranks = {}
        for item in self.mirror.prefix(self.cluster.keys.agents):
            if item.key.endswith(f"/workers/{job}"):
                snapshot = codec.decode(WorkerSnapshot, item.value)
                busy = (WorkerPhase.TRAINING, WorkerPhase.CHECKPOINTING, WorkerPhase.DONE)
                if snapshot.attempt == attempt and snapshot.phase in busy:
                    ranks |= {state.rank: state for state in snapshot.ranks}
        return ranks

    def _step(self, job: JobName) -> int:
        return max((state.step for state in self._training(job).values()), default=0)

    def _term(self) -> int:
        found = self.mirror.get(self.cluster.keys.leader)
        return found.create_revision if found is not None else 0

    def _on_changes(self, changes: tuple[Change, ...], revision: int) -> None:
        del revision
        for change in changes:
            parsed = self.cluster.keys.parse(change.key)
            if parsed is None or change.after is None:
                continue
            if parsed.kind == "event":
                event = codec.decode(EventRecord, change.after.value)
                self.story.say(f"  {parsed.job}: {event.reason}: {event.message}")
            elif parsed.kind == "leader":
                replica = codec.loads(change.after.value)["replica"]
                self.story.say(f"  leader {replica}, term {change.after.create_revision}")

    def _await(self, what: str, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not condition():
            if time.monotonic() > deadline:
                raise Failed(f"waited {LIMIT_S:g} s for {what}")
            time.sleep(0.01)

    # The job ---------------------------------------------------------------------------

    def _submit(self, name: str) -> JobName:
        changes = [f"name={name}", f"args=--steps {self.steps} --pause-ms {self.pause_ms}"]
        spec = jobfile.read(JOB_FILE, changes).spec
        self.client.submit(codec.encode(spec), uuid.uuid4().hex)
        return JobName(name)

    def _await_end(self, job: JobName) -> None:
        shown = 0.0

        def ended() -> bool:
            nonlocal shown
            if time.monotonic() - shown > 3:
                shown = time.monotonic()
                status = self._status(job)
                step = f"step {self._step(job)} of {self.steps}"
                self.story.say(f"  {job}: {status.phase}, attempt {status.attempt}, {step}")
            return self._status(job).phase in TERMINAL_PHASES

        self._await(f"{job} to end", ended)
        status = self._status(job)
        if status.phase != JobPhase.SUCCEEDED:
            raise Failed(f"{job} ended {status.phase}: {status.reason}")

    def _accuracy(self, job: JobName) -> str:
        for _ in range(100):
            chunk = self.client.read_log(job, 0, "stdout", offset=-4096)
            lines = [line for line in chunk.data.decode().splitlines() if line.startswith("accuracy")]
            if lines:
                return lines[-1]
            time.sleep(0.05)
        raise Failed(f"rank 0 of {job} printed no accuracy")

    def _report(self, calm: JobName, job: JobName, accuracy: str) -> None:
        wanted, found = (
            weights.digests(self.cluster.etcd, self.cluster.name, name, prefixes=("model", "optimizer"))
            for name in (calm, job)
        )
        print(f"\n{self._accuracy(job)} (undisturbed: {accuracy.split()[1]})\n")
        print(f"{'fault':24} {'until':16} {'took':>8}   steps repeated")
        for fault in self.faults:
            print(f"{fault.what:24} {fault.recovered:16} {fault.seconds:7.2f}s   {fault.steps_lost}")
        print(f"\n{'checkpoint':>10} {'step':>6} {'attempt':>8} {'bytes':>9}   manifest digest")
        for record in self._commits(job):
            print(
                f"{record.seq:10} {record.step:6} {record.attempt:8} {record.bytes:9}   {record.digest[:16]}"
            )
        if not wanted or wanted != found:
            different = sorted(name for name in wanted | found if wanted.get(name) != found.get(name))
            raise Failed(f"the final weights differ from the undisturbed run's: {', '.join(different)}")
        print(f"\nfinal weights: {len(found)} tensors, every bit equal to the undisturbed run's")
        for name, value in sorted(found.items())[:4]:
            print(f"  {name:32} {value[:32]}")
        print("  ...")

    def close(self) -> None:
        with contextlib.suppress(AttributeError):
            self.mirror.close()
        with contextlib.suppress(AttributeError):
            self.client.close()
        self.cluster.stop()


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Turn signals into KeyboardInterrupt once, so that cleaning up cannot be interrupted half-way."""

    def once(number: int, frame: object) -> None:
        del frame
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, once)
    yield


def main() -> int:
    parser = argparse.ArgumentParser(description="Train through faults and compare bit by bit.")
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument(
        "--pause-ms", type=float, default=8.0, help="rest after each step, to have time to watch"
    )
    parser.add_argument("--keep", type=Path, help="run in this folder and keep it")
    args = parser.parse_args()
    folder = args.keep or Path(tempfile.mkdtemp(prefix="dtrain-demo-"))
    demo = Demo(folder, args.steps, args.pause_ms, keep=args.keep is not None)
    with interruptible():
        try:
            demo.run()
        except Failed as error:
            print(f"\nFAILED: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("\ninterrupted: stopping everything", file=sys.stderr)
            return 130
        finally:
            demo.close()
    left = [process.pid for process in sweeping.find(folder)]
    if left:
        print(f"\nFAILED: processes are left behind: {left}", file=sys.stderr)
        return 1
    print(f"\nall of it held, in {time.monotonic() - demo.story.began:.0f} s; no process is left behind")
    return 0


if __name__ == "__main__":
    sys.exit(main())
