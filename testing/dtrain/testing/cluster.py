"""What both twins promise: a cluster to submit jobs to, to break, and to judge.

Nodes are known by name: coordinators c1, c2, ..., agents a1, a2, ..., members of
etcd etcd-0, etcd-1, ..., and store. Whatever a method breaks another one mends
by the same name, and the end of the ``with`` block ends everything, mended or not.

State is read straight from etcd and never from a component under test.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from dtrain.cli import jobfile
from dtrain.cli.client import Client
from dtrain.protocol import codec
from dtrain.protocol.audit import Auditor
from dtrain.protocol.cluster import LeaderRecord
from dtrain.protocol.errors import DtrainError, ErrorCode, NotFound, Refused, Unavailable
from dtrain.protocol.ids import ClusterName, parse_name
from dtrain.protocol.job import JobSpec
from dtrain.protocol.keys import Keys
from dtrain.storage.etcd.port import KeyValue, prefix_end
from dtrain.storage.etcd.transport import GatewayEtcd
from dtrain.testing import members
from dtrain.testing.following import Following
from dtrain.testing.job import Job
from dtrain.testing.patience import limited, patiently

T = TypeVar("T")

POLL_S = 0.05
READY_S = 240.0
"""How long a cluster may take to get ready, by default."""

LIMIT_S = 120.0
"""Longest wait for one thing that should take seconds: machines that run tests are loaded."""

LOGS_VARIABLE = "DTRAIN_TESTING_LOGS"
"""A folder: when a ``with`` block ends with an error, every node's log is written there."""


class Cluster(ABC):
    """The contract of ``ProcessCluster`` and ``DtrainCluster``. Use it in a ``with`` block.

    Entering starts everything and returns when the cluster takes jobs. Leaving
    without an error judges the whole history of the cluster, and fails if a promise
    of dtrain was broken; leaving at all removes everything.
    """

    def __init__(
        self, *, agents: int, coordinators: int, etcd_members: int, name: str, ready_timeout_s: float
    ) -> None:
        self.name = ClusterName(parse_name(name, "cluster"))
        """Its name, under which its records are in etcd."""
        self.keys = Keys(self.name)
        """Where its records are in etcd."""
        self.agents: tuple[str, ...] = tuple(f"a{number + 1}" for number in range(agents))
        """Names of the machines that train: a1, a2, ..."""
        self.coordinators: tuple[str, ...] = tuple(f"c{number + 1}" for number in range(coordinators))
        """Names of the coordinators: c1, c2, ..."""
        self.etcd_members: tuple[str, ...] = tuple(f"etcd-{number}" for number in range(etcd_members))
        """Names of etcd's members: etcd-0, etcd-1, ..."""
        self._ready_timeout_s = ready_timeout_s
        self._etcd: GatewayEtcd | None = None
        self._client: Client | None = None
        self._auditing: Following | None = None
        self._numbers = itertools.count(1)
        self._names: set[str] = set()
        self._former: dict[str, int] = {}

    # Life --------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self.start_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._audit_the_end()
            else:
                self._tell(error)
        except BaseException as problem:
            if error is None:
                self._save_logs(problem)
            raise
        finally:
            self.close()

    def start_all(self) -> None:
        """Start everything; return when the cluster takes jobs. ``with`` does this.

        Raises:
            Refused: something that is needed is not installed; the message says what.
            Unavailable: a part did not get ready; the message has the end of its log.
        """
        try:
            self._start_all()
            self._auditing = Following(self.endpoints, self.name)
        except BaseException as error:
            _explain(error)
            self._save_logs(error)
            self.close()
            raise

    def close(self) -> None:
        """End and remove everything. May be repeated. ``with`` does this."""
        try:
            for part in (self._auditing, self._client, self._etcd):
                if part is not None:
                    part.close()
            self._auditing = self._client = self._etcd = None
        finally:
            self._close()

    # Names and addresses -------------------------------------------------------------------

    @property
    def nodes(self) -> tuple[str, ...]:
        """Names of everything that can be broken."""
        return (*self.coordinators, *self.agents, *self.etcd_members, *(["store"] if self.store_env else []))

    @property
    @abstractmethod
    def endpoints(self) -> tuple[str, ...]:
        """Client URLs of etcd's members, for programs on this machine, in the members' order."""

    @property
    @abstractmethod
    def addresses(self) -> tuple[str, ...]:
        """``host:port`` of the coordinators, for programs on this machine, in their order."""

    @property
    @abstractmethod
    def store_env(self) -> Mapping[str, str]:
        """Credentials of the S3 store, as environment variables; empty without one."""

    # Looking -------------------------------------------------------------------------------

    @property
    def etcd(self) -> GatewayEtcd:
        """A client of the cluster's etcd."""
        if self._etcd is None:
            self._etcd = GatewayEtcd(self.endpoints)
        return self._etcd

    @property
    def client(self) -> Client:
        """A client of the coordinators: what the command line uses."""
        if self._client is None:
            self._client = Client(self.addresses, timeout_s=30.0)
        return self._client

    def read(self, prefix: str = "") -> dict[str, KeyValue]:
        """Return the records under ``prefix`` (below the cluster's root), straight from etcd.

        Waits for an etcd that a test has just broken, for 30 s: an election takes seconds.

        Raises:
            Unavailable: etcd does not answer.
        """
        return patiently(lambda: self._read(prefix))

    def leader(self, timeout_s: float = LIMIT_S) -> str:
        """Name of the coordinator that leads; waits for one.

        Raises:
            AssertionError: nobody leads for ``timeout_s``.
        """

        def found() -> str:
            items = self.etcd.range(self.keys.leader).items
            return str(codec.decode(LeaderRecord, items[0].value).replica) if items else ""

        return self.until("a coordinator leads", found, timeout_s)

    def etcd_leader(self, timeout_s: float = LIMIT_S) -> str:
        """Name of the etcd member that leads; waits for one.

        Raises:
            AssertionError: no member says that it leads for ``timeout_s``.
        """

        def found() -> str:
            pairs = zip(self.etcd_members, self.endpoints, strict=True)
            return next((name for name, endpoint in pairs if members.leads(endpoint)), "")

        return self.until("a member of etcd leads", found, timeout_s)

    def registered(self) -> set[str]:
        """Names of the coordinators and agents that are registered in etcd at the moment."""
        return set(patiently(self._registrations))

    def wait_ready(self, *nodes: str, timeout_s: float = LIMIT_S) -> None:
        """Wait until somebody leads and ``nodes`` are registered (default: every coordinator and agent).

        Raises:
            AssertionError: not in ``timeout_s``.
        """
        wanted = set(nodes or (*self.coordinators, *self.agents)) & {*self.coordinators, *self.agents}
        self.leader(timeout_s)

        def all_are() -> bool:
            found = self._registrations()
            # What died without a word is registered until its lease ends: that is not what was started.
            return all(found.get(name, 0) > self._former.get(name, 0) for name in wanted)

        self.until(f"{', '.join(sorted(wanted))} are registered", all_are, timeout_s)

    def until(self, what: str, condition: Callable[[], T], timeout_s: float = LIMIT_S) -> T:
        """Wait for ``condition`` to return something true, and return that.

        An etcd or coordinator that does not answer meanwhile is no reason to fail:
        tests take it away. ``what`` completes "not in 120 s: ...".

        Raises:
            AssertionError: not in ``timeout_s``; the message tells the cluster's state.
        """
        deadline = time.monotonic() + timeout_s
        problem = ""
        while True:
            try:
                with limited():
                    found = condition()
                if found:
                    return found
                problem = ""
            except DtrainError as error:
                problem = f" ({error.message})"
            if time.monotonic() > deadline:
                raise AssertionError(f"not in {timeout_s:g} s: {what}{problem}\n{self.describe()}")
            time.sleep(POLL_S)

    def describe(self) -> str:
        """Who leads and who is missing, in lines for people; the end of the log of who is missing."""
        lines = []
        try:
            items = self.etcd.range(self.keys.leader, deadline_s=2.0).items
            leads = str(codec.decode(LeaderRecord, items[0].value).replica) if items else "nobody"
            registered = self._registrations()
            missing = [name for name in (*self.coordinators, *self.agents) if name not in registered]
        except DtrainError as error:
            return f"cluster {self.name}: etcd cannot be read: {error.message}"
        lines.append(f"cluster {self.name}: {leads} leads")
        for name in missing:
            lines += [f"  {name} is not registered; its log ends:", *self.tail(name)]
        return "\n".join(lines)

    def tail(self, node: str, lines: int = 5) -> list[str]:
        """The last lines of a node's log, indented; a sentence if there is none."""
        try:
            found = self.logs(node).strip().splitlines()[-lines:]
        except (DtrainError, OSError) as error:
            found = [f"(no log: {error})"]
        return [f"    {line[:300]}" for line in found]

    @abstractmethod
    def logs(self, node: str) -> str:
        """Everything that a node has logged so far.

        Raises:
            NotFound: there is no such node.
        """

    # Jobs ----------------------------------------------------------------------------------

    def submit(
        self,
        script: str | os.PathLike[str] = "",
        *args: object,
        name: str = "",
        nnodes: int | str = 1,
        nproc_per_node: int = 1,
        working_dir: str | os.PathLike[str] | None = None,
        checkpoint_every_steps: int | None = None,
        **fields: Any,
    ) -> Job:
        """Submit a training script and return the job at once.

        ``script`` is a path; a relative one is looked for in ``working_dir``, which
        is the current folder unless given. ``args`` are its arguments. ``fields`` are
        those of a job file, such as ``env={"LR": "0.1"}``, ``restarts={"max": 3}`` or
        ``module="mypackage.train"`` instead of a script.

        ``name``: default, that of the script, and a number from the second one on.
        ``nnodes``: machines, a number or a range such as "1:3". Agents in containers get
        a copy of ``working_dir`` (of the script's folder, if its path is absolute).

        Raises:
            NotFound: there is no such script.
            Refused: a field is wrong; the message names all that are.
            Conflict: another job has this name.
        """
        path = Path(script)
        if working_dir is None:
            folder, target = (path.parent, path.name) if path.is_absolute() else (Path.cwd(), str(script))
        else:
            folder, target = Path(working_dir).resolve(), str(script)
        if script and not (folder / target).is_file():
            raise NotFound(
                ErrorCode.SCRIPT_NOT_FOUND,
                f"there is no script {folder / target}",
                fix="give working_dir=, or an absolute path: Path(__file__).with_name('train.py')",
            )
        document: dict[str, Any] = {
            "name": name or self._free_name(path.stem),
            "nnodes": nnodes,
            "nproc_per_node": nproc_per_node,
            "args": [str(word) for word in args],
            **({"script": target} if script else {}),
            **fields,
        }
        if checkpoint_every_steps is not None:
            policy = dict(document.get("checkpoint") or {})
            document["checkpoint"] = policy | {"every_steps": checkpoint_every_steps}
        spec = _parsed(document, folder)
        self._names.add(spec.name)
        spec = dataclasses.replace(spec, working_dir=self.install(folder))
        self.client.submit(codec.encode(spec), uuid.uuid4().hex)
        return Job(self, spec.name)

    def job(self, name: str) -> Job:
        """The job called ``name``, however it was submitted."""
        return Job(self, name)

    @abstractmethod
    def install(self, folder: str | os.PathLike[str]) -> str:
        """Make ``folder`` known to every agent; return its path there.

        Raises:
            Refused: it cannot be copied.
        """

    def cli(self, *words: str, timeout_s: float = LIMIT_S) -> "subprocess.CompletedProcess[str]":
        """Run ``dtrain`` with ``words`` against this cluster; return its exit code and what it printed.

        Raises:
            subprocess.TimeoutExpired: it took longer than ``timeout_s``.
        """
        kept = {
            key: value for key, value in os.environ.items() if not key.startswith(("DTRAIN_", "ETCDCTL_"))
        }
        env = (
            kept
            | dict(self.store_env)
            | {
                "DTRAIN_CLUSTER": self.name,
                "DTRAIN_COORDINATORS": ",".join(self.addresses),
                "DTRAIN_ENDPOINTS": ",".join(self.endpoints),
            }
        )
        return subprocess.run(
            [sys.executable, "-m", "dtrain.cli", *words],
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    # Breaking and mending --------------------------------------------------------------------

    @abstractmethod
    def kill(self, node: str) -> None:
        """A machine loses its power: everything on it dies at once. ``start`` brings it back.

        What it had on disk is kept.
        """

    @abstractmethod
    def start(self, node: str) -> None:
        """Start a node that was killed or stopped, with the disk it had; does nothing while it runs.

        Returns before it is ready: see ``wait_ready``.
        """

    @abstractmethod
    def stop(self, node: str, timeout_s: float = LIMIT_S) -> None:
        """Ask a node to end (SIGTERM) and wait until it has; after ``timeout_s`` it is killed.

        An agent that is asked to end hands its ranks over to other machines first.
        """

    def restart(self, node: str) -> None:
        """Stop a node in order and start it again; a coordinator or agent is registered on return."""
        self.stop(node)
        self.start(node)
        if node in (*self.coordinators, *self.agents):
            self.wait_ready(node)

    @abstractmethod
    def pause(self, node: str) -> None:
        """Freeze everything on a node, connections open, as when a machine is suspended."""

    @abstractmethod
    def resume(self, node: str) -> None:
        """Let a paused node go on."""

    @abstractmethod
    def disconnect(self, node: str) -> None:
        """Cut a node off from the others. It goes on running.

        Processes: coordinators and agents, from etcd only; the calls between
        coordinators, agents and ranks still pass.

        Raises:
            Refused: this twin cannot disconnect such a node.
        """

    @abstractmethod
    def reconnect(self, node: str) -> None:
        """Undo ``disconnect``."""

    @abstractmethod
    def partition(self, side_a: Iterable[str], side_b: Iterable[str]) -> None:
        """Let nothing pass between the two sides, in either direction, until ``heal``. Containers only.

        Packets vanish, connections stay open. A node in neither side reaches both;
        several partitions may hold at once.

        Raises:
            Refused: on the process twin.
        """

    @abstractmethod
    def heal(self) -> None:
        """Undo every ``partition`` and every ``disconnect``."""

    @abstractmethod
    def kill_rank(self, job: Job | str, rank: int = 0) -> None:
        """SIGKILL one training process.

        Raises:
            NotFound: this rank does not run at the moment.
        """

    @abstractmethod
    def fill_disk(self, node: str) -> None:
        """Fill the disk of a member of etcd that was given a small one, to its last byte. Containers only.

        Raises:
            Refused: on the process twin, or its disk is not small.
        """

    @abstractmethod
    def free_disk(self, node: str) -> None:
        """Undo ``fill_disk``."""

    @abstractmethod
    def replace(self, node: str, image: str | None = None) -> None:
        """A new machine takes over the name of a node: other address, empty disk, perhaps another image.

        The old one is killed if it still runs. Processes: coordinators and agents,
        and no ``image``.

        Raises:
            Refused: this twin cannot replace such a node.
        """

    # Judging -------------------------------------------------------------------------------------

    def audit(self, *, catch_up: bool = True) -> Auditor:
        """Judge everything that happened in etcd so far; the end of the ``with`` block does it, too.

        ``catch_up``: up to this very moment, which needs an etcd that answers.

        Raises:
            AssertionError: a promise was broken: two leaders acted at once, say, or a
                checkpoint was committed that is not whole. The message says which, and where.
            Unavailable, TimedOut: etcd does not answer.
        """
        assert self._auditing is not None, "the cluster has not been started"
        if catch_up:
            self._auditing.catch_up()
        found = self._auditing.violations()
        if found:
            raise AssertionError(_broken(found))
        return self._auditing.auditor

    # Inside --------------------------------------------------------------------------------------

    @abstractmethod
    def _start_all(self) -> None:
        """Start and wait until everything is ready."""

    @abstractmethod
    def _close(self) -> None:
        """End everything; may be called at any time, and again."""

    def _read(self, prefix: str = "") -> dict[str, KeyValue]:
        full = self.keys.root + prefix
        return {item.key: item for item in self.etcd.range(full, prefix_end(full)).items}

    def _registrations(self) -> dict[str, int]:
        """Who is registered, with the revision of its newest record."""
        found = {}
        for key, item in self._read().items():
            parsed = self.keys.parse(key)
            if parsed is not None and parsed.kind in ("coordinator", "node"):
                found[parsed.name or str(parsed.agent)] = item.mod_revision
        return found

    def _starts(self, node: str) -> None:
        """A node is about to be started: what is registered under its name is of its former life."""
        if node in (*self.coordinators, *self.agents):
            # Without an etcd nobody knows, and it will have to register anew in any case.
            with contextlib.suppress(DtrainError):
                self._former[node] = self._registrations().get(node, 0)

    def _check(self, node: str) -> str:
        if node not in self.nodes:
            known = ", ".join(self.nodes)
            raise NotFound(ErrorCode.NOT_FOUND, f"there is no {node} in this cluster: there are {known}")
        return node

    def _free_name(self, stem: str) -> str:
        base = re.sub(r"[^a-z0-9]+", "-", stem.lower()).strip("-")[:50] or "job"
        names = itertools.chain([base], (f"{base}-{number}" for number in itertools.count(2)))
        return next(name for name in names if name not in self._names)

    def _audit_the_end(self) -> None:
        # A test may end without an etcd; until then everything was judged.
        with contextlib.suppress(DtrainError):
            self.audit()
        self.audit(catch_up=False)

    def _tell(self, error: BaseException) -> None:
        """Add to a test's error what the test did not see."""
        _explain(error)
        with contextlib.suppress(AssertionError):
            found = self._auditing.violations() if self._auditing is not None else []
            if found:
                error.add_note(_broken(found))
        self._save_logs(error)

    def _save_logs(self, error: BaseException) -> None:
        wanted = os.environ.get(LOGS_VARIABLE)
        if not wanted:
            return
        folder = Path(wanted) / f"{self.name}-{os.getpid()}-{time.time_ns()}"
        folder.mkdir(parents=True, exist_ok=True)
        for node in (*self.coordinators, *self.agents, *self.etcd_members, "store"):
            with contextlib.suppress(DtrainError, OSError):
                (folder / f"{node}.log").write_text(self.logs(node))
        error.add_note(f"the logs of all nodes are in {folder}")


def only_containers(what: str) -> Refused:
    """The error of the process twin for what it cannot do."""
    return Refused(
        ErrorCode.BAD_SETTING,
        f"processes of one machine cannot {what}",
        fix="use DtrainCluster, which runs every node in a container",
    )


def not_ready(timeout_s: float, missing: Iterable[str], cause: str = "") -> Unavailable:
    """The error of a start that takes too long."""
    return Unavailable(
        ErrorCode.COORDINATOR_UNAVAILABLE,
        f"not ready after {timeout_s:g} s: {', '.join(sorted(missing))}{cause and chr(10) + cause}",
        fix=f"set {LOGS_VARIABLE} to a folder and look into the logs there",
    )


def _explain(error: BaseException) -> None:
    """Let a traceback show what only the command line would: cause, and what to do."""
    if isinstance(error, DtrainError):
        for note in (error.cause, error.fix):
            if note and note not in getattr(error, "__notes__", ()):
                error.add_note(note)


def _broken(found: Iterable[object]) -> str:
    shown = [str(violation) for violation in found]
    return "\n".join([f"the auditor found {len(shown)} broken promises:", *shown[:20]])


def _parsed(document: Mapping[str, Any], folder: Path) -> JobSpec:
    try:
        # JSON is YAML: a job file's own errors come for free.
        return jobfile.parse(json.dumps(document), "submit()", folder)
    except jobfile.BadJobFile as error:
        raise Refused(
            error.code, "; ".join(error.details), fix="the fields are those of a job file"
        ) from error
