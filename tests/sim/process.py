"""Processes that crash, freeze and thaw, their clocks, and the guardians that hold their leases."""

from collections.abc import Callable
from typing import Any

from dtrain.protocol.errors import NotFound
from dtrain.storage.etcd.session import FixedSession
from tests.sim.etcd import EtcdAccess
from tests.sim.scheduler import Event, Scheduler, Task

WALL_AT_START = 1_700_000_000.0
DEMOTE_SHARE, KILL_SHARE, HANG_SHARE = 0.70, 0.85, 0.4


class SimClock:
    """A node's monotonic clock: its own origin, a rate that is a little off, and maybe a stop."""

    def __init__(self, scheduler: Scheduler, offset_s: float, rate: float) -> None:
        self._scheduler = scheduler
        self._offset_s = offset_s
        self._rate = rate
        self._stopped_at: float | None = None
        self.wall_offset_s = 0.0
        """How far somebody has set the wall clock; nothing that matters may depend on it."""

    def monotonic(self) -> float:
        now = self._scheduler.now if self._stopped_at is None else self._stopped_at
        return self._offset_s + self._rate * now

    def wall(self) -> float:
        return WALL_AT_START + self.wall_offset_s + self._scheduler.now

    def global_at(self, local: float) -> float:
        """When, in the scheduler's time, this clock shows ``local``."""
        return (local - self._offset_s) / self._rate

    def stop(self) -> None:
        """The machine is paused with its clocks: it will not know that time has passed."""
        if self._stopped_at is None:
            self._stopped_at = self._scheduler.now

    def go_on(self) -> None:
        if self._stopped_at is not None:
            self._offset_s -= self._rate * (self._scheduler.now - self._stopped_at)
            self._stopped_at = None


class Process:
    """One life of one process. Everything that happens in it enters through ``post``."""

    def __init__(self, scheduler: Scheduler, name: str, on_bug: Callable[[str, BaseException], None]) -> None:
        self.scheduler = scheduler
        self.name = name
        self.alive = True
        self.frozen = False
        self._held: list[Callable[[], None]] = []
        self._tasks: list[Task] = []
        self._on_bug = on_bug

    def is_alive(self) -> bool:
        return self.alive

    def post(self, call: Callable[[], None]) -> None:
        """Run ``call`` in the process: now, when it thaws, or never."""
        if not self.alive:
            return
        if self.frozen:
            self._held.append(call)
            return
        try:
            call()
        except Exception as error:  # noqa: BLE001 - a bug of what runs here ends the run with a report
            self._on_bug(self.name, error)

    def later(self, delay_s: float, call: Callable[[], None]) -> Event:
        return self.scheduler.after(delay_s, lambda: self.post(call))

    def spawn(self, body: Callable[[], None], name: str) -> Task:
        """Run blocking code as a task of this process."""
        self._tasks = [task for task in self._tasks if not task.done]

        def guarded() -> None:
            try:
                body()
            except Exception as error:  # noqa: BLE001 - as in post
                self._on_bug(f"{self.name}/{name}", error)

        task = self.scheduler.spawn(guarded, self.is_alive, name)
        if not task.done:
            self._tasks.append(task)
        return task

    def stop(self) -> None:
        """It calls ``_exit``: nothing happens in it any more; its parent will see it."""
        self.alive = False
        self._held.clear()

    def die(self) -> None:
        self.alive = False
        self._held.clear()
        tasks, self._tasks = self._tasks, []
        current = self.scheduler._current
        for task in tasks:
            if task is not current:
                task.kill()

    def freeze(self) -> None:
        self.frozen = True

    def thaw(self) -> None:
        self.frozen = False
        held, self._held = self._held, []
        for call in held:
            self.post(call)


class Guardian:
    """Holds a lease for a child: grants, renews, kills before it revokes, restarts.

    ``keep_lease`` is the agents' policy: a dead child is restarted under the same lease.
    ``start`` builds a child for a session; ``stop_child`` ends it for good.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        name: str,
        access: EtcdAccess,
        clock: SimClock,
        *,
        ttl_s: int,
        keep_lease: bool,
        start: Callable[[FixedSession], Process],
        ended: Callable[[], None],
    ) -> None:
        self.scheduler = scheduler
        self.name = name
        self.access = access
        self.clock = clock
        self.ttl_s = ttl_s
        self.keep_lease = keep_lease
        self._start = start
        self._ended = ended
        self.process = Process(scheduler, f"{name}/guardian", _raise)
        access.post = self.process.post
        access.alive = self.process.is_alive
        self.session: FixedSession | None = None
        self.child: Process | None = None
        self._lease = 0
        self._generation = 0
        self._sent_at = 0.0
        self._candidate = 0
        self._granting = False
        self.stopped = False
        self._grant()

    # Its own life.

    def die(self) -> None:
        """SIGKILL: the kernel kills the child with it; the lease runs out by itself."""
        self._end_child()
        self.process.die()

    def freeze(self, *, clocks: bool) -> None:
        """SIGSTOP to both, or a paused machine whose clocks stop too."""
        if clocks:
            self.clock.stop()
        self.process.freeze()
        if self.child is not None:
            self.child.freeze()

    def thaw(self) -> None:
        self.clock.go_on()
        # Who runs first after a pause is chance: the child may act before its guardian looks.
        first, second = self.child, self.process
        if self.scheduler.chance(0.5):
            first, second = self.process, self.child
        for process in (first, second):
            if process is not None and process.alive:
                process.thaw()

    def freeze_child(self) -> None:
        """The child hangs; its guardian notices after a share of the TTL and kills it."""
        child = self.child
        if child is None:
            return
        child.freeze()

        def kill() -> None:
            if child.alive and child.frozen:
                self.child_ended("its heart stood still")

        self.process.later(HANG_SHARE * self.ttl_s, kill)

    # The child.

    def child_ended(self, why: str) -> None:
        """The child is gone, or is to go: dead first, then whatever follows for the lease."""
        self.scheduler.log(self.name, "child ended", why=why)
        self._end_child()
        if not self.keep_lease:
            self._give_up()
        self.process.later(self.scheduler.rng.uniform(0.1, 1.0), self._restart)

    def stop(self, why: str) -> None:
        """The child ended with a configuration error: it is not restarted, an operator is needed."""
        self.scheduler.log(self.name, "stopped for good", why=why)
        self.stopped = True
        self._end_child()
        self._give_up()

    def _end_child(self) -> None:
        child, self.child = self.child, None
        if child is not None:
            child.die()
            self._ended()

    def _restart(self) -> None:
        if self.child is not None or self.stopped:
            return
        if self._lease and self.keep_lease:
            self._start_child()
        elif not self._lease:
            self._grant()

    def _start_child(self) -> None:
        assert self._lease
        self.session = FixedSession(self._lease, ttl_s=self.ttl_s, deadline=self._demote_at())
        self.session.generation = self._generation
        self.child = self._start(self.session)

    # The lease.

    def _demote_at(self) -> float:
        return self._sent_at + DEMOTE_SHARE * self.ttl_s

    def _grant(self) -> None:
        if self._granting:
            return
        self._granting = True
        self._candidate = self._candidate or self.scheduler.rng.getrandbits(62) + 1
        lease, sent_at = self._candidate, self.clock.monotonic()

        def done(result: Any) -> None:
            self._granting = False
            if isinstance(result, Exception):
                self.process.later(self.scheduler.rng.uniform(0.1, 0.3), self._grant)
                return
            self._candidate = 0
            self._lease, self._sent_at = lease, sent_at
            self._generation += 1
            if self.stopped:
                self._give_up()
                return
            self.scheduler.log(self.name, "lease granted", lease=f"{lease:x}"[:6])
            if self.child is None:
                self._start_child()
            elif self.session is not None:
                self.session.replace(lease, self._demote_at())
            self._renew_later(lease)

        self.access.submit(lambda etcd: etcd.grant(self.ttl_s, lease), done, write=True, deadline_s=1.5)

    def _renew_later(self, lease: int, soon: bool = False) -> None:
        share = 1 / 3 if self.keep_lease else 1 / 4
        self.process.later(0.25 if soon else share * self.ttl_s, lambda: self._renew(lease))

    def _renew(self, lease: int) -> None:
        if lease != self._lease:
            return
        if self._must_kill():
            self.child_ended("it led and the lease was not renewed in time")
            return
        sent_at = self.clock.monotonic()

        def done(result: Any) -> None:
            if lease != self._lease:
                return
            if isinstance(result, NotFound):
                self._lost()
            elif isinstance(result, Exception):
                self._renew_later(lease, soon=True)
            else:
                self._sent_at = sent_at
                if self.session is not None:
                    self.session.deadline = self._demote_at()
                self._renew_later(lease)

        self.access.submit(lambda etcd: etcd.keepalive(lease), done, write=False, deadline_s=1.5)

    def _must_kill(self) -> bool:
        late = self.clock.monotonic() > self._sent_at + KILL_SHARE * self.ttl_s
        return not self.keep_lease and late and self.session is not None and self.session.acting != 0

    def _lost(self) -> None:
        self.scheduler.log(self.name, "lease lost")
        self._lease = 0
        if self.session is not None:
            self.session.deadline = 0.0
            if not self.keep_lease and self.session.acting:
                self.child_ended("it led under a lease that is lost")
                return
        self._grant()

    def _give_up(self) -> None:
        """Revoke, now that the child is dead."""
        lease, self._lease = self._lease, 0
        if not lease:
            return

        def done(result: Any) -> None:
            if isinstance(result, Exception):
                self.process.later(1.0, revoke)

        def revoke() -> None:
            self.access.submit(lambda etcd: etcd.revoke(lease), done, write=False, deadline_s=1.5)

        revoke()


def _raise(name: str, error: BaseException) -> None:
    raise error
