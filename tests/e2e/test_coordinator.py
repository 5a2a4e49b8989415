"""Three replicas as real processes on a real etcd: failover, hand-over, and what they leave alone."""

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from dtrain.local.etcd import EtcdServer
from dtrain.protocol import codec
from dtrain.protocol.cluster import LeaderRecord, ReplicaRecord
from dtrain.protocol.ids import ClusterName, JobName
from dtrain.protocol.job import JobPhase, JobStatus
from dtrain.protocol.keys import Keys
from dtrain.protocol.pb import coordinator_pb2 as pb
from dtrain.protocol.pb.coordinator_pb2_grpc import CoordinatorStub
from dtrain.storage.etcd.transport import GatewayEtcd

pytestmark = pytest.mark.e2e

KEYS = Keys(ClusterName("c1"))
TTL_S = 5
CACHE = Path(__file__).parents[2] / ".cache"


@dataclass
class Leader:
    record: LeaderRecord
    term: int


class Cluster:
    """One etcd member and three replicas in a folder that nobody may write to."""

    def __init__(self, folder: Path) -> None:
        self.readonly = folder / "readonly"
        self.readonly.mkdir()
        self.readonly.chmod(0o555)
        self.logs = folder
        self.etcd = EtcdServer(folder / "etcd", cache_dir=CACHE, fsync=False)
        self.guardians: dict[str, subprocess.Popen[bytes]] = {}
        self.client: GatewayEtcd

    def start(self) -> None:
        self.etcd.start()
        self.etcd.wait_ready()
        self.client = GatewayEtcd(self.etcd.endpoints)
        for name in ("r1", "r2", "r3"):
            self.run(name)
        self.leader()
        until(lambda: len(self.replicas()) == 3, "three replicas are registered")

    def run(self, name: str) -> None:
        argv = [sys.executable, "-m", "dtrain.coordinator", "--cluster", "c1", "--id", name]
        argv += ["--listen", "127.0.0.1:0", "--ttl", str(TTL_S), "--log-json", "true"]
        argv += ["--endpoints", self.etcd.endpoint]
        with (self.logs / f"{name}.log").open("ab") as log:
            self.guardians[name] = subprocess.Popen(
                argv, cwd=self.readonly, stdout=subprocess.DEVNULL, stderr=log
            )

    def leader(self, after: int = 0, timeout_s: float = 60.0) -> Leader:
        """Wait for a leader of a term later than ``after``."""
        found: list[Leader] = []

        def look() -> bool:
            for kv in self.client.range(KEYS.leader).items:
                if kv.create_revision > after:
                    found.append(Leader(codec.decode(LeaderRecord, kv.value), kv.create_revision))
            return bool(found)

        until(look, "there is a leader", timeout_s)
        return found[0]

    def replicas(self) -> dict[str, ReplicaRecord]:
        prefix = f"{KEYS.root}coordinators/"
        items = self.client.range(prefix, prefix[:-1] + "0").items
        records = [codec.decode(ReplicaRecord, kv.value) for kv in items]
        return {record.replica: record for record in records}

    def child(self, name: str) -> int:
        """The pid of a replica's working process, as it has registered itself."""
        return self.replicas()[name].pid

    def stub(self, name: str) -> CoordinatorStub:
        return CoordinatorStub(grpc.insecure_channel(self.replicas()[name].address))

    def lines(self, name: str) -> list[dict[str, Any]]:
        found = []
        for line in (self.logs / f"{name}.log").read_text().splitlines():
            if line.startswith("{"):
                found.append(json.loads(line))
        return found

    def close(self) -> None:
        for guardian in self.guardians.values():
            if guardian.poll() is None:
                guardian.terminate()
        for guardian in self.guardians.values():
            try:
                guardian.wait(5)
            except subprocess.TimeoutExpired:
                guardian.kill()
                guardian.wait()
        self.client.close()
        self.etcd.close()
        self.readonly.chmod(0o755)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("coordinators"))
    try:
        made.start()
        yield made
    finally:
        made.close()


@pytest.fixture(autouse=True)
def whole(cluster: Cluster) -> None:
    """Every test begins with three replicas and a leader."""
    for name, guardian in list(cluster.guardians.items()):
        if guardian.poll() is not None:
            cluster.run(name)
    until(lambda: len(cluster.replicas()) == 3, "three replicas are registered", 20.0)
    cluster.leader()


def until(condition: Callable[[], bool], what: str, timeout_s: float = 10.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"not in {timeout_s} s: {what}"
        time.sleep(0.01)


def acting(cluster: Cluster, leader: Leader) -> bool:
    reply = cluster.stub(leader.record.replica).Info(pb.InfoRequest(), timeout=5)
    return bool(reply.leader and reply.term == leader.term)


def test_a_killed_leader_is_replaced_within_a_second(cluster: Cluster) -> None:
    before = cluster.leader()
    began = time.monotonic()
    os.kill(cluster.child(before.record.replica), signal.SIGKILL)
    after = cluster.leader(before.term)
    took_s = time.monotonic() - began
    assert after.term > before.term
    assert took_s < 1.0
    until(lambda: acting(cluster, after), "the new leader acts", 1.0)


def test_a_leader_told_to_stop_hands_over_at_once_and_leaves_nothing(cluster: Cluster) -> None:
    before = cluster.leader()
    guardian = cluster.guardians[before.record.replica]
    began = time.monotonic()
    guardian.terminate()
    after = cluster.leader(before.term)
    took_s = time.monotonic() - began
    assert after.record.replica != before.record.replica
    assert took_s < 1.0
    assert guardian.wait(5) == 0
    assert before.record.replica not in cluster.replicas()


def test_a_killed_guardian_takes_its_leader_along_and_the_ttl_covers_the_rest(cluster: Cluster) -> None:
    before = cluster.leader()
    child = cluster.child(before.record.replica)
    cluster.guardians[before.record.replica].kill()
    cluster.guardians[before.record.replica].wait()
    until(lambda: not alive(child), "the child has died with its guardian", 2.0)
    # A lease lasts at least its TTL; an expiry scan and a try follow.
    after = cluster.leader(before.term, timeout_s=TTL_S + 5)
    assert after.record.replica != before.record.replica


def test_a_frozen_leader_is_killed_before_another_may_lead(cluster: Cluster) -> None:
    before = cluster.leader()
    child = cluster.child(before.record.replica)
    os.kill(child, signal.SIGSTOP)
    after = cluster.leader(before.term, timeout_s=TTL_S)
    assert not alive(child)
    assert after.term > before.term
    killed = [line for line in cluster.lines(before.record.replica) if line["event"] == "child killed"]
    assert "its heart stood still" in killed[-1]["why"]


def test_a_job_submitted_to_a_standby_is_decided_about_by_the_leader(cluster: Cluster) -> None:
    leader = cluster.leader()
    standby = next(name for name in cluster.replicas() if name != leader.record.replica)
    document = {"v": 1, "name": "waits", "entry": {"kind": "script", "target": "train.py"}}
    request = pb.SubmitRequest(spec=json.dumps(document).encode(), request_id="q1")
    assert cluster.stub(standby).Submit(request, timeout=5).created
    key = KEYS.status(JobName("waits"))
    until(lambda: bool(cluster.client.range(key).items), "the job has a status")
    status = codec.decode(JobStatus, cluster.client.range(key).items[0].value)
    assert status.phase is JobPhase.QUEUED
    assert status.term == cluster.leader().term
    # The next leader decides the same, under its own term, without repeating anything.
    os.kill(cluster.child(cluster.leader().record.replica), signal.SIGKILL)
    after = cluster.leader(leader.term)
    until(lambda: acting(cluster, after), "the new leader acts", 2.0)
    item = cluster.client.range(key).items[0]
    assert codec.decode(JobStatus, item.value).phase is JobPhase.QUEUED


def test_a_replica_writes_no_file_and_stays_small(cluster: Cluster) -> None:
    for name, record in cluster.replicas().items():
        writable = []
        for entry in Path(f"/proc/{record.pid}/fd").iterdir():
            flags = int(Path(f"/proc/{record.pid}/fdinfo/{entry.name}").read_text().split()[3], 8)
            target = str(entry.readlink())
            if stat.S_ISREG(entry.stat().st_mode) and flags & os.O_ACCMODE and "memfd:" not in target:
                writable.append(target)
        # Its stderr, which this test has opened for it, is no file of its own.
        assert writable == [str(cluster.logs / f"{name}.log")]
        fields = Path(f"/proc/{record.pid}/status").read_text().split("VmRSS:")[1].split()
        assert int(fields[0]) < 80 * 1024, "kB"
    assert list(cluster.readonly.iterdir()) == []


def test_heavy_libraries_stay_out_of_a_coordinator_and_all_others_out_of_its_guardian() -> None:
    code = "import sys; import {}; print(' '.join(sorted({{m.split('.')[0] for m in sys.modules}})))"
    whole = loaded(code.format("dtrain.coordinator.main"))
    assert not whole & {"torch", "numpy", "boto3", "botocore", "pydantic", "click"}
    guardian = loaded(code.format("dtrain.coordinator.__main__"))
    assert guardian - set(sys.stdlib_module_names) - {"__main__"} <= site_start() | {"dtrain"}


def test_a_port_in_use_ends_with_a_sentence_and_78(cluster: Cluster) -> None:
    taken = next(iter(cluster.replicas().values())).address
    argv = [sys.executable, "-m", "dtrain.coordinator", "--cluster", "c1", "--id", "r9", "--listen", taken]
    done = subprocess.run(
        [*argv, "--endpoints", cluster.etcd.endpoint], check=False, capture_output=True, text=True, timeout=20
    )
    assert done.returncode == 78
    assert "cannot be listened on" in done.stderr
    assert "--listen" in done.stderr


def test_settings_that_cannot_work_are_refused_before_anything_starts() -> None:
    argv = [sys.executable, "-m", "dtrain.coordinator"]
    for flags, said in (
        (["--ttl", "2"], "leaves no time"),
        (["--id", "Not A Name"], "cannot name a replica"),
        (["--listen", "nowhere"], "use host:port"),
    ):
        done = subprocess.run([*argv, *flags], check=False, capture_output=True, text=True, timeout=20)
        assert done.returncode == 78
        assert said in done.stderr


def loaded(code: str) -> set[str]:
    return set(
        subprocess.run(
            [sys.executable, "-c", code], check=False, capture_output=True, text=True
        ).stdout.split()
    )


def site_start() -> set[str]:
    """What this interpreter loads before any program (editable installs' finders)."""
    return loaded("import sys; print(' '.join({m.split('.')[0] for m in sys.modules}))")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
