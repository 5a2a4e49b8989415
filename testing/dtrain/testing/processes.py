"""The twin without containers: every node is a few processes of this machine, on loopback.

It starts in seconds and needs no privileges. What it cannot do it refuses: nodes
share one network stack and one disk, so there is no real partition and no full
disk here, and ``disconnect`` cuts the way to etcd alone.
"""

import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from dtrain.local.cluster import LocalCluster
from dtrain.local.daemons import Keeper
from dtrain.local.etcd import Member
from dtrain.local.weed import WeedServer
from dtrain.protocol.errors import ErrorCode, NotFound, Refused
from dtrain.testing.cluster import LIMIT_S, READY_S, Cluster, only_containers
from dtrain.testing.job import Job

REPORT_S = 0.2
"""How often agents report progress: tests wait for steps."""


class ProcessCluster(Cluster):
    """A cluster of processes: ``with ProcessCluster(agents=2) as cluster: ...``.

    Needs ``pip install 'dtrain[testing]'``, which brings etcd and an S3 server along.

    ``slots``: ranks that each agent can run. ``ttl_s``: seconds until a silent
    coordinator or agent counts as lost. ``store``: ``s3``, a server of its own, or
    ``dir``, a folder. ``folder``: where everything is kept; default, a temporary one that
    is removed at the end.
    """

    def __init__(
        self,
        *,
        agents: int = 2,
        coordinators: int = 3,
        etcd_members: int = 3,
        slots: int = 2,
        ttl_s: int = 5,
        store: str = "s3",
        name: str = "test",
        folder: str | os.PathLike[str] | None = None,
        ready_timeout_s: float = READY_S,
    ) -> None:
        super().__init__(
            agents=agents,
            coordinators=coordinators,
            etcd_members=etcd_members,
            name=name,
            ready_timeout_s=ready_timeout_s,
        )
        self._settings = {
            "coordinators": coordinators,
            "agents": agents,
            "etcd_members": etcd_members,
            "slots": slots,
            "ttl_s": ttl_s,
            "store": store,
        }
        self._folder = Path(folder) if folder is not None else None
        self._made_folder: Path | None = None
        self._local: LocalCluster | None = None
        self._keeper: Keeper | None = None

    @property
    def local(self) -> LocalCluster:
        """What runs below, for faults finer than these.

        Raises:
            Refused: the cluster does not run.
        """
        if self._local is None:
            raise Refused(ErrorCode.USAGE, "the cluster does not run", fix="use it in a with block")
        return self._local

    @property
    def endpoints(self) -> tuple[str, ...]:
        return self.local.endpoints

    @property
    def addresses(self) -> tuple[str, ...]:
        return self.local.addresses

    @property
    def store_env(self) -> Mapping[str, str]:
        return self.local.store_env

    def logs(self, node: str) -> str:
        path = self._log_path(self._check(node))
        return path.read_text(errors="replace") if path.exists() else ""

    def install(self, folder: str | os.PathLike[str]) -> str:
        return str(Path(folder).resolve())

    # Breaking and mending ------------------------------------------------------------------

    def kill(self, node: str) -> None:
        if node in self.etcd_members:
            self.local.kill_member(node)
        elif self._check(node) == "store":
            self._weed.stop()
        else:
            self.local.power_cut(node)

    def start(self, node: str) -> None:
        if self._check(node) != "store":
            if node in self.etcd_members or not self.local.daemon(node).is_running:
                self._starts(node)
            self.local.start_daemon(node)
        elif self._weed.pid is None:
            assert self._keeper is not None
            self._keeper.call(self._weed.start)

    def stop(self, node: str, timeout_s: float = LIMIT_S) -> None:
        if self._check(node) == "store":
            self._weed.stop()
        elif node in self.etcd_members:
            process = self._member(node).process
            if process is not None and process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.terminate()
                with contextlib.suppress(Exception):
                    process.wait(timeout_s)
            self.local.kill_member(node)
        else:
            daemon = self.local.daemon(node)
            daemon.terminate()
            if not daemon.wait(timeout_s):
                daemon.power_cut()

    def pause(self, node: str) -> None:
        frozen: set[int] = set()
        # What is started meanwhile is frozen in the next round; nothing frozen starts anything.
        while fresh := self._pids(self._check(node)) - frozen:
            for pid in fresh:
                _signal(pid, signal.SIGSTOP)
            frozen |= fresh

    def resume(self, node: str) -> None:
        for pid in self._pids(self._check(node)):
            _signal(pid, signal.SIGCONT)

    def disconnect(self, node: str) -> None:
        self._check(node)
        if node not in self.local.links:
            raise only_containers(f"take {node} off the network: coordinators and agents only, from etcd")
        self.local.cut(node)

    def reconnect(self, node: str) -> None:
        self._check(node)
        if node in self.local.links:
            self.local.heal(node)

    def partition(self, side_a: Iterable[str], side_b: Iterable[str]) -> None:
        sides = f"{', '.join(side_a)} and {', '.join(side_b)}"
        raise only_containers(f"be kept from each other, as {sides} should be: they share one network")

    def heal(self) -> None:
        for node in self.local.links:
            self.local.heal(node)

    def kill_rank(self, job: Job | str, rank: int = 0) -> None:
        found = job if isinstance(job, Job) else self.job(job)
        pid = found.pids().get(rank)
        if pid is None:
            raise NotFound(ErrorCode.NOT_FOUND, f"rank {rank} of {found.name} does not run at the moment")
        _signal(pid, signal.SIGKILL)

    def fill_disk(self, node: str) -> None:
        raise only_containers(f"fill the disk of {node}: it is everybody's")

    def free_disk(self, node: str) -> None:
        raise only_containers(f"fill the disk of {node}: it is everybody's")

    def replace(self, node: str, image: str | None = None) -> None:
        if image is not None:
            raise only_containers("run another image")
        if self._check(node) not in (*self.coordinators, *self.agents):
            raise only_containers(f"move {node} to another machine")
        self.kill(node)
        shutil.rmtree(self.local.daemon(node).folder, ignore_errors=True)
        self.start(node)

    # Inside ----------------------------------------------------------------------------------

    def _start_all(self) -> None:
        folder = self._folder
        if folder is None:
            folder = self._made_folder = Path(tempfile.mkdtemp(prefix="dtrain-test-"))
        self._keeper = Keeper("testing")
        self._local = LocalCluster(
            folder,
            name=self.name,
            faults=True,
            etcd_fsync=False,
            auto_compaction="1h",
            agent_flags=("--report-interval", str(REPORT_S)),
            ready_timeout_s=self._ready_timeout_s,
            **self._settings,  # type: ignore[arg-type]
        )
        self._local.start()

    def _close(self) -> None:
        if self._local is not None:
            for node in (*self.etcd_members, *self.coordinators, *self.agents):
                # A frozen process would not hear that it is to end.
                with contextlib.suppress(Exception):
                    self.resume(node)
            self._local.stop()
            self._local = None
        if self._keeper is not None:
            self._keeper.close()
            self._keeper = None
        if self._made_folder is not None:
            shutil.rmtree(self._made_folder, ignore_errors=True)
            self._made_folder = None

    def _pids(self, node: str) -> set[int]:
        if node == "store":
            return {self._weed.pid} if self._weed.pid is not None else set()
        if node in self.etcd_members:
            process = self._member(node).process
            return {process.pid} if process is not None and process.poll() is None else set()
        return set(self.local.daemon(node).pids())

    def _log_path(self, node: str) -> Path:
        if node == "store":
            return self._weed.log_path
        return self._member(node).log_path if node in self.etcd_members else self.local.daemon(node).log_path

    def _member(self, node: str) -> Member:
        return self.local.etcd_servers.members[self.etcd_members.index(node)]

    @property
    def _weed(self) -> WeedServer:
        found = self.local.weed
        if found is None:
            raise NotFound(ErrorCode.NOT_FOUND, "this cluster's store is a folder, which cannot be broken")
        return found


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
