"""A job on a cluster with three etcd members, and what can be done to these members and the way to them.

Shared by the test of the whole list and by ``python -m tests.e2e.bars``.
"""

import contextlib
import itertools
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.contract.etcd.members import etcdctl, leader_of, settle
from tests.support.harness import Harness, say

from dtrain.local.proxy import Behaviour, TcpProxy
from dtrain.protocol.errors import DtrainError
from dtrain.protocol.ids import JobName
from dtrain.storage.etcd.port import Put, Txn
from dtrain.storage.etcd.transport import GatewayEtcd

TTL_S = 5
QUOTA_BYTES = 40 * 1024 * 1024
DISK_MIB = 260

_WON = re.compile(r"\bleading\b")


class Trouble:
    """One job in training, and the faults it must not notice."""

    def __init__(
        self,
        folder: Path,
        *,
        small_disk: bool = False,
        quota_bytes: int = 0,
        isolation_grace_s: float = 0.0,
    ) -> None:
        self.harness = Harness(folder, etcd_members=3, agents=2, slots=1, faults=True, ttl_s=TTL_S)
        self.etcd = self.harness.cluster.etcd_servers
        self.job = JobName("steady")
        self.disk: Path | None = None
        self._isolation_grace_s = isolation_grace_s
        self._holder: subprocess.Popen[bytes] | None = None
        if quota_bytes:
            self.etcd.flags = (f"--quota-backend-bytes={quota_bytes}",)
        if small_disk:
            self._put_on_small_disk(2, folder)

    def __enter__(self) -> "Trouble":
        self.harness.__enter__()
        try:
            self.harness.await_ready()
            args = f"--steps 10000000 --pause-ms 10 --stop-file {self.harness.stop_file('steady')}"
            self.harness.start(
                self.job, args, nproc=1, every_steps=40, isolation_grace_s=self._isolation_grace_s
            )
            self.harness.await_commit(self.job, after=0)
        except BaseException:
            self._end(RuntimeError)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._end(kind)

    def _end(self, kind: type[BaseException] | None) -> None:
        try:
            self.harness.__exit__(kind)
        finally:
            if self._holder is not None:
                self._holder.kill()
                self._holder.wait()

    def _put_on_small_disk(self, member: int, folder: Path) -> None:
        """Let one member's data lie on a disk of its own that nobody else sees."""
        self.disk = folder / "disk"
        self.disk.mkdir(parents=True)
        data = folder / "cluster" / "etcd" / f"etcd-{member}"
        data.mkdir(parents=True, mode=0o700)
        script = f"mount -t tmpfs -o size={DISK_MIB}m none '{self.disk}' && echo ready && exec sleep 3600"
        holder = subprocess.Popen(["unshare", "-m", "sh", "-c", script], stdout=subprocess.PIPE)
        self._holder = holder
        assert holder.stdout is not None
        with holder.stdout as answer:
            assert answer.readline() == b"ready\n"
        bind = f'mount --bind "{self.disk}" "{data}" && exec "$@"'
        enter = ("nsenter", f"--mount=/proc/{holder.pid}/ns/mnt", "sh", "-c", bind, "sh")
        self.etcd.prefixes[member] = enter

    @contextlib.contextmanager
    def full_disk(self) -> Iterator[None]:
        """Leave no byte on the small disk for so long."""
        assert self._holder is not None
        ballast = Path(f"/proc/{self._holder.pid}/root{self.disk}/ballast")
        try:
            with ballast.open("wb", buffering=0) as file:
                for size in (1 << 20, 4096):
                    with contextlib.suppress(OSError):
                        while True:
                            file.write(b"\0" * size)
            yield
        finally:
            ballast.unlink()

    # Eyes ---------------------------------------------------------------------------

    def leaderships(self) -> int:
        """How often any replica has begun to lead."""
        return sum(len(_WON.findall(self.harness.log(name))) for name in self.harness.cluster.coordinators)

    def said(self, event: str) -> int:
        """How often the coordinators have logged this."""
        return sum(self.harness.log(name).count(event) for name in self.harness.cluster.coordinators)

    def restarts(self) -> dict[str, int]:
        """How often each agent's process was started."""
        return {name: self.harness.log(name).count("agent started") for name in self.harness.cluster.agents}

    def answers(self) -> bool:
        """Whether etcd answers now."""
        with contextlib.suppress(DtrainError):
            self.harness.cluster.etcd.range(self.harness.keys.leader, deadline_s=1.0)
            return True
        return False

    def await_calm(self) -> None:
        """Wait until etcd answers and everyone is registered."""
        self.harness.until("etcd answers", self.answers)
        self.harness.await_ready()

    @contextlib.contextmanager
    def unnoticed(self, what: str) -> Iterator[None]:
        """Same ranks, same attempt, steps during it, a commit after it, no promise broken."""
        harness, job = self.harness, self.job
        self.await_calm()
        pids, attempt = harness.pids(job), harness.status(job).attempt
        restarts, leaderships = self.restarts(), self.leaderships()
        step, began = harness.last_step(job), time.monotonic()
        yield
        took_s = time.monotonic() - began
        steps = harness.last_step(job) - step
        back = time.monotonic()
        harness.until("etcd answers", self.answers)
        harness.await_commit(job)
        commit_s = time.monotonic() - back
        self.await_calm()
        assert harness.status(job).attempt == attempt, "the job was restarted"
        assert harness.pids(job) == pids, "ranks were replaced"
        assert self.restarts() == restarts, "an agent ended"
        assert steps >= took_s, f"only {steps} steps in {took_s:.1f} s"
        harness.assert_audited(catch_up=False)
        say(
            f"{what}: {steps} steps in {took_s:.1f} s, {self.leaderships() - leaderships} new leaderships, "
            f"a commit {commit_s:.1f} s after"
        )

    # Faults -------------------------------------------------------------------------

    def proxies(self, *names: str) -> list[TcpProxy]:
        """The links of these daemons to etcd, or of all."""
        links = self.harness.cluster.links
        return [proxy for name in names or links for proxy in links[name].proxies]

    def network(self, behaviour: Behaviour, *names: str) -> None:
        """Treat the links of these daemons, or of all, like this."""
        for proxy in self.proxies(*names):
            proxy.set(behaviour)

    def lose_quorum(self, away_s: float) -> None:
        """Kill the leading member and another one for so long."""
        first = leader_of(self.etcd)
        victims = (first, (first + 1) % 3)
        for index in victims:
            self.etcd.kill(index)
        time.sleep(away_s)
        for index in victims:
            self.etcd.start_member(index)

    def compact(self) -> None:
        """Forget all history but the present."""
        revision = self.harness.cluster.etcd.range(self.harness.keys.leader).revision
        etcdctl(self.etcd, "compact", "--physical", str(revision))

    def fill(self) -> None:
        """Write until etcd has no space."""
        for _ in self._written(1_000_000):
            pass

    def write_until_dead(self, member: int) -> None:
        """Write until this member finds no byte on its disk; it may be the leading one."""
        for number in self._written(100_000):
            if not self.etcd.members[member].is_running:
                return
            assert number < 200, "the disk is not full"

    def _written(self, size: int) -> Iterator[int]:
        client = GatewayEtcd(self.etcd.endpoints)
        chunk = os.urandom(size)
        try:
            for number in itertools.count():
                settle(client, Txn((), (Put(f"/elsewhere/{number % 3}", chunk),)))
                yield number
        finally:
            client.close()

    def free(self) -> None:
        """What the operator does about it."""
        self.compact()
        for member in range(3):
            etcdctl(self.etcd, "defrag", member=member)
        etcdctl(self.etcd, "alarm", "disarm")

    def cli(self, *words: str) -> "subprocess.CompletedProcess[str]":
        """Run a dtrain command."""
        addresses = ",".join(self.harness.cluster.addresses)
        command = [sys.executable, "-m", "dtrain.cli", *words, "--coordinators", addresses]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
