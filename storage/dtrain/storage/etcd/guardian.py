"""The parent process that owns a lease and supervises one child.

Renewals must not wait for application code: a long ``json.loads``, a garbage
collection or a regex delays a thread beside it by seconds. So this process does
nothing else. Standard library only, as are its neighbours ``session_memory``,
``lease_client``, ``lease_keeper`` and ``access``; it must start in milliseconds
and survive what kills its child.

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
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import FrameType
from typing import Any

from dtrain.storage.etcd.access import Access, check_endpoints
from dtrain.storage.etcd.lease_client import boottime
from dtrain.storage.etcd.lease_keeper import DEMOTE_SHARE, TRY_S_MAX, LeaseKeeper
from dtrain.storage.etcd.session_memory import (
    CLEAN_STOP,
    FD_VARIABLE,
    GUARDIAN_PID_VARIABLE,
    REVISION_VARIABLE,
    STARTED,
    SessionMemory,
)

EX_CONFIG = 78
"""A child that exits with it found its settings wrong: starting it again cannot help."""

HANG_SHARE = 0.4
BACKOFF_S_FIRST, BACKOFF_S_MAX, BACKOFF_RESET_S = 0.1, 5.0, 30.0
TTL_S_MIN, TTL_S_MIN_SHORT = 5, 2


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


def run(config: GuardianConfig) -> int:
    """Supervise until the end and return the exit code. Call it from the main thread.

    Ends by SIGTERM or SIGINT, by a child that stops cleanly, or by one that
    exits with 78. A second signal kills the child at once.
    """
    return _Guardian(config).run()


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


class _Guardian:
    def __init__(self, config: GuardianConfig) -> None:
        self._config = config
        self._signals = 0
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
            return self._supervise()
        finally:
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
            os.close(child.pidfd)
            child.memory.close()
            if clean or code == EX_CONFIG or self._signals or not self._keeper.is_alive():
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
        while not self._signals:
            held = self._keeper.held()
            if held.generation and ((held.lease and not held.lost) or not needs_live):
                return True
            if held.lost:
                self._keeper.drop()
                self._keeper.acquire()
            self._poll(None, 1.0)
        return False

    def _spawn(self) -> _Child:
        memory = SessionMemory.create()
        self._keeper.share_with(memory)
        env = dict(os.environ if self._config.env is None else self._config.env)
        env |= {FD_VARIABLE: str(memory.fd), GUARDIAN_PID_VARIABLE: str(os.getpid())}
        # A fresh process has no past by which to tell that etcd was restored from an older state.
        env |= {REVISION_VARIABLE: str(self._keeper.revision_seen)}
        # A group of its own: Ctrl-C reaches the guardian alone, which stops the child in order.
        process = subprocess.Popen(
            list(self._config.argv), env=env, pass_fds=(memory.fd,), process_group=0, stdin=subprocess.DEVNULL
        )
        now = boottime()
        self._report("child started", pid=process.pid)
        return _Child(process, memory, os.pidfd_open(process.pid), now, beat_at=now)

    def _watch(self, child: _Child) -> int:
        """Supervise ``child`` to its end and return its code; it has been waited for."""
        hang_s = HANG_SHARE * self._config.ttl_s
        tick_s = hang_s / 20
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
            self._forward_stop(child, now)
            why = self._reason_to_kill(child, now, hang_s)
            if why:
                self._report("child killed", pid=child.process.pid, why=why)
                child.process.kill()
                return child.process.wait()
            if self._keeper.held().lost:
                # Nobody acts under it, so the child goes on under a new one.
                self._keeper.drop()
                self._keeper.acquire()

    def _reason_to_kill(self, child: _Child, now: float, hang_s: float) -> str:
        if not self._keeper.is_alive():
            return "the lease thread has died"
        if child.stop_by is not None and (now > child.stop_by or self._signals > 1):
            return "it did not stop in time"
        if child.memory.has_flag(STARTED) and now - child.beat_at > hang_s:
            return f"its heart stood still for {now - child.beat_at:.1f} s"
        acting = child.memory.acting()
        if self._config.policy is Policy.COORDINATOR and acting:
            held = self._keeper.held()
            if held.lost or acting != held.generation:
                return "it led under a lease that is lost"
            if now > held.kill_at:
                return "it led and the lease was not renewed in time"
        return ""

    def _forward_stop(self, child: _Child, now: float) -> None:
        if self._signals and child.stop_by is None:
            child.stop_by = now + self._config.grace_s
            self._report("stopping", pid=child.process.pid, grace_s=self._config.grace_s)
            child.process.send_signal(signal.SIGTERM)

    def _give_up_lease(self) -> None:
        lease = self._keeper.drop()
        if lease and self._keeper.revoke(lease):
            self._report("lease revoked", lease=f"{lease:x}")

    def _pause(self, seconds: float) -> None:
        end = boottime() + seconds
        while not self._signals and (left_s := end - boottime()) > 0:
            self._poll(None, left_s)

    def _poll(self, pidfd: int | None, timeout_s: float) -> None:
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
        self._signals += 1
        self._wake()

    def _report(self, event: str, **fields: Any) -> None:
        line = {"time": round(time.time(), 3), "event": event, "component": self._config.component, **fields}
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(json.dumps(line) + "\n")
            sys.stderr.flush()
