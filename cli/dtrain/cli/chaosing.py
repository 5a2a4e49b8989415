"""What ``dtrain chaos`` puts together: etcd, the mark, a breaker, an auditor, and the run itself."""

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dtrain.cli import meant as cluster_meant
from dtrain.cli.foreground import Foreground
from dtrain.cli.globals import Settings
from dtrain.local import marks
from dtrain.local.breaker import FillingBreaker
from dtrain.local.chaos import Chaos
from dtrain.local.chaos_plan import Settings as ChaosSettings
from dtrain.local.chaos_report import Report
from dtrain.local.fault_port import RemoteBreaker
from dtrain.local.faults import Breaker
from dtrain.local.filling import Filling
from dtrain.local.host_breaker import HostBreaker
from dtrain.local.sight import Eyes
from dtrain.local.watchman import Watchman
from dtrain.protocol.cluster import TestMark
from dtrain.protocol.keys import Keys
from dtrain.runtime.config import ETCD, EtcdOptions, etcd_options, parse
from dtrain.storage.etcd.endpoints import Tls
from dtrain.storage.etcd.open import open_etcd

SEEN_S_MAX = 15.0
"""How long the auditor may lag behind before etcd's history is compacted under it."""


@dataclass(frozen=True, slots=True)
class Meant:
    """The cluster that is meant, and how its etcd is reached."""

    keys: Keys
    options: EtcdOptions


def find(chosen: Settings) -> Meant:
    """Return the cluster that is meant: flags, environment, then the context file.

    Raises:
        Unavailable: no etcd is configured; coordinators alone are not enough.
    """
    options = etcd_options(parse("dtrain chaos", "", ETCD, (), os.environ))
    cluster, options = cluster_meant.find(
        chosen,
        options,
        why="chaos watches a cluster through etcd, and no etcd is configured",
        fix="start a test cluster (dtrain up --test), or give --endpoints URL,... and --cluster NAME",
    )
    return Meant(Keys(cluster), options)


def run(meant: Meant, settings: ChaosSettings, say: Callable[[str], None]) -> Report:
    """Break the cluster, watch it recover, and say how it went; a signal heals what is broken and reports.

    Raises:
        Refused: it is no test cluster, or nothing of what was asked for is possible in it.
        Unavailable: it does not work to begin with.
    """
    etcd = open_etcd(meant.options)
    watchman = Watchman(lambda: open_etcd(meant.options), meant.keys)
    breaker: Breaker | None = None
    try:
        mark = marks.require(etcd, meant.keys)
        eyes = Eyes(etcd, meant.keys)
        filling = _filling(meant, watchman)
        if filling.is_filled():
            say("an earlier run left etcd full: freeing it first")
            filling.free()
        breaker = FillingBreaker(_breaker(mark, eyes), filling)
        chaos = Chaos(settings, eyes, breaker, members=_members(mark, meant), watchman=watchman, say=say)
        for why in chaos.refused:
            say(f"left out: {why}")
        interrupted = False
        with Foreground(breaker.close) as foreground:
            chaos.begin()
            try:
                chaos.storm()
            except foreground.Interrupted:
                interrupted = True
            finally:
                say("no more faults: everything is healed")
                chaos.calm()
        return chaos.report(interrupted=interrupted)
    finally:
        if breaker is not None:
            breaker.close()
        watchman.close()
        etcd.close()


def check(meant: Meant) -> TestMark:
    """Return the cluster's mark.

    Raises:
        Refused: it is no test cluster.
    """
    etcd = open_etcd(meant.options)
    try:
        return marks.require(etcd, meant.keys)
    finally:
        etcd.close()


def mark(meant: Meant) -> None:
    """Say that this cluster may be broken on purpose.

    Raises:
        Conflict: it has unfinished jobs, or is marked already.
    """
    etcd = open_etcd(meant.options)
    try:
        marks.add(etcd, meant.keys, marks.make())
    finally:
        etcd.close()


def unmark(meant: Meant) -> bool:
    """Take that back; False if there was no mark."""
    etcd = open_etcd(meant.options)
    try:
        filling = _filling(meant, None)
        if filling.is_filled():
            filling.free()
        return marks.remove(etcd, meant.keys)
    finally:
        etcd.close()


def _filling(meant: Meant, watchman: Watchman | None) -> Filling:
    options = meant.options

    def seen(revision: int) -> int:
        if watchman is None or watchman.await_revision(revision, SEEN_S_MAX):
            return revision
        return watchman.reached

    return Filling(
        options.endpoints,
        meant.keys,
        compact_up_to=seen,
        tls=Tls(options.cacert or None, options.cert or None, options.key or None),
        user=options.user,
        password=options.password,
    )


def _is_here(mark: TestMark) -> bool:
    return bool(mark.faults) and mark.boot_id == marks.boot_id() and Path(mark.faults).exists()


def _breaker(mark: TestMark, eyes: Eyes) -> Breaker:
    if _is_here(mark):
        return RemoteBreaker(mark.faults)
    return HostBreaker(eyes.look, hostname=socket.gethostname())


def _members(mark: TestMark, meant: Meant) -> list[str]:
    if _is_here(mark):
        return [f"etcd-{index}" for index in range(len(meant.options.endpoints))]
    return ["etcd"]
