"""Coordinators die while a job trains: ranks keep their processes, and steps go on."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import grpc
import pytest
from tests.support.harness import Harness, say

from dtrain.protocol import codec, wire
from dtrain.protocol.commands import Command, Header, Start, Stop
from dtrain.protocol.events import EventReason
from dtrain.protocol.ids import Attempt, ClusterName, JobName, Term
from dtrain.protocol.pb.agent_pb2_grpc import AgentStub
from dtrain.protocol.snapshot import NodeRecord

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

TTL_S = 5.0
STEPS = 100_000


@pytest.fixture(scope="module")
def job(harness: Harness) -> Iterator[JobName]:
    """One job for all faults of this module: none of them may be noticed by its ranks."""
    name = harness.start("train", f"--steps {STEPS} --pause-ms 10", every_steps=40)
    yield name
    harness.client.set_intent(name, wanted="cancel")
    harness.until("the job is cancelled", lambda: harness.status(name).phase == "CANCELLED")
    harness.assert_released(name)


@contextmanager
def unnoticed(harness: Harness, job: JobName) -> Iterator[None]:
    """Ranks keep their processes and their attempt, and a checkpoint commits afterwards."""
    pids, attempt = harness.pids(job), harness.status(job).attempt
    yield
    harness.await_steps(job)
    harness.await_commit(job)
    assert harness.pids(job) == pids
    assert harness.status(job).attempt == attempt
    harness.await_ready()


def new_term(harness: Harness, old: int) -> None:
    harness.until("there is a new leader", lambda: harness.term() not in (0, old))


def test_ranks_do_not_notice_that_the_leader_is_killed(harness: Harness, job: JobName) -> None:
    with unnoticed(harness, job):
        old, began = harness.term(), time.monotonic()
        harness.cluster.kill_leader_process()
        new_term(harness, old)
        say(f"leader killed, new one after {time.monotonic() - began:.2f} s")
        harness.await_event(job, EventReason.LEADER_CHANGED)


def test_sigterm_hands_the_leadership_over(harness: Harness, job: JobName) -> None:
    with unnoticed(harness, job):
        name, old, began = harness.cluster.leader(), harness.term(), time.monotonic()
        assert name is not None
        harness.cluster.kill_guardian(name, signal.SIGTERM)
        new_term(harness, old)
        say(f"leader told to stop, new one after {time.monotonic() - began:.2f} s")
        assert harness.cluster.leader() != name
        assert harness.cluster.daemon(name).wait(30.0)
        harness.cluster.start_daemon(name)


def test_forged_late_and_repeated_commands_have_no_effect(harness: Harness, job: JobName) -> None:
    """Whoever can reach an agent, an old leader or a stranger, cannot end training."""
    with unnoticed(harness, job):
        status, term = harness.status(job), harness.term()
        agent = status.members[0].agent
        node = codec.decode(NodeRecord, harness.cluster.etcd.range(harness.keys.node(agent)).items[0].value)
        snapshot = harness.snapshots(job)[agent]
        assert snapshot.rendezvous
        now = Header(harness.cluster.name, Term(term), job, status.uid, status.attempt, "e2e")

        def stop(**changes: Any) -> Stop:
            return Stop(replace(now, **changes), 0.0, release=True, why="a test")

        with grpc.insecure_channel(node.address) as channel:
            stub = AgentStub(channel)

            def send(command: Command) -> tuple[bool, str]:
                ack = stub.Execute(wire.command_to_pb(command), timeout=20)
                return ack.accepted, ack.message

            accepted, why = send(stop(term=Term(term - 1)))
            assert (accepted, "is over" in why) == (False, True), why
            accepted, why = send(stop(term=Term(term + 1_000_000)))
            assert (accepted, "could not be confirmed" in why) == (False, True), why
            assert send(stop(attempt=Attempt(status.attempt - 1))) == (True, "nothing to do")
            assert not send(stop(cluster=ClusterName("other")))[0]
            # What was done is not done twice, whenever it comes again.
            again = replace(now, id=f"start.{status.attempt}")
            assert send(Start(again, snapshot.rendezvous, status.restore)) == (True, "known")


def test_a_killed_guardian_costs_one_ttl(harness: Harness, job: JobName) -> None:
    with unnoticed(harness, job):
        name, old, began = harness.cluster.leader(), harness.term(), time.monotonic()
        assert name is not None
        harness.cluster.kill_guardian(name)
        new_term(harness, old)
        took_s = time.monotonic() - began
        say(f"guardian killed, new leader after {took_s:.2f} s")
        # The lease is all that is left to tell: one TTL, and slack for a loaded machine.
        assert took_s < TTL_S + 3.0
        harness.cluster.start_daemon(name)


def test_a_frozen_leader_is_replaced_and_harms_nothing_when_it_thaws(harness: Harness, job: JobName) -> None:
    with unnoticed(harness, job):
        name, old = harness.cluster.leader(), harness.term()
        assert name is not None
        harness.cluster.freeze(name)
        new_term(harness, old)
        harness.cluster.thaw(name)


def test_training_goes_on_without_any_coordinator(harness: Harness, job: JobName) -> None:
    with unnoticed(harness, job):
        harness.until("a checkpoint is open", lambda: harness.opened(job))
        for name in harness.cluster.coordinators:
            harness.cluster.kill_guardian(name)
        for daemon in harness.cluster.coordinators.values():
            assert daemon.wait(10.0)
        seq, began = int(harness.status(job).seq_last), time.monotonic()
        harness.until("10 s have passed", lambda: time.monotonic() - began > 10.0)
        assert harness.last_step(job) > 0
        harness.await_steps(job)
        for name in harness.cluster.coordinators:
            harness.cluster.start_daemon(name)
        # What was open when they died is decided one way or the other.
        harness.until("the open checkpoint is settled", lambda: all(r.seq > seq for r in harness.opened(job)))
        harness.until("there is a leader", lambda: harness.term())
