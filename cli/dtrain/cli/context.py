"""Which cluster is meant, and where its replicas are.

A flag beats the environment, which beats the context file that ``dtrain up``
writes. Replicas are given as addresses, or looked up in etcd.
"""

import contextlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtrain.cli.globals import Settings
from dtrain.protocol.errors import ErrorCode, NotFound, Refused, Unavailable
from dtrain.protocol.ids import ClusterName, parse_name
from dtrain.protocol.keys import Keys
from dtrain.runtime.tls import TLS, TlsFiles, tls_files

if TYPE_CHECKING:
    from dtrain.cli.client import Client


_VARIABLES = (
    "DTRAIN_CLUSTER",
    "DTRAIN_COORDINATORS",
    "DTRAIN_ENDPOINTS",
    "DTRAIN_ENDPOINTS_FILE",
    "DTRAIN_CACERT",
    "DTRAIN_CERT",
    "DTRAIN_KEY",
    "DTRAIN_USER",
    "DTRAIN_PASSWORD",
    "DTRAIN_PASSWORD_FILE",
    "DTRAIN_TLS_CERT",
    "DTRAIN_TLS_KEY",
    "DTRAIN_TLS_CACERT",
)


_TLS_FIELDS = tuple(setting.name.replace("-", "_") for setting in TLS)


@dataclass(frozen=True, slots=True)
class Known:
    """A cluster in the context file. ``pid`` is the ``dtrain up`` that runs it, 0 for none."""

    name: str
    coordinators: tuple[str, ...]
    endpoints: tuple[str, ...] = ()
    folder: str = ""
    pid: int = 0
    started: int = 0
    """Start time of ``pid``, in ticks: a pid may be used again."""
    tls_cert: str = ""
    tls_key: str = ""
    tls_cacert: str = ""
    etcdctl: str = ""
    """The program beside the etcd that it runs."""

    @property
    def alive(self) -> bool:
        """False for a local cluster whose ``dtrain up`` has gone."""
        return not self.pid or start_ticks(self.pid) == self.started


def path() -> Path:
    """Where the context file is."""
    base = os.environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "dtrain" / "context.json"


def load() -> tuple[str, dict[str, Known]]:
    """Return the current cluster's name and all known ones; a damaged file counts as empty."""
    try:
        document = json.loads(path().read_text())
        known = {
            name: Known(
                name,
                tuple(entry["coordinators"]),
                tuple(entry.get("endpoints", ())),
                entry.get("folder", ""),
                entry.get("pid", 0),
                entry.get("started", 0),
                *(str(entry.get(field, "")) for field in (*_TLS_FIELDS, "etcdctl")),
            )
            for name, entry in document["clusters"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "", {}
    return document.get("current", ""), known


def remember(cluster: Known) -> None:
    """Make ``cluster`` the current one."""
    _, known = load()
    _write(cluster.name, known | {cluster.name: cluster})


def forget(cluster: Known) -> None:
    """Take ``cluster`` out, unless another ``dtrain up`` has written it since."""
    current, known = load()
    if known.get(cluster.name) == cluster:
        del known[cluster.name]
        left = current if current != cluster.name else next(iter(known), "")
        _write(left, known)


def known_here(
    name: str, coordinators: tuple[str, ...], endpoints: tuple[str, ...], folder: Path, *, etcdctl: str = ""
) -> Known:
    """Describe a cluster that lives as long as this process."""
    pid = os.getpid()
    return Known(name, coordinators, endpoints, str(folder), pid, start_ticks(pid), etcdctl=etcdctl)


def start_ticks(pid: int) -> int:
    """Return when a process started, in ticks since boot; 0 if there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    return int(stat.rpartition(")")[2].split()[19])


def _write(current: str, known: dict[str, Known]) -> None:
    target = path()
    target.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "v": 1,
        "current": current,
        "clusters": {
            name: {key: value for key, value in asdict(entry).items() if key != "name"}
            for name, entry in known.items()
        },
    }
    fd, temporary = tempfile.mkstemp(dir=target.parent, prefix=".context-")
    with os.fdopen(fd, "w") as file:
        json.dump(document, file, indent=1)
    Path(temporary).replace(target)


def addresses(settings: Settings) -> tuple[str, ...]:
    """Return the replicas of the cluster that is meant; () if none is configured.

    Raises:
        NotFound: the cluster named is unknown.
        Refused: a DTRAIN_ variable is misspelt.
        Unavailable: it is, but runs no more; or etcd cannot be asked.
    """
    _refuse_misspelt(os.environ)
    if settings.coordinators:
        return _split(settings.coordinators)
    current, known = load()
    if settings.endpoints or os.environ.get("DTRAIN_ENDPOINTS_FILE"):
        return _look_up(_split(settings.endpoints), settings.cluster or "default", settings.etcd_flags())
    name = settings.cluster or current
    if not name:
        return ()
    if name not in known:
        raise NotFound(
            ErrorCode.NOT_FOUND,
            f"no cluster {name!r} is known here",
            cause=f"{path()} knows {', '.join(known) or 'none'}",
            fix="give --coordinators HOST:PORT,... or --endpoints URL,...",
        )
    if not known[name].alive:
        if not settings.cluster:
            return ()
        raise Unavailable(
            ErrorCode.COORDINATOR_UNAVAILABLE,
            f"the local cluster {name} runs no more",
            fix=f"start it again: dtrain up --name {name}",
        )
    return known[name].coordinators


def local_cluster(settings: Settings) -> Known | None:
    """Return the local cluster that is meant; None: another one is, or none runs."""
    if settings.coordinators or settings.endpoints or os.environ.get("DTRAIN_ENDPOINTS_FILE"):
        return None
    name, known = load()
    entry = known.get(settings.cluster or name)
    return entry if entry is not None and entry.alive else None


def connect(settings: Settings) -> "Client":
    """Return a client of the cluster that is meant.

    Raises:
        Unavailable, NotFound: no cluster is configured, or see ``addresses``.
    """
    found = addresses(settings)
    if not found:
        raise Unavailable(
            ErrorCode.COORDINATOR_UNAVAILABLE,
            "no cluster is configured",
            cause="neither --coordinators nor --endpoints is given, and no local cluster runs",
            fix="start a local cluster (dtrain up), or set DTRAIN_COORDINATORS=host:port,...",
        )
    return client(settings, found, timeout_s=settings.timeout_s)


def client(settings: Settings, replicas: Sequence[str], *, timeout_s: float) -> "Client":
    """Return a client of ``replicas`` with the TLS files that are configured.

    Raises:
        Refused: BAD_SETTING; some of them are missing, or cannot be used.
    """
    from dtrain.cli.client import Client
    from dtrain.cli.output import say

    made = Client(replicas, timeout_s=timeout_s, tls=tls_of(settings))
    for problem in made.problems():
        say(f"warning: {problem}")
    return made


def tls_of(settings: Settings) -> TlsFiles | None:
    """Return the TLS files of the cluster that is meant: options and environment, then the context file.

    Raises:
        Refused: BAD_SETTING; some of them are missing, or cannot be read.
    """
    values = {setting.name: getattr(settings, setting.name.replace("-", "_")) for setting in TLS}
    if not any(values.values()) and not settings.coordinators and not settings.endpoints:
        current, known = load()
        entry = known.get(settings.cluster or current)
        if entry is not None:
            values = {setting.name: getattr(entry, setting.name.replace("-", "_")) for setting in TLS}
    return tls_files(values)


def _refuse_misspelt(environ: Mapping[str, str]) -> None:
    import difflib

    for name in environ:
        near = difflib.get_close_matches(name, _VARIABLES, n=1, cutoff=0.85) if name[:7] == "DTRAIN_" else []
        if near and name not in _VARIABLES:
            raise Refused(ErrorCode.BAD_SETTING, f"{name} is not a setting", fix=f"did you mean {near[0]}?")


def _split(text: str) -> tuple[str, ...]:
    parts = tuple(part.strip().removeprefix("http://") for part in text.split(",") if part.strip())
    return tuple(dict.fromkeys(parts))


def _look_up(endpoints: tuple[str, ...], cluster: str, flags: Sequence[str]) -> tuple[str, ...]:
    from dtrain.runtime.config import ETCD, etcd_options, parse
    from dtrain.storage.etcd.open import open_etcd
    from dtrain.storage.etcd.port import prefix_end

    prefix = f"{Keys(ClusterName(parse_name(cluster, 'cluster'))).root}coordinators/"
    options = etcd_options(parse("dtrain", "", ETCD, flags, os.environ))
    if endpoints:
        options = replace(options, endpoints=endpoints, endpoints_file="")
    etcd = open_etcd(options)
    try:
        found: Any = etcd.range(prefix, prefix_end(prefix), deadline_s=3.0)
    finally:
        with contextlib.suppress(Exception):
            etcd.close()
    replicas = []
    for item in found.items:
        with contextlib.suppress(ValueError, KeyError):
            replicas.append(str(json.loads(item.value)["address"]))
    if not replicas:
        raise Unavailable(
            ErrorCode.COORDINATOR_UNAVAILABLE,
            f"no coordinator of cluster {cluster} runs",
            cause=f"etcd has nothing under {prefix}",
            fix="check --cluster, or start one: dtrain coordinator",
        )
    return tuple(replicas)
