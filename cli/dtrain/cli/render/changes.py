"""One job's changes, as lines for people and as objects for programs. Pure."""

import json
from collections.abc import Iterator
from typing import Any

from dtrain.cli.answers import Changed
from dtrain.cli.watching import Moment
from dtrain.protocol import codec
from dtrain.protocol.errors import DtrainError
from dtrain.protocol.events import EventRecord
from dtrain.protocol.job import Intent, JobStatus


def documents(job: str, moment: Moment) -> Iterator[dict[str, Any]]:
    """Every changed record of a moment; at first every record there is, in order of its last change."""
    if moment.listed and not moment.changes:
        found = sorted(moment.items.values(), key=lambda item: (item.mod_revision, item.key))
        changes = [Changed(item.key, item.value, item.mod_revision, item.create_revision) for item in found]
    else:
        changes = list(moment.changes)
    for change in changes:
        document: dict[str, Any] = {
            "v": 1,
            "kind": "Change",
            "job": job,
            "revision": change.revision,
            "key": change.key.removeprefix(f"jobs/{job}/"),
            "deleted": change.value is None,
        }
        if change.value is not None:
            document["record"] = _shown(document["key"], change.value)
        yield document


class Teller:
    """Says what happens to a job: events, and where it stands whenever that is another."""

    def __init__(self, job: str) -> None:
        self._prefix = f"jobs/{job}/"
        self._stands = ""

    def lines(self, moment: Moment) -> list[str]:
        """What a moment is worth telling; [] for most."""
        if moment.listed and not moment.changes:
            status = moment.items.get(f"{self._prefix}status")
            first = self._status(status.value) if status is not None else None
            return [f"{'':20}  {first or 'waiting for a leader to look at it'}"]
        # The event that tells why comes before the phase that it leads to.
        changes = sorted(moment.changes, key=lambda change: "/events/" not in change.key)
        return [line for change in changes if change.value is not None for line in self._line(change)]

    def _line(self, change: Changed) -> Iterator[str]:
        assert change.value is not None
        kind = change.key.removeprefix(self._prefix).partition("/")[0]
        try:
            if kind == "events":
                event = codec.decode(EventRecord, change.value)
                about = f" {event.object}:" if event.object else ""
                yield f"{event.last or event.first:20}  {event.reason}{about} {event.message}"
            elif kind == "status" and (line := self._status(change.value)):
                yield f"{'':20}  {line}"
            elif kind == "intent":
                intent = codec.decode(Intent, change.value)
                yield f"{intent.at:20}  wanted: {intent.wanted}" + (f" (by {intent.by})" if intent.by else "")
        except DtrainError as error:
            yield f"{'':20}  {change.key}: {error.message}"

    def _status(self, value: bytes) -> str:
        """Phase, attempt and sentence; "": as before."""
        status = codec.decode(JobStatus, value)
        attempt = f"  attempt {status.attempt}" if status.attempt else ""
        line = f" {status.phase} {attempt}  {status.reason}".strip()
        if line == self._stands:
            return ""
        self._stands = line
        return line


def _shown(key: str, value: bytes) -> Any:
    from dtrain.cli.records import redacted

    try:
        document = json.loads(value)
    except ValueError:
        return value.decode(errors="replace")
    return redacted({"spec": document})["spec"] if key == "spec" else document
