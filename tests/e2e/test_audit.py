"""``dtrain audit`` as a process, on a real etcd whose history is handmade, compacted and broken."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dtrain.cli import exits
from dtrain.local.etcd import EtcdServer
from dtrain.protocol import codec
from dtrain.protocol.ids import Attempt, ClusterName, JobName, Term, Uid
from dtrain.protocol.job import JobPhase, JobStatus
from dtrain.protocol.keys import Keys
from dtrain.storage.etcd.port import Delete, Put, Txn
from dtrain.storage.etcd.transport import GatewayEtcd

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

KEYS = Keys(ClusterName("c"))
JOB = JobName("j")


class World:
    """An etcd, and a leader who writes what it is told."""

    def __init__(self, server: EtcdServer) -> None:
        self.server = server
        self.etcd = GatewayEtcd(server.endpoints)
        self.term = 0

    def put(self, key: str, value: bytes) -> int:
        return self.etcd.txn(Txn(success=(Put(key, value),))).revision

    def lead(self) -> None:
        self.etcd.txn(Txn(success=(Delete(KEYS.leader),)))
        self.term = self.put(KEYS.leader, b"{}")

    def status(self, attempt: int, term: int = 0) -> int:
        record = JobStatus(Term(term or self.term), Uid("u"), JobPhase.STARTING, attempt=Attempt(attempt))
        return self.put(KEYS.status(JOB), codec.encode(record))

    def compact(self, revision: int) -> None:
        etcdctl = self.server.binary.etcdctl
        assert etcdctl is not None
        command = [etcdctl, "--endpoints", self.server.endpoint, "compact", str(revision)]
        subprocess.run(command, check=True, capture_output=True, timeout=20)

    def command(self, *flags: str) -> list[str]:
        return [sys.executable, "-m", "dtrain.cli", "audit", "--cluster", "c", *flags]

    @property
    def env(self) -> dict[str, str]:
        # As etcdctl's users have it.
        return os.environ | {"ETCDCTL_ENDPOINTS": self.server.endpoint}

    def audit(self, *flags: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            self.command(*flags), env=self.env, capture_output=True, text=True, timeout=120, check=False
        )


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    server = EtcdServer(tmp_path / "etcd", fsync=False)
    try:
        server.start()
        server.wait_ready()
        made = World(server)
        yield made
        made.etcd.close()
    finally:
        server.close()


def document(done: "subprocess.CompletedProcess[str]") -> dict[str, Any]:
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_history_is_judged_recorded_and_judged_again(world: World, tmp_path: Path) -> None:
    world.lead()
    world.status(1)
    done = world.audit()
    assert done.returncode == exits.OK, done.stderr
    assert "1 terms, 1 attempts, 0 commits, 0 snapshots checked: no violation" in done.stdout
    old = world.term
    world.lead()
    late = world.status(2, term=old)
    file = tmp_path / "history.jsonl.gz"
    done = world.audit("--record", str(file), "-o", "json")
    assert done.returncode == exits.CHECK_FAILED
    assert [(v["revision"], v["invariant"]) for v in document(done)["violations"]] == [(late, "I1")]
    again = world.audit("--from", str(file), "-o", "json")
    assert document(again)["violations"] == document(done)["violations"]
    # What is forgotten is not judged, and that is said.
    world.compact(late)
    done = world.audit()
    assert done.returncode == exits.OK, done.stdout
    assert f"history before revision {late} is compacted: judged from there on" in done.stderr


def test_a_follower_tells_a_violation_when_it_happens(world: World) -> None:
    world.lead()
    follower = subprocess.Popen(
        world.command("--follow", "-o", "json"),
        env=world.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert follower.stdout is not None
        assert follower.stderr is not None
        assert "watching" in follower.stderr.readline()
        world.status(1)
        broken = world.status(3)
        told = json.loads(follower.stdout.readline())
        assert (told["revision"], told["invariant"]) == (broken, "I5")
        follower.send_signal(signal.SIGINT)
        rest, _ = follower.communicate(timeout=90)
        assert json.loads(rest)["violations_total"] == 1
        assert follower.returncode == exits.CHECK_FAILED
    finally:
        follower.kill()
        follower.wait()
