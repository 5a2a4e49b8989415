"""Events: which are shown, and those that only the archive has left."""

import time
from dataclasses import dataclass

from dtrain.cli import archived, output, reading
from dtrain.cli.client import Client
from dtrain.cli.records import Cluster
from dtrain.cli.render import lists
from dtrain.cli.render.table import When, age_s
from dtrain.protocol.events import EventRecord


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which events: of one job or of all, of some types or reasons, not older than ``since_s``."""

    job: str | None = None
    types: tuple[str, ...] = ()
    since_s: float | None = None
    uid: str = ""

    def fits(self, event: EventRecord, now: float) -> bool:
        """Whether an event is among them; ``types`` are Normal, Warning, or reasons, in any case."""
        words = {word.strip().lower() for text in self.types for word in text.split(",") if word.strip()}
        if words and not words & {event.type.value.lower(), event.reason.value.lower()}:
            return False
        age = age_s(event.last or event.first, now)
        return self.since_s is None or age is None or age <= self.since_s


def listing(client: Client, wanted: Wanted, *, iso: bool, form: str) -> None:
    """Print what has happened so far, oldest first, with what only the archive has left."""
    cluster = _read(client, wanted)
    now = time.time()
    found = [
        (name, event)
        for name, job in cluster.jobs.items()
        for _, event in sorted({**_earlier(client, wanted, cluster, name), **job.events}.items())
        if wanted.fits(event, now)
    ]
    shown = {(name, event.seq) for name, event in found}
    output.listing(
        "Event",
        [
            {"v": 1, "kind": "Event", "job": name, **document}
            for name, job in cluster.jobs.items()
            for seq, document in sorted(job.raw.get("events", {}).items(), key=lambda pair: int(pair[0]))
            if (name, int(seq)) in shown
        ],
        lists.events(found, When(now, iso), wide=form == "wide"),
        [f"{name}/{event.seq}" for name, event in found],
        output=form,
        revision=cluster.revision,
    )
    output.freshness(cluster.age_s)


def _read(client: Client, wanted: Wanted) -> Cluster:
    if wanted.job is None:
        return reading.everything(client)
    job, cluster = archived.job(client, wanted.job, wanted.uid)
    cluster.jobs = {job.name: job}
    return cluster


def _earlier(client: Client, wanted: Wanted, cluster: Cluster, name: str) -> dict[int, EventRecord]:
    return archived.earlier_events(client, cluster.jobs[name]) if wanted.job and cluster.revision else {}
