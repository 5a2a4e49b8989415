"""A history recorded from a real cluster is good; every deliberate damage to it is named."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dtrain.cli.auditing import Recorded
from dtrain.protocol.audit import Auditor, Change, Violation
from dtrain.protocol.keys import Keys, Parsed

GOOD = Path(__file__).parent / "data" / "good.jsonl.gz"
"""Two replicas lead one after the other, a rank dies, checkpoints are retired, the name is used again."""

Revision = tuple[int, list[Change]]


class Kept:
    """A sink that keeps what it gets."""

    def __init__(self) -> None:
        self.revisions: list[Revision] = []

    def begin_at(self, revision: int, records: Any) -> None:
        raise AssertionError("the recording begins with the first revision")

    def feed(self, revision: int, changes: Any) -> None:
        self.revisions.append((revision, list(changes)))


@pytest.fixture(scope="module")
def recorded() -> Recorded:
    source = Recorded(GOOD)
    kept = Kept()
    source.play(kept)
    assert source.whole
    source.kept = kept.revisions  # type: ignore[attr-defined]
    return source


class Tape:
    """A copy of the recording that can be damaged."""

    def __init__(self, recorded: Recorded) -> None:
        self.keys = Keys(recorded.cluster)
        self.cluster = recorded.cluster
        self.revisions: list[Revision] = [(number, list(c)) for number, c in recorded.kept]  # type: ignore[attr-defined]

    def judge(self) -> list[Violation]:
        auditor = Auditor(self.cluster)
        for revision, changes in self.revisions:
            auditor.feed(revision, changes)
        return auditor.violations

    def places(self, kind: str, *, deleted: bool = False) -> Iterator[tuple[int, int, Parsed]]:
        """Index of the revision, of the change in it, and the key, of each change of a kind."""
        for at, (_, changes) in enumerate(self.revisions):
            for index, change in enumerate(changes):
                place = self.keys.parse(change.key)
                if place is not None and place.kind == kind and (change.value is None) is deleted:
                    yield at, index, place

    def edit(self, kind: str, change: Callable[[dict[str, Any]], bool]) -> None:
        """Change the first record of a kind that ``change`` says it has changed."""
        for at, index, _ in self.places(kind):
            changes = self.revisions[at][1]
            old = changes[index]
            document = json.loads(old.value or b"")
            if change(document):
                changes[index] = Change(old.key, json.dumps(document).encode(), old.create_revision)
                return
        raise AssertionError(f"no {kind} could be damaged")

    def drop(self, kind: str, *, deleted: bool, number: int = 0) -> None:
        """Take one change out of the history."""
        at, index, _ = list(self.places(kind, deleted=deleted))[number]
        del self.revisions[at][1][index]

    def replay_later(self, kind: str, *, deleted: bool = False, number: int = 0) -> None:
        """A change happens once more, at the end: a late writer that nothing has stopped."""
        at, index, _ = list(self.places(kind, deleted=deleted))[number]
        late = self.revisions[-1][0] + 1
        self.revisions.append((late, [self.revisions[at][1][index]]))


def setting(path: str, value: Callable[[Any], Any]) -> Callable[[dict[str, Any]], bool]:
    """An edit of one field, given as a.b.0.c."""

    def apply(document: dict[str, Any]) -> bool:
        *parents, last = path.split(".")
        found: Any = document
        try:
            for name in parents:
                found = found[int(name)] if name.isdecimal() else found[name]
            found[last] = value(found[last])
        except (KeyError, IndexError):
            return False
        return True

    return apply


def drop_tombstone(tape: Tape) -> None:
    at, index, _ = next(
        (at, index, place)
        for at, index, place in tape.places("checkpoint", deleted=True)
        if any(parsed.kind == "garbage" for parsed in parsed_of(tape, at))
    )
    tape.revisions[at] = (tape.revisions[at][0], [tape.revisions[at][1][index]])


def parsed_of(tape: Tape, at: int) -> list[Parsed]:
    return [place for change in tape.revisions[at][1] if (place := tape.keys.parse(change.key)) is not None]


def later_snapshot(tape: Tape, **changes: Any) -> None:
    """The last snapshot with ranks comes once more, changed."""
    for at, index, _ in reversed(list(tape.places("worker"))):
        old = tape.revisions[at][1][index]
        document = json.loads(old.value or b"")
        if document.get("ranks") and document.get("command", {}).get("kind") != "Stop":
            document |= changes
            again = Change(old.key, json.dumps(document).encode(), old.create_revision)
            tape.revisions.insert(at + 1, (tape.revisions[at][0], [again]))
            return
    raise AssertionError("no snapshot with ranks")


def another_process(document: dict[str, Any]) -> bool:
    """In the first attempt's last steps a rank is suddenly another process."""
    ranks = document.get("ranks")
    if not ranks or ranks[0]["step"] < 5:
        return False
    ranks[0]["pid"] += 1
    return True


DAMAGE: dict[str, tuple[str, Callable[[Tape], None]]] = {
    "a status under another term": ("I1", lambda t: t.edit("status", setting("term", lambda v: v + 1))),
    "a commit under another term": ("I1", lambda t: t.edit("checkpoint", setting("term", lambda v: v - 1))),
    "a tombstone under another term": ("I1", lambda t: t.edit("garbage", setting("term", lambda v: 1))),
    "the old leader writes again": ("I1", lambda t: t.replay_later("event")),
    "the second leader is never elected": ("I1", lambda t: t.drop("leader", deleted=False, number=1)),
    "the first leader never goes": ("I2", lambda t: t.drop("leader", deleted=True)),
    "the first leader's key comes again": ("I2", lambda t: t.replay_later("leader")),
    "a retirement without its tombstone": ("I3", drop_tombstone),
    "a tombstone of other blobs": ("I3", lambda t: t.edit("garbage", setting("digest", lambda v: v[::-1]))),
    "a retired commit comes back": ("I5", lambda t: t.replay_later("checkpoint")),
    "latest lags behind": ("I4", lambda t: t.drop("latest", deleted=False, number=1)),
    "latest goes back": ("I4", lambda t: t.replay_later("latest")),
    "latest names another checkpoint": ("I4", lambda t: t.edit("latest", setting("seq", lambda v: v + 1))),
    "an attempt is skipped": ("I5", lambda t: t.edit("status", setting("attempt", lambda v: v + 2))),
    "an intent is not written": ("I5", lambda t: t.drop("open", deleted=False)),
    "an intent is left behind": ("I5", lambda t: t.drop("open", deleted=True)),
    "a commit of another step": ("I5", lambda t: t.edit("checkpoint", setting("step", lambda v: v + 1))),
    "a commit of another intent": ("I5", lambda t: t.edit("checkpoint", setting("nonce", lambda v: v[::-1]))),
    "a commit of another attempt": (
        "I5",
        lambda t: t.edit("checkpoint", setting("attempt", lambda v: v + 1)),
    ),
    "an agent obeys more than was decided": (
        "I6",
        lambda t: t.edit("worker", setting("attempt", lambda v: v + 1)),
    ),
    "an agent goes back": ("I6", lambda t: later_snapshot(t, attempt=1)),
    "an agent obeys a term that never was": (
        "I6",
        lambda t: t.edit("worker", setting("command.term", lambda v: v + 10_000)),
    ),
    "an agent runs another's ranks": (
        "I6",
        lambda t: t.edit("worker", setting("ranks.0.rank", lambda v: v + 7)),
    ),
    "a former life of an agent reports": (
        "I6",
        lambda t: t.edit("worker", setting("incarnation", lambda v: v[::-1])),
    ),
    "a start forks twice": ("I7", lambda t: t.edit("worker", another_process)),
    "a rank's part changes": (
        "I7",
        lambda t: t.edit(
            "worker",
            lambda d: bool(d.get("durable")) and setting("durable.0.digest", lambda v: v[::-1])(d),
        ),
    ),
    "a job goes on after its end": (
        "phase",
        lambda t: t.edit("status", lambda d: d["phase"] == "RUNNING" and bool(d.update(phase="FAILED") or 1)),
    ),
    "a record is cut off": (
        "readable",
        lambda t: t.edit("status", lambda d: bool(d.pop("phase", None))),
    ),
}


def test_the_recorded_history_is_good(recorded: Recorded) -> None:
    auditor = Auditor(recorded.cluster)
    Recorded(GOOD).play(auditor)
    assert not auditor.violations
    assert (auditor.terms, auditor.attempts, auditor.commits) == (2, 3, 7)


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(recorded: Recorded, name: str) -> None:
    invariant, damage = DAMAGE[name]
    tape = Tape(recorded)
    damage(tape)
    assert invariant in {violation.invariant for violation in tape.judge()}


@pytest.mark.parametrize("kind", ["checkpoint", "latest"])
def test_whichever_commit_is_taken_out_is_missed(recorded: Recorded, kind: str) -> None:
    for number in range(len(list(Tape(recorded).places(kind)))):
        tape = Tape(recorded)
        tape.drop(kind, deleted=False, number=number)
        assert tape.judge(), f"{kind} {number}"
