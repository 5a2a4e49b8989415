"""Settings of a coordinator. Standard library only: the guardian reads them too."""

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dtrain.coordinator.api.validate import holds_credentials
from dtrain.coordinator.web.settings import DASHBOARD, DashboardSettings, dashboard_settings
from dtrain.coordinator.webhooks.settings import WEBHOOKS, Webhook, load_webhooks
from dtrain.protocol.errors import ErrorCode, Refused
from dtrain.protocol.ids import ClusterName, ReplicaId, parse_name
from dtrain.runtime.addresses import bracketed, is_wildcard, towards
from dtrain.runtime.config import ETCD, EtcdOptions, Setting, etcd_options, parse, switch
from dtrain.runtime.serving import check_listen
from dtrain.runtime.tls import TLS, TlsFiles, tls_files

TTL_S_MIN, TTL_S_MIN_SHORT = 5, 2

CORDON_S = 7200.0
"""Long enough for somebody to look, short enough that a machine that was blamed wrongly is not lost."""

SETTINGS = (
    Setting("cluster", "name of the cluster: everything lives under /dtrain/<cluster>/ in etcd", "default"),
    Setting("id", "name of this replica, unique in the cluster (default: from the host name)", ""),
    Setting("listen", "address to serve the API on; port 0 picks a free one", "127.0.0.1:7070"),
    Setting("advertise", "address that clients reach it under (default: the one listened on)", ""),
    Setting("health-listen", "address for probes and metrics, plain HTTP: host:port (default: none)", ""),
    Setting("ttl", "seconds that a silent leader is trusted; 5 is the fast profile", 10, int),
    Setting("allow-short-ttl", "tests only: a TTL below 5 seconds", False, switch),
    Setting("default-store", "where jobs that name no store keep their checkpoints", ""),
    Setting(
        "scrub-interval",
        "seconds after which a committed checkpoint is read again in the background; 0: never",
        86_400.0,
        float,
    ),
    Setting("scrub-mb-s", "MB per second that this reads at most; 0: no bound", 50.0, float),
    Setting(
        "cordon-for",
        "seconds that a machine gets no new ranks after attempts of jobs kept ending because of it; 0: never",
        CORDON_S,
        float,
    ),
    Setting(
        "archive-keep",
        "days that records and logs of jobs that have ended are kept in the store; 0: for ever",
        90.0,
        float,
    ),
    Setting("log-json", "one JSON object per line (default: unless stderr is a terminal)", None, switch),
    *DASHBOARD,
    *WEBHOOKS,
    *TLS,
    *ETCD,
)


@dataclass(frozen=True, slots=True)
class Config:
    """What one replica needs to know.

    ``ttl_s`` is also what agents' leases are taken to last: the fleet uses one profile.
    """

    cluster: ClusterName
    replica: ReplicaId
    listen: str
    advertise: str
    ttl_s: int
    allow_short_ttl: bool
    default_store: str
    log_json: bool | None
    etcd: EtcdOptions
    tls: TlsFiles | None = None
    health_listen: str = ""
    scrub_interval_s: float = 0.0
    scrub_mb_s: float = 0.0
    host: str = ""
    """What to advertise before the port where ``listen`` means every address; "": what ``listen`` says."""
    cordon_s: float = 0.0
    dashboard: DashboardSettings | None = None
    webhooks: tuple[Webhook, ...] = ()
    archive_keep_days: float = 90.0

    def __post_init__(self) -> None:
        least = TTL_S_MIN_SHORT if self.allow_short_ttl else TTL_S_MIN
        if self.ttl_s < least:
            raise Refused(
                ErrorCode.BAD_SETTING,
                f"a TTL of {self.ttl_s} s leaves no time to renew it",
                fix=f"use {least} s or more; 10 rides out an election of etcd's",
            )
        if holds_credentials(self.default_store):
            raise Refused(
                ErrorCode.BAD_SETTING,
                "--default-store holds credentials, and it is stored and shown",
                fix="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile, instead",
            )
        for setting, address in (("listen", self.listen), ("advertise", self.advertise)):
            host, _, port = address.rpartition(":")
            if address and not (host and port.isdecimal() and int(port) < 65536):
                raise Refused(
                    ErrorCode.BAD_SETTING, f"--{setting} cannot be {address!r}", fix="use host:port"
                )
        check_listen(self.health_listen)
        for setting, number in (
            ("scrub-interval", self.scrub_interval_s),
            ("scrub-mb-s", self.scrub_mb_s),
            ("cordon-for", self.cordon_s),
            ("archive-keep", self.archive_keep_days),
        ):
            if not 0 <= number < 1e9:
                raise Refused(ErrorCode.BAD_SETTING, f"--{setting} cannot be {number}", fix="use 0 or more")

    def dashboard_url(self, bound: str) -> str:
        """Return where browsers find the dashboard, given the host:port of the API; "": there is none."""
        host = self.advertised(bound).rpartition(":")[0].strip("[]")
        return self.dashboard.url(host) if self.dashboard is not None else ""

    def advertised(self, bound: str) -> str:
        """Return the address for the records, given the host:port that was bound."""
        if self.advertise or not self.host:
            return self.advertise or bound
        return f"{bracketed(self.host)}:{bound.rpartition(':')[2]}"


def load(argv: Sequence[str], environ: Mapping[str, str]) -> Config:
    """Read the settings.

    Raises:
        Refused: BAD_SETTING or BAD_NAME.
        SystemExit: ``--help``, or an unknown flag.
    """
    values = parse("dtrain coordinator", "One replica of the coordinator.", SETTINGS, argv, environ)
    etcd = etcd_options(values)
    tls = tls_files(values)
    return Config(
        ClusterName(parse_name(values["cluster"], "cluster")),
        ReplicaId(parse_name(values["id"] or _from_host(), "replica")),
        values["listen"],
        values["advertise"],
        values["ttl"],
        values["allow-short-ttl"],
        values["default-store"],
        values["log-json"],
        etcd,
        tls,
        values["health-listen"],
        values["scrub-interval"],
        values["scrub-mb-s"],
        # Nobody can call 0.0.0.0.
        towards(etcd.endpoints, "--advertise")
        if is_wildcard(values["listen"]) and values["listen"] and not values["advertise"]
        else "",
        values["cordon-for"],
        dashboard_settings(values, secured=tls is not None),
        load_webhooks(values["webhook-file"]),
        values["archive-keep"],
    )


def _from_host() -> str:
    name = socket.gethostname().split(".")[0].lower()
    return "".join(c if c.isascii() and c.isalnum() else "-" for c in name)[:63].strip("-") or "coordinator"
