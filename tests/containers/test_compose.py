"""deploy/compose as its users have it: up, a job, a leader that dies, and nothing left when it is down."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dtrain.storage.blobs import digest
from dtrain.storage.blobs.s3 import S3Blobs
from dtrain.storage.blobs.s3_settings import S3Settings

ROOT = Path(__file__).parents[2]
IMAGES = ("COORDINATOR", "AGENT", "ETCD", "STORE")
UP_S, WAIT_S = 420, 240.0


def why_no_compose() -> str:
    for command in (["docker", "compose", "version"], ["docker-compose", "version"]):
        if (
            shutil.which(command[0])
            and subprocess.run(command, capture_output=True, check=False).returncode == 0
        ):
            return ""
    return "there is neither 'docker compose' nor docker-compose"


pytestmark = [
    pytest.mark.skipif(bool(why_no_compose()), reason=why_no_compose()),
    pytest.mark.timeout(1500),
]


def free_ports(count: int) -> list[int]:
    held = [socket.socket() for _ in range(count)]
    for each in held:
        each.bind(("127.0.0.1", 0))
    ports = [int(each.getsockname()[1]) for each in held]
    for each in held:
        each.close()
    return ports


class Compose:
    """A copy of deploy/compose with a project name, ports and jobs of its own."""

    def __init__(self, folder: Path) -> None:
        self.project = f"dtrain-test-{secrets.token_hex(3)}"
        self.folder = folder / "deploy" / "compose"
        for part in ("compose", "etcd"):
            ignored = shutil.ignore_patterns(".env", "secure")
            shutil.copytree(ROOT / "deploy" / part, folder / "deploy" / part, ignore=ignored)
        jobs = folder / "jobs"
        jobs.mkdir()
        shutil.copy(ROOT / "tests/e2e/scripts/train.py", jobs)
        for readable in (folder, jobs, jobs / "train.py"):
            readable.chmod(0o755)
        self._job = jobs / "job.yaml"
        names = ("C1", "C2", "C3", "ETCD", "STORE")
        self.ports = dict(zip(names, free_ports(len(names)), strict=True))
        settings = {f"DTRAIN_PORT_{name}": str(port) for name, port in self.ports.items()}
        settings |= {
            f"DTRAIN_IMAGE_{name}": os.environ.get(f"DTRAIN_IMAGE_{name}") or f"dtrain-{name.lower()}:local"
            for name in IMAGES
        }
        settings |= {"COMPOSE_PROJECT_NAME": self.project, "DTRAIN_WORKSPACE": str(jobs)}
        settings |= {"COMPOSE_FILE": "compose.yaml", "DTRAIN_STORE_SECRET_KEY": "a-secret-of-this-test"}
        (self.folder / ".env").write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
        clean = {
            name: value for name, value in os.environ.items() if not name.startswith(("DTRAIN_", "AWS_"))
        }
        addresses = ",".join(f"127.0.0.1:{self.ports[name]}" for name in ("C1", "C2", "C3"))
        self.env = clean | {"DTRAIN_COORDINATORS": addresses, "XDG_CONFIG_HOME": str(folder)}

    def script(self, name: str, *words: str) -> "subprocess.CompletedProcess[str]":
        done = self._run([str(self.folder / name), *words], timeout_s=UP_S + 120)
        assert done.returncode == 0, f"{name}: {done.stdout[-3000:]}\n{done.stderr[-3000:]}\n{self._logs()}"
        return done

    def dtrain(self, *words: str, env: dict[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
        code = "from dtrain.cli.main import main; main()"
        return self._run([sys.executable, "-c", code, *words], timeout_s=120, env=env)

    def submit(self, name: str, steps: int) -> None:
        self._job.write_text(
            f"name: {name}\nnnodes: 2\nscript: train.py\nworking_dir: /workspace\n"
            f"args: [--steps, '{steps}', --pause-ms, '100']\n"
            "checkpoint: {every_steps: 20, keep_last: 2}\n"
        )
        done = self.dtrain("submit", str(self._job))
        assert done.returncode == 0, done.stderr

    def job(self, name: str) -> dict[str, Any]:
        done = self.dtrain("get", "jobs", name, "-o", "json")
        return dict(json.loads(done.stdout).get("status") or {}) if done.returncode == 0 else {}

    def wait_for(self, name: str, phase: str) -> dict[str, Any]:
        end = time.monotonic() + WAIT_S
        while (found := self.job(name)).get("phase") != phase:
            story = self.dtrain("describe", "job", name).stdout if time.monotonic() > end else ""
            assert time.monotonic() < end, f"{found}\n{story}\n{self._logs()}"
            time.sleep(1)
        return found

    def leader(self, other_than: str = "") -> str:
        """The replica that leads now, asked of a member of etcd, which knows at once."""
        end = time.monotonic() + WAIT_S
        while time.monotonic() < end:
            listed = self.dtrain("get", "coordinators", "-o", "json")
            items = json.loads(listed.stdout)["items"] if listed.returncode == 0 else []
            for name in [item["name"] for item in items if item["term"]]:
                if name != other_than:
                    return str(name)
            time.sleep(1)
        raise AssertionError(f"nobody but {other_than} leads\n{self._logs()}")

    def container(self, service: str) -> str:
        labels = (f"com.docker.compose.project={self.project}", f"com.docker.compose.service={service}")
        found = self._run(["docker", "ps", "-aq", *(f"--filter=label={label}" for label in labels)])
        return found.stdout.strip()

    def left(self) -> str:
        label = f"label=com.docker.compose.project={self.project}"
        kinds = (["ps", "-a"], ["volume", "ls"], ["network", "ls"])
        return "".join(self._run(["docker", *kind, "-q", "--filter", label]).stdout for kind in kinds)

    def etcdctl(self, *words: str) -> "subprocess.CompletedProcess[str]":
        return self._run(["docker", "exec", self.container("etcd-0"), "etcdctl", *words], timeout_s=60)

    def docker(self, *words: str) -> str:
        done = self._run(["docker", *words], timeout_s=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def _logs(self) -> str:
        tails = []
        for service in ("c1", "c2", "c3", "a1", "a2", "bucket"):
            found = self.container(service)
            log = self._run(["docker", "logs", "--tail", "8", found]) if found else None
            tails.append(f"== {service}\n{log.stdout}{log.stderr}" if log else f"== no {service}\n")
        return "".join(tails)

    def _run(
        self, command: list[str], *, timeout_s: float = 60, env: dict[str, str] | None = None
    ) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            command, capture_output=True, text=True, env=env or self.env, timeout=timeout_s,
            stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip


@pytest.fixture
def compose(tmp_path: Path) -> Iterator[Compose]:
    made = Compose(tmp_path)
    try:
        yield made
    finally:
        made.script("down.sh", "--volumes")
        assert made.left() == ""


def test_a_job_outlives_the_leader_of_a_cluster_made_with_compose(compose: Compose) -> None:
    compose.script("up.sh", "--agents", "2", "--timeout", str(UP_S))
    compose.submit("short", steps=400)
    compose.wait_for("short", "RUNNING")
    first = compose.leader()
    # SIGKILL for everything in the container, its guardian too: the lease has to run out.
    compose.docker("kill", compose.container(first))
    second = compose.leader(other_than=first)
    assert second != first
    ended = compose.wait_for("short", "SUCCEEDED")
    assert ended["attempt"] == 1
    committed = compose.etcdctl("get", "--prefix", "--keys-only", "/dtrain/default/jobs/short/checkpoints/")
    assert "checkpoints/" in committed.stdout

    # Not even a coordinator's container need come back: a new one knows as much.
    compose.docker("rm", compose.container(first))
    compose.script("up.sh", "--timeout", str(UP_S))
    assert compose.job("short")["phase"] == "SUCCEEDED"

    # What the files promise is what the engine made of them.
    for service in ("c1", "c2", "c3", "a1", "etcd-0", "store"):
        made = json.loads(compose.docker("inspect", compose.container(service)))[0]["HostConfig"]
        assert made["ReadonlyRootfs"] is True
        assert made["CapDrop"] == ["ALL"]
        assert not made["Binds"] or not service.startswith("c")
        ports = [binding["HostIp"] for bound in (made["PortBindings"] or {}).values() for binding in bound]
        assert set(ports) <= {"127.0.0.1"}
    anonymous = S3Blobs(
        "dtrain",
        settings=S3Settings(endpoint=f"http://127.0.0.1:{compose.ports['STORE']}"),
        credentials=("dtrain", "a-guess"),
    )
    with pytest.raises(Exception, match=r"refused|denied|credentials|403|SignatureDoesNotMatch"):
        anonymous.put("x", [b"x"], chunk_crcs=[digest.crc32c(b"x")])
    anonymous.close()


def test_with_tls_a_job_runs_and_nobody_gets_in_without_a_key(compose: Compose) -> None:
    compose.script("up.sh", "--agents", "2", "--secure", "--timeout", str(UP_S))
    own = compose.folder / "secure/pki/operator/me"
    plain = dict(compose.env)
    compose.env |= {
        "DTRAIN_TLS_CERT": str(own / "grpc.crt"),
        "DTRAIN_TLS_KEY": str(own / "grpc.key"),
        "DTRAIN_TLS_CACERT": str(own / "grpc-ca.crt"),
    }
    compose.submit("locked", steps=60)
    assert compose.wait_for("locked", "SUCCEEDED")["attempt"] == 1

    refused = compose.dtrain("get", "jobs", env=plain)
    assert refused.returncode != 0
    assert "locked" not in refused.stdout
    # With etcd's certificate but no user of it: keys stay closed.
    nobody = compose.etcdctl("get", "--prefix", "/dtrain/default/")
    assert nobody.returncode != 0
    assert "permission denied" in nobody.stderr or "user name is empty" in nobody.stderr
    password = (compose.folder / "secure/passwords/reader").read_text()
    reader = compose.etcdctl(
        "--user", f"reader:{password}", "get", "--prefix", "--keys-only", "/dtrain/default/"
    )
    assert "jobs/locked/status" in reader.stdout
    # Each sees its own keys, as its own user, and nothing else.
    seen = compose.docker("exec", compose.container("a1"), "ls", "-ln", "/run/dtrain").splitlines()[1:]
    assert {tuple(line.split()[:4:2]) for line in seen} == {("-r--------", "10001")}
    assert "is readable by others" not in compose.docker("logs", compose.container("a1"))
