"""What the verbs of ``dtrain checkpoints`` do: look, ask the leader, read the store."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dtrain.cli import output, pinning, reading, waiting
from dtrain.cli.client import Client
from dtrain.cli.identity import new_id, whoami
from dtrain.cli.localstore import open_here
from dtrain.cli.progress import Progress
from dtrain.cli.records import Job
from dtrain.cli.render import checkpoints
from dtrain.cli.render.table import When
from dtrain.protocol.checkpoint import CommitRecord, Manifest
from dtrain.protocol.errors import Conflict, ErrorCode, NotFound, Refused
from dtrain.storage.blobs.port import BlobStore
from dtrain.storage.checkpoints import reading as stored
from dtrain.storage.checkpoints import verifying


def listing(client: Client, wanted: str, output_format: str, *, iso: bool = False) -> None:
    """Show a job's checkpoints."""
    found, cluster = reading.job(client, wanted)
    lines = checkpoints.checkpoint_lines(found)
    output.listing(
        "Checkpoint",
        [document(found, line) for line in lines],
        checkpoints.checkpoints(found, When(time.time(), iso), wide=output_format == "wide"),
        [f"{found.name}/{line.seq}" for line in lines],
        output=output_format,
        revision=cluster.revision,
    )
    output.freshness(cluster.age_s)


def document(job: Job, line: checkpoints.CheckpointLine) -> dict[str, Any]:
    """One checkpoint with the records behind it."""
    seq = str(line.seq)
    folder = {"Committed": "checkpoints", "Bad": "checkpoints", "Open": "open", "Deleting": "garbage"}
    found: dict[str, Any] = {
        "v": 1,
        "kind": "Checkpoint",
        "job": job.name,
        "seq": line.seq,
        "step": line.step,
        "attempt": line.attempt,
        "world_size": line.world_size,
        "bytes": line.bytes,
        "state": line.state,
        "latest": line.latest,
        "pinned": line.pinned,
        "record": job.raw.get(folder[line.state], {}).get(seq),
        "pins": [pin for place, pin in job.raw.get("pins", {}).items() if place.partition("/")[0] == seq],
    }
    for name in ("verified", "bad"):
        if seq in job.raw.get(name, {}):
            found[name] = job.raw[name][seq]
    return found


@contextmanager
def opened(uri: str) -> Iterator[BlobStore]:
    """The store of a job, as this machine reaches it.

    Raises:
        NotFound: the job has none.
        Refused: it cannot be opened here.
    """
    if not uri:
        raise NotFound(ErrorCode.NOT_FOUND, "the job has no store, so it has no checkpoints")
    try:
        store = open_here(uri)
    except Refused as error:
        raise Refused(
            error.code,
            error.message,
            fix="checkpoints are read from here: run this where the store is reached, or give --store URI",
        ) from error
    try:
        yield store
    finally:
        store.close()


@dataclass(frozen=True, slots=True)
class Verified:
    """What reading one checkpoint whole found."""

    seq: int
    record: CommitRecord
    report: verifying.Report
    quarantined: str = ""
    """What the leader made of it, "" if it was not asked or there was nothing to tell."""

    def as_json(self, job: str) -> dict[str, Any]:
        """The result for programs."""
        return {
            "v": 1,
            "kind": "CheckpointVerification",
            "job": job,
            "seq": self.seq,
            "step": self.record.step,
            "ok": not self.report.damages,
            "bytes": self.report.bytes,
            "blobs": self.report.blobs,
            "damages": [
                {
                    "blob": damage.blob,
                    "rank": damage.rank,
                    "chunk": damage.chunk,
                    "expected": damage.expected,
                    "found": damage.found,
                    "tensors": list(damage.tensors),
                }
                for damage in self.report.damages
            ],
            "quarantine": self.quarantined,
        }


def verify(
    client: Client, name: str, seq: int, *, store_uri: str, report: bool, timeout_s: float
) -> Verified:
    """Read one checkpoint whole; have the leader look at what is damaged, and put it aside.

    Raises:
        NotFound: there is no such checkpoint.
        Unavailable, Refused: the store does not answer, or will not.
    """
    with pinning.held(client, name, seq, "verify") as hold:
        pinned = hold.pinned
        record = pinned.record
        with opened(store_uri or pinned.store) as store, Progress(f"checkpoint {record.seq}") as progress:
            found = verifying.verify(store, record.manifest, record.digest, on_progress=progress)
        told = ""
        if found.damages and record.seq not in reading.one(client, name)[0].commits:
            # The pin was lost, to an etcd that was away for long, say, and retention went on.
            raise Conflict(
                ErrorCode.CONFLICT,
                f"checkpoint {record.seq} of {name} was deleted while it was read",
                cause=hold.lost,
                fix=f"dtrain checkpoints list {name}",
            )
        if found.damages and report:
            damage = found.damages[0]
            order = client.report_damage(
                name, record.seq, damage.blob, damage.chunk, request_id=new_id(), by=whoami()
            )
            job = await_order(client, name, order, "the leader's own look at it", timeout_s)
            told = "quarantined" if record.seq in job.bad else "not confirmed by the leader"
    return Verified(int(record.seq), record, found, told)


def await_order(client: Client, name: str, order: str, what: str, timeout_s: float) -> Job:
    """Wait until the leader has answered a request; return the job's records then.

    Raises:
        TimedOut: it has not, within ``timeout_s``.
    """
    return waiting.until(client, name, lambda job: order not in job.orders, what=what, timeout_s=timeout_s)


def delete(client: Client, name: str, seq: int, *, timeout_s: float | None) -> bool:
    """Have a checkpoint deleted; True once it is, False if that was only asked for.

    Raises:
        NotFound, Conflict: there is none, or it must stay; the message says why.
    """
    order = client.delete_checkpoint(name, seq, request_id=new_id(), by=whoami())
    if timeout_s is None:
        return False
    job = await_order(client, name, order, "the deletion", timeout_s)
    if seq in job.commits:
        reasons = [
            event.message
            for _, event in sorted(job.events.items())
            if event.object == f"checkpoint/{seq}" and event.reason == "UserRequested"
        ]
        raise Conflict(
            ErrorCode.CONFLICT,
            reasons[-1] if reasons else f"checkpoint {seq} of {name} is not deleted",
            fix=f"dtrain checkpoints list {name}",
        )
    return True


def collect(client: Client, name: str, timeout_s: float) -> str:
    """Have the store searched for orphans now; return what came of it.

    Raises:
        TimedOut: not within ``timeout_s``.
    """
    order = client.collect_garbage(name, request_id=new_id(), by=whoami())
    job = await_order(client, name, order, "the search for orphans", timeout_s)
    told = [event.message for _, event in sorted(job.events.items()) if event.reason == "GarbageCollected"]
    return told[-1] if told else "the store was searched"


def manifest_of(store: BlobStore, record: CommitRecord) -> Manifest:
    """The manifest behind a commit record.

    Raises:
        DamageFound: it is not the one that was committed.
    """
    return stored.read_manifest(store, record.manifest, record.digest)
