"""Which clusters may be broken on purpose: those with a mark in etcd, and no others.

A cluster made for faults writes its own mark when it starts. Any other can be
marked by hand while it has no unfinished job, since whoever submitted one did
not agree to have it broken. There is no way around the mark (docs/adr/0010).
"""

import getpass
import os
import socket
import time
from pathlib import Path

from dtrain.protocol import codec
from dtrain.protocol.cluster import TestMark
from dtrain.protocol.errors import Conflict, ErrorCode, Refused
from dtrain.protocol.ids import JobName
from dtrain.protocol.job import TERMINAL_PHASES, JobStatus
from dtrain.protocol.keys import Keys
from dtrain.runtime.clock import iso
from dtrain.storage.etcd.port import Compare, Delete, Etcd, Put, Relation, Target, Txn, prefix_end


def boot_id() -> str:
    """The kernel's id of this boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def make(*, pid: int = 0, faults: str = "") -> TestMark:
    """Return a mark of this user and machine; see the record for ``pid`` and ``faults``."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = str(os.getuid())
    host = socket.gethostname()
    return TestMark(f"{user}@{host}", iso(time.time()), host, boot_id(), pid, faults)


def find(etcd: Etcd, keys: Keys) -> TestMark | None:
    """Return the cluster's mark, None if it has none."""
    found = etcd.range(keys.test).items
    return codec.decode(TestMark, found[0].value) if found else None


def require(etcd: Etcd, keys: Keys) -> TestMark:
    """Return the cluster's mark.

    Raises:
        Refused: it has none, so nobody said that it may be broken.
    """
    mark = find(etcd, keys)
    if mark is None:
        raise Refused(
            ErrorCode.NOT_A_TEST_CLUSTER,
            f"cluster {keys.cluster} is not marked as a test cluster, so nothing in it is broken on purpose",
            fix="start one with 'dtrain up --test', or mark this one while it is idle: dtrain chaos --mark",
        )
    return mark


def put(etcd: Etcd, keys: Keys, mark: TestMark) -> None:
    """Write the mark, whatever there is: for who starts a cluster."""
    etcd.txn(Txn((), (Put(keys.test, codec.encode(mark)),)))


def remove(etcd: Etcd, keys: Keys) -> bool:
    """Take the mark away; False if there was none."""
    there = Compare(keys.test, Target.CREATE, 0, Relation.GREATER)
    return etcd.txn(Txn((there,), (Delete(keys.test),))).succeeded


def add(etcd: Etcd, keys: Keys, mark: TestMark) -> None:
    """Mark a cluster that runs, if it is idle.

    Raises:
        Conflict: a job is not finished, or was submitted just now, or the cluster is marked already.
    """
    found = etcd.range(keys.jobs, prefix_end(keys.jobs))
    busy = sorted(unfinished({item.key: item.value for item in found.items}, keys))
    if busy:
        raise Conflict(
            ErrorCode.CONFLICT,
            f"cluster {keys.cluster} has unfinished jobs: {', '.join(busy[:5])}",
            cause="who submitted them did not agree to have them broken",
            fix="wait for their end or cancel them, then mark it",
        )
    # A job submitted since then changes a key below: the mark must lose that race.
    still_idle = Compare(
        keys.jobs, Target.MOD, found.revision + 1, Relation.LESS, range_end=prefix_end(keys.jobs)
    )
    unmarked = Compare(keys.test, Target.CREATE, 0)
    done = etcd.txn(Txn((still_idle, unmarked), (Put(keys.test, codec.encode(mark)),)))
    if not done.succeeded:
        raise Conflict(
            ErrorCode.CONFLICT,
            f"cluster {keys.cluster} was not marked: it is marked already, or a job was submitted meanwhile",
            fix="dtrain chaos --dry-run shows whether it is marked",
        )


def unfinished(records: dict[str, bytes], keys: Keys) -> set[JobName]:
    """Names of jobs with a specification and no end, by the records below ``jobs/``."""
    specs: set[JobName] = set()
    ended: dict[JobName, JobStatus] = {}
    uids: dict[JobName, str] = {}
    for key, value in records.items():
        parsed = keys.parse(key)
        if parsed is None:
            continue
        if parsed.kind == "spec":
            specs.add(parsed.job)
            uids[parsed.job] = str(codec.loads(value).get("uid", ""))
        elif parsed.kind == "status":
            ended[parsed.job] = codec.decode(JobStatus, value)
    return {
        job
        for job in specs
        if job not in ended or ended[job].uid != uids[job] or ended[job].phase not in TERMINAL_PHASES
    }
