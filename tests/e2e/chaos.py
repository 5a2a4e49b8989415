# ruff: noqa: T201 - what it prints is what it is for
"""One long job under random kills, and its weights compared with an undisturbed run, bit by bit.

    python -m tests.e2e.chaos                      # 100 kills, a random seed
    python -m tests.e2e.chaos --seed 7 --kills 20
    python -m tests.e2e.chaos --minutes 60 --kills 100000

The seed fixes what is killed and how patiently; where the job stands when it
happens is up to the machine. Half of the kills wait until all ranks train
again, the others come at any moment, also into a recovery. In the end the job
must have SUCCEEDED with the right weights, the history of etcd must pass the
auditor, and nothing may be left behind. Exit code 0: all of it held.
"""

import argparse
import contextlib
import heapq
import random
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.harness import Harness

from dtrain.protocol.errors import DtrainError, NotFound
from dtrain.protocol.ids import JobName

WEIGHTS = {
    "rank": 5,
    "agent": 3,
    "launcher": 2,
    "machine": 3,
    "leader": 2,
    "coordinator": 1,
    "coordinator guardian": 2,
    "agent guardian": 2,
    "frozen agent": 2,
    "frozen coordinator": 1,
}
"""How often each kind is drawn."""

AWAY_S = (0.5, 7.0)
"""How long something that was killed or frozen stays away: shorter and longer than a lease."""

HASTE_S = (0.05, 5.0)
"""How soon the next kill follows one that is not waited for."""

REST_S = 4.0
"""Training gets up to this long after a recovery, so that there is progress to lose."""

RECOVERY_S_MAX = 120.0
RANKS = 4


@dataclass
class Chaos:
    """The cluster, the job, and the book of what was done to them."""

    harness: Harness
    job: JobName
    seed: int
    rng: random.Random = field(init=False)
    began: float = field(default_factory=time.monotonic)
    counts: Counter[str] = field(default_factory=Counter)
    recoveries: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    _away: list[tuple[float, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.began:7.1f}s  {text}", flush=True)

    def run(self, kills: int, minutes: float) -> None:
        """Kill until enough was killed, then make everything whole again."""
        end = time.monotonic() + 60 * minutes
        while self.counts.total() < kills and time.monotonic() < end:
            kind = self.rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
            hasty, haste_s, rest_s = (
                self.rng.random() < 0.5,
                self.rng.uniform(*HASTE_S),
                self.rng.uniform(0, REST_S),
            )
            what = self._kill(kind)
            if what is None:
                self._wait(0.2)
                continue
            at = time.monotonic()
            self.counts[kind] += 1
            status = self.harness.status(self.job)
            where = f"attempt {status.attempt}, {status.phase}, step {self.harness.last_step(self.job)}"
            self.say(f"{self.counts.total():4} {what}  ({where})")
            if hasty:
                self._wait(haste_s)
                continue
            self._await_recovery(at + 0.1)
            took_s = time.monotonic() - at
            self.recoveries[kind].append(took_s)
            self.say(f"     recovered after {took_s:.2f} s")
            self._wait(rest_s)
        self.say("no more kills: everything comes back")
        while self._away:
            self._wait(0.2)
        self.harness.await_ready()
        self._await_recovery(time.monotonic())

    def table(self) -> str:
        """Count and recovery times of each kind."""
        lines = [f"{'killed':22} {'times':>5} {'waited for':>10} {'median':>8} {'max':>8}"]
        for kind in WEIGHTS:
            found = self.recoveries[kind]
            shown = f"{statistics.median(found):7.2f}s {max(found):7.2f}s" if found else f"{'-':>8} {'-':>8}"
            lines.append(f"{kind:22} {self.counts[kind]:5} {len(found):10} {shown}")
        everything = [took for found in self.recoveries.values() for took in found]
        if everything:
            median, longest = statistics.median(everything), max(everything)
            lines.append(
                f"{'all':22} {self.counts.total():5} {len(everything):10} {median:7.2f}s {longest:7.2f}s"
            )
        return "\n".join(lines)

    # Kills --------------------------------------------------------------------------

    def _kill(self, kind: str) -> str | None:
        """Kill one thing of a kind; None if there is none to kill just now."""
        cluster = self.harness.cluster
        away_s = self.rng.uniform(*AWAY_S)
        pick = self.rng.random()
        try:
            match kind:
                case "rank":
                    rank = int(pick * RANKS)
                    return f"rank {rank} (pid {cluster.kill_rank(rank, job=self.job)})"
                case "agent":
                    return f"agent process of {(name := self._member(pick))} (pid {cluster.kill_agent(name)})"
                case "launcher":
                    return f"launcher of {(name := self._member(pick))} (pid {cluster.kill_launcher(name)})"
                case "machine":
                    name = self._member(pick)
                    cluster.power_cut(name)
                    return f"machine {name}, {self._bring_back(name, away_s)}"
                case "leader":
                    return f"leader {cluster.kill_leader_process()}"
                case "coordinator":
                    name = self._coordinator(pick)
                    return f"coordinator {name} (pid {cluster.kill_process(name)})"
                case "coordinator guardian":
                    name = self._coordinator(pick)
                    cluster.kill_guardian(name)
                    return f"guardian of coordinator {name}, {self._bring_back(name, away_s)}"
                case "frozen agent" | "frozen coordinator":
                    name = self._member(pick) if kind == "frozen agent" else self._coordinator(pick)
                    cluster.freeze(name)
                    return f"froze {name} without its ranks, {self._bring_back(name, away_s)}"
                case _:
                    name = self._member(pick)
                    cluster.kill_guardian(name)
                    return f"guardian of agent {name}, {self._bring_back(name, away_s)}"
        except NotFound:
            return None

    def _member(self, pick: float) -> str:
        """A machine of the job; between attempts any."""
        members = [member.agent for member in self.harness.status(self.job).members]
        names: list[str] = [str(name) for name in members] or sorted(self.harness.cluster.agents)
        return names[int(pick * len(names))]

    def _coordinator(self, pick: float) -> str:
        names = sorted(self.harness.cluster.coordinators)
        return names[int(pick * len(names))]

    def _bring_back(self, name: str, away_s: float) -> str:
        if name not in [known for _, known in self._away]:
            heapq.heappush(self._away, (time.monotonic() + away_s, name))
        return f"back in {away_s:.1f} s"

    # Waiting ------------------------------------------------------------------------

    def _tend(self) -> None:
        """Start, or thaw, what has been away for long enough."""
        while self._away and self._away[0][0] <= time.monotonic():
            _, name = heapq.heappop(self._away)
            self.harness.cluster.thaw(name)
            self.harness.cluster.daemon(name).start()

    def _wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self._tend()
            time.sleep(0.05)

    def _await_recovery(self, since: float) -> None:
        """Wait until there is a leader and every rank of the current attempt does steps."""

        def trains() -> bool:
            self._tend()
            if time.monotonic() < since or not self.harness.term():
                return False
            ranks = self.harness.training(self.job)
            if len(ranks) != RANKS:
                return False
            return all(
                self.harness.newest_mark(self.job, int(rank), state.pid) > since
                for rank, state in ranks.items()
            )

        self.harness.until("all ranks train again", trains, RECOVERY_S_MAX)


def run(seed: int, kills: int, *, agents: int, minutes: float, folder: Path, pause_ms: float = 40.0) -> Chaos:
    """Do the whole of it.

    Raises:
        AssertionError: something that should have held did not.
    """
    with Harness(folder, name="chaos", agents=agents) as harness:
        harness.await_ready()
        args = f"--steps 100000000 --pause-ms {pause_ms} --stop-file {harness.stop_file('chaos')}"
        job = harness.start("chaos", args, max_restarts=1_000_000)
        chaos = Chaos(harness, job, seed)
        chaos.say(f"training on {agents} agents; seed {seed}")
        try:
            chaos.run(kills, minutes)
        finally:
            print(chaos.table(), flush=True)
        harness.stop_file(job).touch()
        harness.await_end(job)
        steps = int(harness.commits(job)[-1].step)
        harness.assert_succeeded(job, steps)
        status = harness.status(job)
        chaos.say(f"{status.phase} at step {steps}, in attempt {status.attempt}")
        calm = harness.submit("calm", f"--steps {steps}", every_steps=0)
        harness.assert_succeeded(calm, steps)
        wanted, found = harness.digests(calm), harness.digests(job)
        assert found, "the last checkpoint holds no tensors"
        assert wanted == found, f"other weights: {sorted(k for k in wanted if wanted[k] != found.get(k))}"
        chaos.say(f"{len(found)} tensors, every bit equal to the undisturbed run's")
        harness.assert_clean()
        chaos.say("the auditor finds no violation in etcd's history; no process, blob or lease is left over")
        return chaos


def main() -> int:
    """Parse, run, and tell how it went."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seed", type=int, help="default: a random one")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--agents", type=int, default=4, help="machines; the job needs two")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after this long")
    parser.add_argument("--folder", type=Path, help="keep everything there (default: a temporary folder)")
    args = parser.parse_args()
    seed = args.seed if args.seed is not None else random.SystemRandom().randrange(1_000_000)
    print(f"seed {seed}: python -m tests.e2e.chaos --seed {seed} --kills {args.kills}", flush=True)
    with contextlib.ExitStack() as stack:
        folder = args.folder
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dtrain-chaos-")))
        try:
            run(seed, args.kills, agents=args.agents, minutes=args.minutes, folder=folder)
        except (AssertionError, DtrainError) as error:
            print(f"\nFAILED with seed {seed}: {error}", file=sys.stderr)
            return 1
    print(f"\nall of it held; seed {seed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
