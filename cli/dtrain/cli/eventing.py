"""Events: which are shown, and the new ones as they come."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import click

from dtrain.cli import archived, output, reading, records
from dtrain.cli.client import Client
from dtrain.cli.records import Cluster
from dtrain.cli.render import lists
from dtrain.cli.render.table import When, age_s
from dtrain.cli.watching import changes
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


def follow(client: Client, wanted: Wanted, *, iso: bool, form: str) -> None:
    """Print what has happened so far and then each event as it comes, once, until interrupted."""
    for name, event, document in _new(client, wanted):
        if form in ("json", "yaml") or not sys.stdout.isatty():
            click.echo(json.dumps({"v": 1, "kind": "Event", "job": name, **document}, ensure_ascii=False))
        else:
            table = lists.events([(name, event)], When(time.time(), iso), wide=form == "wide")
            click.echo("   ".join(table.rows[0]))
        sys.stdout.flush()


def _new(client: Client, wanted: Wanted) -> Iterator[tuple[str, EventRecord, dict[str, object]]]:
    seen: dict[str, int] = {}
    counts: dict[tuple[str, int], int] = {}
    for cluster in changes(client, _reader(client, wanted), output.say):
        now = time.time()
        for name, job in cluster.jobs.items():
            for seq, event in sorted(job.events.items()):
                # A repeated event keeps its number and counts on.
                if seq <= seen.get(name, 0) and event.count <= counts.get((name, seq), event.count):
                    continue
                seen[name] = max(seq, seen.get(name, 0))
                counts[name, seq] = event.count
                if wanted.fits(event, now):
                    yield name, event, job.raw.get("events", {}).get(str(seq), {})
            # Bounded by what etcd keeps.
            for of in [of for of in counts if of[0] == name and of[1] not in job.events]:
                del counts[of]


def _reader(client: Client, wanted: Wanted) -> Callable[..., Cluster]:
    if wanted.job is None:
        return lambda **how: records.group(client.read("jobs/", **how))
    exact = reading.name(client, wanted.job)
    return lambda **how: records.group(client.read(f"jobs/{exact}/", **how))


def _read(client: Client, wanted: Wanted) -> Cluster:
    if wanted.job is None:
        return reading.everything(client)
    job, cluster = archived.job(client, wanted.job, wanted.uid)
    cluster.jobs = {job.name: job}
    return cluster


def _earlier(client: Client, wanted: Wanted, cluster: Cluster, name: str) -> dict[int, EventRecord]:
    return archived.earlier_events(client, cluster.jobs[name]) if wanted.job and cluster.revision else {}
