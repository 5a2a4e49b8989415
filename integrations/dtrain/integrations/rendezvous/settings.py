"""What ``torchrun --rdzv-conf`` may say, and what holds if it says nothing.

torch's names are understood wherever they mean the same here. Access to etcd
comes from ``--rdzv-conf``, then ``DTRAIN_*``, then etcdctl's variables.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from dtrain.protocol.errors import DtrainError
from dtrain.runtime import config
from dtrain.runtime.config import EtcdOptions

PREFIX = "/dtrain-rdzv"
TTL_S = 10

LEASE_S_MIN = 2
"""etcd itself grants no shorter lease with its usual election timeout."""

ALIASES = {
    "ca_cert": "cacert",
    "ssl_cert": "cert",
    "ssl_cert_key": "key",
    "timeout": "join_timeout",
}
"""Names of torch's own etcd backends."""

IGNORED = frozenset({"is_host", "store_type", "read_timeout", "heartbeat_timeout"})
"""What torch's other backends take and nothing here corresponds to; it is no reason to fail."""

ACCESS = ("cacert", "cert", "key", "user", "password_file", "endpoints_file")


TLS = ("cacert", "cert")
TLS_VARIABLES = ("DTRAIN_CACERT", "DTRAIN_CERT", "ETCDCTL_CACERT", "ETCDCTL_CERT")
"""Whoever names one of them means https where an endpoint does not say it."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Times in seconds."""

    etcd: EtcdOptions
    prefix: str = PREFIX
    """Below which runs are kept; needed where a user's role covers another one."""
    ttl: int = TTL_S
    """Lease of a node: within this time its death is noticed. The state outlives the last node by as much."""
    keep_alive_interval: float = TTL_S / 3
    """Between renewals; at most half of ``ttl``, so that one may fail."""
    join_timeout: float = 600.0
    """How long an agent waits for a round. Standing by beyond ``max_nodes`` is not limited."""
    last_call_timeout: float = 30.0
    """How long a round with enough agents waits for more, up to the maximum."""
    close_timeout: float = 30.0
    """How long an agent that ends tries to say so to etcd."""
    connect_timeout: float = 5.0
    """Within this time etcd must answer at the start; later it may be away for any time."""
    store_timeout: float = 300.0
    """How long a call of an agent to another one's TCPStore may take."""


NUMBERS = (
    "keep_alive_interval",
    "join_timeout",
    "last_call_timeout",
    "close_timeout",
    "connect_timeout",
    "store_timeout",
)
OTHERS = ("ttl", "prefix", "protocol", "keep_alive_max_attempt")
KNOWN = frozenset({*NUMBERS, *OTHERS, *ACCESS, *ALIASES, *IGNORED})


def parse(endpoint: str, conf: Mapping[str, object], environ: Mapping[str, str]) -> Settings:
    """Return the settings of one agent.

    Raises:
        ValueError: one is unknown or wrong; the text says which and what to write.
    """
    for name in conf:
        if name not in KNOWN:
            near = difflib.get_close_matches(name, KNOWN, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(sorted(KNOWN))}"
            raise ValueError(f"--rdzv-conf: {name!r} is not a setting of this backend{hint}")
    given = {ALIASES.get(name, name): str(value) for name, value in conf.items()}
    numbers = {name: _seconds(name, given[name]) for name in NUMBERS if name in given}
    ttl = _ttl(given, numbers)
    interval = numbers.setdefault("keep_alive_interval", ttl / 3)
    if interval > ttl / 2:
        raise ValueError(
            f"--rdzv-conf: keep_alive_interval={interval:g} is more than half of ttl={ttl}: "
            "one late renewal would end the lease"
        )
    prefix = given.get("prefix", PREFIX)
    if not prefix.startswith("/") or not prefix.strip("/") or not prefix.isascii():
        raise ValueError(f"--rdzv-conf: prefix={prefix!r} must be a path such as {PREFIX}")
    return Settings(_etcd(endpoint, given, environ), prefix, ttl, **numbers)


def _ttl(given: Mapping[str, str], numbers: Mapping[str, float]) -> int:
    attempts = _seconds("keep_alive_max_attempt", given.get("keep_alive_max_attempt", "3"))
    text = given.get("ttl", "")
    if text:
        ttl = _seconds("ttl", text)
    elif "keep_alive_interval" in numbers:
        # torch's way to say the same: so many heartbeats may be missed.
        ttl = numbers["keep_alive_interval"] * max(2.0, attempts)
    else:
        return TTL_S
    if ttl < LEASE_S_MIN:
        raise ValueError(f"--rdzv-conf: ttl={ttl:g} is shorter than etcd's shortest lease, {LEASE_S_MIN} s")
    return round(ttl)


def _seconds(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < float("inf"):
        raise ValueError(f"--rdzv-conf: {name}={text!r} must be a positive number")
    return value


def _etcd(endpoint: str, given: Mapping[str, str], environ: Mapping[str, str]) -> EtcdOptions:
    protocol = given.get("protocol", "").lower()
    if protocol not in ("", "http", "https"):
        raise ValueError(f"--rdzv-conf: protocol={protocol!r} must be http or https")
    secure = any(name in given for name in TLS) or any(environ.get(name) for name in TLS_VARIABLES)
    scheme = protocol or ("https" if secure else "http")
    words = [f"--{name.replace('_', '-')}={given[name]}" for name in ACCESS if name in given]
    if endpoint.strip():
        members = [each if "://" in each else f"{scheme}://{each}" for each in config.words(endpoint)]
        words.append(f"--endpoints={','.join(members)}")
    try:
        return config.etcd_options(config.parse("torchrun", "", config.ETCD, words, environ))
    except DtrainError as error:
        raise ValueError(f"{error.message}; {error.fix}") from error
