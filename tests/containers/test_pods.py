"""The pods of deploy/kubernetes, run as containers: rendered command, environment, files, user, rights.

What Kubernetes itself does (scheduling, budgets, policies) is not here. What a pod would run into is:
a root that cannot be written, no capability, certificates and passwords picked by its name, probes,
and the time it has between SIGTERM and SIGKILL.
"""

import itertools
import os
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.kube import (
    KUSTOMIZE,
    ROOT,
    Document,
    Pod,
    composed,
    container,
    documents,
    expanded,
    find,
    kinds,
    kustomize,
    of_component,
    secrets_of_the_readme,
    template,
)

docker = pytest.importorskip("docker", reason="the docker package is not installed")

IMAGES = {
    "coordinator": os.environ.get("DTRAIN_IMAGE_COORDINATOR", "dtrain-coordinator:local"),
    "agent": os.environ.get("DTRAIN_IMAGE_AGENT", "dtrain-agent:local"),
    "etcd": os.environ.get("DTRAIN_IMAGE_ETCD", "dtrain-etcd:local"),
    "store": os.environ.get("DTRAIN_IMAGE_STORE", "dtrain-store:local"),
}
STORE = """mini -dir=/data -ip=127.0.0.1 -ip.bind=0.0.0.0 -master.telemetry=false -admin.ui=false
 -webdav=false -s3.port.iceberg=0 -s3.port.lance=0 -bucket=training -s3.port=8333"""
KEYS = {"AWS_ACCESS_KEY_ID": "pods", "AWS_SECRET_ACCESS_KEY": "pods-secret"}


def eventually(true: Callable[[], Any], what: Callable[[], str], timeout_s: float = 300.0) -> Any:
    end = time.monotonic() + timeout_s
    while not (found := true()):
        assert time.monotonic() < end, f"not in {timeout_s:g} s: {what()}"
        time.sleep(0.5)
    return found


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=3) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


class Node:
    """Runs pods on a network of their own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._client = docker.from_env(timeout=120)
        self._prefix = f"pods-{os.urandom(3).hex()}"
        self._net, self._hosts = f"10.{os.urandom(1)[0] % 100 + 120}.{os.urandom(1)[0]}", itertools.count(10)
        pool = docker.types.IPAMPool(subnet=f"{self._net}.0/24")
        # Addresses are known before the pods are, as they stand in their environment.
        self._network = self._client.networks.create(
            self._prefix,
            labels={"dtrain-test": self._prefix},
            ipam=docker.types.IPAMConfig(pool_configs=[pool]),
        )
        self._running: list[Any] = []
        self.secrets: dict[str, dict[str, bytes]] = {}

    def close(self) -> None:
        for each in self._running:
            each.remove(force=True, v=True)
        self._network.remove()
        self._client.close()

    def run(
        self, given: list[Document], workload: Document, image: str, name: str, *aliases: str
    ) -> "Running":
        ip = f"{self._net}.{next(self._hosts)}"
        folder = self._folder / name
        pod = Pod(given, workload, folder, name, self.secrets, ip)
        spec, main = template(workload)["spec"], container(workload)
        security = main["securityContext"]
        volumes = {volume["name"]: volume for volume in spec.get("volumes", ())}
        command = main.get("command")
        words = [expanded(word, pod.environment) for word in main["args"]]
        binds, tmpfs = [], {}
        for mount in main["volumeMounts"]:
            if mount["mountPath"].startswith("/etc/dtrain"):
                continue
            if "configMap" in volumes.get(mount["name"], {}):
                binds.append(
                    f"{self._folder}/{volumes[mount['name']]['configMap']['name']}:{mount['mountPath']}:ro"
                )
            else:
                tmpfs[mount["mountPath"]] = "uid=10001,gid=10001,mode=0770,exec"
        if (folder / "etc/dtrain").exists():
            open_to_the_group(folder / "etc")
            binds.append(f"{folder}/etc/dtrain:/etc/dtrain:ro")
        made = self._client.containers.create(
            image,
            words,
            entrypoint=command,
            name=f"{self._prefix}-{name}",
            hostname=name,
            environment=pod.environment,
            user=f"{spec['securityContext']['runAsUser']}:{spec['securityContext']['runAsGroup']}",
            read_only=security["readOnlyRootFilesystem"],
            cap_drop=security["capabilities"]["drop"],
            security_opt=["no-new-privileges"],
            volumes=binds,
            tmpfs=tmpfs,
            labels={"dtrain-test": self._prefix},
            **self._attached(ip, name, *aliases),
        )
        self._running.append(made)
        made.start()
        return Running(made, ip, workload)

    def _attached(self, ip: str, *aliases: str) -> dict[str, Any]:
        here = self._client.api.create_endpoint_config(aliases=list(aliases), ipv4_address=ip)
        return {"network": self._prefix, "networking_config": {self._prefix: here}}

    def store(self) -> None:
        made = self._client.containers.create(
            IMAGES["store"],
            STORE.split(),
            entrypoint=["weed"],
            environment={**KEYS, "GOMEMLIMIT": "256MiB"},
            labels={"dtrain-test": self._prefix},
            **self._attached(f"{self._net}.{next(self._hosts)}", "store"),
        )
        self._running.append(made)
        made.start()

    def configmap(self, name: str, *files: Path) -> None:
        """Lay files out as a kubelet does: links into a folder with another name on every node."""
        target = self._folder / name / "..2026_11_22"
        target.mkdir(parents=True)
        for file in files:
            (target / file.name).write_bytes(file.read_bytes())
            (target.parent / file.name).symlink_to(f"..data/{file.name}")
        (target.parent / "..data").symlink_to(target.name)
        target.parent.chmod(0o755)


def open_to_the_group(folder: Path) -> None:
    """Modes of a Secret volume under fsGroup 10001."""
    for path in (folder, *folder.rglob("*")):
        os.chown(path, -1, 10001)
        path.chmod(0o750 if path.is_dir() else 0o440)


class Running:
    """A pod's container."""

    def __init__(self, made: Any, ip: str, workload: Document) -> None:
        self.made, self.ip, self.workload = made, ip, workload

    def passes(self, probe: str) -> bool:
        asked = container(self.workload)[probe]["httpGet"]
        (port,) = (
            each["containerPort"]
            for each in container(self.workload)["ports"]
            if each["name"] == asked["port"]
        )
        return answers(f"http://{self.ip}:{port}{asked['path']}")

    def exec(self, *words: str) -> tuple[int, str]:
        code, output = self.made.exec_run(list(words))
        return code, output.decode(errors="replace")

    def terminate(self) -> tuple[int, float]:
        """Send SIGTERM and, when the pod's grace is over, SIGKILL; return exit code and seconds."""
        since = time.monotonic()
        self.made.stop(timeout=template(self.workload)["spec"]["terminationGracePeriodSeconds"])
        took_s = time.monotonic() - since
        return int(self.made.wait()["StatusCode"]), took_s

    def log(self) -> str:
        return str(self.made.logs(tail=40).decode(errors="replace"))


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    client = docker.from_env(timeout=10)
    for image in IMAGES.values():
        client.images.get(image)
    client.close()
    made = Node(tmp_path)
    yield made
    made.close()


@pytest.mark.timeout(1500)
def test_pods_with_tls_and_users_train_and_end_in_time(node: Node, tmp_path: Path) -> None:
    # etcd, by the example's own flags.
    example = kustomize(KUSTOMIZE / "etcd-example")
    etcd = find(example, "StatefulSet", "etcd")
    members = [
        node.run(example, etcd, IMAGES["etcd"], f"etcd-{n}", f"etcd-{n}.etcd", "etcd") for n in range(3)
    ]
    for member in members:
        eventually(lambda member=member: member.passes("readinessProbe"), member.log)
    node.store()

    # Users and Secrets, by the README's commands.
    passwords = tmp_path / "passwords"
    etcdctl = ROOT / ".cache/etcd/usr/bin/etcdctl"

    def users() -> bool:
        # Running it again changes nothing; a busy machine misses etcdctl's deadline now and then.
        done = subprocess.run(
            [
                *(ROOT / "deploy/etcd/setup-auth.sh", "--passwords", passwords, "--cluster", "prod"),
                *("init", "dtrain-agent-0", "dtrain-agent-1"),
            ],
            env={
                **os.environ,
                "ETCDCTL_ENDPOINTS": f"http://{members[0].ip}:2379",
                "ETCDCTL": os.environ.get(
                    "DTRAIN_ETCDCTL_BIN", str(etcdctl) if etcdctl.exists() else "etcdctl"
                ),
            },
            capture_output=True,
            check=False,
        )
        return done.returncode == 0

    eventually(users, members[0].log)
    node.secrets = secrets_of_the_readme(
        tmp_path / "secrets", {path.name: path.read_text() for path in passwords.iterdir()}
    )
    node.secrets["dtrain-store"] = {name: value.encode() for name, value in KEYS.items()}
    node.configmap(
        "dtrain-workspace", *(ROOT / "examples/chargpt" / name for name in ("train.py", "job.yaml"))
    )

    # The base with users and certificates, and what the example's overlay says of stores and scripts.
    overlay = tmp_path / "overlay"
    overlay.mkdir()
    given = composed(overlay, "etcd-roles", "tls-secrets")
    plain = kustomize(KUSTOMIZE / "overlays/example")
    for settings in kinds(given, "ConfigMap"):
        if "DTRAIN_CLUSTER" in settings["data"]:
            settings["data"]["DTRAIN_CLUSTER"] = "prod"
        if "endpoints" in settings["data"]:
            settings["data"] = find(plain, "ConfigMap", "dtrain-etcd")["data"]
        for other in kinds(plain, "ConfigMap"):
            port = other["data"].get("DTRAIN_LISTEN")
            if port is not None and port == settings["data"].get("DTRAIN_LISTEN"):
                settings["data"] = other["data"]
    coordinator, agent = of_component(given, "coordinator"), of_component(given, "agent")
    (mount,) = (
        each
        for each in container(of_component(plain, "agent"))["volumeMounts"]
        if each["name"] == "workspace"
    )
    container(agent)["volumeMounts"].append(mount)
    template(agent)["spec"]["volumes"].append(
        {"name": "workspace", "configMap": {"name": "dtrain-workspace"}}
    )

    replicas = [
        node.run(given, coordinator, IMAGES["coordinator"], f"dtrain-coordinator-{n}", "dtrain-coordinator")
        for n in range(2)
    ]
    machine = node.run(given, agent, IMAGES["agent"], "dtrain-agent-0")
    for pod in (*replicas, machine):
        eventually(lambda pod=pod: pod.passes("readinessProbe"), pod.log)
        assert pod.passes("livenessProbe")

    # A Job submits, and may be repeated.
    manifest = documents((KUSTOMIZE / "jobs/submit-tls.yaml").read_text())
    for attempt in range(2):
        submission = node.run(manifest, manifest[0], IMAGES["coordinator"], f"submit-{attempt}")
        assert submission.made.wait()["StatusCode"] == 0, submission.log()
    assert "nothing changed" in submission.log()
    code, said = replicas[0].exec("dtrain", "wait", "chargpt", "--for", "step=5", "--timeout", "240s")
    assert code == 0, said + machine.log()

    # An agent drains within the time that its pod has.
    code, took_s = machine.terminate()
    assert code != 137, f"killed after {took_s:.0f} s\n{machine.log()}"
    for replica in replicas:
        code, took_s = replica.terminate()
        assert code != 137
        assert took_s < 20
