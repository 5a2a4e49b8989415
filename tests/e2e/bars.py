"""The bars of an etcd in trouble, with their figures: ``python -m tests.e2e.bars watch|quorum``.

``watch``: events through member kills, proxies that re-chunk and cut streams, and
compaction; each is delivered exactly once or relisted. ``quorum``: a job trains
while etcd has no quorum. The suite runs the same code with smaller numbers.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from tests.contract.etcd.members import settle
from tests.contract.etcd.support import binary, compact
from tests.e2e.trouble import Trouble
from tests.support.harness import SCRIPTS

from dtrain.local import ports
from dtrain.local.etcd import EtcdCluster
from dtrain.local.proxy import TcpProxy
from dtrain.runtime.clock import iso
from dtrain.storage.etcd.mirror import Change, Mirror
from dtrain.storage.etcd.port import Compare, Get, Put, Target, Txn, prefix_end
from dtrain.storage.etcd.transport import GatewayEtcd

Tell = Callable[[str], None]

PREFIX = "/bar/"
COUNTER = "/bar-writes"
KEYS = 400
EVENTS_PER_TXN = 50
FAULT_EVERY_EVENTS = 500
BEHIND_MAX = 200
STALL_S_MAX = 60.0


@dataclass(slots=True)
class WatchFigures:
    """What came of the events."""

    written: int = 0
    delivered: int = 0
    superseded: int = 0
    """A list told of a later value of the same key instead."""
    lost: int = 0
    repeated: int = 0
    lists: int = -1
    """After the first one."""
    kills: int = 0
    rechunks: int = 0
    cuts: int = 0
    compactions: int = 0
    stall_s_max: float = 0.0
    took_s: float = 0.0

    def __str__(self) -> str:
        return (
            f"{self.written} events written in {self.took_s:.0f} s: {self.delivered} delivered once, "
            f"{self.superseded} superseded in {self.lists} lists, {self.lost} lost, "
            f"{self.repeated} repeated; {self.kills} members killed, {self.rechunks} re-chunkings, "
            f"{self.cuts} cuts, {self.compactions} compactions; longest stall {self.stall_s_max:.1f} s"
        )


class _Judge:
    """Listens to a mirror. Each key's value begins with a serial number that grows by one."""

    def __init__(self, figures: WatchFigures) -> None:
        self._figures = figures
        self._last: dict[str, int] = {}
        self._missed = 0
        self.heard_at = time.monotonic()
        self.done = threading.Event()

    def on_changes(self, changes: tuple[Change, ...], _revision: int) -> None:
        # Only a list may jump over values, and it says so after these.
        self._figures.lost += self._missed
        self._missed = 0
        self.heard_at = time.monotonic()
        for change in changes:
            serial = int(change.after.value.split(b" ")[0]) if change.after else 0
            last = self._last.get(change.key, 0)
            if serial <= last:
                self._figures.repeated += 1
                continue
            self._figures.delivered += 1
            self._missed += serial - last - 1
            self._last[change.key] = serial

    def on_relist(self, _revision: int) -> None:
        self._figures.lists += 1
        self._figures.superseded += self._missed
        self._missed = 0

    def settle(self) -> None:
        self._figures.lost += self._missed
        self._missed = 0


class WatchBar:
    """One mirror behind proxies, one writer beside them, and a fault every few hundred events."""

    def __init__(self, cluster: EtcdCluster, stack: ExitStack) -> None:
        self.figures = WatchFigures()
        self._cluster = cluster
        self._rng = random.Random(7)
        self._proxies = [stack.enter_context(TcpProxy(endpoint)) for endpoint in cluster.endpoints]
        self._writer = stack.enter_context(closing(GatewayEtcd(cluster.endpoints)))
        self._serials = dict.fromkeys((f"{PREFIX}{number:04}" for number in range(KEYS)), 0)
        self._down: int | None = None
        self._writes = 0
        self._judge = _Judge(self.figures)
        reader = stack.enter_context(closing(GatewayEtcd([proxy.endpoint for proxy in self._proxies])))
        self._failures: list[Exception] = []
        self._mirror = stack.enter_context(
            closing(
                Mirror(
                    reader,
                    PREFIX,
                    on_changes=self._judge.on_changes,
                    on_relist=self._judge.on_relist,
                    on_failure=self._failures.append,
                    progress_interval_s=1.0,
                )
            )
        )

    def run(self, events: int, tell: Tell) -> None:
        """Write so many events through the faults, and wait until all of them are accounted for."""
        self._mirror.start()
        assert self._mirror.wait_for(1, 15.0)
        faults = 0
        while self.figures.written < events:
            self._write()
            self._look()
            if self.figures.written >= (faults + 1) * FAULT_EVERY_EVENTS:
                self._break(faults)
                faults += 1
                if faults % 20 == 0:
                    tell(str(self.figures))
        self._restore()
        for proxy in self._proxies:
            proxy.passing()
        found = self._writer.range(PREFIX, prefix_end(PREFIX))
        assert self._mirror.wait_for(max(kv.mod_revision for kv in found.items), STALL_S_MAX), "it hangs"
        # One more list or batch may be on its way to the judge.
        deadline = time.monotonic() + 10.0
        figures = self.figures
        while figures.delivered + figures.superseded < figures.written and time.monotonic() < deadline:
            time.sleep(0.05)
        self._judge.settle()
        assert tuple(self._mirror.prefix(PREFIX)) == found.items, "the mirror is not what etcd holds"
        assert not self._failures

    def _write(self) -> None:
        puts = []
        for key in self._rng.sample(sorted(self._serials), EVENTS_PER_TXN):
            self._serials[key] += 1
            puts.append(Put(key, b"%d %s" % (self._serials[key], b"x" * self._rng.randrange(20, 300))))
        # A write that times out may come later: sent again without a guard, it would be events of its own.
        guard = Compare(COUNTER, Target.VERSION, self._writes)
        settle(self._writer, Txn((guard,), (*puts, Put(COUNTER, b"")), (Get(COUNTER),)))
        self._writes += 1
        self.figures.written += len(puts)

    def _look(self) -> None:
        """Wait while the mirror is far behind: what a list passes over is no evidence."""
        figures = self.figures
        while True:
            stall_s = time.monotonic() - self._judge.heard_at
            figures.stall_s_max = max(figures.stall_s_max, stall_s)
            assert stall_s < STALL_S_MAX, f"nothing has come for {stall_s:.0f} s: {figures}"
            if figures.written - figures.delivered - figures.superseded <= BEHIND_MAX:
                return
            time.sleep(0.005)

    def _break(self, number: int) -> None:
        self._restore()
        rng, figures = self._rng, self.figures
        match number % 5:
            case 0:
                figures.kills += 1
                self._down = rng.randrange(3)
                self._cluster.kill(self._down)
            case 1:
                figures.rechunks += 1
                for proxy in self._proxies:
                    proxy.rechunk(rng.choice((1, 3, 64, 1000)), to_server=True)
            case 2:
                figures.cuts += 1
                for proxy in self._proxies:
                    proxy.close_after(rng.randrange(500, 20_000))
                # In the middle of a message; but for ever, no backlog would come through whole.
                self._write()
                self._write()
                time.sleep(0.2)
                for proxy in self._proxies:
                    proxy.passing()
            case 3:
                figures.cuts += 1
                for proxy in self._proxies:
                    proxy.passing()
                    proxy.reset_connections()
            case _:
                figures.compactions += 1
                for proxy in self._proxies:
                    proxy.cut()
                self._write()
                self._write()
                compact(self._cluster.endpoints[0], self._writer.range(PREFIX).revision)
                for proxy in self._proxies:
                    proxy.passing()

    def _restore(self) -> None:
        if self._down is not None:
            self._cluster.start_member(self._down)
            self._cluster.wait_ready()
            self._down = None


def watch(folder: Path, events: int, tell: Tell = lambda _line: None) -> WatchFigures:
    """Send ``events`` events through every fault and count what arrives.

    Raises:
        AssertionError: one was lost or repeated, or the mirror hung.
    """
    began = time.monotonic()
    with ExitStack() as stack:
        cluster = stack.enter_context(
            EtcdCluster(folder / "etcd", size=3, binary=binary("3.5"), fsync=False, progress_s=1)
        )
        bar = WatchBar(cluster, stack)
        bar.run(events, tell)
    figures = bar.figures
    figures.took_s = time.monotonic() - began
    assert figures.lost == figures.repeated == 0, str(figures)
    assert figures.delivered + figures.superseded == figures.written, str(figures)
    assert min(figures.kills, figures.rechunks, figures.cuts, figures.compactions) > 0, str(figures)
    return figures


@dataclass(frozen=True, slots=True)
class QuorumFigures:
    """What a job did around the loss of the quorum."""

    away_s: float
    before: "tuple[Slice, ...]"
    during: "tuple[Slice, ...]"
    after: "tuple[Slice, ...]"
    commit_s: float
    """From the return of the members to the first commit."""

    @property
    def change(self) -> float:
        """How much slower (< 0) the steps were while the quorum was away, as a share of the control's."""
        usual = mean(one.share for one in self.before + self.after)
        return (mean(one.share for one in self.during) - usual) / usual

    @property
    def noise(self) -> float:
        """How far a slice with a quorum is from the mean of such slices, at most, as a share."""
        shares = [one.share for one in self.before + self.after]
        return max(abs(share - mean(shares)) for share in shares) / mean(shares)

    def __str__(self) -> str:
        def rates(slices: "tuple[Slice, ...]") -> str:
            job, control = mean(one.job for one in slices), mean(one.control for one in slices)
            return f"{job:.1f} ({control:.1f})"

        return (
            f"quorum away for {self.away_s:.0f} s: steps/s of the job (of torchrun beside it) "
            f"{rates(self.before)} before, {rates(self.during)} during, {rates(self.after)} after: "
            f"{self.change:+.1%} against torchrun, slices differ by up to {self.noise:.1%}; "
            f"no rank restarted; first commit {self.commit_s:.1f} s after it returned"
        )


@dataclass(frozen=True, slots=True)
class Slice:
    """Steps per second of the job and of a control, at the same time."""

    job: float
    control: float

    @property
    def share(self) -> float:
        return self.job / self.control


class Control:
    """The same script under torchrun: what the machine gives it, whatever happens to etcd."""

    def __init__(self, folder: Path) -> None:
        self._marks = folder / "control"
        self._log = (folder / "control.log").open("wb")
        words = f"--steps 10000000 --pause-ms 10 --marks {self._marks}".split()
        port = str(ports.reserve(1)[0])
        launch = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
        command = [sys.executable, *launch, str(SCRIPTS / "train.py"), *words]
        env = {key: value for key, value in os.environ.items() if not key.startswith("DTRAIN_")}
        self._process = subprocess.Popen(
            command, stdout=self._log, stderr=self._log, start_new_session=True, env=env
        )

    def __enter__(self) -> "Control":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(20.0)
        self._process.kill()
        self._process.wait()
        # Its ranks are in sessions of their own: a torchrun that did not end them leaves them behind.
        for path in self._marks.glob("*"):
            pid = int(path.name.rpartition("-")[2])
            with suppress(OSError):
                if str(self._marks) in Path(f"/proc/{pid}/cmdline").read_text():
                    os.kill(pid, signal.SIGKILL)
        self._log.close()

    def steps(self) -> int:
        """How many steps its first rank has completed."""
        return sum(path.read_bytes().count(b"\n") for path in self._marks.glob("0-*"))


def measure(trouble: Trouble, control: Control, for_s: float) -> Slice:
    """Measure both over the same time."""
    job, other, began = trouble.harness.last_step(trouble.job), control.steps(), time.monotonic()
    time.sleep(for_s)
    took_s = time.monotonic() - began
    return Slice((trouble.harness.last_step(trouble.job) - job) / took_s, (control.steps() - other) / took_s)


def quorum(folder: Path, away_s: float, tell: Tell = lambda _line: None) -> QuorumFigures:
    """Take the quorum away from a job in training for ``away_s``.

    Raises:
        AssertionError: a rank or the job was restarted, or a promise broken.
    """
    slice_s = max(3.0, min(10.0, away_s / 6))
    slices = max(2, int(away_s / slice_s))
    # Beyond this grace ranks would end in order, which is another promise.
    grace_s = max(600.0, 3 * away_s)
    with (
        Control(folder) as control,
        Trouble(folder, isolation_grace_s=grace_s) as trouble,
        trouble.unnoticed("quorum lost"),
    ):
        harness, job = trouble.harness, trouble.job
        harness.until("the control trains", lambda: control.steps() > 10)

        def slices_now() -> tuple[Slice, ...]:
            return tuple(measure(trouble, control, slice_s) for _ in range(slices))

        tell("before")
        before = slices_now()
        during: list[Slice] = []
        thread = threading.Thread(target=lambda: during.extend(slices_now()), daemon=True)
        thread.start()
        tell("away")
        trouble.lose_quorum(slice_s * slices)
        back, back_at = time.monotonic(), iso(time.time())
        thread.join()
        harness.until(
            "a checkpoint is committed",
            lambda: any(record.committed_at > back_at for record in harness.commits(job)),
        )
        commit_s = time.monotonic() - back
        tell("after")
        after = slices_now()
    return QuorumFigures(slice_s * slices, before, tuple(during), after, commit_s)


def main() -> int:
    """Print the figures of one bar; 1 if it is not met."""
    parser = argparse.ArgumentParser(prog="python -m tests.e2e.bars", description=__doc__)
    parser.add_argument("bar", choices=("watch", "quorum"))
    parser.add_argument("--events", type=int, default=100_000)
    parser.add_argument("--away", type=float, default=60.0, help="s without a quorum; 600 is worth trying")
    args = parser.parse_args()

    def tell(line: str) -> None:
        sys.stderr.write(f"{line}\n")

    with tempfile.TemporaryDirectory(prefix="dtrain-bars-") as folder:
        if args.bar == "watch":
            sys.stdout.write(f"{watch(Path(folder), args.events, tell)}\n")
            return 0
        figures = quorum(Path(folder), args.away, tell)
    sys.stdout.write(f"{figures}\n")
    slower = -figures.change > max(0.1, figures.noise)
    return int(slower or figures.commit_s > 10.0)


if __name__ == "__main__":
    sys.exit(main())
