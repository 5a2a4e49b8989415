"""Everything locked: TLS and users on etcd, mutual TLS on gRPC, certificates and roles by our own scripts.

While a job trains, every certificate and password is replaced, and a role is
taken away and given back: no rank notices. Then somebody who owns a machine of
the cluster tries what machines must not do.
"""

import os
import subprocess
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import grpc
import pytest
from tests.contract.etcd.secured import CLUSTER, HOSTS, KEYS, holder, make_certs, run
from tests.support.harness import Harness, say
from tests.support.history import Following

from dtrain.cli.client import Client
from dtrain.local import sweeping
from dtrain.local.etcd import EtcdTls, SecureEtcd
from dtrain.protocol import codec, wire
from dtrain.protocol.commands import Header, Stop
from dtrain.protocol.errors import DtrainError, ErrorCode, Refused
from dtrain.protocol.ids import AgentName, Attempt, ClusterName, JobName, Term
from dtrain.protocol.pb import agent_pb2, agent_pb2_grpc, coordinator_pb2, coordinator_pb2_grpc
from dtrain.protocol.snapshot import NodeRecord
from dtrain.runtime import grpc_tls
from dtrain.runtime.tls import TlsFiles
from dtrain.storage.etcd.port import Put, Txn, prefix_end
from dtrain.storage.etcd.transport import GatewayEtcd

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

A1, A2 = AgentName("a1"), AgentName("a2")


class Locked(Harness):
    """A harness whose cluster is locked, and that holds keys to it."""

    def __init__(self, folder: Path) -> None:
        self.pki, self.passwords = folder / "pki", folder / "passwords"
        holders = [f"{role}:{name}={HOSTS}" for role, name in (("etcd", "etcd-0"),)]
        holders += [f"coordinator:c{number}" for number in (1, 2)] + ["agent:a1", "agent:a2", "agent:rogue"]
        make_certs(self.pki, "--cluster", CLUSTER, *holders, "operator:jane", "reader:eyes")
        super().__init__(
            folder,
            name=CLUSTER,
            coordinators=2,
            agents=2,
            agent_flags=("--report-interval", "0.2", *self._flags("agent", "agent-{name}")),
            coordinator_flags=self._flags("coordinator", "coordinator"),
            secure=SecureEtcd(
                EtcdTls(self.pki, holder(self.pki, "reader", "eyes")),
                prepare=lambda endpoints: self._make_users(endpoints),
                open=lambda endpoints: self.etcd_as("ops", "reader", "eyes", endpoints),
            ),
        )
        self.cluster.etcd_servers.flags = ("--bcrypt-cost=4",)

    def __enter__(self) -> "Locked":
        self.cluster.start()
        eyes = self.etcd_as("reader", "reader", "eyes", self.cluster.endpoints)
        self._auditing = Following(self.cluster.endpoints, self.cluster.name, eyes)
        self.client = Client(self.cluster.addresses, tls=self.grpc_files("operator", "jane"))
        return self

    def etcd_as(self, user: str, role: str, name: str, endpoints: Sequence[str] = ()) -> GatewayEtcd:
        return GatewayEtcd(
            endpoints or self.cluster.endpoints,
            tls=holder(self.pki, role, name),
            user=user,
            password_file=str(self.passwords / user),
        )

    def grpc_files(self, role: str, name: str) -> TlsFiles:
        where = self.pki / role / name
        return TlsFiles(*(str(where / file) for file in ("grpc.crt", "grpc.key", "grpc-ca.crt")))

    def setup(self, *arguments: str, endpoints: Sequence[str] = ()) -> str:
        words = ("--passwords", str(self.passwords), "--cluster", CLUSTER, *arguments)
        return run("setup-auth.sh", *words, env=self._etcdctl_env(endpoints))

    def etcdctl(self, *args: str, user: str = "root") -> str:
        env = self._etcdctl_env() | {
            "ETCDCTL_USER": user,
            "ETCDCTL_PASSWORD": (self.passwords / user).read_text(),
        }
        done = subprocess.run(
            [self.cluster.etcdctl, *args], capture_output=True, text=True, timeout=20, check=True,
            env=os.environ | env,
        )  # fmt: skip
        return done.stdout

    def address(self, agent: AgentName) -> str:
        [found] = self.cluster.etcd.range(KEYS.node(agent)).items
        return str(codec.decode(NodeRecord, found.value).address)

    def _make_users(self, endpoints: Sequence[str]) -> None:
        self.setup("init", "a1", "a2", "rogue", endpoints=endpoints)

    def _flags(self, role: str, user: str) -> tuple[str, ...]:
        where = f"{self.pki}/{role}/{{name}}"
        return (
            *(
                "--cacert",
                f"{where}/etcd-ca.crt",
                "--cert",
                f"{where}/etcd.crt",
                "--key",
                f"{where}/etcd.key",
            ),
            *("--user", user, "--password-file", f"{self.passwords}/{user}"),
            *("--tls-cacert", f"{where}/grpc-ca.crt"),
            *("--tls-cert", f"{where}/grpc.crt", "--tls-key", f"{where}/grpc.key"),
        )

    def _etcdctl_env(self, endpoints: Sequence[str] = ()) -> dict[str, str]:
        tls = holder(self.pki, "reader", "eyes")
        return {
            "ETCDCTL_API": "3",
            "ETCDCTL": self.cluster.etcdctl,
            "ETCDCTL_ENDPOINTS": ",".join(endpoints or self.cluster.endpoints),
            "ETCDCTL_CACERT": tls.ca or "",
            "ETCDCTL_CERT": tls.cert or "",
            "ETCDCTL_KEY": tls.key or "",
        }


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Locked]:
    with Locked(tmp_path_factory.mktemp("s")) as made:
        made.await_ready()
        yield made
        made.assert_clean()


@pytest.fixture(scope="module")
def job(locked: Locked) -> JobName:
    return locked.start("train", f"--steps 1000000 --pause-ms 10 --stop-file {locked.stop_file('train')}")


class Unmoved:
    """Fails at the end if a rank was restarted or leadership changed meanwhile."""

    def __init__(self, locked: Locked, job: JobName) -> None:
        self.locked, self.job = locked, job

    def __enter__(self) -> None:
        self.before = self._look()

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            assert self._look() == self.before

    def _look(self) -> tuple[object, ...]:
        return self.locked.term(), self.locked.status(self.job).attempt, self.locked.pids(self.job)


def test_a_job_trains_and_commits(locked: Locked, job: JobName) -> None:
    locked.await_commit(job, after=0)
    info = locked.client.info()
    assert info.etcd_version == ".".join(str(part) for part in locked.cluster.etcd_servers.binary.version)
    # etcd 3.5.16 is below the floor: once for everybody to see, and once in the log.
    assert sum("CVE-2026-33413" in problem for problem in info.problems) == 1
    for name in ("c1", "a1"):
        locked.until(f"{name} warns", lambda name=name: "CVE-2026-33413" in locked.log(name))  # type: ignore[misc]
        assert sum("CVE-2026-33413" in line for line in locked.log(name).splitlines()) == 1


def test_all_certificates_are_replaced_under_a_running_job(locked: Locked, job: JobName) -> None:
    with Unmoved(locked, job):
        make_certs(locked.pki, "renew")
        for name in ("c1", "c2", "a1", "a2"):
            # The guardian's connection and the process's own.
            locked.until(
                f"{name} has new certificates for etcd",
                lambda name=name: locked.log(name).count("TLS files for etcd replaced") >= 2,  # type: ignore[misc]
            )
        locked.await_commit(job)
        locked.await_steps(job)


def test_the_authorities_are_replaced_under_a_running_job(locked: Locked, job: JobName) -> None:
    """etcd reads its CAs at its start: the only process that has to be restarted."""
    before = locked.pids(job), locked.status(job).attempt
    for step in ("new-ca", "renew", "drop-ca"):
        make_certs(locked.pki, step)
        if step != "renew":
            locked.cluster.etcd_servers.kill()
            locked.cluster.etcd_servers.start_member(0)
            locked.await_ready()
        locked.await_commit(job)
    assert (locked.pids(job), locked.status(job).attempt) == before


@pytest.mark.parametrize("user", ["agent-a1", "coordinator"])
def test_a_password_is_replaced_under_a_running_job(locked: Locked, job: JobName, user: str) -> None:
    with Unmoved(locked, job):
        (locked.passwords / user).write_text(uuid.uuid4().hex)
        locked.setup("passwd", user)
        locked.await_commit(job)
        locked.await_steps(job)


def test_a_role_is_taken_away_and_given_back_under_a_running_job(locked: Locked, job: JobName) -> None:
    """The agent says so, trains on, and is heard again as soon as it may speak."""
    with Unmoved(locked, job):
        locked.etcdctl("user", "revoke-role", "agent-a2", "agent-a2")
        locked.until("a2 says that it is denied", lambda: "permission denied" in locked.log("a2"))
        locked.await_steps(job, 50)
        locked.etcdctl("user", "grant-role", "agent-a2", "agent-a2")
        locked.await_commit(job)


def test_a_coordinator_without_its_role_commits_nothing_and_recovers(locked: Locked, job: JobName) -> None:
    before = locked.pids(job), locked.status(job).attempt
    locked.etcdctl("user", "revoke-role", "coordinator", "coordinator")
    newest = locked.commits(job)[-1].seq
    locked.until(
        "a leader says that it is denied", lambda: "permission denied" in locked.log("c1") + locked.log("c2")
    )
    locked.await_steps(job, 100)
    assert locked.commits(job)[-1].seq == newest
    locked.etcdctl("user", "grant-role", "coordinator", "coordinator")
    locked.await_commit(job, after=newest)
    assert (locked.pids(job), locked.status(job).attempt) == before


# Somebody who owns a machine ----------------------------------------------------------------


def test_a_rogue_agent_writes_no_key_of_another(locked: Locked, job: JobName) -> None:
    rogue = locked.etcd_as("agent-rogue", "agent", "rogue")
    try:
        assert rogue.txn(Txn((), (Put(f"{KEYS.root}agents/rogue/spare", b"own"),))).succeeded
        for key in (KEYS.node(A1), KEYS.worker(A1, job), KEYS.leader, KEYS.status(job), KEYS.latest(job)):
            with pytest.raises(Refused) as caught:
                rogue.txn(Txn((), (Put(key, b"forged"),)))
            assert caught.value.code is ErrorCode.ETCD_AUTH
        with pytest.raises(Refused):
            rogue.range(KEYS.jobs, prefix_end(KEYS.jobs))
    finally:
        locked.etcdctl("del", f"{KEYS.root}agents/rogue/spare")
        rogue.close()


def stop_everything(locked: Locked, job: JobName, term: int) -> agent_pb2.Command:
    status = locked.status(job)
    header = Header(
        ClusterName(CLUSTER), Term(term), job, status.uid, Attempt(status.attempt + 1), uuid.uuid4().hex
    )
    return wire.command_to_pb(Stop(header, 0.0, release=True, why="forged"))


def execute(locked: Locked, job: JobName, term: int, files: TlsFiles | None) -> agent_pb2.Ack:
    tls = grpc_tls.Credentials(files) if files is not None else None
    channel = grpc_tls.to_agent("a1", locked.address(A1), tls, ())
    try:
        stub = agent_pb2_grpc.AgentStub(channel)
        return stub.Execute(stop_everything(locked, job, term), timeout=10)
    finally:
        channel.close()


def test_a_rogue_agent_commands_no_other(locked: Locked, job: JobName) -> None:
    with Unmoved(locked, job):
        for files in (
            locked.grpc_files("agent", "rogue"),
            locked.grpc_files("operator", "jane"),
            locked.grpc_files("reader", "eyes"),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                execute(locked, job, locked.term(), files)
            assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        with pytest.raises(grpc.RpcError) as caught:
            execute(locked, job, locked.term(), None)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        locked.await_steps(job)


def test_a_certificate_of_another_authority_opens_nothing(
    locked: Locked, job: JobName, tmp_path: Path
) -> None:
    make_certs(tmp_path / "forged", "--cluster", CLUSTER, "coordinator:c1", "agent:a1")
    where = tmp_path / "forged" / "coordinator" / "c1"
    forged = TlsFiles(
        str(where / "grpc.crt"), str(where / "grpc.key"), locked.grpc_files("agent", "rogue").cacert
    )
    with Unmoved(locked, job):
        with pytest.raises(grpc.RpcError) as caught:
            execute(locked, job, locked.term() + 1, forged)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        with pytest.raises(DtrainError):
            Client(locked.cluster.addresses, tls=forged, timeout_s=3.0).info()


def test_a_forged_term_is_believed_from_nobody(locked: Locked, job: JobName) -> None:
    """Not even from a real coordinator's certificate: the term is what etcd says."""
    with Unmoved(locked, job):
        stolen = locked.grpc_files("coordinator", "c1")
        ack = execute(locked, job, locked.term() + 1000, stolen)
        assert (ack.accepted, "could not be confirmed" in ack.message) == (False, True), ack.message
        locked.await_commit(job)
        locked.await_steps(job)


def test_a_rogue_agent_asks_in_no_other_s_name_and_submits_nothing(locked: Locked, job: JobName) -> None:
    tls = grpc_tls.Credentials(locked.grpc_files("agent", "rogue"))
    channel = grpc_tls.to_coordinator(locked.cluster.addresses[0], tls, ())
    try:
        stub = coordinator_pb2_grpc.CoordinatorStub(channel)
        for call in (
            lambda: stub.Consult(coordinator_pb2.ConsultRequest(agent="a1"), timeout=10),
            lambda: stub.SetIntent(coordinator_pb2.SetIntentRequest(job=job, wanted="cancel"), timeout=10),
            lambda: stub.Submit(coordinator_pb2.SubmitRequest(spec=b"{}"), timeout=10),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                call()
            assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    finally:
        channel.close()


def test_no_password_is_seen_anywhere(locked: Locked, job: JobName) -> None:
    secrets = {path.read_text().strip() for path in locked.passwords.iterdir()}
    assert len(secrets) >= 6
    shown = "".join(locked.log(name) for name in ("c1", "c2", "a1", "a2"))
    for found in sweeping.find(locked.cluster.folder):
        for file in ("cmdline", "environ"):
            try:
                shown += Path(f"/proc/{found.pid}/{file}").read_text(errors="replace")
            except OSError:
                continue
    shown += "".join(
        kv.value.decode(errors="replace")
        for kv in locked.cluster.etcd.range(KEYS.root, prefix_end(KEYS.root)).items
    )
    assert len(shown) > 10_000
    assert not [secret for secret in secrets if secret in shown]
    assert "PRIVATE KEY" not in shown


def test_the_job_ends_as_if_nothing_had_happened(locked: Locked, job: JobName) -> None:
    locked.stop_file(job).touch()
    locked.await_end(job)
    locked.assert_succeeded(job, int(locked.commits(job)[-1].step))
    say(f"{len(locked.commits(job))} commits kept, attempt {locked.status(job).attempt}")
