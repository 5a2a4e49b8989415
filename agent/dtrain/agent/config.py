"""Settings of an agent. Standard library only: the guardian reads them too."""

import math
import os
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dtrain.protocol.errors import ErrorCode, Refused
from dtrain.protocol.ids import AgentName, ClusterName, parse_name
from dtrain.runtime.addresses import bracketed, is_wildcard, towards
from dtrain.runtime.config import ETCD, EtcdOptions, Setting, etcd_options, parse, size, switch, words
from dtrain.runtime.serving import check_listen
from dtrain.runtime.tls import TLS, TlsFiles, tls_files

TTL_S_MIN, TTL_S_MIN_SHORT = 5, 2
LOG_KEEP_DAYS_MAX = 3650
LOG_COPY_BYTES_MAX = 8 * 1024 * 1024

SETTINGS = (
    Setting("cluster", "name of the cluster: everything lives under /dtrain/<cluster>/ in etcd", "default"),
    Setting("name", "name of this machine, unique in the cluster (default: from the host name)", ""),
    Setting("host", "address that other machines' ranks reach this one under (default: towards etcd)", ""),
    Setting("listen", "address to take commands on; port 0 picks a free one (default: HOST:0)", ""),
    Setting("advertise", "address that coordinators reach it under (default: the one listened on)", ""),
    Setting("health-listen", "address for probes and metrics, plain HTTP: host:port (default: none)", ""),
    Setting("slots", "ranks this machine can run at once (default: its GPUs, else 1)", None, int),
    Setting("data-dir", "journal, sockets and logs (default: ~/.local/state/dtrain/<cluster>/<name>)", ""),
    Setting(
        "cache-size",
        "room for copies of checkpoints in the data directory, such as 200GB; 0: none are kept",
        0,
        size,
    ),
    Setting(
        "package-cache-size",
        "room for the archives of packed working directories in the data directory; 0: none are kept",
        2_000_000_000,
        size,
    ),
    Setting("ttl", "seconds that a silent agent is trusted; 5 is the fast profile", 10, int),
    Setting("allow-short-ttl", "tests only: a TTL below 5 seconds", False, switch),
    Setting("orphan-grace", "seconds that ranks live on without an agent", 600.0, float),
    Setting("report-interval", "seconds between reports of mere progress, at least", 2.0, float),
    Setting(
        "drain-grace",
        "seconds that a stopped agent waits for its jobs to be saved and moved elsewhere; 0: it ends at once",
        60.0,
        float,
    ),
    Setting(
        "preemption-notice",
        "what says that this machine is about to be taken away, comma-separated or repeated: a path that "
        "appears, aws, gcp, azure, a URL (URL#REGEX: whose answer fits), or an entry point",
        (),
        words,
        repeat=True,
    ),
    Setting("preemption-interval", "seconds between two looks for such a notice", 2.0, float),
    Setting(
        "accept-restored-etcd",
        "obey the leader of an etcd that was restored without raising its revisions: forget the newest term",
        False,
        switch,
    ),
    Setting("keep-ranks", "leave the ranks running when the agent is stopped", False, switch),
    Setting(
        "stop-grace", "seconds between SIGTERM and SIGKILL for ranks when the agent is stopped", 15.0, float
    ),
    Setting(
        "log-copy-interval",
        "seconds between copies of what ranks wrote to the store: a lost machine takes so much with it",
        15.0,
        float,
    ),
    Setting(
        "log-copy-size",
        "what is kept in the store of each rank's stdout and stderr, its beginning and its end; 0: nothing",
        5 * 1024 * 1024,
        size,
    ),
    Setting(
        "log-keep",
        "days for which logs stay on this machine after their attempt, once the store has them; four times "
        "as long without a copy; 0: for ever",
        7.0,
        float,
    ),
    Setting(
        "log-size",
        "room for logs on this machine, such as 50GB: beyond it the oldest of attempts that are over go, "
        "those first that the store has; 0: no limit",
        0,
        size,
    ),
    Setting("log-json", "one JSON object per line (default: unless stderr is a terminal)", None, switch),
    *TLS,
    *ETCD,
)


@dataclass(frozen=True, slots=True)
class Config:
    """What one agent needs to know. Times in seconds."""

    cluster: ClusterName
    name: AgentName
    host: str
    listen: str
    advertise: str
    slots: int
    gpus: int
    data_dir: Path
    ttl_s: int
    allow_short_ttl: bool
    orphan_grace_s: float
    report_interval_s: float
    drain_grace_s: float
    """How long it waits, once told to stop, for its jobs to move; 0: not at all."""
    keep_ranks: bool
    stop_grace_s: float
    log_json: bool | None
    etcd: EtcdOptions
    tls: TlsFiles | None = None
    health_listen: str = ""
    accept_restored_etcd: bool = False
    preemption_notices: tuple[str, ...] = ()
    """Sources of notices, unparsed: the guardian has no use for them."""
    preemption_interval_s: float = 2.0
    notice_grace_s: float = 0.0
    """If a notice does not say when it ends. Also ranks that a stop leaves alone go with their machine."""
    package_cache_bytes: int = 0
    """Archives of packed working directories kept here, for jobs of the same content: at most so much."""
    cache_bytes: int = 0
    """Copies of checkpoints kept here, so that a restart need not read the store: at most so much."""
    log_copy_interval_s: float = 15.0
    log_copy_bytes: int = 5 * 1024 * 1024
    """Of each log in the store, its beginning and its end; 0: logs stay on the machine."""
    log_keep_days: float = 7.0
    """For so long are logs kept here that the store has too; 0: for ever."""
    log_bytes_max: int = 0
    """Room for all logs here; 0: no limit."""

    def __post_init__(self) -> None:
        least = TTL_S_MIN_SHORT if self.allow_short_ttl else TTL_S_MIN
        if self.ttl_s < least:
            raise _bad(
                f"a TTL of {self.ttl_s} s leaves no time to renew it",
                f"use {least} s or more; 10 rides out an election of etcd's",
            )
        if self.slots < 1:
            raise _bad(f"--slots cannot be {self.slots}", "use 1 or more")
        if self.orphan_grace_s < self.ttl_s:
            # A crashed agent needs a moment to come back, or its ranks die for nothing.
            raise _bad(f"--orphan-grace cannot be {self.orphan_grace_s} s", "use at least the TTL")
        if self.report_interval_s < 0 or self.stop_grace_s < 0:
            raise _bad("--report-interval and --stop-grace cannot be negative", "use 0 or more seconds")
        if not 0 <= self.drain_grace_s < math.inf:
            raise _bad(f"--drain-grace cannot be {self.drain_grace_s}", "use 0 or more seconds")
        if not 0.1 <= self.preemption_interval_s <= 60:
            raise _bad(
                f"--preemption-interval cannot be {self.preemption_interval_s} s",
                "use 0.1 to 60: some clouds give half a minute",
            )
        if not 0.2 <= self.log_copy_interval_s <= 3600:
            raise _bad(
                f"--log-copy-interval cannot be {self.log_copy_interval_s} s",
                "use 0.2 to 3600; --log-copy-size 0 turns copies off",
            )
        if not 0 <= self.log_keep_days <= LOG_KEEP_DAYS_MAX:
            raise _bad(
                f"--log-keep cannot be {self.log_keep_days} days", f"use 0 (for ever) to {LOG_KEEP_DAYS_MAX}"
            )
        if not 0 <= self.log_copy_bytes <= LOG_COPY_BYTES_MAX:
            raise _bad(
                f"--log-copy-size cannot be {self.log_copy_bytes} bytes",
                f"use 0 to {LOG_COPY_BYTES_MAX // 2**20}MiB: it is held in memory while it is copied",
            )
        for setting, address in (("listen", self.listen), ("advertise", self.advertise)):
            host, _, port = address.rpartition(":")
            if address and not (host and port.isdecimal() and int(port) < 65536):
                raise _bad(f"--{setting} cannot be {address!r}", "use host:port")
        check_listen(self.health_listen)

    def advertised(self, port: int) -> str:
        """Return the address for the node record, given the port that was bound."""
        return self.advertise or f"{bracketed(self.host)}:{port}"


def load(argv: Sequence[str], environ: Mapping[str, str]) -> Config:
    """Read the settings.

    Raises:
        Refused: BAD_SETTING or BAD_NAME.
        SystemExit: ``--help``, or an unknown flag.
    """
    values = parse("dtrain agent", "The agent of one machine.", SETTINGS, argv, environ)
    cluster = ClusterName(parse_name(values["cluster"], "cluster"))
    name = AgentName(parse_name(values["name"] or _from_host(), "machine"))
    etcd = etcd_options(values)
    listens_at = "" if is_wildcard(values["listen"]) else values["listen"].rpartition(":")[0].strip("[]")
    host = values["host"] or listens_at or towards(etcd.endpoints, "--host")
    gpus = count_gpus(environ, Path("/dev"))
    slots = values["slots"] if values["slots"] is not None else max(1, gpus)
    data_dir = values["data-dir"] or str(_state_home(environ) / "dtrain" / cluster / name)
    return Config(
        cluster=cluster,
        name=name,
        host=host,
        listen=values["listen"] or f"{bracketed(host)}:0",
        advertise=values["advertise"],
        slots=slots,
        gpus=gpus,
        data_dir=Path(os.path.abspath(data_dir)),  # noqa: PTH100 - links must stay: the path names the folder
        ttl_s=values["ttl"],
        allow_short_ttl=values["allow-short-ttl"],
        orphan_grace_s=values["orphan-grace"],
        report_interval_s=values["report-interval"],
        # Ranks that are to stay need not move.
        drain_grace_s=0.0 if values["keep-ranks"] else values["drain-grace"],
        keep_ranks=values["keep-ranks"],
        stop_grace_s=values["stop-grace"],
        log_json=values["log-json"],
        etcd=etcd,
        tls=tls_files(values),
        health_listen=values["health-listen"],
        accept_restored_etcd=values["accept-restored-etcd"],
        preemption_notices=values["preemption-notice"],
        preemption_interval_s=values["preemption-interval"],
        notice_grace_s=values["drain-grace"],
        cache_bytes=values["cache-size"],
        package_cache_bytes=values["package-cache-size"],
        log_copy_interval_s=values["log-copy-interval"],
        log_copy_bytes=values["log-copy-size"],
        log_keep_days=values["log-keep"],
        log_bytes_max=values["log-size"],
    )


def count_gpus(environ: Mapping[str, str], devices: Path) -> int:
    """Return how many NVIDIA GPUs ranks may use here, without asking a driver library."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([part for part in visible.split(",") if part.strip() not in ("", "-1")])
    try:
        # In a container these are the ones it was given; /proc/driver lists the host's.
        names = os.listdir(devices)  # noqa: PTH208
    except OSError:
        return 0
    return sum(1 for name in names if re.fullmatch(r"nvidia\d+", name))


def _state_home(environ: Mapping[str, str]) -> Path:
    home = environ.get("XDG_STATE_HOME")
    return Path(home) if home else Path.home() / ".local" / "state"


def _from_host() -> str:
    name = socket.gethostname().split(".")[0].lower()
    return "".join(c if c.isascii() and c.isalnum() else "-" for c in name)[:63].strip("-") or "agent"


def _bad(message: str, fix: str) -> Refused:
    return Refused(ErrorCode.BAD_SETTING, message, fix=fix)
