"""Which checks there are for what was asked and what is configured."""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from dtrain.cli import context, meant
from dtrain.cli.client import Client, closing
from dtrain.cli.doctor import cluster, etcd, job, machine, store
from dtrain.cli.doctor.findings import Check, skipped
from dtrain.cli.globals import Settings
from dtrain.protocol.errors import DtrainError, NotFound, Unavailable
from dtrain.runtime.config import ETCD, etcd_options, parse

NO_CLUSTER = "start one (dtrain up), or give --coordinators or --endpoints"
CALL_S = 3.0


def checks(
    settings: Settings,
    wanted: Sequence[str],
    *,
    store_uri: str,
    job_file: Path | None,
    data_dir: Path | None,
    ttl_s: float,
) -> list[Check]:
    """Return what to look at in the scopes ``wanted``, in the order in which things depend on each other.

    Raises:
        Refused: a setting cannot be used.
        NotFound: the cluster that is named is not known.
    """
    found: list[Check] = []
    if "etcd" in wanted:
        found += _etcd(settings, ttl_s)
    addresses: tuple[str, ...] = ()
    why = "no cluster is configured"
    try:
        addresses = context.addresses(settings)
    except NotFound:
        raise
    except DtrainError as error:
        why = error.message

    def connect() -> Client:
        return context.client(settings, addresses, timeout_s=CALL_S)

    for scope in ("coordinators", "agents"):
        if scope in wanted:
            found += (
                [check for check in cluster.checks(connect) if check.scope == scope]
                if addresses
                else [_absent(scope, why)]
            )
    if "store" in wanted:
        uri = store_uri or (_default_store(connect) if addresses else "")
        found += store.checks(uri) if uri else [_absent("store", "no store is named", "give --store URI")]
    preload: Sequence[str] = ()
    if job_file is not None and "job" in wanted:
        looks, spec = job.checks(job_file, (lambda: cluster.slots(connect)) if addresses else None)
        found += looks
        preload = spec.preload if spec is not None else ()
    if "machine" in wanted:
        name = settings.cluster or "default"
        found += machine.checks(data_dir or Path.home() / ".local/state/dtrain" / name, preload)
    return found


def _etcd(settings: Settings, ttl_s: float) -> list[Check]:
    options = etcd_options(parse("dtrain doctor", "", ETCD, settings.etcd_flags(), os.environ))
    try:
        name, options = meant.find(
            settings, options, why="no etcd is configured", fix="give --endpoints URL,..."
        )
    except Unavailable as error:
        return [_absent("etcd", error.message, error.fix)]
    return etcd.checks(name, options, ttl_s)


def _default_store(connect: "object") -> str:
    assert callable(connect)
    with contextlib.suppress(DtrainError), closing(connect()) as client:
        return str(client.info().store)
    return ""


def _absent(scope: str, why: str, fix: str = NO_CLUSTER) -> Check:
    return Check(scope, "configured", lambda: [skipped(why, fix)])
