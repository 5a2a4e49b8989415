"""The twin in containers: every node is a container on a network of the cluster's own.

Real machines as far as the programs can tell: each node has its own address, process
table and disk; packets between two sides can vanish, a disk can be full, and a node
can be replaced by one that knows nothing. Built on testcontainers, so that it finds
the engine as other tests do (``DOCKER_HOST``, contexts, properties file).

Each node's address is fixed for its life, as a machine's is: it comes back with it
after ``start`` and ``reconnect``. What is published on the host keeps its port, too.
"""

import contextlib
import ipaddress
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from dtrain.local import ports
from dtrain.protocol.errors import DtrainError, ErrorCode, NotFound, Refused, Unavailable
from dtrain.storage.blobs import digest
from dtrain.storage.blobs.s3 import S3Blobs
from dtrain.storage.blobs.s3_settings import S3Settings
from dtrain.testing import copying, joining, nodes, wires
from dtrain.testing.cluster import LIMIT_S, READY_S, Cluster, not_ready
from dtrain.testing.images import Images
from dtrain.testing.job import Job
from dtrain.testing.nodes import Kind, Shape

T = TypeVar("T")

REPORT_S = 0.2
_THREADS = 8
_PORT_TRIES = 3
_STOP_S = 120.0
_DISK = "/disk"
_FIRST_HOST = 10
"""Addresses below belong to the gateway, and to whatever an engine wants for itself."""


@dataclass(slots=True)
class _Node:
    """One node. ``address`` and ``host_port`` outlive its container's restarts."""

    name: str
    kind: Kind
    address: str
    host_port: int = 0
    image: str = ""
    container: Any = None
    paused: bool = False
    connected: bool = True
    former_log: str = ""


class DtrainCluster(Cluster):
    """A cluster of containers: ``with DtrainCluster(agents=2) as cluster: ...``.

    Needs a Docker engine, ``pip install 'dtrain[testing]'`` and the images that
    ``Images`` names. Ask ``DtrainCluster.available()`` first where there may be none.

    ``slots``: ranks that each agent can run. ``ttl_s``: seconds until a silent
    coordinator or agent counts as lost. ``images``: image names, see ``Images``.
    ``small_disk``: members of etcd whose disk ``fill_disk`` can fill, with its size:
    ``{"etcd-2": "260m"}`` (etcd reserves 2 x 64 MB for its log). ``env``: more settings for
    coordinators and agents, as environment variables. ``options``: more of the Docker SDK's
    options for every container, such as ``{"dns": ["10.0.0.2"]}`` or ``{"mem_limit": "2g"}``.
    """

    def __init__(
        self,
        *,
        agents: int = 2,
        coordinators: int = 3,
        etcd_members: int = 3,
        slots: int = 2,
        ttl_s: int = 5,
        name: str = "test",
        images: Images | None = None,
        small_disk: Mapping[str, str] | None = None,
        env: Mapping[str, str] | None = None,
        options: Mapping[str, Any] | None = None,
        ready_timeout_s: float = READY_S,
    ) -> None:
        super().__init__(
            agents=agents,
            coordinators=coordinators,
            etcd_members=etcd_members,
            name=name,
            ready_timeout_s=ready_timeout_s,
        )
        self.id = f"{name}-{secrets.token_hex(4)}"
        """Its label and the prefix of its containers' names in the engine: unique."""
        self.images = (images or Images()).resolved()
        """The images that its nodes run, unless ``replace`` gave one another."""
        self._shape = Shape(
            cluster=name,
            token=self.id,
            images=self.images,
            etcd_members=self.etcd_members,
            ttl_s=ttl_s,
            slots=slots,
            report_s=REPORT_S,
            credentials=("dtrain-test", secrets.token_hex(16)),
            env=dict(env or {}),
        )
        self._options = dict(options or {})
        self._small_disk = dict(small_disk or {})
        for member in self._small_disk:
            if member not in self.etcd_members:
                raise NotFound(ErrorCode.NOT_FOUND, f"etcd has no member {member}")
        self._docker: Any = None
        self._network: Any = None
        self._subnet: ipaddress.IPv4Network | None = None
        self._hosts: Iterator[int] = iter(())
        self._nodes: dict[str, _Node] = {}
        self._holders: dict[str, Any] = {}
        self._wires = wires.Cuts()
        self._installed: dict[str, bytes] = {}
        self._reaper: subprocess.Popen[bytes] | None = None
        self._host = self._bind = "127.0.0.1"
        self._ports: list[int] = []

    @staticmethod
    def available(images: Images | None = None) -> str:
        """Return why no such cluster can be made here, "" if one can: for ``pytest.mark.skipif``.

        Images that can be pulled count as there.
        """
        try:
            from dtrain.testing import engine
        except ImportError as error:
            return f"{error.name} is not installed: pip install 'dtrain[testing]'"
        try:
            client = engine.connect()
        except Refused as error:
            return error.message
        wanted = (images or Images()).resolved()
        with contextlib.closing(client):
            return engine.missing(client, _all(wanted))

    # Names and addresses -------------------------------------------------------------------

    @property
    def endpoints(self) -> tuple[str, ...]:
        return tuple(f"http://{self.address_of(name)}" for name in self.etcd_members)

    @property
    def addresses(self) -> tuple[str, ...]:
        return tuple(self.address_of(name) for name in self.coordinators)

    @property
    def store_env(self) -> Mapping[str, str]:
        return self._shape.store_env

    @property
    def store_uri(self) -> str:
        """The store of jobs that name none, as nodes see it."""
        return self._shape.store_uri

    @property
    def store_address(self) -> str:
        """URL of the S3 server for programs on this machine."""
        return f"http://{self.address_of('store')}"

    def address_of(self, node: str) -> str:
        """``host:port`` under which a node is reached from this machine; agents are not."""
        found = self._node(node)
        return f"{self._host}:{found.host_port}"

    def inner_address(self, node: str) -> str:
        """A node's IPv4 address inside the cluster's network."""
        return self._node(node).address

    def container(self, node: str) -> Any:
        """A node's container, as the Docker SDK's ``Container``, for what this class does not offer."""
        return self._container(node)

    def execute(self, node: str, *command: str, user: str = "") -> "subprocess.CompletedProcess[str]":
        """Run a command in a node's container; return its exit code and what it printed."""
        code, (out, err) = self._container(node).exec_run(list(command), user=user, demux=True)
        return subprocess.CompletedProcess(
            command, int(code), (out or b"").decode(errors="replace"), (err or b"").decode(errors="replace")
        )

    def logs(self, node: str) -> str:
        found = self._node(node)
        if found.container is None:
            return found.former_log
        data = found.container.get_wrapped_container().logs()
        return found.former_log + str(data.decode(errors="replace"))

    def install(self, folder: str | os.PathLike[str]) -> str:
        source = Path(folder).resolve()
        inner = f"{source.name or 'root'}-{secrets.token_hex(3)}"
        data = copying.archive(source, inner, nodes.UID)
        self._installed[inner] = data
        self._each([partial(self._copy, name, data) for name in self.agents])
        return f"{nodes.WORKSPACE}/{inner}"

    # Breaking and mending ------------------------------------------------------------------

    def kill(self, node: str) -> None:
        self._end(node, "SIGKILL", 0.0)

    def start(self, node: str) -> None:
        found, container = self._node(node), self._container(node)
        container.reload()
        if container.status == "running":
            return
        self._starts(node)
        container.start()
        found.paused = False
        self._apply_cuts(node)

    def stop(self, node: str, timeout_s: float = LIMIT_S) -> None:
        kind = self._node(node).kind
        # The store waits for its clients to leave, and loses nothing when it is killed.
        self._end(node, "SIGKILL" if kind is Kind.STORE else "SIGTERM", timeout_s)

    def pause(self, node: str) -> None:
        found = self._node(node)
        if not found.paused:
            self._container(node).pause()
            found.paused = True

    def resume(self, node: str) -> None:
        found = self._node(node)
        if found.paused:
            self._container(node).unpause()
            found.paused = False

    def disconnect(self, node: str) -> None:
        found = self._node(node)
        if found.connected:
            self._network.disconnect(self._container(node))
            found.connected = False

    def reconnect(self, node: str) -> None:
        found = self._node(node)
        if not found.connected:
            self._network.connect(self._container(node), aliases=[node], ipv4_address=found.address)
            found.connected = True
            self._apply_cuts(node)

    def partition(self, side_a: Iterable[str], side_b: Iterable[str]) -> None:
        side_a = [self._check(name) for name in side_a]
        side_b = [self._check(name) for name in side_b]
        self._wires.cut(side_a, side_b)
        self._each([partial(self._apply_cuts, name) for name in {*side_a, *side_b}])

    def heal(self) -> None:
        cut = self._wires.heal()
        self._each([partial(self._mend, name, peers) for name, peers in cut.items()])
        for node in self._nodes:
            self.reconnect(node)

    def kill_rank(self, job: Job | str, rank: int = 0) -> None:
        found = job if isinstance(job, Job) else self.job(job)
        pid = found.pids().get(rank)
        holders = [m for m in found.members if m.first_rank <= rank < m.first_rank + m.nproc]
        if pid is None or not holders:
            raise NotFound(ErrorCode.NOT_FOUND, f"rank {rank} of {found.name} does not run at the moment")
        done = self.execute(str(holders[0].agent), "sh", "-c", f"kill -9 {pid}", user="0")
        if done.returncode:
            raise NotFound(ErrorCode.NOT_FOUND, f"rank {rank} of {found.name} has just ended")

    def fill_disk(self, node: str) -> None:
        # dd ends with an error once nothing more fits: that is what it is for.
        self._on_disk(
            node, f"dd if=/dev/zero of={_DISK}/ballast bs=1M; dd if=/dev/zero of={_DISK}/rest bs=4k; true"
        )

    def free_disk(self, node: str) -> None:
        self._on_disk(node, f"rm -f {_DISK}/ballast {_DISK}/rest")

    def replace(self, node: str, image: str | None = None) -> None:
        found = self._node(node)
        if found.kind is Kind.STORE:
            raise Refused(ErrorCode.BAD_SETTING, "the store keeps all checkpoints: nothing can replace it")
        if found.kind is Kind.ETCD:
            self._replace_member(found, image)
            return
        self._retire(found, image)
        self._starts(node)
        self._run(found)
        self._reapply(node)

    # Starting ----------------------------------------------------------------------------------

    def _start_all(self) -> None:
        from dtrain.testing import engine

        self._docker = engine.connect()
        engine.pull(self._docker, _all(self.images))
        engine.sweep(self._docker)
        self._watch_over()
        self._make_network()
        published = [*self.etcd_members, *self.coordinators, "store"]
        self._ports = ports.reserve(len(published))
        host_ports = dict(zip(published, self._ports, strict=True))
        for kind, names in self._kinds():
            for name in names:
                self._nodes[name] = _Node(name, kind, self._next_address(), host_ports.get(name, 0))
        found = engine.hosts(self._docker)
        if found != ["127.0.0.1"]:
            self._bind = "0.0.0.0"  # noqa: S104 - the engine is elsewhere, or we cannot tell
        for member in self._small_disk:
            self._make_disk(member)
        self._each([partial(self._run, node) for node in self._nodes.values()])
        self._host = self._reachable(found)
        self._await_ready()

    def _watch_over(self) -> None:
        """Have somebody else remove everything if we are killed."""
        self._reaper = subprocess.Popen(
            # By its file: importing the package would take it a second, for nothing in the usual case.
            [sys.executable, "-P", str(Path(__file__).with_name("reaper.py")), self.id],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _labels(self) -> dict[str, str]:
        from dtrain.testing import engine

        return {engine.LABEL: self.id, engine.OWNER: engine.owner()}

    def _make_network(self) -> None:
        from testcontainers.core.network import Network

        # Fixed addresses need a subnet of our own; which one is free only the engine knows.
        probe = Network(docker_network_kw={"labels": self._labels()}).create()
        found = self._docker.networks.get(probe.name)
        subnet = found.attrs["IPAM"]["Config"][0]["Subnet"]
        probe.remove()
        self._network = self._create_network(subnet)
        self._subnet = ipaddress.IPv4Network(subnet)
        self._hosts = iter(range(_FIRST_HOST, self._subnet.num_addresses - 1))

    def _create_network(self, subnet: str) -> Any:
        import docker.types
        from testcontainers.core.network import Network

        pool = docker.types.IPAMPool(subnet=subnet)
        made = Network(
            docker_network_kw={
                "labels": self._labels(),
                "ipam": docker.types.IPAMConfig(pool_configs=[pool]),
                # Ends of a bridge answer at once, whatever the engine's other networks do.
                "driver": "bridge",
            }
        )
        made.name = self.id
        return self._docker.networks.get(made.create().id)

    def _next_address(self) -> str:
        assert self._subnet is not None
        return str(self._subnet.network_address + next(self._hosts))

    def _make_disk(self, member: str) -> None:
        """A disk in memory, kept by a container that does nothing else: it outlives its member's death."""
        name = f"{self.id}-{member}-disk"
        self._docker.volumes.create(
            name,
            driver="local",
            driver_opts={
                "type": "tmpfs",
                "device": "tmpfs",
                "o": f"size={self._small_disk[member]},mode=1777",
            },
            labels=self._labels(),
        )
        self._holders[member] = self._docker.containers.run(
            self.images.tools,
            entrypoint=["sleep"],
            command=["1000000000"],
            name=f"{name}-holder",
            labels=self._labels(),
            volumes={name: {"bind": _DISK, "mode": "rw"}},
            network_mode="none",
            user="0",
            detach=True,
        )

    def _run(self, node: _Node, *, etcd_peers: Iterable[str] = ()) -> None:
        recipe = nodes.recipe(
            self._shape, node.kind, node.name, node.address, image=node.image, etcd_peers=tuple(etcd_peers)
        )
        for tries in range(_PORT_TRIES):
            try:
                self._run_once(node, recipe)
                return
            except Exception as error:
                taken = "already allocated" in str(error) or "address already in use" in str(error)
                if not taken or tries + 1 == _PORT_TRIES:
                    raise
                node.container.stop()
                [node.host_port] = ports.reserve(1)
                self._ports.append(node.host_port)

    def _run_once(self, node: _Node, recipe: nodes.Recipe) -> None:
        import docker.types
        from testcontainers.core.container import DockerContainer

        endpoint = docker.types.EndpointConfig("1.40", aliases=[node.name], ipv4_address=node.address)
        container = DockerContainer(recipe.image, env=dict(recipe.env))
        container.with_command(list(recipe.command)).with_name(f"{self.id}-{node.name}")
        if recipe.port:
            published: dict[str, Any] = container.ports
            published[f"{recipe.port}/tcp"] = (self._bind, node.host_port)
        if node.name in self._small_disk:
            container.with_volume_mapping(f"{self.id}-{node.name}-disk", nodes.ETCD_DATA, "rw")
        container.with_kwargs(
            labels={**self._labels(), "dev.dtrain.testing.node": node.name},
            network=self.id,
            networking_config={self.id: endpoint},
            read_only=recipe.read_only,
            shm_size="256m",
            # A probe every few seconds in every container costs more than all that is tested.
            healthcheck={"test": ["NONE"]},
            **({"entrypoint": list(recipe.entrypoint)} if recipe.entrypoint else {}),
            **self._options,
        )
        node.container = container
        container.start()
        if node.kind is Kind.AGENT:
            for data in self._installed.values():
                self._copy(node.name, data)

    def _reachable(self, hosts: list[str]) -> str:
        """The first address under which a published port answers."""
        if len(hosts) == 1:
            return hosts[0]
        port = self._nodes[self.etcd_members[0]].host_port
        deadline = time.monotonic() + 10.0
        while time.monotonic() < deadline:
            for host in hosts:
                with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=0.5):
                    return host
            time.sleep(0.05)
        return hosts[0]

    def _await_ready(self) -> None:
        deadline = time.monotonic() + self._ready_timeout_s
        missing = {*self.coordinators, *self.agents, "store"}
        while missing:
            problem = ""
            try:
                missing -= self.registered()
                if "store" in missing and self._store_answers():
                    missing.discard("store")
                if not missing and not self.etcd.range(self.keys.leader).items:
                    missing.add("a leader")
                missing.discard("a leader") if self.etcd.range(self.keys.leader).items else None
            except DtrainError as error:
                problem = error.message
            for name in self.nodes:
                self._check_alive(name)
            if missing and time.monotonic() > deadline:
                tails = [
                    line for name in sorted(missing & set(self._nodes)) for line in (name, *self.tail(name))
                ]
                raise not_ready(self._ready_timeout_s, missing, "\n".join([problem, *tails]))
            if missing:
                time.sleep(0.1)

    def _check_alive(self, node: str) -> None:
        container = self._container(node)
        container.reload()
        if container.status in ("exited", "dead"):
            raise Unavailable(
                ErrorCode.COORDINATOR_UNAVAILABLE,
                f"{node} ended at once with exit code {container.attrs['State']['ExitCode']}; its log ends:\n"
                + "\n".join(self.tail(node, 10)),
                fix=f"check the image {container.attrs['Config']['Image']}",
            )

    def _store_answers(self) -> bool:
        store = S3Blobs(
            nodes.BUCKET,
            settings=S3Settings(endpoint=self.store_address, connect_timeout_s=1.0, timeout_s=5.0),
            credentials=self._shape.credentials,
        )
        key, data = f"dtrain-probe/ready-{secrets.token_hex(4)}", b"ready"
        try:
            store.put(key, [data], chunk_crcs=[digest.crc32c(data)])
            store.delete(key)
        except DtrainError:
            return False
        finally:
            store.close()
        return True

    # Ending ------------------------------------------------------------------------------------

    def _close(self) -> None:
        if self._docker is None:
            return
        from dtrain.testing import engine

        with contextlib.suppress(Exception):
            # All at once: each takes the engine a while.
            made = [node.container for node in self._nodes.values() if node.container is not None]
            self._each([one.stop for one in made])
        left = engine.remove(self._docker, self.id)
        self._docker.close()
        self._docker = None
        ports.release(self._ports)
        self._ports = []
        # Last: until here, our own death would leave something for it to do.
        if self._reaper is not None:
            self._reaper.kill()
            self._reaper.wait()
            assert self._reaper.stdin is not None
            self._reaper.stdin.close()
            self._reaper = None
        if left:
            raise Unavailable(
                ErrorCode.BUG,
                f"the engine did not remove everything: {'; '.join(left)}",
                fix=f"docker ps -a --filter label=dev.dtrain.testing={self.id}",
            )

    # Inside ------------------------------------------------------------------------------------

    def _kinds(self) -> list[tuple[Kind, tuple[str, ...]]]:
        # In the order in which they need each other: etcd takes longest.
        return [
            (Kind.ETCD, self.etcd_members),
            (Kind.STORE, ("store",)),
            (Kind.COORDINATOR, self.coordinators),
            (Kind.AGENT, self.agents),
        ]

    def _node(self, name: str) -> _Node:
        self._check(name)
        if name not in self._nodes:
            raise Refused(ErrorCode.USAGE, "the cluster does not run", fix="use it in a with block")
        return self._nodes[name]

    def _container(self, name: str) -> Any:
        found = self._node(name).container
        if found is None:
            raise NotFound(ErrorCode.NOT_FOUND, f"{name} has no container at the moment")
        return found.get_wrapped_container()

    def _is_running(self, name: str) -> bool:
        container = self._container(name)
        container.reload()
        return bool(container.status in ("running", "paused"))

    def _end(self, name: str, number: str, timeout_s: float) -> None:
        found, container = self._node(name), self._container(name)
        if not self._is_running(name):
            return
        if number == "SIGKILL":
            container.kill()
            container.wait(timeout=_STOP_S)
        else:
            container.stop(timeout=int(timeout_s))
        found.paused = False

    def _retire(self, node: _Node, image: str | None) -> None:
        """Remove a node's container; what comes after it is another machine."""
        node.former_log = self.logs(node.name)[-65536:] + f"\n--- {node.name} is replaced ---\n"
        # Killed first, as machines end: nothing is told to anybody.
        self._end(node.name, "SIGKILL", 0.0)
        node.container.stop()
        node.container = None
        node.address = self._next_address()
        node.image = image or node.image
        node.paused, node.connected = False, True

    def _replace_member(self, node: _Node, image: str | None) -> None:
        others = [name for name in self.etcd_members if name != node.name]
        through = [f"http://{self.address_of(name)}" for name in others]
        self._retire(node, image)
        joining.remove(through, node.name)
        joining.add(through, f"http://{node.name}:{nodes.ETCD_PEER_PORT}")
        if node.name in self._holders:
            self._on_disk(node.name, f"rm -rf {_DISK}/*")
        self._run(node, etcd_peers=self.etcd_members)
        self._reapply(node.name)

    def _reapply(self, name: str) -> None:
        for one in (name, *self._wires.peers(name)):
            self._apply_cuts(one)

    def _apply_cuts(self, name: str) -> None:
        """Let packets to whom this node is cut off from vanish; anew after each start of it."""
        peers = self._wires.peers(name)
        if peers and self._node(name).connected and self._is_running(name):
            assert self._subnet is not None
            addresses = [self._node(peer).address for peer in sorted(peers)]
            self._in_network_of(name, wires.cut_script(str(self._subnet), addresses))

    def _mend(self, name: str, peers: Iterable[str]) -> None:
        if self._node(name).connected and self._is_running(name):
            assert self._subnet is not None
            addresses = [self._node(peer).address for peer in sorted(peers)]
            self._in_network_of(name, wires.mend_script(str(self._subnet), addresses))

    def _in_network_of(self, name: str, script: str) -> None:
        import docker.errors

        try:
            self._docker.containers.run(
                self.images.tools,
                entrypoint=["sh", "-ec"],
                command=[script],
                network_mode=f"container:{self._container(name).id}",
                cap_add=["NET_ADMIN"],
                labels=self._labels(),
                user="0",
                remove=True,
            )
        except docker.errors.ContainerError as error:
            said = (error.stderr or b"").decode(errors="replace")
            raise Unavailable(
                ErrorCode.COORDINATOR_UNAVAILABLE,
                f"the network of {name} could not be changed: {said}",
                fix=f"check the image {self.images.tools}: it needs a shell and iproute2",
            ) from error

    def _on_disk(self, member: str, script: str) -> None:
        holder = self._holders.get(member)
        if holder is None:
            raise Refused(
                ErrorCode.BAD_SETTING,
                f"the disk of {member} has no end",
                fix=f'make the cluster with small_disk={{"{member}": "260m"}}; members of etcd only',
            )
        code, out = holder.exec_run(["sh", "-c", script], user="0")
        if code:
            raise Unavailable(ErrorCode.BUG, f"the disk of {member}: {out.decode(errors='replace')}")

    def _copy(self, agent: str, data: bytes) -> None:
        if not self._container(agent).put_archive(nodes.WORKSPACE, data):
            raise Unavailable(ErrorCode.AGENT_UNAVAILABLE, f"{agent} did not take the script's folder")

    def _each(self, jobs: Iterable[Callable[[], T]]) -> list[T]:
        """Do them side by side; raise the first error once all have ended."""
        pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="docker")
        try:
            futures = [pool.submit(job) for job in jobs]
            return [future.result() for future in futures]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _all(images: Images) -> tuple[str, ...]:
    return (images.coordinator, images.agent, images.etcd, images.store, images.tools)
