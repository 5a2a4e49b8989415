"""Random programs against etcd, and what is seen of them: the model and a real server run the same one.

A program is a list of statements. Its keys have no prefix, its revisions count from the program's start (the
first write is revision 1; 0 stays 0) and its leases are small numbers: one text runs anywhere. ``Side``
translates on the way in and out. ``generate`` draws a program from a seed, ``code`` prints one as Python,
``shrink`` makes a failing one small.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from enum import Enum
from typing import Any

from dtrain.protocol.errors import DtrainError, ErrorCode, NotFound, OutcomeUnknown, Refused, Unavailable
from dtrain.storage.etcd.memory import MemoryEtcd
from dtrain.storage.etcd.port import (
    Compare,
    Delete,
    Etcd,
    Get,
    KeyValue,
    Operation,
    Put,
    Relation,
    Target,
    Txn,
    WatchStream,
)

NAMES = ("a", "a/x", "b", "b/1", "c", "z")
ENDS = ("a/x", "b", "b0", "c", "zz", "~")
LEASES = 3
MARKER_S = 15.0


@dataclass(frozen=True, slots=True)
class Range:
    """Read [key, end) at a revision (0: now)."""

    key: str
    end: str | None = None
    revision: int = 0
    limit: int = 0


@dataclass(frozen=True, slots=True)
class Grant:
    """Grant a lease."""

    lease: int
    ttl_s: int = 600


@dataclass(frozen=True, slots=True)
class Keepalive:
    """Renew a lease."""

    lease: int


@dataclass(frozen=True, slots=True)
class Revoke:
    """End a lease."""

    lease: int


@dataclass(frozen=True, slots=True)
class Compact:
    """Forget history; open watches are drained first, what they are owed is no race then."""

    revision: int


@dataclass(frozen=True, slots=True)
class Watch:
    """Open a watch under a name of the program's."""

    name: int
    key: str
    end: str | None = None
    start: int = 0


@dataclass(frozen=True, slots=True)
class Drain:
    """Read all that the watch is owed, up to a put made for the purpose."""

    name: int


@dataclass(frozen=True, slots=True)
class Full:
    """Run statements under the NOSPACE alarm."""

    body: tuple["Statement", ...]


@dataclass(frozen=True, slots=True)
class Where:
    """Ask for the revision."""


Statement = Txn | Range | Grant | Keepalive | Revoke | Compact | Watch | Drain | Full | Where
Program = tuple[Statement, ...]


class Side:
    """One etcd that runs a program. ``compact`` and ``alarm`` do what the port does not offer."""

    def __init__(
        self,
        etcd: Etcd,
        prefix: str,
        leases: int,
        compact: Callable[[int], None],
        alarm: Callable[[bool], None],
    ) -> None:
        self._etcd = etcd
        self._prefix = prefix
        self._leases = leases
        self._compact = compact
        self._alarm = alarm
        self._base = etcd.status().revision
        self._streams: dict[int, tuple[Watch, WatchStream | DtrainError]] = {}
        self._markers = 0

    def run(self, program: Program) -> Iterator[Any]:
        """Yield what each statement shows; in the end, what every watch and key does."""
        try:
            for statement in program:
                yield self.step(statement)
            yield [self.step(Drain(name)) for name in sorted(self._streams)]
            yield self.step(Range("", "~~"))
        finally:
            for _, stream in self._streams.values():
                if not isinstance(stream, DtrainError):
                    stream.close()
            for lease in range(1, LEASES + 1):
                self._etcd.revoke(self._leases + lease)

    def step(self, statement: Statement) -> Any:
        """Run one statement and return what it shows."""
        try:
            return self._do(statement)
        except DtrainError as error:
            return _seen(error)

    def _do(self, statement: Statement) -> Any:
        match statement:
            case Txn():
                result = self._etcd.txn(self._placed(statement))
                read = tuple(tuple(self._kv(kv) for kv in kvs) for kvs in result.responses)
                return result.succeeded, self._relative(result.revision), read
            case Range(key, end, revision, limit):
                found = self._etcd.range(
                    self._key(key), self._end(end), revision=self._revision(revision), limit=limit
                )
                return tuple(self._kv(kv) for kv in found.items), self._relative(found.revision), found.more
            case Grant(lease, ttl_s):
                return self._etcd.grant(ttl_s, self._leases + lease)
            case Keepalive(lease):
                return self._etcd.keepalive(self._leases + lease)
            case Revoke(lease):
                return self._etcd.revoke(self._leases + lease)
            case Compact(revision):
                drained = [self.step(Drain(name)) for name in sorted(self._streams)]
                try:
                    self._compact(self._base + revision)
                except DtrainError as error:
                    return drained, _seen(error)
                return drained
            case Watch(name):
                return self._open(name, statement)
            case Drain(name):
                return self._drain(name)
            case Full(body):
                self._alarm(True)
                try:
                    return [self.step(inner) for inner in body]
                finally:
                    self._alarm(False)
            case Where():
                status = self._etcd.status()
                return self._relative(status.revision), status.alarms

    def _open(self, name: int, watch: Watch) -> Any:
        if name in self._streams:
            _, old = self._streams.pop(name)
            if not isinstance(old, DtrainError):
                old.close()
        try:
            stream: WatchStream | DtrainError = self._etcd.watch(
                self._key(watch.key), self._end(watch.end), self._revision(watch.start)
            )
        except DtrainError as error:
            # A server may refuse at once or with the first message: what counts is that it does.
            stream = error
        self._streams[name] = watch, stream
        return "opened"

    def _drain(self, name: int) -> Any:
        if name not in self._streams:
            return "no such watch"
        watch, stream = self._streams[name]
        if isinstance(stream, DtrainError):
            del self._streams[name]
            return _seen(stream)
        # A watch from a future revision hears nothing before it: mark until it must have heard.
        now = self._etcd.status().revision - self._base
        for _ in range(max(1, watch.start - now)):
            self._markers += 1
            marker = b"marker %d" % self._markers
            last = self._etcd.txn(Txn((), (Put(self._key(watch.key), marker),))).revision
        events: list[Any] = []
        seen = 0
        while seen < last:
            try:
                batch = stream.next(MARKER_S)
            except DtrainError as error:
                del self._streams[name]
                return events, _seen(error)
            assert batch is not None, f"{watch} is silent after {events}"
            if not batch.events:
                continue
            revisions = [event.kv.mod_revision for event in batch.events]
            assert revisions == sorted(revisions), f"out of order: {batch}"
            assert revisions[0] > seen, f"a revision in two pieces: {batch}"
            seen = revisions[-1]
            for event in batch.events:
                kv = event.kv
                shown = (
                    (kv.key[len(self._prefix) :], self._relative(kv.mod_revision))
                    if event.kind == "delete"
                    else self._kv(kv)
                )
                events.append((event.kind, shown))
        return events

    # Between the program's words and the server's.

    def _key(self, key: str) -> str:
        return self._prefix + key if key != "(none)" else ""

    def _end(self, end: str | None) -> str | None:
        return None if end is None else self._prefix + end

    def _revision(self, revision: int) -> int:
        return self._base + revision if revision else 0

    def _lease(self, lease: int) -> int:
        return self._leases + lease if lease else 0

    def _relative(self, revision: int) -> int:
        return revision - self._base

    def _placed(self, txn: Txn) -> Txn:
        return Txn(
            tuple(self._compare(compare) for compare in txn.compares),
            tuple(self._operation(operation) for operation in txn.success),
            tuple(self._operation(operation) for operation in txn.failure),
        )

    def _compare(self, compare: Compare) -> Compare:
        operand = compare.operand
        if isinstance(operand, int) and compare.target in (Target.CREATE, Target.MOD):
            operand = self._revision(operand)
        elif isinstance(operand, int) and compare.target is Target.LEASE:
            operand = self._lease(operand)
        return replace(
            compare, key=self._key(compare.key), range_end=self._end(compare.range_end), operand=operand
        )

    def _operation(self, operation: Operation) -> Operation:
        match operation:
            case Put(key, value, lease):
                return Put(self._key(key), value, self._lease(lease))
            case Delete(key, end):
                return Delete(self._key(key), self._end(end))
            case Get(key, end):
                return Get(self._key(key), self._end(end))

    def _kv(self, kv: KeyValue) -> tuple[Any, ...]:
        return (
            kv.key[len(self._prefix) :],
            kv.value if len(kv.value) < 100 else (len(kv.value), kv.value[:10]),
            self._relative(kv.create_revision),
            self._relative(kv.mod_revision),
            kv.version,
            kv.lease and kv.lease - self._leases,
        )


def _seen(error: DtrainError) -> tuple[str, ErrorCode]:
    """What a caller can act on: the kind of error, not what an adapter derives from it."""
    kinds: tuple[type[DtrainError], ...] = (NotFound, Refused, OutcomeUnknown, Unavailable)
    kind = next((kind for kind in kinds if isinstance(error, kind)), type(error))
    return kind.__name__, error.code


# Drawing.


def generate(seed: int) -> Program:
    """Return the program of ``seed``."""
    rng = random.Random(seed)
    drawn = _Drawn(rng)
    return (*drawn.opening(), *(drawn.statement() for _ in range(rng.randint(6, 20))))


class _Drawn:
    """Draws statements beside a model that runs them, so that most of them hit what exists."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._model = MemoryEtcd(lambda: 0.0)
        self._side = Side(self._model, "/", 100, self._model.compact, lambda _on: None)
        self._watching = rng.random() < 0.5
        self._full = rng.random() < 0.08
        self._compacting = rng.random() < 0.5

    @property
    def _revision(self) -> int:
        return self._model.revision - 1

    def statement(self) -> Statement:
        drawn = self._draw()
        self._side.step(drawn)
        return drawn

    def opening(self) -> Program:
        """Return a few statements after which there is something to read, guard and lose."""
        program = (Grant(1), Txn((), self.branch(4)), Txn((), self.branch(2)), Txn((), self.branch(2)))
        for statement in program:
            self._side.step(statement)
        return program

    def _draw(self) -> Statement:
        rng = self._rng
        choices: list[tuple[int, Callable[[], Statement]]] = [
            (40, self.txn),
            (14, self.range),
            (8, self.grant),
            (4, lambda: Keepalive(self.lease())),
            (5, lambda: Revoke(self.lease())),
            (2, Where),
            (1, self.refused),
        ]
        if self._watching:
            choices += [(9, self.watch), (5, lambda: Drain(rng.randint(1, 2)))]
        if self._compacting:
            choices.append((6, lambda: Compact(self.revision(past=True))))
        if self._full:
            choices.append((4, self.full))
        weights = [weight for weight, _ in choices]
        (_, make) = rng.choices(choices, weights)[0]
        return make()

    def txn(self) -> Txn:
        rng = self._rng
        compares = tuple(self.compare() for _ in range(rng.choice((0, 0, 0, 1, 1, 2, 4))))
        success, failure = self.branch(rng.randint(0, 4)), self.branch(rng.choice((0, 0, 1, 2)))
        return Txn(compares, success, failure)

    def branch(self, size: int) -> tuple[Operation, ...]:
        rng = self._rng
        operations: list[Operation] = []
        for _ in range(size):
            kind = rng.choice("pppppddg")
            if kind == "p":
                lease = self.lease() if rng.random() < 0.35 else 0
                operations.append(Put(self.name(), self.value(), lease))
            elif kind == "d":
                operations.append(Delete(self.name(), self.end()))
            else:
                operations.append(Get(self.name(), self.end()))
        if rng.random() < 0.9:
            # Most programs should get somewhere: no key twice, unless by the remaining chance.
            seen: set[str] = set()
            kept: list[Operation] = []
            for operation in operations:
                if isinstance(operation, Put):
                    if operation.key in seen:
                        continue
                    seen.add(operation.key)
                kept.append(operation)
            operations = [op for op in kept if not isinstance(op, Delete) or not _covers_any(op, seen)]
        return tuple(operations)

    def compare(self) -> Compare:
        rng = self._rng
        target = rng.choice(list(Target))
        operand: int | bytes
        match target:
            case Target.VALUE:
                operand = self.value()
            case Target.VERSION:
                operand = rng.randint(0, 3)
            case Target.LEASE:
                operand = rng.randint(0, LEASES)
            case _:
                operand = 0 if rng.random() < 0.4 else self.revision()
        relation = rng.choice([*Relation, Relation.EQUAL])
        return Compare(self.name(), target, operand, relation, self.end())

    def range(self) -> Range:
        rng = self._rng
        revision = 0 if rng.random() < 0.5 else self.revision()
        key = "" if rng.random() < 0.3 else self.name()
        end = "~" if not key else self.end()
        return Range(key, end, revision, rng.choice((0, 0, 0, 1, 2, 3)))

    def grant(self) -> Grant:
        return Grant(self.lease(), self._rng.choice((60, 600, 3600)))

    def watch(self) -> Watch:
        # The compacted revision itself is the corner where servers differ.
        compacted = self._model.compacted
        start = self._rng.choice((0, self.revision(), self.revision(), compacted))
        return Watch(self._rng.randint(1, 2), self.name(), self.end(inverted=False), start)

    def full(self) -> Full:
        rng = self._rng
        makers: list[Callable[[], Statement]] = [
            self.txn,
            self.txn,
            self.range,
            self.grant,
            Where,
            lambda: Keepalive(self.lease()),
            lambda: Revoke(self.lease()),
        ]
        return Full(tuple(rng.choice(makers)() for _ in range(rng.randint(1, 5))))

    def refused(self) -> Statement:
        """Something that etcd turns down whatever the state is, or hardly accepts."""
        rng = self._rng
        name = self.name()
        puts = tuple(Put(f"many/{i}", b"") for i in range(rng.choice((128, 129))))
        return rng.choice(
            (
                Txn((), puts),
                Txn((), (), puts),
                Txn(tuple(Compare(put.key, Target.CREATE, 0) for put in puts), (Put(name, b"guarded"),)),
                Txn((), (Put(name, b"x" * rng.choice((1_500_000, 1_572_000, 1_574_000, 2_200_000))),)),
                Txn((Compare(name, Target.VALUE, b"y" * 1_600_000),), (Get(name),)),
                Txn((), (Put("(none)", b"v"),)),
                Txn((), (Delete("(none)"),)),
                Txn((Compare("(none)", Target.CREATE, 0),)),
                Range("(none)"),
                Grant(self.lease(), 9_000_000_001),
                Range(name, None, self._revision + 50),
            )
        )

    def name(self) -> str:
        return self._rng.choice(NAMES)

    def end(self, *, inverted: bool = True) -> str | None:
        if self._rng.random() < 0.7:
            return None
        return self._rng.choice(ENDS if inverted else ENDS[-2:])

    def value(self) -> bytes:
        return self._rng.choice((b"", b"0", b"1", b"\x00\xff\n", b"10", "é".encode()))

    def lease(self) -> int:
        living = [lease - 100 for lease in self._model.leases()]
        return (
            self._rng.choice(living) if living and self._rng.random() < 0.7 else self._rng.randint(1, LEASES)
        )

    def revision(self, *, past: bool = False) -> int:
        offsets = (-3, -2, -1, -1, 0, 0, 0, 1) if past else (-6, -4, -3, -2, -2, -1, -1, 0, 0, 0, 1, 2)
        return max(1, self._revision + self._rng.choice(offsets))


def _covers_any(delete: Delete, keys: set[str]) -> bool:
    end = delete.range_end
    return any(key == delete.key if end is None else delete.key <= key < end for key in keys)


# Making a failing program small, and telling it.


def shrink(program: Program, fails: Callable[[Program], bool]) -> Program:
    """Return a smaller program that still fails: statements first, then their parts."""
    before = None
    while before != program:
        before = program
        program = _with_less(_without(program, fails), fails)
    return program


def _without(program: Program, fails: Callable[[Program], bool]) -> Program:
    size = max(1, len(program) // 2)
    while size:
        at = 0
        while at < len(program):
            shorter = program[:at] + program[at + size :]
            if fails(shorter):
                program = shorter
            else:
                at += size
        size //= 2
    return program


def _with_less(program: Program, fails: Callable[[Program], bool]) -> Program:
    at = 0
    while at < len(program):
        for simpler in _simpler(program[at]):
            candidate = (*program[:at], simpler, *program[at + 1 :])
            if fails(candidate):
                program = candidate
                break
        else:
            at += 1
    return program


def _simpler(statement: Statement) -> Iterator[Statement]:
    match statement:
        case Txn(compares, success, failure):
            for at in range(len(compares)):
                yield replace(statement, compares=compares[:at] + compares[at + 1 :])
            for at in range(len(success)):
                yield replace(statement, success=success[:at] + success[at + 1 :])
            for at in range(len(failure)):
                yield replace(statement, failure=failure[:at] + failure[at + 1 :])
            for at, operation in enumerate(success):
                if isinstance(operation, Put) and operation.lease:
                    bare = replace(operation, lease=0)
                    yield replace(statement, success=(*success[:at], bare, *success[at + 1 :]))
        case Full(body):
            for at in range(len(body)):
                yield Full(body[:at] + body[at + 1 :])
        case Range(limit=limit) if limit:
            yield replace(statement, limit=0)
        case _:
            pass


def code(program: Program) -> str:
    """Return the program as Python text."""
    lines = "".join(f"    {_text(statement)},\n" for statement in program)
    return f"(\n{lines})"


def _text(value: Any) -> str:
    if isinstance(value, Enum):
        return str(value)
    if isinstance(value, tuple):
        inner = ", ".join(_text(part) for part in value)
        return f"({inner},)" if value else "()"
    if isinstance(value, bytes) and len(value) > 100:
        return f"{value[:1]!r} * {len(value)}"
    if is_dataclass(value) and not isinstance(value, type):
        given = [getattr(value, field.name) for field in fields(value)]
        return f"{type(value).__name__}({', '.join(_text(part) for part in given)})"
    return repr(value)
