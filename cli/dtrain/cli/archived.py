"""Jobs as they are now, and as the archive remembers them once they are over."""

from dtrain.cli import naming, output, reading, records
from dtrain.cli.answers import Reading
from dtrain.cli.client import Client
from dtrain.cli.records import Cluster, Job
from dtrain.protocol.errors import DtrainError, ErrorCode, NotFound
from dtrain.protocol.events import EventRecord


def job(client: Client, wanted: str, uid: str = "") -> tuple[Job, Cluster]:
    """The job that ``wanted`` names, with what was read; from the archive if ``uid`` or its loss asks for it.

    Raises:
        NotFound, Refused: no such job, or several; nor was it archived.
    """
    name = wanted.removeprefix("job/")
    try:
        found, cluster = reading.job(client, wanted)
        if uid in ("", found.spec.uid if found.spec else ""):
            return found, cluster
        name = found.name
    except NotFound as error:
        past = _past(client, name, uid, error)
    else:
        past = client.read_archive(name, uid)
    cluster = records.group(past)
    found = cluster.jobs[naming.find(cluster.jobs, name, "job")]
    of = found.status.uid if found.status else uid
    output.say(f"{name} (uid {of}) as it was archived when it ended")
    return found, cluster


def past_or_present(client: Client, wanted: str, uid: str = "") -> tuple[Job, str]:
    """A job, and its uid if what it wrote can only be in the archive; "" if it is the present one."""
    found, cluster = job(client, wanted, uid)
    past = not cluster.revision
    return found, found.status.uid if past and found.status else ""


def earlier_events(client: Client, found: Job) -> dict[int, EventRecord]:
    """Events of a job that etcd has dropped, by number; those that were archived in time."""
    first = min(found.events, default=0)
    if first <= 1 or found.status is None or not found.status.store:
        return {}
    try:
        past = records.group(_with_status(client.read_archive(found.name, events_before=first), found))
    except DtrainError as error:
        if error.code is not ErrorCode.OLDER_RELEASE:
            output.say(f"events of {found.name} before number {first} could not be read: {error.message}")
        return {}
    known = past.jobs.get(found.name)
    if known is None:
        return {}
    found.raw.setdefault("events", {}).update(known.raw.get("events", {}))
    return dict(known.events)


def _with_status(past: Reading, found: Job) -> Reading:
    # A job without a status is none to whoever groups records.
    from dtrain.cli.answers import Item
    from dtrain.protocol import codec

    status = Item(f"jobs/{found.name}/status", codec.encode(found.status), 0, 0)
    return Reading((*past.items, status), past.revision, past.age_s, past.replica)


def _past(client: Client, name: str, uid: str, error: NotFound) -> Reading:
    try:
        return client.read_archive(name, uid)
    except DtrainError:
        raise error from None
