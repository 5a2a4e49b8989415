"""How the nodes of a ``DtrainCluster`` are started: image, command, environment, ports.

Values only; ``containers.py`` acts on them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from dtrain.testing.images import Images

ETCD_PORT, ETCD_PEER_PORT = 2379, 2380
API_PORT = 7070
S3_PORT = 8333
BUCKET = "dtrain"
ETCD_DATA = "/var/lib/etcd"
WORKSPACE = "/workspace"
UID = 10001
"""User and group of dtrain's own images."""

PROGRESS_S = 5
"""How often a member of etcd tells an idle watch that nothing is missing."""


class Kind(StrEnum):
    """What a node is."""

    ETCD = "etcd"
    STORE = "store"
    COORDINATOR = "coordinator"
    AGENT = "agent"


@dataclass(frozen=True, slots=True)
class Recipe:
    """One container. ``port``: the one that is published on the host, 0 for none."""

    image: str
    command: tuple[str, ...]
    port: int = 0
    entrypoint: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    read_only: bool = False
    stop_signal: str = "SIGTERM"


@dataclass(frozen=True, slots=True)
class Shape:
    """What all nodes of one cluster agree on."""

    cluster: str
    token: str
    """Unique for this cluster: etcd's members recognize each other by it."""
    images: Images
    etcd_members: tuple[str, ...]
    ttl_s: int
    slots: int
    report_s: float
    credentials: tuple[str, str]
    env: Mapping[str, str] = field(default_factory=dict)
    """Of the user: for coordinators and agents."""

    @property
    def store_env(self) -> dict[str, str]:
        """Credentials of the store."""
        key, secret = self.credentials
        return {"AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret}

    @property
    def endpoints(self) -> str:
        """Client URLs of etcd inside the network."""
        return ",".join(f"http://{name}:{ETCD_PORT}" for name in self.etcd_members)

    @property
    def store_uri(self) -> str:
        """The default store of jobs, inside the network."""
        return f"s3://{BUCKET}/?endpoint=http://store:{S3_PORT}&region=us-east-1"


def recipe(
    shape: Shape,
    kind: Kind,
    name: str,
    address: str,
    *,
    image: str = "",
    etcd_peers: Sequence[str] = (),
) -> Recipe:
    """Return how the node ``name`` at ``address`` is started.

    ``etcd_peers``: for a member that joins an etcd that exists, everybody who is in it then.
    """
    match kind:
        case Kind.ETCD:
            return _etcd(shape, name, image, etcd_peers)
        case Kind.STORE:
            return _store(shape, image)
        case Kind.COORDINATOR:
            env = {
                **_common(shape),
                "DTRAIN_ID": name,
                "DTRAIN_DEFAULT_STORE": shape.store_uri,
                # Machines are killed on purpose: that makes none of them a bad one.
                "DTRAIN_CORDON_FOR": "0",
                # Older versions advertise the wildcard that the image listens on.
                "DTRAIN_ADVERTISE": f"{address}:{API_PORT}",
            }
            return Recipe(
                image or shape.images.coordinator, ("coordinator",), API_PORT, env=env, read_only=True
            )
        case Kind.AGENT:
            env = {
                **_common(shape),
                "DTRAIN_NAME": name,
                "DTRAIN_SLOTS": str(shape.slots),
                "DTRAIN_REPORT_INTERVAL": str(shape.report_s),
            }
            return Recipe(image or shape.images.agent, ("agent",), env=env)


def _common(shape: Shape) -> dict[str, str]:
    return {
        "DTRAIN_CLUSTER": shape.cluster,
        "DTRAIN_ENDPOINTS": shape.endpoints,
        "DTRAIN_TTL": str(shape.ttl_s),
        "DTRAIN_LOG_JSON": "false",
        **shape.store_env,
        **shape.env,
    }


def _etcd(shape: Shape, name: str, image: str, peers: Sequence[str]) -> Recipe:
    everyone = peers or shape.etcd_members
    command = (
        f"--name={name}",
        f"--data-dir={ETCD_DATA}/data",
        f"--listen-client-urls=http://0.0.0.0:{ETCD_PORT}",
        f"--advertise-client-urls=http://{name}:{ETCD_PORT}",
        f"--listen-peer-urls=http://0.0.0.0:{ETCD_PEER_PORT}",
        f"--initial-advertise-peer-urls=http://{name}:{ETCD_PEER_PORT}",
        f"--initial-cluster={','.join(f'{one}=http://{one}:{ETCD_PEER_PORT}' for one in everyone)}",
        f"--initial-cluster-state={'existing' if peers else 'new'}",
        f"--initial-cluster-token={shape.token}",
        f"--experimental-watch-progress-notify-interval={PROGRESS_S}s",
        "--auto-compaction-mode=periodic",
        "--auto-compaction-retention=1h",
        # No machine loses its power here, and a killed process loses nothing that it has written.
        "--unsafe-no-fsync",
        "--logger=zap",
        "--log-level=warn",
    )
    return Recipe(image or shape.images.etcd, command, ETCD_PORT, entrypoint=("etcd",))


def _store(shape: Shape, image: str) -> Recipe:
    command = (
        "mini",
        "-dir=/data",
        # Its parts meet on loopback: their address must not change with the network.
        "-ip=127.0.0.1",
        "-ip.bind=0.0.0.0",
        "-master.telemetry=false",
        "-admin.ui=false",
        "-webdav=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        f"-bucket={BUCKET}",
        f"-s3.port={S3_PORT}",
    )
    env = {**shape.store_env, "GOMEMLIMIT": "256MiB"}
    # It waits for its clients to leave when it is asked to end.
    return Recipe(
        image or shape.images.store, command, S3_PORT, entrypoint=("weed",), env=env, stop_signal="SIGKILL"
    )
