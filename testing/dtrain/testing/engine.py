"""The container engine: whether there is one, and what must not be left behind in it.

Everything that a test cluster makes (containers, volumes, its network) carries one
label with the cluster's id, and one with its owner, a process of this machine. What
a killed owner leaves behind is removed at once by a watcher (``reaper.py``) and, if
that one was killed too, when the next cluster starts.
"""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import docker.errors
from testcontainers.core.config import testcontainers_config
from testcontainers.core.docker_client import DockerClient

from dtrain.protocol.errors import ErrorCode, Refused
from dtrain.testing.images import is_built_here

LABEL = "dev.dtrain.testing"
OWNER = "dev.dtrain.testing.owner"

_GONE = (docker.errors.NotFound,)


def why_none() -> str:
    """Return why no container engine can be used, "" if one answers."""
    try:
        client = docker.from_env(timeout=5)
    except docker.errors.DockerException as error:
        return f"no container engine answers: {_short(error)}"
    try:
        client.ping()
    except (docker.errors.DockerException, OSError) as error:
        return f"no container engine answers: {_short(error)}"
    finally:
        client.close()
    return ""


def connect() -> Any:
    """Return a Docker client, made the way testcontainers makes its own.

    Raises:
        Refused: no engine answers.
    """
    reason = why_none()
    if reason:
        raise Refused(
            ErrorCode.BAD_SETTING,
            reason,
            fix="start one, or set DOCKER_HOST; without containers use ProcessCluster",
        )
    client = DockerClient().client
    _settle_ryuk(client)
    return client


def missing(client: Any, images: tuple[str, ...]) -> str:
    """Return which image is not there and cannot be pulled either, as a sentence; "" for none."""
    for image in images:
        if is_built_here(image) and not _has(client, image):
            return f"there is no image {image}"
    return ""


def pull(client: Any, images: tuple[str, ...]) -> None:
    """Make sure that every image is there.

    Raises:
        Refused: one is not, and cannot be pulled.
    """
    for image in dict.fromkeys(images):
        if _has(client, image):
            continue
        if is_built_here(image):
            raise Refused(
                ErrorCode.BAD_SETTING,
                f"there is no image {image}",
                fix="build it: make images, or name another one: docs/testing.md",
            )
        try:
            client.images.pull(image)
        except docker.errors.DockerException as error:
            raise Refused(
                ErrorCode.BAD_SETTING,
                f"the image {image} cannot be pulled: {_short(error)}",
                fix="name one that is at hand: docs/testing.md lists the variables",
            ) from error


def owner() -> str:
    """Return what this process is known by on labels: its machine, its pid and when it started."""
    return f"{_machine()}/{os.getpid()}/{_started(os.getpid())}"


def remove(client: Any, cluster: str) -> list[str]:
    """Remove everything of one cluster; return what could not be removed."""
    problems = []
    for kind, found in _everything(client, f"{LABEL}={cluster}"):
        try:
            if kind == "container":
                found.remove(force=True, v=True)
            else:
                found.remove()
        except _GONE:
            continue
        except docker.errors.APIError as error:
            # Somebody else, the watcher say, is removing it at this moment.
            if error.status_code != 409:
                problems.append(f"{kind} {found.name}: {_short(error)}")
    return problems


def sweep(client: Any) -> None:
    """Remove clusters whose owner, a process of this machine, is dead."""
    for _, found in _everything(client, LABEL):
        with contextlib.suppress(*_GONE):
            labels = _labels(found)
            if _is_dead(labels.get(OWNER, "")):
                remove(client, labels[LABEL])


def hosts(client: Any) -> list[str]:
    """Under which addresses published ports may be reached from here, the likeliest first."""
    if testcontainers_config.tc_host_override:
        return [testcontainers_config.tc_host_override]
    url = str(client.api.base_url)
    if url.startswith(("tcp://", "http://", "https://")) and "localhost" not in url and "+docker" not in url:
        return [url.split("://", 1)[1].rsplit(":", 1)[0]]
    found = ["127.0.0.1"]
    if Path("/.dockerenv").exists():
        # The engine may be in here, or it is the one that runs us: then it is our gateway.
        with contextlib.suppress(OSError):
            found += _gateways()
    return found


def _has(client: Any, image: str) -> bool:
    try:
        client.images.get(image)
    except docker.errors.ImageNotFound:
        return False
    return True


def _settle_ryuk(client: Any) -> None:
    """Use testcontainers' own watcher only if its image is at hand: ours does the same without one."""
    asked = any(
        value is not None
        for value in (
            os.environ.get("TESTCONTAINERS_RYUK_DISABLED"),
            testcontainers_config.tc_properties.get("ryuk.disabled"),
        )
    )
    if not asked and not _has(client, testcontainers_config.ryuk_image):
        testcontainers_config.ryuk_disabled = True


def _everything(client: Any, label: str) -> Iterator[tuple[str, Any]]:
    """Containers, then what they use."""
    wanted = {"label": label}
    for container in client.containers.list(all=True, filters=wanted, ignore_removed=True):
        yield "container", container
    for volume in client.volumes.list(filters=wanted):
        yield "volume", volume
    for network in client.networks.list(filters=wanted):
        yield "network", network


def _labels(found: Any) -> dict[str, str]:
    labels = found.attrs.get("Labels") or found.attrs.get("Config", {}).get("Labels") or {}
    return dict(labels)


def _is_dead(label: str) -> bool:
    machine, _, rest = label.partition("/")
    pid, _, started = rest.partition("/")
    return machine == _machine() and pid.isdecimal() and _started(int(pid)) != started


def _machine() -> str:
    with contextlib.suppress(OSError):
        # Containers have names of their own, and may share one boot id: both together are one machine.
        return f"{socket.gethostname()}-{Path('/proc/sys/kernel/random/boot_id').read_text().strip()[:8]}"
    return socket.gethostname()


def _started(pid: int) -> str:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    return stat.rpartition(")")[2].split()[19]


def _gateways() -> list[str]:
    found = []
    for line in Path("/proc/net/route").read_text().splitlines()[1:]:
        words = line.split()
        if words[1] == "00000000":
            number = bytes.fromhex(words[2])[::-1]
            found.append(socket.inet_ntoa(number))
    return found


def _short(error: Exception) -> str:
    return str(error).strip().splitlines()[-1][:300] if str(error).strip() else type(error).__name__
