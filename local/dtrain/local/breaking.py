"""What a local cluster can be broken with: signals, power cuts, cut and slow links.

Everything here is undone by name: ``thaw``, ``start_daemon`` and ``heal``. Names
are those of daemons (c1, a1) and of etcd's members (etcd-0).
"""

import contextlib
import os
import signal
from abc import ABC, abstractmethod
from pathlib import Path

from dtrain.local.daemons import Daemon, Keeper
from dtrain.local.etcd import EtcdCluster
from dtrain.local.links import Links, Way
from dtrain.protocol import codec
from dtrain.protocol.cluster import LeaderRecord
from dtrain.protocol.errors import DtrainError, ErrorCode, NotFound, Refused
from dtrain.protocol.ids import JobName
from dtrain.protocol.keys import Keys
from dtrain.protocol.snapshot import WorkerSnapshot
from dtrain.storage.etcd.port import KeyValue, prefix_end
from dtrain.storage.etcd.transport import GatewayEtcd

NOTICE_S = 30
"""What a notice says that a machine has left, as on the dearest of clouds."""


class Breakable(ABC):
    """The half of ``LocalCluster`` that breaks things; not of use by itself."""

    folder: Path
    keys: Keys
    etcd_servers: EtcdCluster
    coordinators: dict[str, Daemon]
    agents: dict[str, Daemon]
    links: dict[str, Links]
    """By daemon; empty unless the cluster was made with ``faults``."""
    _keepers: list[Keeper]

    @property
    @abstractmethod
    def etcd(self) -> GatewayEtcd:
        """A client of the cluster's etcd."""

    # Looking ---------------------------------------------------------------------------

    def read(self, prefix: str) -> dict[str, KeyValue]:
        """Return the records under ``prefix`` (below the cluster's root), straight from etcd."""
        full = self.keys.root + prefix
        return {item.key: item for item in self.etcd.range(full, prefix_end(full)).items}

    def daemon(self, name: str) -> Daemon:
        """The coordinator or agent called ``name``.

        Raises:
            NotFound: there is none.
        """
        found = self.coordinators.get(name) or self.agents.get(name)
        if found is None:
            known = ", ".join([*self.coordinators, *self.agents])
            raise NotFound(
                ErrorCode.NOT_FOUND, f"there is no {name} in this cluster", fix=f"there are {known}"
            )
        return found

    @property
    def members(self) -> tuple[str, ...]:
        """Names of etcd's members."""
        return tuple(member.name for member in self.etcd_servers.members)

    def leader(self) -> str | None:
        """Name of the replica that leads, None at the moment."""
        found = self.etcd.range(self.keys.leader).items
        return str(codec.decode(LeaderRecord, found[0].value).replica) if found else None

    def snapshots(self) -> list[tuple[JobName, WorkerSnapshot]]:
        """Every agent's snapshot of every job."""
        found = []
        for key, item in self.read("agents/").items():
            parsed = self.keys.parse(key)
            if parsed is not None and parsed.kind == "worker":
                found.append((parsed.job, codec.decode(WorkerSnapshot, item.value)))
        return found

    # Breaking --------------------------------------------------------------------------

    def kill_leader_process(self, number: int = signal.SIGKILL) -> str:
        """Signal the leader's real process (its guardian lives on); return its name.

        Raises:
            NotFound: nobody leads.
        """
        name = self.leader()
        if name is None:
            raise NotFound(ErrorCode.NOT_FOUND, "there is no leader at the moment")
        self.kill_process(name, number)
        return name

    def kill_process(self, name: str, number: int = signal.SIGKILL) -> int:
        """Signal the real process of a coordinator or agent; return its pid."""
        return self._hit(self.daemon(name).process_pid, f"process of {name}", number)

    def kill_agent(self, name: str, number: int = signal.SIGKILL) -> int:
        """Signal an agent's process: its launchers and ranks live on."""
        return self.kill_process(name, number)

    def kill_guardian(self, name: str, number: int = signal.SIGKILL) -> int:
        """Signal the guardian of a coordinator or agent."""
        return self._hit(self.daemon(name).guardian_pid, f"guardian of {name}", number)

    def kill_launcher(self, agent: str, number: int = signal.SIGKILL, *, pick: int = 0) -> int:
        """Signal a launcher of an agent: with several jobs, the one at ``pick``."""
        found = self.daemon(agent).launcher_pids()
        return self._hit(found[pick % len(found)] if found else None, f"launcher of {agent}", number)

    def kill_rank(self, rank: int, number: int = signal.SIGKILL, *, job: str = "") -> int:
        """Signal a rank, by its newest snapshot; return its pid."""
        newest, pid = -1, None
        for name, snapshot in self.snapshots():
            for state in snapshot.ranks:
                wanted = state.rank == rank and state.exit_code is None and job in ("", name)
                if wanted and snapshot.attempt > newest:
                    newest, pid = snapshot.attempt, state.pid
        return self._hit(pid, f"rank {rank}", number)

    def power_cut(self, agent: str) -> None:
        """Everything of one machine dies at the same moment; ``start_daemon`` brings it back."""
        self.daemon(agent).power_cut()

    def notice(self, agent: str) -> Path:
        """The file whose appearance tells an agent that its machine is about to go."""
        return self.folder / "notices" / self.daemon(agent).name

    def preempt(self, agent: str) -> None:
        """Tell an agent that its machine goes in NOTICE_S; the machine does not go by itself.

        Raises:
            Refused: the cluster was made without ``faults``.
        """
        self._links(agent)
        path = self.notice(agent)
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{NOTICE_S} the market asks for it")

    def give_back(self, agent: str) -> None:
        """Do what follows on ``preempt``: the machine goes, and another one comes under its name."""
        self.power_cut(agent)
        self.notice(agent).unlink(missing_ok=True)
        self.start_daemon(agent)

    def kill_member(self, name: str) -> None:
        """SIGKILL for one member of etcd; ``start_daemon`` brings it back with its data."""
        self.etcd_servers.kill(self._member(name))

    def freeze(self, name: str) -> None:
        """SIGSTOP for a member, or guardian and process of a daemon, as if its machine were suspended."""
        if name in self.members:
            self.etcd_servers.freeze(self._member(name))
        else:
            self._to_both(name, signal.SIGSTOP)

    def thaw(self, name: str) -> None:
        """SIGCONT after ``freeze``."""
        if name in self.members:
            self.etcd_servers.thaw(self._member(name))
        else:
            self._to_both(name, signal.SIGCONT)

    def start_daemon(self, name: str) -> None:
        """Start a coordinator, an agent or a member of etcd that has ended."""
        if name not in self.members:
            self.daemon(name).start()
            return
        index = self._member(name)
        if not self.etcd_servers.members[index].is_running:
            # The member dies with the thread that starts it.
            self._keepers[0].call(lambda: self.etcd_servers.start_member(index))

    def cut(self, name: str, way: Way = "both") -> None:
        """Cut a daemon off from etcd, in both directions or one, until ``heal``.

        Raises:
            NotFound: there is no such daemon.
            Refused: the cluster was made without ``faults``, or there is no such way.
        """
        self._links(name).cut(way)

    def slow(self, name: str, delay_s: float) -> None:
        """Deliver what passes between a daemon and etcd ``delay_s`` late in each direction, until ``heal``.

        Raises:
            NotFound, Refused: see ``cut``.
        """
        self._links(name).slow(delay_s)

    def heal(self, name: str) -> None:
        """Let everything pass between a daemon and etcd after ``cut`` or ``slow``.

        Raises:
            NotFound, Refused: see ``cut``.
        """
        self._links(name).heal()

    # Inside ----------------------------------------------------------------------------

    def _links(self, name: str) -> Links:
        self.daemon(name)
        found = self.links.get(name)
        if found is None:
            raise Refused(
                ErrorCode.BAD_SETTING,
                f"the links of {name} cannot be broken: this is no test cluster",
                fix="start it as one: dtrain up --test",
            )
        return found

    def _member(self, name: str) -> int:
        if name not in self.members:
            known = ", ".join(self.members)
            raise NotFound(ErrorCode.NOT_FOUND, f"etcd has no member {name}", fix=f"there are {known}")
        return self.members.index(name)

    def _hit(self, pid: int | None, what: str, number: int) -> int:
        if pid is None:
            raise NotFound(ErrorCode.NOT_FOUND, f"there is no {what}")
        try:
            os.kill(pid, number)
        except ProcessLookupError as error:
            raise NotFound(ErrorCode.NOT_FOUND, f"{what} has just ended") from error
        return pid

    def _to_both(self, name: str, number: int) -> None:
        daemon = self.daemon(name)
        for pid in (daemon.guardian_pid, daemon.process_pid):
            if pid is not None:
                with contextlib.suppress(DtrainError):
                    self._hit(pid, name, number)
