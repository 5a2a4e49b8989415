"""The images themselves: what is in them, what they may do, and how they start and end."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import docker
import docker.errors
import pytest

from dtrain.testing.images import Images

LABEL = "dtrain.test.images"
LIMIT_S = 240.0
STOP_S = 20

pytestmark = pytest.mark.timeout(600)

LOOK = """
import importlib.util as u, json, os, shutil, stat
raised = []
for top, folders, files in os.walk("/"):
    if top == "/":
        folders[:] = [f for f in folders if f not in ("proc", "sys", "dev")]
    for name in files:
        path = os.path.join(top, name)
        mode = os.lstat(path).st_mode
        if stat.S_ISREG(mode) and mode & (stat.S_ISUID | stat.S_ISGID):
            raised.append(path)
print(json.dumps({
    "modules": [m for m in ("torch", "numpy", "pip", "boto3", "dtrain.coordinator.main") if u.find_spec(m)],
    "programs": [p for p in ("cc", "gcc", "c++", "clang", "make", "pip", "pip3", "sudo") if shutil.which(p)],
    "raised": raised,
    "ids": [os.getuid(), os.getgid(), os.getgroups()],
}))
"""


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    client = docker.from_env()
    label = f"{LABEL}={os.getpid()}"
    yield client
    for container in client.containers.list(all=True, filters={"label": label}):
        container.remove(force=True, v=True)
    for network in client.networks.list(filters={"label": label}):
        network.remove()
    client.close()


@pytest.fixture(scope="module")
def images() -> Images:
    return Images().resolved()


Run = Callable[..., Any]


@pytest.fixture
def run(engine: Any) -> Iterator[Run]:
    """Start a container as strictly as the documentation says: no capability, nothing to write."""
    started: list[Any] = []

    def start(image: str, *command: str, **more: Any) -> Any:
        hard = {"read_only": True, "cap_drop": ["ALL"], "security_opt": ["no-new-privileges"]}
        container = engine.containers.run(
            image, list(command), detach=True, labels={LABEL: str(os.getpid())}, **{**hard, **more}
        )
        started.append(container)
        return container

    yield start
    for container in started:
        container.remove(force=True, v=True)


@pytest.fixture(scope="module")
def etcd(engine: Any, images: Images) -> Iterator[tuple[str, str]]:
    """Name of a network, and the URL of an etcd in it."""
    labels = {LABEL: str(os.getpid())}
    network = engine.networks.create(f"dtrain-test-images-{os.getpid()}", labels=labels)
    address = "http://etcd:2379"
    server = engine.containers.create(
        images.etcd,
        [
            "--listen-client-urls=http://0.0.0.0:2379",
            f"--advertise-client-urls={address}",
            "--data-dir=/data/etcd",
        ],
        entrypoint=["etcd"],
        labels=labels,
        tmpfs={"/data": ""},
    )
    network.connect(server, aliases=["etcd"])
    server.start()
    yield network.name, address
    server.remove(force=True, v=True)
    network.remove()


def eventually(what: str, condition: Callable[[], bool], container: Any) -> None:
    end = time.monotonic() + LIMIT_S
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"{what}: not within {LIMIT_S:.0f} s\n{container.logs().decode()[-4000:]}")
        time.sleep(0.25)


def health(container: Any) -> str:
    container.reload()
    return str(container.attrs["State"]["Health"]["Status"])


def output(container: Any) -> str:
    code = container.wait(timeout=LIMIT_S)["StatusCode"]
    text = container.logs().decode()
    assert code == 0, text
    return str(text)


def test_a_coordinator_has_no_torch_no_pip_no_compiler_and_no_way_to_become_root(
    run: Run, images: Images
) -> None:
    found = json.loads(output(run(images.coordinator, "-c", LOOK, entrypoint=["python"])))
    assert found == {
        "modules": ["boto3", "dtrain.coordinator.main"],
        "programs": [],
        "raised": [],
        "ids": [10001, 10001, [10001]],
    }


def test_a_coordinator_without_etcd_says_what_it_lacks(run: Run, images: Images) -> None:
    alone = run(
        images.coordinator, environment={"DTRAIN_ENDPOINTS": "http://127.0.0.1:1"}, network_mode="none"
    )
    eventually("a word about etcd", lambda: b"127.0.0.1:1" in alone.logs(), alone)
    answer = alone.exec_run(["python", "-m", "dtrain.runtime.probe", "http://127.0.0.1:7080/readyz"])
    assert answer.exit_code == 1
    assert b"etcd" in answer.output


@pytest.mark.ci
def test_a_coordinator_works_with_a_read_only_root_and_no_volume_and_ends_at_once(
    run: Run, images: Images, etcd: tuple[str, str]
) -> None:
    network, url = etcd
    one = run(images.coordinator, environment={"DTRAIN_ENDPOINTS": url}, network=network)
    eventually("healthy", lambda: health(one) == "healthy", one)
    assert not one.attrs["Mounts"]
    asked = one.exec_run(["dtrain", "get", "coordinators", "--coordinators", "127.0.0.1:7070"])
    assert asked.exit_code == 0, asked.output.decode()
    assert b"leader" in asked.output
    began = time.monotonic()
    one.stop(timeout=STOP_S)
    assert time.monotonic() - began < STOP_S
    assert one.wait()["StatusCode"] == 0
    # Nothing was written: what replaces it elsewhere knows as much as it did.
    assert not one.diff()


@pytest.mark.ci
def test_an_agent_has_the_torch_of_its_base_and_becomes_healthy(
    run: Run, images: Images, etcd: tuple[str, str]
) -> None:
    network, url = etcd
    one = run(
        images.agent,
        environment={"DTRAIN_ENDPOINTS": url, "DTRAIN_NAME": "a1"},
        network=network,
        tmpfs={"/tmp": "exec,mode=1777"},
    )
    script = (
        "import sys, torch, dtrain.trainer; print(torch.__file__, torch.ones(2).sum().item(), sys.prefix)"
    )
    ran = one.exec_run(["python", "-c", script])
    assert ran.exit_code == 0, ran.output.decode()
    file, total, prefix = ran.output.decode().split()[-3:]
    assert (total, prefix) == ("2.0", "/opt/dtrain")
    assert not file.startswith("/opt/dtrain"), "a torch of dtrain's own would not be the base's"
    eventually("healthy", lambda: health(one) == "healthy", one)
    assert [mount["Destination"] for mount in one.attrs["Mounts"] if mount["Type"] == "volume"] == [
        "/var/lib/dtrain"
    ]
    one.stop(timeout=STOP_S)
    assert one.wait()["StatusCode"] == 0, one.logs().decode()[-4000:]


def test_the_images_say_what_they_are(
    engine: Any, images: Images, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {}
    for name in (images.coordinator, images.agent):
        image = engine.images.get(name)
        labels = image.labels
        sizes[name] = round(image.attrs["Size"] / 1e6)
        assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
        assert labels["org.opencontainers.image.version"] not in {"", "unknown"}
        config = image.attrs["Config"]
        assert config["User"] == "10001:10001"
        assert config["StopSignal"] == "SIGTERM"
        assert config["Entrypoint"] == ["tini", "--", "dtrain"]
    with capsys.disabled():
        sys.stdout.write(f"\nsizes in MB: {sizes}\n")
    assert sizes[images.coordinator] < 300
