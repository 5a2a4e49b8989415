"""The status port as an orchestrator sees it: nothing is ever restarted because etcd is away."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dtrain.local.cluster import LocalCluster

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

AWAY_S = 16.0
"""Past the age at which a copy of etcd is old, and past every lease."""


def ask(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=5.0) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


class Ports:
    """The status ports of a cluster's daemons, by name."""

    def __init__(self, cluster: LocalCluster) -> None:
        self.cluster = cluster
        self.names = (*cluster.coordinators, *cluster.agents)
        self._bases = {name: self._base(name) for name in self.names}

    def _base(self, name: str) -> str:
        log = (self.cluster.folder / "logs" / f"{name}.log").read_text()
        found = re.search(r'"event": "status port".*?"address": "([\d.:]+)"', log)
        assert found, log
        return f"http://{found[1]}"

    def url(self, name: str, page: str) -> str:
        return f"{self._bases[name]}/{page}"

    def page(self, name: str, page: str) -> tuple[int, Any]:
        status, body = ask(self.url(name, page))
        return status, json.loads(body)

    def metrics(self, name: str) -> dict[str, float]:
        status, body = ask(self.url(name, "metrics"))
        assert status == 200, body
        lines = [line.rsplit(" ", 1) for line in body.splitlines() if not line.startswith("#")]
        return {series: float(value) for series, value in lines}

    def eventually(self, what: Callable[[], bool], timeout_s: float = 60.0) -> None:
        end = time.monotonic() + timeout_s
        while not what():
            seen = {name: self.page(name, "readyz") for name in self.names}
            assert time.monotonic() < end, f"never came true; {seen}"
            time.sleep(0.1)


class Watcher(threading.Thread):
    """Asks every daemon, again and again, whether it is live, as a kubelet would."""

    def __init__(self, ports: Ports) -> None:
        super().__init__(daemon=True)
        self._ports = ports
        self._over = threading.Event()
        self.dead: list[str] = []
        self.asked = 0

    def run(self) -> None:
        while not self._over.wait(0.2):
            for name in self._ports.names:
                self.asked += 1
                try:
                    status, body = self._ports.page(name, "livez")
                except (OSError, ValueError) as error:
                    status, body = 0, repr(error)
                if status != 200:
                    self.dead.append(f"{name}: {status} {body}")

    def __enter__(self) -> "Watcher":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join(10.0)


@pytest.fixture(scope="module")
def ports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ports]:
    flags = ("--health-listen", "127.0.0.1:0", "--log-json", "true")
    with LocalCluster(
        tmp_path_factory.mktemp("probes"),
        coordinators=2,
        agents=1,
        store="dir",
        etcd_fsync=False,
        coordinator_flags=flags,
        agent_flags=flags,
    ) as cluster:
        yield Ports(cluster)


def all_ready(ports: Ports) -> bool:
    return all(ports.page(name, "readyz")[0] == 200 for name in ports.names)


def test_leader_standby_and_agent_are_ready_and_say_who_leads(ports: Ports) -> None:
    ports.eventually(lambda: all_ready(ports))
    ports.eventually(lambda: sum(ports.page(name, "readyz")[1]["leads"] for name in ("c1", "c2")) == 1)
    pages = {name: ports.page(name, "readyz")[1] for name in ("c1", "c2")}
    leader = next(name for name, page in pages.items() if page["leads"])
    assert {page["leader"] for page in pages.values()} == {leader}
    assert len({page["term"] for page in pages.values()}) == 1
    assert ports.page("a1", "readyz")[1]["etcd_link"] == "ok"


def test_metrics_tell_what_the_cluster_has(ports: Ports) -> None:
    leads = {name: ports.metrics(name)["dtrain_coordinator_is_leader"] for name in ("c1", "c2")}
    assert sorted(leads.values()) == [0.0, 1.0]
    # Counted every few seconds.
    ports.eventually(lambda: ports.metrics("c1")['dtrain_agents{state="ready"}'] == 1.0)
    found = ports.metrics("c2")
    assert found['dtrain_jobs{phase="RUNNING"}'] == 0.0
    assert found["dtrain_mirror_age_seconds"] < 30.0
    assert found["process_resident_memory_bytes"] > 1e6
    agent = ports.metrics("a1")
    assert agent["dtrain_agent_registered"] == 1.0
    assert agent["dtrain_agent_slots"] == 2.0
    assert agent['dtrain_agent_etcd_link{state="ok"}'] == 1.0


def test_the_probe_program_says_yes_and_no(ports: Ports) -> None:
    def probe(url: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-P", "-m", "dtrain.runtime.probe", url, "--timeout", "20"]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

    assert probe(ports.url("c1", "readyz")).returncode == 0
    missing = probe(ports.url("c1", "elsewhere"))
    assert missing.returncode == 1
    assert "404" in missing.stderr


def test_a_port_that_is_taken_is_an_error_with_a_fix(ports: Ports, tmp_path: Path) -> None:
    taken = ports.url("c1", "").removeprefix("http://").removesuffix("/")
    command = [
        sys.executable,
        "-m",
        "dtrain.coordinator",
        "--health-listen",
        taken,
        "--listen",
        "127.0.0.1:0",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, cwd=tmp_path)
    assert done.returncode == 78
    assert "DT-5006" in done.stderr
    assert "--health-listen" in done.stderr


def test_a_process_that_crashes_is_live_again_before_anybody_restarts_its_container(ports: Ports) -> None:
    ports.eventually(lambda: all_ready(ports))
    pid = ports.cluster.coordinators["c2"].process_pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    asked: list[int] = []

    def ready_again() -> bool:
        # The guardian has the same port: no connection is refused in between.
        asked.append(ports.page("c2", "livez")[0])
        return ports.cluster.coordinators["c2"].process_pid != pid and all_ready(ports)

    ports.eventually(ready_again)
    assert set(asked) == {200}


def test_an_outage_of_etcd_makes_nothing_ready_and_nothing_dead(ports: Ports) -> None:
    cluster = ports.cluster
    ports.eventually(lambda: all_ready(ports))
    guardians = {name: cluster.daemon(name).guardian_pid for name in ports.names}
    agent = cluster.agents["a1"].process_pid
    with Watcher(ports) as watcher:
        cluster.etcd_servers.freeze(0)
        began = time.monotonic()
        ports.eventually(lambda: not any(ports.page(name, "readyz")[0] == 200 for name in ports.names))
        reasons = {name: ports.page(name, "readyz")[1]["reasons"] for name in ports.names}
        # The leader's process has ended; its guardian answers in its place.
        assert any("lease" in reason for name in ("c1", "c2") for reason in reasons[name]), reasons
        assert any("cut off" in reason for reason in reasons["a1"]), reasons
        time.sleep(max(0.0, began + AWAY_S - time.monotonic()))
        cluster.etcd_servers.thaw(0)
        ports.eventually(lambda: all_ready(ports))
    assert watcher.asked > 20
    assert not watcher.dead
    assert {name: cluster.daemon(name).guardian_pid for name in ports.names} == guardians
    assert cluster.agents["a1"].process_pid == agent


def test_no_page_shows_what_needs_protection(ports: Ports, tmp_path: Path) -> None:
    secret = "hunter2-in-the-environment"
    job = tmp_path / "job.yaml"
    job.write_text(
        f"name: quiet\nscript: secret_path.py\nworking_dir: {tmp_path}\nargs: [--token, {secret}]\n"
        f"env: {{API_TOKEN: {secret}}}\nnnodes: 1\nnproc_per_node: 1\n"
    )
    (tmp_path / "secret_path.py").write_text("import time\ntime.sleep(600)\n")
    dtrain = [
        str(Path(sys.executable).parent / "dtrain"),
        "--coordinators",
        ",".join(ports.cluster.addresses),
    ]
    subprocess.run([*dtrain, "submit", str(job)], check=True, timeout=60, capture_output=True)
    ports.eventually(
        lambda: sum(n for s, n in ports.metrics("c1").items() if s.startswith("dtrain_jobs")) == 1.0
    )
    ports.eventually(lambda: ports.page("a1", "readyz")[1]["jobs"] == 1)
    for name in ports.names:
        for page in ("livez", "readyz", "metrics", "elsewhere"):
            _, body = ask(ports.url(name, page))
            for hidden in (
                secret,
                "API_TOKEN",
                "secret_path",
                str(tmp_path),
                ports.cluster.addresses[0],
            ):
                assert hidden not in body, f"{name}/{page} shows {hidden}"
    subprocess.run([*dtrain, "cancel", "quiet", "--yes"], check=True, timeout=60, capture_output=True)
