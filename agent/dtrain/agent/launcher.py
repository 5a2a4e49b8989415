"""The launcher: forks a job's ranks and outlives the agent.

Run as ``python -m dtrain.agent.launcher FOLDER --listen-fd N`` by its client,
with ``LaunchSettings`` as JSON on stdin; see ``launching.py`` for what it is
told and what it reports. One thread, one selector: a fork copies only the
forking thread, so a second one could leave a lock held for ever in every rank.

While it imports, orders are read between two modules; those that need a fork
wait for the end of the imports.

Ended by: ``Quit``, SIGTERM, or ``orphan_grace_s`` without an agent. However it
ends, its ranks die with it: each asked the kernel for that (PDEATHSIG).
"""

import argparse
import contextlib
import json
import os
import selectors
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any, assert_never

from dtrain.agent.launch import kernel, processes, reading, spawn
from dtrain.agent.launch.family import ALL_ATTEMPTS, Clearing, Family, RankChild, StoreChild, signal_group
from dtrain.agent.launch.link import LINK_ERRORS, Link, peer_is_own_user
from dtrain.agent.launch.preload import Preloaded, calm_libraries, preload
from dtrain.agent.launch.rank_main import RankSpec
from dtrain.agent.launching import (
    ClearBelow,
    Cleared,
    Forked,
    ForkRanks,
    LauncherOrder,
    LauncherReady,
    LauncherReport,
    LauncherState,
    LaunchSettings,
    LiveRank,
    ProcessId,
    Quit,
    RankEnded,
    RankLaunch,
    ServeStore,
    SignalRanks,
    StoreReady,
)
from dtrain.protocol import codec
from dtrain.protocol.ids import Attempt
from dtrain.protocol.ranklink import ENV_ARENA_FD, ENV_ATTEMPT

SETTINGS_BYTES_MAX = 4 * 1024 * 1024
CLEARING_TICK_S = 0.05
SIGTERM_GRACE_S = 2.0
EXIT_NOT_FORKED = 70
"""Reported for a rank that the kernel refused to create."""


def log(event: str, **fields: object) -> None:
    """One line to launcher.log. Not ``logging``: its handlers would be inherited by the ranks."""
    now = time.time()
    stamp = f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(now))}.{int(now * 1000) % 1000:03d}Z"
    line = " ".join([stamp, event, *(f"{name}={value!r}" for name, value in fields.items())])
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())


class Launcher:
    """The event loop; owns every child and the one connection that counts."""

    def __init__(self, settings: LaunchSettings, listener: socket.socket, own: ProcessId) -> None:
        self._settings = settings
        self._own = own
        self._listener = listener
        self._selector = selectors.DefaultSelector()
        self._agent: Link | None = None
        self._alone_since: float | None = time.monotonic()
        self._family = Family()
        self._clearings: list[Clearing] = []
        self._arenas: dict[int, int] = {}
        self._preloaded = Preloaded()
        self._warning = ""
        self._ready = False
        self._waiting: list[ServeStore | ForkRanks] = []
        self._floor = -1
        self._ending: Clearing | None = None
        self._ended = False
        self._asked_to_end = False
        self._wakeup_read, self._wakeup_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def run(self) -> None:
        """Listen, import, serve; returns when everything of this job has ended."""
        self._listen()
        self._turn(0.0)
        self._import()
        while not self._ended:
            self._turn(self._patience())
        if self._agent is not None:
            self._agent.socket.settimeout(1.0)
            self._agent.flush()

    # Setting up

    def _listen(self) -> None:
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ, "listener")
        self._selector.register(self._wakeup_read, selectors.EVENT_READ, "signal")
        signal.set_wakeup_fd(self._wakeup_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask_to_end)

    def _ask_to_end(self, *_: object) -> None:
        self._asked_to_end = True

    def _import(self) -> None:
        started = time.monotonic()
        calm_libraries()
        self._preloaded = preload(self._settings.preload, self._settings.working_dir, lambda: self._turn(0.0))
        self._family.adopt_household()
        problem = self._preloaded.fork_problem()
        if problem:
            self._preloaded.warnings.append(_exec_warning(problem))
        self._warning = "; ".join(self._preloaded.warnings)
        self._ready = True
        log("ready", seconds=round(time.monotonic() - started, 2), warning=self._warning)
        self._tell(LauncherReady(self._warning))
        waiting, self._waiting = self._waiting, []
        for order in waiting:
            self._obey(order)

    # The loop

    def _patience(self) -> float | None:
        if self._clearings or self._ending:
            return CLEARING_TICK_S
        if self._alone_since is None:
            return None
        return max(0.0, self._alone_since + self._settings.orphan_grace_s - time.monotonic())

    def _turn(self, timeout_s: float | None) -> None:
        for key, events in self._selector.select(timeout_s):
            if key.data == "listener":
                self._accept()
            elif key.data == "signal":
                with contextlib.suppress(BlockingIOError):
                    os.read(self._wakeup_read, 4096)
            elif isinstance(key.data, Link):
                self._serve(key.data, events)
            elif isinstance(key.data, StoreChild):
                self._hear_store(key.data)
        self._reap()
        self._advance(time.monotonic())

    def _advance(self, now: float) -> None:
        for clearing in list(self._clearings):
            finished, stuck = clearing.advance(self._family, now)
            self._reap()
            if finished:
                self._clearings.remove(clearing)
                self._family.forget_below(int(clearing.below))
                self._tell(Cleared(Attempt(int(clearing.below)), stuck, self._family.named(stuck)))
        if self._asked_to_end and self._ending is None:
            log("ending", why="signal")
            self._end(SIGTERM_GRACE_S)
        if self._ending is None and self._is_orphan(now):
            log("ending", why=f"no agent for {self._settings.orphan_grace_s} s")
            self._end(0.0)
        if self._ending is not None:
            finished, stuck = self._ending.advance(self._family, now)
            self._reap()
            if finished:
                log("ended", stuck=stuck)
                self._ended = True

    def _is_orphan(self, now: float) -> bool:
        return self._alone_since is not None and now >= self._alone_since + self._settings.orphan_grace_s

    def _end(self, grace_s: float) -> None:
        self._ending = Clearing(below=ALL_ATTEMPTS, ask_until=time.monotonic() + grace_s)

    # The agent

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        if not peer_is_own_user(connection):
            log("connection refused", why="another user")
            connection.close()
            return
        if self._agent is not None:
            # Two agents would contradict each other; the newer one is the one that was restarted.
            log("connection replaced")
            self._drop(self._agent)
        self._agent = Link(connection)
        self._alone_since = None
        self._selector.register(connection, selectors.EVENT_READ, self._agent)
        self._tell(self._state())
        for child in list(self._family.ranks.values()):
            if child.ended is not None:
                self._tell(child.ended)

    def _state(self) -> LauncherState:
        store = self._family.newest_store()
        return LauncherState(
            process=self._own,
            ready=self._ready,
            ranks=tuple(child.live for child in self._family.ranks.values()),
            store_attempt=store.attempt if store else None,
            store_port=store.port if store else None,
            warning=self._warning,
        )

    def _serve(self, link: Link, events: int) -> None:
        if link is not self._agent:
            return
        try:
            if events & selectors.EVENT_READ:
                for order in link.orders():
                    self._obey(order)
        except LINK_ERRORS as error:
            log("agent gone", why=str(error))
            self._drop(link)
            return
        self._flush(link)

    def _flush(self, link: Link) -> None:
        if link is not self._agent:
            return
        link.flush()
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if link.has_output else 0)
        self._selector.modify(link.socket, wanted, link)

    def _drop(self, link: Link) -> None:
        self._selector.unregister(link.socket)
        link.close()
        if link is self._agent:
            self._agent = None
            self._alone_since = time.monotonic()

    def _tell(self, report: LauncherReport) -> None:
        link = self._agent
        if link is None:
            return
        if link.post(report):
            self._flush(link)
        else:
            self._drop(link)

    # Orders

    def _obey(self, order: LauncherOrder) -> None:
        now = time.monotonic()
        match order:
            case ClearBelow(attempt=attempt, grace_s=grace_s):
                self._floor = max(self._floor, attempt)
                self._waiting = [held for held in self._waiting if held.attempt >= attempt]
                self._clearings.append(Clearing(below=attempt, ask_until=now + grace_s))
            case ServeStore() | ForkRanks() if not self._ready:
                self._waiting.append(order)
            case ServeStore():
                self._serve_store(order)
            case ForkRanks():
                self._fork_ranks(order)
            case SignalRanks(attempt=attempt, signal=number):
                for child in self._family.running():
                    if child.live.attempt == attempt:
                        signal_group(child.live.process.pid, number)
            case Quit(grace_s=grace_s):
                log("ending", why="told to")
                self._end(grace_s)
            case _:
                assert_never(order)

    def _may_fork(self) -> bool:
        problem = self._preloaded.fork_problem()
        if problem and problem not in self._warning:
            self._warning = "; ".join(filter(None, (self._warning, _exec_warning(problem))))
            log("exec instead of fork", why=problem)
            self._tell(LauncherReady(self._warning))
        return not problem

    def _serve_store(self, order: ServeStore) -> None:
        known = self._family.store_of(order.attempt)
        if known is not None:
            if known.port:
                self._tell(StoreReady(order.attempt, known.port))
            return
        if order.attempt < self._floor:
            self._tell(StoreReady(order.attempt, 0, "a later attempt has begun"))
            return
        answer_read, answer_write = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(answer_read, False)
        try:
            if self._may_fork():
                pid = spawn.fork_store(order.host, answer_write, self._leave)
            else:
                pid = spawn.exec_store(order.host, answer_write)
        except OSError as error:
            os.close(answer_read)
            self._tell(StoreReady(order.attempt, 0, f"no process for the store: {error.strerror}"))
            return
        finally:
            os.close(answer_write)
        child = StoreChild(order.attempt, pid, answer_read)
        self._family.stores[pid] = child
        self._selector.register(answer_read, selectors.EVENT_READ, child)

    def _hear_store(self, child: StoreChild) -> None:
        try:
            text = os.read(child.answer_fd, 4096)
        except BlockingIOError:
            return
        self._selector.unregister(child.answer_fd)
        os.close(child.answer_fd)
        child.answer_fd = -1
        answer: dict[str, Any] = (
            json.loads(text) if text else {"port": 0, "problem": "the store's process died at once"}
        )
        child.port = answer["port"]
        log("store", attempt=child.attempt, pid=child.pid, **answer)
        self._tell(StoreReady(child.attempt, child.port, answer.get("problem", "")))

    def _fork_ranks(self, order: ForkRanks) -> None:
        if order.attempt < self._floor:
            log("fork refused", attempt=order.attempt, floor=self._floor)
            self._tell(Forked(order.attempt, ()))
            return
        known = self._family.of_attempt(order.attempt)
        unborn = []
        started = time.monotonic()
        for launch in order.ranks:
            if launch.rank in known:
                continue  # the order came twice
            try:
                self._start_rank(order, launch)
            except OSError as error:
                unborn.append(_not_forked(order.attempt, launch, error))
        self._family.newest_forked = max(self._family.newest_forked, order.attempt)
        children = self._family.of_attempt(order.attempt).values()
        seconds = round(time.monotonic() - started, 4)
        log("forked", attempt=order.attempt, pids=[c.live.process.pid for c in children], seconds=seconds)
        self._tell(Forked(order.attempt, tuple(child.live for child in children)))
        for report in unborn:
            self._tell(report)

    def _start_rank(self, order: ForkRanks, launch: RankLaunch) -> None:
        arena = self._arena(launch.local_rank)
        defaults = {
            "TORCHELASTIC_ERROR_FILE": str(Path(launch.log_dir) / "error.json"),
            ENV_ATTEMPT: str(order.attempt),
        }
        env = {**defaults, **launch.env, ENV_ARENA_FD: str(arena)}
        spec = RankSpec(
            entry=order.entry,
            rank=launch.rank,
            working_dir=order.working_dir,
            log_dir=launch.log_dir,
            error_file=env["TORCHELASTIC_ERROR_FILE"],
            env=env,
            arena_fd=arena,
            parent_pid=self._own.pid,
        )
        # What an earlier life left there must not be taken for this rank's last words.
        Path(spec.error_file).unlink(missing_ok=True)
        if self._may_fork():
            pid = spawn.fork_rank(spec, self._leave, self._preloaded.descriptors)
        else:
            Path(launch.log_dir).mkdir(parents=True, exist_ok=True)
            pid = spawn.exec_rank(spec)
        process = processes.identify(pid)
        assert process is not None, "an unreaped child has an entry in /proc"
        live = LiveRank(order.attempt, launch.rank, launch.local_rank, process)
        self._family.ranks[pid] = RankChild(live, launch.log_dir, spec.error_file)

    def _arena(self, local_rank: int) -> int:
        if local_rank not in self._arenas:
            self._arenas[local_rank] = os.memfd_create(f"dtrain-arena-{local_rank}")
        return self._arenas[local_rank]

    def _leave(self) -> None:
        """In a forked child: let go of what is the launcher's, through the objects that own it.

        Closed behind their backs, these numbers would be closed a second time
        when the objects are collected, and may be the program's files by then.
        """
        self._selector.close()
        self._listener.close()
        if self._agent is not None:
            self._agent.close()

    # Deaths

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            code = os.waitstatus_to_exitcode(status)
            if pid in self._family.stores:
                self._bury_store(self._family.stores.pop(pid), code)
            child = self._family.ranks.get(pid)
            if child is not None and child.ended is None:
                self._bury_rank(child, code)

    def _bury_store(self, child: StoreChild, code: int) -> None:
        log("store ended", attempt=child.attempt, exit_code=code)
        if child.answer_fd >= 0:
            self._hear_store(child)

    def _bury_rank(self, child: RankChild, code: int) -> None:
        live = child.live
        child.live = LiveRank(live.attempt, live.rank, live.local_rank, live.process, code)
        child.ended = RankEnded(
            attempt=live.attempt,
            rank=live.rank,
            pid=live.process.pid,
            exit_code=code,
            at=time.time(),
            error=reading.error_text(Path(child.error_file)),
            log_tail=reading.log_tail(Path(child.log_dir)),
        )
        log("rank ended", attempt=live.attempt, rank=live.rank, pid=live.process.pid, exit_code=code)
        self._tell(child.ended)


def _exec_warning(problem: str) -> str:
    return f"ranks are started by exec instead of fork, which costs seconds each time: {problem}"


def _not_forked(attempt: Attempt, launch: RankLaunch, error: OSError) -> RankEnded:
    message = f"rank {launch.rank} could not be started: {error}"
    detail = {"py_callstack": "", "timestamp": str(int(time.time()))}
    text = json.dumps({"message": {"message": message, "extraInfo": detail}})
    return RankEnded(attempt, launch.rank, 0, EXIT_NOT_FORKED, time.time(), text, message)


def main() -> None:
    """Read the settings, become a subreaper, serve."""
    parser = argparse.ArgumentParser(prog="python -m dtrain.agent.launcher")
    parser.add_argument("folder")
    parser.add_argument("--listen-fd", type=int, required=True)
    arguments = parser.parse_args()
    settings = codec.decode(LaunchSettings, sys.stdin.buffer.read(), bytes_max=SETTINGS_BYTES_MAX)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    kernel.adopt_orphans()
    own = processes.identify(os.getpid())
    assert own is not None, "this process has an entry in /proc"
    log("started", pid=own.pid, folder=arguments.folder, preload=settings.preload)
    try:
        os.chdir(settings.working_dir)
    except OSError as error:
        log("working directory cannot be entered", folder=settings.working_dir, why=error.strerror)
    os.set_inheritable(arguments.listen_fd, False)
    Launcher(settings, socket.socket(fileno=arguments.listen_fd), own).run()
    # Past finalisation: tearing torch down takes longer than everything it could still do for us.
    os._exit(0)


if __name__ == "__main__":
    main()
