"""Faults for a marked cluster that nobody here runs: signals to its processes on this host.

A process is hit only if its record says that it runs on this boot of this
machine, and if the process with that pid is what the record says: pids are
used again, and containers have pids of their own.
"""

import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path

from dtrain.local.faults import WEIGHTS, Fault, Kind, Part
from dtrain.local.marks import boot_id
from dtrain.local.sight import Sight
from dtrain.protocol.errors import ErrorCode, NotFound, Refused

_NO_WAY_BACK = {
    Part.MACHINE: "a machine",
    Part.AGENT_GUARDIAN: "an agent",
    Part.COORDINATOR_GUARDIAN: "a coordinator",
    Part.ETCD: "a member of etcd",
}


class HostBreaker:
    """Breaks what ``look`` finds, as far as that is possible from here."""

    def __init__(self, look: Callable[[], Sight], *, hostname: str) -> None:
        self._look = look
        self._hostname = hostname
        self._boot_id = boot_id()
        self._frozen: dict[Fault, tuple[int, ...]] = {}

    def cannot(self, kind: Kind, part: Part) -> str:
        if (kind, part) not in WEIGHTS:
            return f"{kind} is nothing that can be done to a {part}"
        if kind in (Kind.CUT, Kind.SLOW):
            return "links can be cut and slowed only in a cluster that 'dtrain up --test' started here"
        if kind is Kind.PREEMPT:
            return "where an agent looks for notices is known only in a cluster of 'dtrain up --test'"
        if kind is Kind.KILL and part in _NO_WAY_BACK:
            return f"nobody here could start {_NO_WAY_BACK[part]} again that another program has started"
        if kind is Kind.FREEZE and part is Part.ETCD:
            return "no record says which process is a member of etcd"
        return ""

    def strike(self, fault: Fault) -> None:
        if why := self.cannot(fault.kind, fault.part):
            raise Refused(ErrorCode.BAD_SETTING, f"cannot {fault}: {why}")
        pid = self._pid(fault)
        if fault.kind is Kind.KILL:
            _send(pid, signal.SIGKILL, fault)
            return
        # The guardian is the parent: frozen first, or it would take the rest for stuck.
        pids = (_parent(pid), pid)
        self._frozen[fault] = pids
        for each in pids:
            _send(each, signal.SIGSTOP, fault)

    def heal(self, fault: Fault) -> None:
        for pid in self._frozen.pop(fault, ()):
            with contextlib.suppress(NotFound):
                _send(pid, signal.SIGCONT, fault)

    def close(self) -> None:
        for fault in list(self._frozen):
            self.heal(fault)

    def _pid(self, fault: Fault) -> int:
        sight = self._look()
        if fault.part in (Part.COORDINATOR, Part.LEADER):
            replica = sight.coordinators.get(fault.name)
            here = replica is not None and replica.host == self._hostname
            pid = replica.pid if replica is not None and here else 0
            return _checked(pid, "dtrain.coordinator", fault.name, fault)
        node = sight.agents.get(fault.name)
        here = node is not None and node.boot_id == self._boot_id
        if node is None or not here:
            raise NotFound(ErrorCode.NOT_FOUND, f"{fault.name} does not run on this machine")
        if fault.part is Part.AGENT:
            return _checked(node.pid, "dtrain.agent", fault.name, fault)
        mine = [
            rank
            for name, job in sight.jobs.items()
            for number, rank in job.ranks.items()
            if rank.agent == fault.name
            and (fault.part is Part.LAUNCHER or (name, number) == (fault.job, fault.rank))
        ]
        if not mine:
            raise NotFound(ErrorCode.NOT_FOUND, f"{fault.name} has no such rank")
        rank_pid = _checked(mine[fault.pick % len(mine)].pid, "dtrain.agent.launcher", "", fault)
        return rank_pid if fault.part is Part.RANK else _parent(rank_pid)


def _checked(pid: int, module: str, name: str, fault: Fault) -> int:
    words = _command(pid)
    if module not in words or (name and name not in words):
        raise NotFound(ErrorCode.NOT_FOUND, f"{fault.part} {fault.name} has no process here")
    return pid


def _command(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0") if pid > 0 else []
    except OSError:
        return []


def _parent(pid: int) -> int:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError as error:
        raise NotFound(ErrorCode.NOT_FOUND, "the process has just ended") from error
    parent = int(stat.rpartition(")")[2].split()[1])
    if not any(word.startswith("dtrain.") for word in _command(parent)):
        raise NotFound(ErrorCode.NOT_FOUND, f"process {pid} has no guardian or launcher above it")
    return parent


def _send(pid: int, number: int, fault: Fault) -> None:
    try:
        os.kill(pid, number)
    except OSError as error:
        raise NotFound(ErrorCode.NOT_FOUND, f"{fault.part} {fault.name} cannot be hit: {error}") from error
