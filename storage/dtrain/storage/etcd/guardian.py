"""The parent process that owns a lease and supervises one child.

Renewals must not wait for application code: a long ``json.loads``, a garbage
collection or a regex delays a thread beside it by seconds. So this process does
nothing else. Standard library only, as are its neighbours ``session_memory``,
``lease_client``, ``lease_keeper`` and ``access``; it must start in milliseconds
and survive what kills its child.

It also owns the port for probes, which outlives children: it answers while no
child does. A coordinator has no child while etcd is away, and must not be
restarted for that. To systemd it is the main process and speaks for both.

Above a coordinator, a dead or stuck child is killed, waited for, and only
*then* the lease is revoked: another replica may win the moment it is gone, and
two must never act. Above an agent the lease is kept and the child restarted,
beside its running training processes; its lease ends with the guardian.

Run it in the main thread: ``PR_SET_PDEATHSIG``, which ties the child's life to
this process, fires when the spawning thread ends.
"""

import contextlib
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import FrameType
from typing import Any

from dtrain.runtime.addresses import is_wildcard
from dtrain.runtime.notify import VARIABLES as NOTIFY_VARIABLES
from dtrain.runtime.notify import Notifier
from dtrain.runtime.serving import FD_VARIABLE as HEALTH_VARIABLE
from dtrain.runtime.serving import Page, StatusServer, verdict
from dtrain.storage.etcd.access import Access, check_endpoints
from dtrain.storage.etcd.lease_client import boottime
from dtrain.storage.etcd.lease_keeper import DEMOTE_SHARE, TRY_S_MAX, LeaseKeeper
from dtrain.storage.etcd.session_memory import (
    CLEAN_STOP,
    FD_VARIABLE,
    GUARDIAN_PID_VARIABLE,
    READY,
    REVISION_VARIABLE,
    STARTED,
    STOPPING_VARIABLE,
    SessionMemory,
)

EX_CONFIG = 78
"""A child that exits with it found its settings wrong: starting it again cannot help."""

STOP_SLACK_S = 15.0
"""Beyond the grace: for killing the child and revoking the lease."""

HANG_SHARE = 0.4
BACKOFF_S_FIRST, BACKOFF_S_MAX, BACKOFF_RESET_S = 0.1, 5.0, 30.0
TTL_S_MIN, TTL_S_MIN_SHORT = 5, 2

DOUBT_S_MAX = 0.1
"""How late the guardian may hear that etcd told the child of a lost lease."""

POLL_S_MAX = 30.0
"""Far more than any turn of the guardian takes."""


class Policy(Enum):
    """What a dead child means for the lease."""

    COORDINATOR = "coordinator"
    """It ends: revoke, then a fresh lease for a new child."""

    AGENT = "agent"
    """It stays: the machine is alive, and so are its training processes."""


@dataclass(frozen=True, slots=True)
class GuardianConfig:
    """What to run and how long to trust it."""

    argv: tuple[str, ...]
    endpoints: tuple[str, ...]
    policy: Policy
    component: str
    """Who we are, in every line on stderr."""

    ttl_s: int = 10
    grace_s: float = 15.0
    """From SIGTERM to SIGKILL."""

    drain_s: float = 0.0
    """So much longer the child may take after the first SIGTERM, and is restarted meanwhile if it
    dies. A second signal ends that wait (the child gets SIGINT), a third one the child."""

    tls_ca: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    user: str = ""
    password: str = field(default="", repr=False)
    password_file: str = ""
    endpoints_file: str = ""
    env: Mapping[str, str] | None = None
    """Environment of the child; None: ours."""

    allow_short_ttl: bool = False
    """Tests only: 2 s instead of 5 s at least."""

    def __post_init__(self) -> None:
        if not self.argv:
            raise ValueError("the guardian has no command to run")
        check_endpoints(self.endpoints)
        least = TTL_S_MIN_SHORT if self.allow_short_ttl else TTL_S_MIN
        if self.ttl_s < least:
            raise ValueError(f"a TTL of {self.ttl_s} s is too short: use {least} s or more")
        slack_s = 0.1 if self.allow_short_ttl else 0.25
        needed_s = self.renew_share * self.ttl_s + 2 * min(TRY_S_MAX, self.ttl_s / 6) + slack_s
        # Two members may fail to answer before a leader has to stop. An agent stops nothing.
        if self.policy is Policy.COORDINATOR and needed_s > DEMOTE_SHARE * self.ttl_s:
            raise ValueError(f"a TTL of {self.ttl_s} s leaves no time for a second try")

    @property
    def renew_share(self) -> float:
        return 1 / 4 if self.policy is Policy.COORDINATOR else 1 / 3


def run(config: GuardianConfig, health: socket.socket | None = None) -> int:
    """Supervise until the end and return the exit code. Call it from the main thread.

    ``health`` is a listening socket for probes; the child inherits it.

    Ends by SIGTERM or SIGINT, by a child that stops cleanly, or by one that
    exits with 78. A second signal kills the child at once, or the third if it drains.
    """
    return _Guardian(config, health).run()


@dataclass(slots=True)
class _Child:
    process: "subprocess.Popen[bytes]"
    memory: SessionMemory
    pidfd: int
    started_at: float
    beats: int = 0
    beat_at: float = 0.0
    stop_by: float | None = None
    """When SIGKILL follows the SIGTERM that was sent."""
    told: bool = False
    """It was started after the first signal, and knows of it."""
    hurried: bool = False
    """It was told not to wait for anything any more."""
    doubts: int = 0
    """How many of its doubts about the lease etcd has been asked about."""
    killed: str = ""
    """Why it was killed, one of ``KILLS``; "": it was not."""


class _Guardian:
    def __init__(self, config: GuardianConfig, health: socket.socket | None) -> None:
        self._config = config
        self._health = health
        self._notifier = Notifier(os.environ)
        self._standing = "waiting for a lease from etcd"
        self._polled_at = boottime()
        pages = {"/livez": self._live, "/readyz": self._unready, "/metrics": self._unready}
        self._memory: SessionMemory | None = None
        """The page shared with the child that lives."""
        self._status = (
            None
            if health is None
            else StatusServer(health, pages, report=self._report, gives_way=self._child_serves)
        )
        self._signals = 0
        self._signalled_at = 0.0
        self._has_run = False
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._keeper = LeaseKeeper(
            Access(
                config.endpoints,
                config.tls_ca,
                config.tls_cert,
                config.tls_key,
                config.user,
                config.password,
                config.password_file,
                config.endpoints_file,
            ),
            ttl_s=config.ttl_s,
            renew_share=config.renew_share,
            on_change=self._wake,
            report=self._report,
        )
        self._backoff_s = BACKOFF_S_FIRST

    def run(self) -> int:
        before = {
            number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            gc.collect()
            gc.freeze()
            self._keeper.start()
            if self._status is not None:
                self._report_status_port(self._status.address)
                threading.Thread(target=self._answer_probes, name="status", daemon=True).start()
            return self._supervise()
        finally:
            self._notifier.stopping("stopped", 0.0)
            if self._status is not None:
                self._status.close()
            self._keeper.stop()
            for number, handler in before.items():
                signal.signal(number, handler)
            self._wake_read.close()
            self._wake_write.close()

    def _supervise(self) -> int:
        keeps_lease = self._config.policy is Policy.AGENT
        self._keeper.acquire()
        while self._wait_for_lease(needs_live=not keeps_lease):
            child = self._spawn()
            code = self._watch(child)
            clean = code == 0 and child.memory.has_flag(CLEAN_STOP)
            lived_s = boottime() - child.started_at
            self._keeper.share_with(None)
            self._keeper.child_ended(child.memory.fenced(), child.killed)
            self._memory = None
            os.close(child.pidfd)
            child.memory.close()
            self._stand_in("the process has ended and is started again")
            if clean or code == EX_CONFIG or self._must_end() or not self._keeper.is_alive():
                self._give_up_lease()
                self._report("stopped", code=code)
                return code if code >= 0 else 128 - code
            self._report("child ended", code=code, lived_s=round(lived_s, 3))
            if not keeps_lease:
                # The child is gone, waited for: from here on another replica may lead.
                self._give_up_lease()
            if lived_s >= BACKOFF_RESET_S:
                self._backoff_s = BACKOFF_S_FIRST
            self._pause(self._backoff_s)
            self._backoff_s = min(BACKOFF_S_MAX, self._backoff_s * 2)
            if not keeps_lease:
                self._keeper.acquire()
        self._give_up_lease()
        return 0

    def _wait_for_lease(self, *, needs_live: bool) -> bool:
        """Wait until a child may be started; False: we were told to stop.

        An agent is restarted with the lease it has, even if etcd is away: its
        training processes are running.
        """
        while not self._must_end():
            self._standing = "waiting for a lease from etcd"
            held = self._keeper.held()
            if held.generation and ((held.lease and not held.lost) or not needs_live):
                return True
            if held.lost:
                self._keeper.drop()
                self._keeper.acquire()
            self._poll(None, 1.0)
            self._tell(self._standing)
        return False

    def _must_end(self) -> bool:
        """Whether no child is to run any more: told to stop, and there is nothing, or no time, to drain."""
        if not self._signals:
            return False
        over = boottime() >= self._signalled_at + self._config.drain_s
        return over or self._signals > 1 or not self._has_run

    def _spawn(self) -> _Child:
        self._has_run = True
        memory = SessionMemory.create()
        self._keeper.share_with(memory)
        env = dict(os.environ if self._config.env is None else self._config.env)
        env |= {FD_VARIABLE: str(memory.fd), GUARDIAN_PID_VARIABLE: str(os.getpid())}
        # A fresh process has no past by which to tell that etcd was restored from an older state.
        env |= {REVISION_VARIABLE: str(self._keeper.revision_seen)}
        told = self._signals > 0
        if told:
            # What its former life was told still holds, and the time for it is running.
            env |= {STOPPING_VARIABLE: f"{self._signalled_at:.3f}"}
        passed = [memory.fd]
        if self._health is not None:
            passed.append(self._health.fileno())
            env[HEALTH_VARIABLE] = str(self._health.fileno())
        for name in NOTIFY_VARIABLES:
            env.pop(name, None)
        # A group of its own: Ctrl-C reaches the guardian alone, which stops the child in order.
        process = subprocess.Popen(
            list(self._config.argv), env=env, pass_fds=passed, process_group=0, stdin=subprocess.DEVNULL
        )
        now = boottime()
        self._standing = "the process is starting"
        self._memory = memory
        self._report("child started", pid=process.pid)
        return _Child(process, memory, os.pidfd_open(process.pid), now, beat_at=now, told=told)

    def _watch(self, child: _Child) -> int:
        """Supervise ``child`` to its end and return its code; it has been waited for."""
        hang_s = HANG_SHARE * self._config.ttl_s
        tick_s = min(DOUBT_S_MAX, hang_s / 20)
        ticked_at = boottime()
        while True:
            self._poll(child.pidfd, tick_s)
            code = child.process.poll()
            if code is not None:
                return code
            now = boottime()
            # After a pause of this very process the child had none of the time either.
            if child.memory.beats() != child.beats or now - ticked_at > hang_s / 2:
                child.beats, child.beat_at = child.memory.beats(), now
            ticked_at = now
            self._speak_for(child, now, hang_s)
            self._forward_stop(child, now)
            child.killed, why = self._reason_to_kill(child, now, hang_s)
            if why:
                self._report("child killed", pid=child.process.pid, why=why)
                child.process.kill()
                return child.process.wait()
            if child.memory.doubts() != child.doubts:
                child.doubts = child.memory.doubts()
                self._keeper.check()
            if self._keeper.held().lost:
                # Nobody acts under it, so the child goes on under a new one.
                self._keeper.drop()
                self._keeper.acquire()

    def _reason_to_kill(self, child: _Child, now: float, hang_s: float) -> tuple[str, str]:
        """Return which of ``KILLS`` it is, and why in words; empty ones: there is none."""
        if not self._keeper.is_alive():
            return "lease", "the lease thread has died"
        if child.stop_by is not None and (now > child.stop_by or self._signals > self._patient_signals):
            return "stop", "it did not stop in time"
        if child.memory.has_flag(STARTED) and now - child.beat_at > hang_s:
            return "hang", f"its heart stood still for {now - child.beat_at:.1f} s"
        acting = child.memory.acting()
        if self._config.policy is Policy.COORDINATOR and acting:
            held = self._keeper.held()
            if held.lost or acting != held.generation:
                return "lease", "it led under a lease that is lost"
            if now > held.kill_at:
                return "lease", "it led and the lease was not renewed in time"
        return "", ""

    def _forward_stop(self, child: _Child, now: float) -> None:
        grace_s, drain_s = self._config.grace_s, self._config.drain_s
        if self._signals and child.stop_by is None:
            child.stop_by = max(now, self._signalled_at + drain_s) + grace_s
            self._report("stopping", pid=child.process.pid, grace_s=grace_s, drain_s=drain_s)
            if not child.told:
                child.process.send_signal(signal.SIGTERM)
            self._notifier.stopping("draining" if drain_s else "stopping", drain_s + grace_s + STOP_SLACK_S)
        if self._signals > 1 and drain_s and child.stop_by is not None and not child.hurried:
            child.hurried = True
            child.stop_by = min(child.stop_by, now + grace_s)
            # Not SIGTERM again: two that are pending become one.
            child.process.send_signal(signal.SIGINT)

    @property
    def _patient_signals(self) -> int:
        return 2 if self._config.drain_s else 1

    def _give_up_lease(self) -> None:
        lease = self._keeper.drop()
        if lease and self._keeper.revoke(lease):
            self._report("lease revoked", lease=f"{lease:x}")

    def _pause(self, seconds: float) -> None:
        end = boottime() + seconds
        while not self._must_end() and (left_s := end - boottime()) > 0:
            self._poll(None, min(left_s, 1.0))
            self._tell(self._standing)

    # Probes and systemd.

    def _speak_for(self, child: _Child, now: float, hang_s: float) -> None:
        """Tell systemd how the child is, and leave probes to it once it answers them."""
        started = child.memory.has_flag(STARTED)
        if started and now - child.beat_at > hang_s / 2:
            # Its heart stands still: silence, until it beats again or has been killed.
            return
        if started:
            self._standing = ""
        if child.memory.has_flag(READY):
            self._notifier.ready()
        if child.stop_by is None:
            held = self._keeper.held()
            cut_off = held.lost or now > held.kill_at
            self._tell("cut off from etcd" if cut_off else _standing(self._config.policy, child.memory))
        else:
            # Draining takes longer than a watchdog's patience.
            self._notifier.beat(now)

    def _tell(self, status: str) -> None:
        self._notifier.beat(boottime())
        self._notifier.status(status)

    def _stand_in(self, why: str) -> None:
        self._standing = why
        if self._status is not None:
            self._status.look()

    def _child_serves(self) -> bool:
        # Looked up at each connection: who was told by the child that it is ready must not be
        # told by its guardian, a moment later, that it is starting.
        memory = self._memory
        try:
            return memory is not None and memory.has_flag(STARTED)
        except ValueError:  # closed since: the child has ended
            return False

    def _answer_probes(self) -> None:
        assert self._status is not None
        try:
            self._status.run()
        except BaseException as error:
            # Probes that find nobody have the daemon restarted: that is what they are for.
            self._report("status port failed", error=f"{type(error).__name__}: {error}")
            raise

    def _report_status_port(self, address: str) -> None:
        note = (
            {"note": "open to every network of this machine, without a login"} if is_wildcard(address) else {}
        )
        self._report("status port", address=address, **note)

    def _live(self) -> Page:
        age_s = boottime() - self._polled_at
        reasons = [f"the guardian has stood still for {age_s:.0f} s"] if age_s > POLL_S_MAX else []
        return verdict("live", not reasons, reasons or [self._standing])

    def _unready(self) -> Page:
        return verdict("ready", False, [self._standing])

    def _poll(self, pidfd: int | None, timeout_s: float) -> None:
        self._polled_at = boottime()
        poller = select.poll()
        poller.register(self._wake_read, select.POLLIN)
        if pidfd is not None:
            poller.register(pidfd, select.POLLIN)
        poller.poll(max(1, int(timeout_s * 1000)))
        with contextlib.suppress(BlockingIOError):
            self._wake_read.recv(4096)

    def _wake(self) -> None:
        with contextlib.suppress(OSError):
            self._wake_write.send(b"x")

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        if not self._signals:
            self._signalled_at = boottime()
        self._signals += 1
        self._wake()

    def _report(self, event: str, **fields: Any) -> None:
        line = {"time": round(time.time(), 3), "event": event, "component": self._config.component, **fields}
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(json.dumps(line) + "\n")
            sys.stderr.flush()


def _standing(policy: Policy, memory: SessionMemory) -> str:
    """Return how a child is, in a word for people."""
    if not memory.has_flag(STARTED):
        return "starting"
    if policy is Policy.COORDINATOR:
        return "leads" if memory.acting() else "stands by"
    return "registered" if memory.has_flag(READY) else "waiting to be registered in etcd"
