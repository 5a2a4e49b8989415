"""The guardian's promises, on real processes and a real etcd."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.contract.etcd.support import collect, eventually

from dtrain.local import ports
from dtrain.local.etcd import EtcdCluster
from dtrain.storage.etcd.guardian import GuardianConfig, Policy
from dtrain.storage.etcd.port import Put, Txn
from dtrain.storage.etcd.transport import GatewayEtcd

TTL_S = 2

CHILD = """
    import os, signal, sys, time
    from dtrain.storage.etcd.session import attach
    session = attach()
    mode = sys.argv[1] if len(sys.argv) > 1 else ""
    stopping = []
    signal.signal(signal.SIGTERM, lambda *_: stopping.append(1))
    def say(**fields):
        import json
        fields |= {"pid": os.getpid(), "lease": session.lease, "generation": session.generation}
        os.write(1, (json.dumps(fields) + "\\n").encode())  # at once: it may be killed in between
    if mode == "drain":
        signal.signal(signal.SIGTERM, lambda *_: say(told="SIGTERM"))
        signal.signal(signal.SIGINT, lambda *_: stopping.append(1))
    if mode == "stubborn": signal.signal(signal.SIGINT, signal.SIG_IGN)
    if mode == "exit78": sys.exit(78)
    if mode == "crash": say(at=time.monotonic()); sys.exit(1)
    if mode == "done": session.set_clean_stop(); sys.exit(0)
    session.set_started()
    if mode == "doubts": signal.signal(signal.SIGUSR1, lambda *_: session.doubt())
    if mode == "acting": session.set_acting(True, session.generation)
    say(ppid=os.getppid(), since=session.stopping_since)
    generation, acts = session.generation, True
    while not stopping or mode == "stubborn":
        session.beat()
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        if session.generation != generation or session.may_act(now) != acts:
            generation, acts = session.generation, session.may_act(now)
            say(acts=acts)
        time.sleep(0.01)
    session.set_clean_stop()
    sys.exit(7 if mode == "seven" else 0)
"""


class Guarded:
    """A guardian process with its child; every line of both is kept."""

    def __init__(
        self,
        folder: Path,
        endpoints: list[str],
        policy: str,
        mode: str,
        grace_s: float,
        drain_s: float,
        ttl_s: int,
    ) -> None:
        child = folder / "child.py"
        child.write_text(textwrap.dedent(CHILD))
        program = (
            "import sys\n"
            "from dtrain.storage.etcd.guardian import GuardianConfig, Policy, run\n"
            f"sys.exit(run(GuardianConfig(({sys.executable!r}, {str(child)!r}, {mode!r}),"
            f" {tuple(endpoints)!r},"
            f" Policy({policy!r}), 'test', ttl_s={ttl_s}, grace_s={grace_s}, drain_s={drain_s},"
            " allow_short_ttl=True)))"
        )
        self._out, self._err = folder / "out", folder / "err"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen([sys.executable, "-c", program], stdout=out, stderr=err)

    def lives(self) -> list[dict[str, Any]]:
        """What the children said."""
        return [json.loads(line) for line in self._out.read_text().splitlines()]

    def events(self) -> list[dict[str, Any]]:
        """What the guardian said."""
        return [json.loads(line) for line in self._err.read_text().splitlines()]

    def said(self, event: str) -> bool:
        return any(line["event"] == event for line in self.events())

    def child(self, number: int = 0) -> dict[str, Any]:
        """The first words of the ``number``-th child, once it has said them."""

        def started() -> list[dict[str, Any]]:
            return [life for life in self.lives() if "ppid" in life]

        eventually(lambda: len(started()) > number, what=f"child {number}: {self._err.read_text()}")
        return started()[number]

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        # They die with their guardian; waiting for it leaves nothing behind.
        for life in self.lives():
            eventually(
                lambda pid=life["pid"]: not is_alive(pid), 5, f"child {life['pid']} outlives its guardian"
            )


def is_alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


Guard = Callable[..., Guarded]


@pytest.fixture
def guard(tmp_path: Path) -> Iterator[Guard]:
    running: list[Guarded] = []

    def start(
        endpoints: list[str],
        policy: str = "coordinator",
        mode: str = "",
        grace_s: float = 5.0,
        drain_s: float = 0.0,
        ttl_s: int = TTL_S,
    ) -> Guarded:
        folder = tmp_path / f"guardian-{len(running)}"
        folder.mkdir()
        running.append(Guarded(folder, endpoints, policy, mode, grace_s, drain_s, ttl_s))
        return running[-1]

    yield start
    for guarded in running:
        guarded.end()


@pytest.fixture
def etcd(etcd_35: EtcdCluster) -> Iterator[GatewayEtcd]:
    client = GatewayEtcd(etcd_35.endpoints)
    yield client
    client.close()


def put_under(etcd: GatewayEtcd, key: str, lease: int) -> int:
    return etcd.txn(Txn((), (Put(key, b"leader", lease),))).revision


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_coordinator_s_lease_is_revoked_only_after_it_is_gone(
    guard: Guard, etcd_35: EtcdCluster, etcd: GatewayEtcd, number: signal.Signals
) -> None:
    guarded = guard(etcd_35.endpoints)
    first = guarded.child()
    key = f"/guardian/{first['pid']}"
    revision = put_under(etcd, key, first["lease"])
    stream = etcd.watch(key, None, revision + 1)
    os.kill(first["pid"], number)
    start = time.monotonic()
    collect(stream, 1)
    took_s = time.monotonic() - start
    # At the moment at which another replica may win, this one no longer exists.
    assert not Path(f"/proc/{first['pid']}").exists()
    stream.close()
    limit_s = 0.5 if number is signal.SIGKILL else 0.4 * TTL_S + 0.7
    assert took_s < limit_s
    second = guarded.child(1)
    assert second["lease"] != first["lease"]
    assert second["generation"] > first["generation"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_an_agent_is_restarted_under_the_lease_it_had(
    guard: Guard, etcd_35: EtcdCluster, etcd: GatewayEtcd, number: signal.Signals
) -> None:
    guarded = guard(etcd_35.endpoints, "agent")
    first = guarded.child()
    key = f"/guardian/{first['pid']}"
    revision = put_under(etcd, key, first["lease"])
    os.kill(first["pid"], number)
    second = guarded.child(1)
    assert (second["lease"], second["generation"]) == (first["lease"], first["generation"])
    assert not is_alive(first["pid"])
    [kv] = etcd.range(key).items
    assert kv.mod_revision == revision
    guarded.signal(signal.SIGTERM)
    assert guarded.process.wait(5) == 0
    assert etcd.range(key).items == ()


def test_a_child_dies_with_its_guardian(guard: Guard, etcd_35: EtcdCluster) -> None:
    guarded = guard(etcd_35.endpoints)
    child = guarded.child()
    assert child["ppid"] == guarded.process.pid
    guarded.signal(signal.SIGKILL)
    guarded.process.wait()
    eventually(lambda: not is_alive(child["pid"]), 2, "the child's death")


@pytest.mark.parametrize("policy", ["coordinator", "agent"])
@pytest.mark.parametrize(("mode", "code"), [("", 0), ("seven", 7)])
def test_sigterm_stops_the_child_revokes_and_passes_its_code_on(
    guard: Guard, etcd_35: EtcdCluster, etcd: GatewayEtcd, policy: str, mode: str, code: int
) -> None:
    guarded = guard(etcd_35.endpoints, policy, mode)
    child = guarded.child()
    key = f"/guardian/{child['pid']}"
    put_under(etcd, key, child["lease"])
    guarded.signal(signal.SIGTERM)
    assert guarded.process.wait(5) == code
    assert etcd.range(key).items == ()
    assert not is_alive(child["pid"])


def test_a_child_that_will_not_stop_is_killed_and_its_lease_kept_until_then(
    guard: Guard, etcd_35: EtcdCluster, etcd: GatewayEtcd
) -> None:
    guarded = guard(etcd_35.endpoints, mode="stubborn", grace_s=1.2 * TTL_S)
    child = guarded.child()
    key = f"/guardian/{child['pid']}"
    put_under(etcd, key, child["lease"])
    guarded.signal(signal.SIGTERM)
    time.sleep(1.1 * TTL_S)
    assert etcd.range(key).items, "the lease was not renewed during the stop"
    assert guarded.process.wait(5) == 128 + signal.SIGKILL
    assert etcd.range(key).items == ()


def told(guarded: Guarded, pid: int) -> bool:
    return any(life.get("told") == "SIGTERM" and life["pid"] == pid for life in guarded.lives())


def test_a_draining_child_that_dies_is_started_again_and_knows_since_when(
    guard: Guard, etcd_35: EtcdCluster
) -> None:
    guarded = guard(etcd_35.endpoints, policy="agent", mode="drain", drain_s=60.0)
    first = guarded.child()
    assert first["since"] == 0.0
    guarded.signal(signal.SIGTERM)
    eventually(lambda: told(guarded, first["pid"]), what="the signal is passed on")
    os.kill(first["pid"], signal.SIGKILL)
    second = guarded.child(1)
    assert 0 < time.clock_gettime(time.CLOCK_BOOTTIME) - second["since"] < 60.0
    assert second["lease"] == first["lease"]
    # The second signal ends the wait, in order: the child is not killed.
    guarded.signal(signal.SIGTERM)
    assert guarded.process.wait(15) == 0
    assert not guarded.said("child killed")
    assert not told(guarded, second["pid"])


def test_a_drain_has_an_end_and_the_third_signal_waits_for_nothing(
    guard: Guard, etcd_35: EtcdCluster
) -> None:
    guarded = guard(etcd_35.endpoints, policy="agent", mode="drain", grace_s=0.5, drain_s=0.5)
    child = guarded.child()
    guarded.signal(signal.SIGTERM)
    assert guarded.process.wait(15) == 128 + signal.SIGKILL
    assert not is_alive(child["pid"])

    guarded = guard(etcd_35.endpoints, policy="agent", mode="stubborn", grace_s=60.0, drain_s=60.0)
    child = guarded.child()
    for _ in range(3):
        guarded.signal(signal.SIGTERM)
        # Pending signals of one kind are one.
        time.sleep(0.3)
    assert guarded.process.wait(15) == 128 + signal.SIGKILL
    assert not is_alive(child["pid"])


def test_exit_78_is_final(guard: Guard, etcd_35: EtcdCluster) -> None:
    guarded = guard(etcd_35.endpoints, mode="exit78")
    assert guarded.process.wait(5) == 78
    assert sum(line["event"] == "child started" for line in guarded.events()) == 1
    assert guarded.said("lease revoked")


def test_a_child_that_stops_on_purpose_is_not_restarted(guard: Guard, etcd_35: EtcdCluster) -> None:
    guarded = guard(etcd_35.endpoints, mode="done")
    assert guarded.process.wait(20) == 0
    assert sum(line["event"] == "child started" for line in guarded.events()) == 1
    assert guarded.said("lease revoked")


def test_a_crash_loop_is_slowed_down(guard: Guard, etcd_35: EtcdCluster) -> None:
    guarded = guard(etcd_35.endpoints, "agent", "crash")
    eventually(lambda: len(guarded.lives()) >= 4)
    at = [life["at"] for life in guarded.lives()]
    assert at[3] - at[2] > 0.4
    assert at[1] - at[0] > 0.1
    assert len({life["lease"] for life in guarded.lives()}) == 1


def test_a_leader_cut_from_etcd_stops_acting_and_is_killed_before_its_lease_can_end(
    guard: Guard, fresh_etcd: EtcdCluster
) -> None:
    guarded = guard(fresh_etcd.endpoints, mode="acting")
    leader = guarded.child()
    start = time.monotonic()
    fresh_etcd.freeze()
    eventually(lambda: not is_alive(leader["pid"]), TTL_S + 1, "the leader's end")
    assert time.monotonic() - start < 0.85 * TTL_S + 0.2
    assert any(life.get("acts") is False for life in guarded.lives()), "it never noticed that it may not act"
    assert guarded.events()[-1]["event"] != "stopped"
    fresh_etcd.thaw()
    second = guarded.child(1)
    assert second["lease"] != leader["lease"]


@pytest.mark.parametrize("policy", ["coordinator", "agent"])
def test_who_does_not_lead_goes_on_without_etcd_and_gets_a_new_lease(
    guard: Guard, fresh_etcd: EtcdCluster, policy: str
) -> None:
    guarded = guard(fresh_etcd.endpoints, policy)
    child = guarded.child()
    etcd = GatewayEtcd(fresh_etcd.endpoints)
    fresh_etcd.freeze()
    time.sleep(1.1 * TTL_S)
    fresh_etcd.thaw()
    # Whether or not the lease survived the freeze, this ends it.
    eventually(lambda: etcd.revoke(child["lease"]) is None)
    eventually(lambda: guarded.lives()[-1]["generation"] > child["generation"], what="a new lease")
    assert is_alive(child["pid"])
    assert guarded.lives()[-1]["pid"] == child["pid"]
    assert guarded.lives()[-1]["lease"] != child["lease"]
    assert guarded.said("etcd does not answer")
    etcd.close()


def test_a_child_that_hears_of_a_lost_lease_first_gets_a_new_one_at_once(
    guard: Guard, etcd_35: EtcdCluster, etcd: GatewayEtcd
) -> None:
    # By its renewals alone it would hear of it 1.5 s later on average, and up to 3 s.
    guarded = guard(etcd_35.endpoints, "agent", "doubts", ttl_s=9)
    child = guarded.child()
    # For nothing: it keeps the lease that is there.
    os.kill(child["pid"], signal.SIGUSR1)
    time.sleep(0.3)
    assert guarded.lives()[-1]["lease"] == child["lease"]
    waits = []
    for _ in range(4):
        lease = guarded.lives()[-1]["lease"]
        etcd.revoke(lease)
        start = time.monotonic()
        os.kill(child["pid"], signal.SIGUSR1)
        eventually(lambda gone=lease: guarded.lives()[-1]["lease"] not in (0, gone), what="a new lease")
        waits.append(time.monotonic() - start)
    assert max(waits) < 1.0
    assert guarded.lives()[-1]["pid"] == child["pid"]


def test_a_leader_whose_lease_was_revoked_is_killed(
    guard: Guard, etcd_35: EtcdCluster, etcd: GatewayEtcd
) -> None:
    guarded = guard(etcd_35.endpoints, mode="acting")
    leader = guarded.child()
    etcd.revoke(leader["lease"])
    eventually(lambda: not is_alive(leader["pid"]), TTL_S, "the leader's end")
    assert guarded.child(1)["generation"] > leader["generation"]


def test_a_guardian_without_etcd_says_so_and_waits(
    guard: Guard, tmp_path: Path, etcd_35: EtcdCluster
) -> None:
    [port] = ports.reserve(1)
    guarded = guard([f"http://127.0.0.1:{port}"])
    eventually(lambda: guarded.said("etcd does not answer"))
    assert guarded.events()[0]["endpoints"] == [f"http://127.0.0.1:{port}"]
    assert not guarded.said("child started")
    guarded.signal(signal.SIGTERM)
    assert guarded.process.wait(5) == 0
    ports.release([port])


def test_a_guardian_finds_the_member_that_lives(guard: Guard, etcd_35: EtcdCluster) -> None:
    dead = ports.reserve(2)
    guarded = guard([*(f"http://127.0.0.1:{port}" for port in dead), etcd_35.endpoints[0]])
    assert guarded.child()["generation"] == 1
    ports.release(dead)


def test_the_guardian_loads_the_standard_library_only() -> None:
    program = (
        "import sys, dtrain.storage.etcd.guardian as g\n"
        "print(sorted(m for m in sys.modules if m.startswith('dtrain.')"
        " or m.split('.')[0] in ('etcd3gw', 'requests', 'urllib3', 'structlog', 'grpc', 'google.protobuf')))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout.replace("'", '"')))
    of_runtime = ("addresses", "notify", "redact", "serving", "watched")
    assert loaded == {"dtrain.runtime", *(f"dtrain.runtime.{name}" for name in of_runtime)} | {
        "dtrain.protocol",
        "dtrain.protocol.errors",
        "dtrain.storage",
        "dtrain.storage.etcd",
        *(
            f"dtrain.storage.etcd.{name}"
            for name in ("access", "guardian", "lease_client", "lease_keeper", "session_memory")
        ),
    }


@pytest.mark.parametrize(
    ("ttl_s", "short", "policy"),
    [
        (4, False, Policy.COORDINATOR),
        (4, False, Policy.AGENT),
        (1, True, Policy.COORDINATOR),
        (0, True, Policy.AGENT),
    ],
)
def test_timing_that_leaves_no_room_is_refused(ttl_s: int, short: bool, policy: Policy) -> None:
    with pytest.raises(ValueError, match="TTL"):
        GuardianConfig(("x",), ("http://h:1",), policy, "t", ttl_s=ttl_s, allow_short_ttl=short)


@pytest.mark.parametrize("ttl_s", [5, 10, 60])
@pytest.mark.parametrize("policy", list(Policy))
def test_the_documented_profiles_are_accepted(ttl_s: int, policy: Policy) -> None:
    GuardianConfig(("x",), ("http://h:1",), policy, "t", ttl_s=ttl_s)


def test_a_password_is_not_shown() -> None:
    config = GuardianConfig(("x",), ("http://h:1",), Policy.AGENT, "t", user="u", password="hush")
    assert "hush" not in repr(config)
