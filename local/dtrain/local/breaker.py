"""Faults for a cluster that this process runs, and the one fault that needs nothing but etcd."""

import signal
import threading

from dtrain.local import sweeping
from dtrain.local.breaking import Breakable
from dtrain.local.faults import WEIGHTS, Breaker, Fault, Kind, Part
from dtrain.local.filling import Filling
from dtrain.local.links import WAYS
from dtrain.protocol.errors import ErrorCode, NotFound, Refused


class FillingBreaker:
    """Fills etcd itself and leaves every other fault to ``inner``.

    Whoever fills has to know what is compacted when it is freed, so this runs
    where the cluster is watched.
    """

    def __init__(self, inner: Breaker, filling: Filling) -> None:
        self._inner = inner
        self._filling = filling
        self._filled: list[Fault] = []

    def cannot(self, kind: Kind, part: Part) -> str:
        return "" if (kind, part) == (Kind.FILL, Part.ETCD) else self._inner.cannot(kind, part)

    def strike(self, fault: Fault) -> None:
        if fault.kind is not Kind.FILL:
            self._inner.strike(fault)
            return
        self._filled.append(fault)
        try:
            self._filling.fill()
        except Refused:
            self._filled.remove(fault)
            raise

    def heal(self, fault: Fault) -> None:
        if fault.kind is not Kind.FILL:
            self._inner.heal(fault)
        elif fault in self._filled:
            self._filling.free()
            self._filled.remove(fault)

    def close(self) -> None:
        """Heal everything that is still broken."""
        try:
            for fault in list(self._filled):
                self.heal(fault)
        finally:
            self._inner.close()


class LocalBreaker:
    """Breaks ``cluster``; its etcd is filled by ``FillingBreaker``, which goes around this one."""

    def __init__(self, cluster: Breakable) -> None:
        self._cluster = cluster
        self._broken: list[Fault] = []
        self._lock = threading.RLock()

    def cannot(self, kind: Kind, part: Part) -> str:
        if (kind, part) not in WEIGHTS:
            return f"{kind} is nothing that can be done to a {part}"
        if kind in (Kind.CUT, Kind.SLOW, Kind.PREEMPT) and not self._cluster.links:
            return "its daemons have no links of their own to etcd: it was not started with faults"
        return ""

    def strike(self, fault: Fault) -> None:
        if why := self.cannot(fault.kind, fault.part):
            raise Refused(ErrorCode.BAD_SETTING, f"cannot {fault}: {why}")
        with self._lock:
            if fault.lasts:
                # Before it is done: a fault that fails half-way needs healing, too.
                self._broken.append(fault)
            try:
                self._do(fault)
            except NotFound:
                if fault.lasts:
                    self._broken.remove(fault)
                raise

    def heal(self, fault: Fault) -> None:
        cluster, name = self._cluster, fault.name
        with self._lock:
            if fault not in self._broken:
                return
            match fault.kind:
                case Kind.KILL:
                    cluster.start_daemon(name)
                case Kind.FREEZE:
                    cluster.thaw(name)
                    if fault.part is not Part.ETCD:
                        # Its guardian may have given up on what was frozen, or the other way round.
                        cluster.start_daemon(name)
                case Kind.CUT | Kind.SLOW:
                    cluster.heal(name)
                case Kind.PREEMPT:
                    cluster.give_back(name)
                case Kind.FILL:
                    pass
            self._broken.remove(fault)

    def close(self) -> None:
        """Heal everything that is still broken."""
        with self._lock:
            for fault in list(self._broken):
                self.heal(fault)

    # Inside ----------------------------------------------------------------------------

    def _do(self, fault: Fault) -> None:
        cluster, name = self._cluster, fault.name
        match fault.kind, fault.part:
            case Kind.KILL, Part.RANK:
                if not sweeping.signal_if_found(fault.pid, cluster.folder, signal.SIGKILL):
                    raise NotFound(ErrorCode.NOT_FOUND, f"rank {fault.rank} of {fault.job} has just ended")
            case Kind.KILL, Part.LAUNCHER:
                cluster.kill_launcher(name, pick=fault.pick)
            case Kind.KILL, Part.AGENT | Part.COORDINATOR | Part.LEADER:
                cluster.kill_process(name)
            case Kind.KILL, Part.AGENT_GUARDIAN | Part.COORDINATOR_GUARDIAN:
                cluster.kill_guardian(name)
            case Kind.KILL, Part.MACHINE:
                cluster.power_cut(name)
            case Kind.KILL, _:
                cluster.kill_member(name)
            case Kind.FREEZE, _:
                cluster.freeze(name)
            case Kind.CUT, _:
                cluster.cut(name, next((way for way in WAYS if way == fault.way), "both"))
            case Kind.SLOW, _:
                cluster.slow(name, fault.delay_s)
            case Kind.PREEMPT, _:
                cluster.preempt(name)
            case _:
                raise AssertionError(fault)
