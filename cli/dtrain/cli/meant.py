"""Which cluster a verb means that reads etcd itself, and how that etcd is reached."""

from dataclasses import replace

from dtrain.cli import context
from dtrain.cli.globals import Settings
from dtrain.protocol.errors import ErrorCode, Unavailable
from dtrain.protocol.ids import ClusterName, parse_name
from dtrain.runtime.config import EtcdOptions


def find(chosen: Settings, options: EtcdOptions, *, why: str, fix: str) -> tuple[ClusterName, EtcdOptions]:
    """Return the cluster that is meant: flags, environment, then the context file.

    ``why`` and ``fix``: what to say where no etcd is configured.

    Raises:
        Unavailable: none is; coordinators alone are not enough.
    """
    endpoints = tuple(part.strip() for part in chosen.endpoints.split(",") if part.strip())
    name = chosen.cluster
    if not endpoints and options.endpoints_file:
        endpoints = options.endpoints
    if not endpoints:
        current, known = context.load()
        entry = known.get(name or current)
        if entry is None or not entry.endpoints or not entry.alive:
            raise Unavailable(ErrorCode.COORDINATOR_UNAVAILABLE, why, fix=fix)
        endpoints, name = entry.endpoints, name or current
    return ClusterName(parse_name(name or "default", "cluster")), replace(options, endpoints=endpoints)
