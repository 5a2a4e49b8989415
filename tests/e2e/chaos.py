# ruff: noqa: T201 - what it prints is what it is for
"""One long job under random faults, and its weights compared with an undisturbed run, bit by bit.

    python -m tests.e2e.chaos                      # 100 faults, a random seed
    python -m tests.e2e.chaos --seed 7 --kills 20
    python -m tests.e2e.chaos --minutes 60 --kills 100000

The engine is that of ``dtrain chaos``: kills, freezes, cut and slow links, a
full etcd. The seed fixes what happens and how patiently; where the job stands
then is up to the machine. Half of the faults wait until all ranks train again,
the others come at any moment, also into a recovery. In the end the job must
have SUCCEEDED with the right weights, the history of etcd must pass the auditor,
and nothing may be left behind. Exit code 0: all of it held.
"""

import argparse
import contextlib
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.support.harness import Harness

from dtrain.local.breaker import FillingBreaker, LocalBreaker
from dtrain.local.chaos import Chaos
from dtrain.local.chaos_plan import Settings
from dtrain.local.chaos_report import Report
from dtrain.local.faults import Kind
from dtrain.local.filling import Filling
from dtrain.local.sight import Eyes
from dtrain.protocol.errors import DtrainError
from dtrain.protocol.ids import JobName

QUOTA_BYTES = 96 * 1024 * 1024
"""Of etcd: some seconds to fill, and far more than a run writes."""


def broken_by(harness: Harness) -> FillingBreaker:
    """Return what breaks the harness's cluster; history is compacted only once it was audited."""

    def seen(revision: int) -> int:
        harness.assert_audited()
        return revision

    cluster = harness.cluster
    return FillingBreaker(LocalBreaker(cluster), Filling(cluster.endpoints, cluster.keys, compact_up_to=seen))


def run(
    seed: int,
    kills: int,
    *,
    agents: int,
    minutes: float,
    folder: Path,
    pause_ms: float = 40.0,
    kinds: tuple[Kind, ...] = tuple(Kind),
) -> Report:
    """Do the whole of it.

    Raises:
        AssertionError: something that should have held did not.
    """
    began = time.monotonic()

    def say(text: str) -> None:
        print(text, flush=True)

    settings = Settings(seed, kinds=kinds, every_s=2.0, wait=0.5, count=kills, for_s=60 * minutes)
    shape = {"agents": agents, "etcd_members": 3, "faults": True, "etcd_quota_bytes": QUOTA_BYTES}
    with Harness(folder, name="chaos", **shape) as harness:
        harness.await_ready()
        args = f"--steps 100000000 --pause-ms {pause_ms} --stop-file {harness.stop_file('chaos')}"
        job = harness.start("chaos", args, max_restarts=1_000_000)
        say(f"training on {agents} agents; seed {seed}")
        report = strike(harness, settings, say)
        assert report.ok, "\n".join(report.lines())
        assert_same_bits(harness, job)
        say("every bit of the weights is equal to the undisturbed run's")
        harness.assert_clean()
        say(f"no violation, nothing is left over; {time.monotonic() - began:.0f} s")
        return report


def strike(harness: Harness, settings: Settings, say: Callable[[str], None] = print) -> Report:
    """Storm, then calm, on a harness's cluster; print what came of it."""
    breaker = broken_by(harness)
    eyes = Eyes(harness.cluster.etcd, harness.keys)
    chaos = Chaos(settings, eyes, breaker, members=harness.cluster.members, say=say)
    try:
        chaos.begin()
        chaos.storm()
        chaos.calm()
    finally:
        breaker.close()
        report = chaos.report()
        print("\n".join(report.lines()), flush=True)
    return report


def assert_same_bits(harness: Harness, job: JobName) -> None:
    """End the job, run the same number of steps undisturbed, and compare all of its state."""
    harness.stop_file(job).touch()
    harness.await_end(job)
    steps = int(harness.commits(job)[-1].step)
    harness.assert_succeeded(job, steps)
    calm = harness.submit("calm", f"--steps {steps}", every_steps=0)
    harness.assert_succeeded(calm, steps)
    wanted, found = harness.digests(calm), harness.digests(job)
    assert found, "the last checkpoint holds no tensors"
    assert wanted == found, f"other weights: {sorted(k for k in wanted if wanted[k] != found.get(k))}"


def main() -> int:
    """Parse, run, and tell how it went."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seed", type=int, help="default: a random one")
    parser.add_argument("--kills", type=int, default=100, help="faults of any kind")
    parser.add_argument("--kinds", default=",".join(Kind), help="default: %(default)s")
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
        kinds = tuple(Kind(word) for word in args.kinds.split(","))
        try:
            run(seed, args.kills, agents=args.agents, minutes=args.minutes, folder=folder, kinds=kinds)
        except (AssertionError, DtrainError) as error:
            print(f"\nFAILED with seed {seed}: {error}", file=sys.stderr)
            return 1
    print(f"\nall of it held; seed {seed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
