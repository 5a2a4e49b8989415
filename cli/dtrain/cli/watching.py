"""Every change of some records, each once and in order, from whichever replica answers, for ever."""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from dtrain.cli.answers import Changed, Item
from dtrain.cli.client import Client
from dtrain.protocol.errors import DtrainError, ErrorCode, OutcomeUnknown, Refused, Unavailable

WAIT_S = 15.0
"""One call waits so long for a change; then the next one does."""

POLL_S = 1.0
"""A replica of the former release is read this often, or when it has something."""

RETRY_S = 0.5

Items = dict[str, Item]


@dataclass(frozen=True, slots=True)
class Moment:
    """What one transaction changed, and all there is after it, until the next one is asked for.

    ``listed``: the first one, which is what was found, or one after which it is not known what
    came between: ``changes`` are then differences, and each may stand for several.
    """

    revision: int
    changes: tuple[Changed, ...]
    items: Mapping[str, Item]
    listed: bool = False
    age_s: float = 0.0


def moments(
    client: Client, prefixes: Sequence[str], say: Callable[[str], None], *, after: int = 0
) -> Iterator[Moment]:
    """Yield what is there, and then what changes below ``prefixes``; with ``after`` what has changed since.

    A lost cluster is said once, and tried again for ever.
    """
    items, revision, age_s = _read(client, prefixes)
    read_at = revision
    if after:
        revision = after
        items = {key: item for key, item in items.items() if item.mod_revision <= after}
        yield Moment(after, (), items)
    else:
        yield Moment(revision, (), items, listed=True, age_s=age_s)
    lost = False
    while True:
        try:
            found = client.changes(prefixes, after_revision=revision, wait_s=WAIT_S)
            behind, exact = found.lost, True
            changes, reached = found.changes, found.revision
        except (Unavailable, OutcomeUnknown) as error:
            lost = _say_once(error, say, said=lost)
            time.sleep(RETRY_S)
            continue
        except Refused as error:
            if error.code is not ErrorCode.OLDER_RELEASE:
                raise
            time.sleep(POLL_S)
            behind, exact = True, False
        if lost:
            lost = False
            say(f"connected again, one of {', '.join(client.addresses)}")
        if not behind:
            yield from _apply(items, changes, read_at)
            revision = reached
            continue
        try:
            now, revision, age_s = _read(client, prefixes)
            if exact:
                say(f"what came between is not known any more: the newest state, of revision {revision}")
        except (Unavailable, OutcomeUnknown) as error:
            lost = _say_once(error, say, said=lost)
            continue
        read_at = revision
        for moment in _apply(items, differences(items, now, revision), read_at):
            yield Moment(moment.revision, moment.changes, moment.items, listed=True, age_s=age_s)


def differences(before: Mapping[str, Item], now: Mapping[str, Item], revision: int) -> list[Changed]:
    """What leads from one list to another, which is of ``revision``, in order of revision."""
    gone = [Changed(key, None, revision, 0) for key in before if key not in now]
    newer = [
        Changed(item.key, item.value, item.mod_revision, item.create_revision)
        for item in now.values()
        if item.key not in before or before[item.key].mod_revision != item.mod_revision
    ]
    return sorted([*newer, *gone], key=lambda change: change.revision)


def _apply(items: Items, changes: Iterable[Changed], read_at: int) -> Iterator[Moment]:
    """Take changes in, revision by revision. What was read at ``read_at`` had already is passed over."""
    for revision, of_one in itertools.groupby(changes, lambda change: change.revision):
        fresh = []
        for change in of_one:
            known = items.get(change.key)
            if change.value is None:
                # What was read may be newer than its revision says: gone already, or there again.
                if revision > read_at and (known is None or known.mod_revision > revision):
                    continue
                items.pop(change.key, None)
            else:
                if known is not None and known.mod_revision >= revision:
                    continue
                items[change.key] = Item(change.key, change.value, change.create_revision, revision)
            fresh.append(change)
        if fresh:
            yield Moment(revision, tuple(fresh), items)


def _read(client: Client, prefixes: Sequence[str]) -> tuple[Items, int, float]:
    """All there is; what is newer than the revision that is returned will be told again, and passed over."""
    readings = [client.read(prefix) for prefix in prefixes]
    items = {item.key: item for reading in readings for item in reading.items if "/workers/" not in item.key}
    return items, min(one.revision for one in readings), max(one.age_s for one in readings)


def _say_once(error: DtrainError, say: Callable[[str], None], *, said: bool) -> bool:
    if not said:
        say(f"{error.message}; trying again")
    return True
