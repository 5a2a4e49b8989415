"""The working directory of a job, packed here and put into the job's store before it is submitted."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from dtrain.cli import output
from dtrain.cli.answers import Submitted
from dtrain.cli.client import Client
from dtrain.cli.durations import show_bytes
from dtrain.cli.jobfile import Pack
from dtrain.cli.localstore import open_here
from dtrain.cli.progress import Progress
from dtrain.protocol import codec
from dtrain.protocol.errors import Conflict, ErrorCode, Refused
from dtrain.protocol.ids import ClusterName
from dtrain.protocol.job import EntryKind, JobSpec
from dtrain.protocol.package import Package
from dtrain.storage.blobs.port import BlobStore
from dtrain.storage.packages import depot, packing
from dtrain.storage.packages.packing import Archive, CannotPackError, Kind, Listing

TRIES_MAX = 3
LISTED_MAX = 200
"""Lines of a dry run; ``-o json`` has all."""


def submit(client: Client, spec: JobSpec, pack: Pack, request_id: str) -> Submitted:
    """Submit a job, with its working directory if it is to be packed.

    Raises:
        CannotPackError: see ``packing.look``.
        Refused: ALWAYS, and there is no store, or this machine cannot write to it.
        Conflict: another job has this name.
        Unavailable: the cluster or the store does not answer.
    """
    if pack is Pack.NEVER:
        return client.submit(codec.encode(spec), request_id)
    info = client.info()
    uri = spec.checkpoint.store or info.store
    if not uri:
        if pack is Pack.ALWAYS:
            raise Refused(
                ErrorCode.CANNOT_PACK,
                "there is no store to keep the packed working directory in",
                fix="name one in the job file (checkpoint: {store: URI}), or start coordinators with "
                "--default-store",
            )
        return _as_a_path(client, spec, request_id, "there is no store")
    with _archived(spec) as archive, _opened(uri) as store:
        place = _Place(store, uri, ClusterName(info.cluster))
        try:
            reply = _stored_and_submitted(client, spec, request_id, archive, place)
        except Conflict as error:
            if error.code is not ErrorCode.OLDER_RELEASE or pack is Pack.ALWAYS:
                raise
            return _as_a_path(client, spec, request_id, error.message)
    if b'"package"' not in reply.spec:
        output.say(
            "warning: the coordinator is of a release that knows no packed working directories: "
            f"the job starts in {spec.working_dir} of each machine"
        )
    return reply


def preview(spec: JobSpec, pack: Pack) -> Listing | None:
    """What would be packed; None: nothing.

    Raises:
        CannotPackError: see ``packing.look``.
    """
    return None if pack is Pack.NEVER else _looked_at(spec)


def show(listing: Listing) -> None:
    """Print what would be packed."""
    click.echo(
        f"{listing.root} would be packed: {len(listing.entries)} entries, {show_bytes(listing.size_bytes)}"
    )
    for entry in listing.entries[:LISTED_MAX]:
        size = "" if entry.kind is not Kind.FILE else show_bytes(entry.size_bytes)
        mark = {Kind.FOLDER: "/", Kind.LINK: f" -> {entry.target}"}.get(entry.kind, "")
        click.echo(f"  {size:>9}  {entry.path}{mark}{' *' if entry.executable else ''}")
    if len(listing.entries) > LISTED_MAX:
        click.echo(f"  and {len(listing.entries) - LISTED_MAX} more: -o json lists all")


def as_json(listing: Listing) -> dict[str, Any]:
    """The same for programs."""
    return {
        "source": str(listing.root),
        "files_bytes": listing.size_bytes,
        "entries": [
            {
                "path": entry.path,
                "kind": entry.kind.value,
                "size_bytes": entry.size_bytes,
                **({"executable": True} if entry.executable else {}),
                **({"target": entry.target} if entry.target else {}),
            }
            for entry in listing.entries
        ],
    }


def _as_a_path(client: Client, spec: JobSpec, request_id: str, why: str) -> Submitted:
    output.say(f"{why}: {spec.working_dir} is not packed, and must exist on every machine")
    return client.submit(codec.encode(spec), request_id)


# Steps --------------------------------------------------------------------------


def _looked_at(spec: JobSpec) -> Listing:
    listing = packing.look(Path(spec.working_dir))
    if spec.entry.kind is EntryKind.SCRIPT and not Path(spec.entry.target).is_absolute():
        wanted = Path(spec.entry.target).as_posix()
        names = {entry.path for entry in listing.entries}
        if ".." in Path(wanted).parts or wanted not in names:
            raise CannotPackError(
                f"the script {spec.entry.target} is not among what is packed of {listing.root}",
                (),
                "see which .gitignore or .dtrainignore leaves it out (a line '!name' in .dtrainignore keeps "
                "it), or give the folder that it lies in",
            )
    return listing


@contextlib.contextmanager
def _archived(spec: JobSpec) -> Iterator[Archive]:
    listing = _looked_at(spec)
    with tempfile.TemporaryDirectory(prefix="dtrain-pack-") as folder:
        with Progress(f"packing {listing.root}") as progress:
            archive = packing.pack(listing, Path(folder) / "package.tar.gz", progress)
        yield archive


@contextlib.contextmanager
def _opened(uri: str) -> Iterator[BlobStore]:
    try:
        store = open_here(uri)
    except Refused as error:
        raise Refused(
            error.code,
            error.message,
            fix="the working directory is stored from here: submit where the store can be written, or set "
            "pack: false to run from a folder that all machines have",
        ) from error
    try:
        yield store
    finally:
        store.close()


@dataclasses.dataclass(frozen=True, slots=True)
class _Place:
    """Where a package goes; ``uri``: as the cluster calls the store."""

    store: BlobStore
    uri: str
    cluster: ClusterName


def _stored_and_submitted(
    client: Client, spec: JobSpec, request_id: str, archive: Archive, place: _Place
) -> Submitted:
    store, cluster = place.store, place.cluster
    nonce = depot.find(store, cluster, archive)
    entries, size = len(archive.listing.entries), show_bytes(archive.size_bytes)
    for tries in range(1, TRIES_MAX + 1):
        known = nonce is not None
        if nonce is None:
            with Progress("storing the working directory") as progress:
                nonce = depot.put(store, cluster, archive, progress)
        package = Package(
            digest=archive.digest,
            nonce=nonce,
            store=place.uri,
            size_bytes=archive.size_bytes,
            files=entries,
            files_bytes=archive.listing.size_bytes,
            source=str(archive.listing.root),
        )
        try:
            reply = client.submit(codec.encode(dataclasses.replace(spec, package=package)), request_id)
        except Conflict as error:
            # Nobody had named it for a while, and it is being deleted just now: under another name it stays.
            if error.code is not ErrorCode.CONFLICT or not known or tries == TRIES_MAX:
                raise
            nonce = None
            continue
        how = "stored before" if known else f"{size} stored"
        output.say(f"packed {archive.listing.root}: {entries} entries, {how} ({archive.digest[:12]})")
        return reply
    raise AssertionError("the last try returns or raises")
