"""Records and messages of two releases: neither loses or misreads what the other one wrote."""

import dataclasses
import enum
import json
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorSet

from dtrain.coordinator.core.releases import UNREAD_BEFORE
from dtrain.protocol import codec, wire
from dtrain.protocol.checkpoint import (
    CommitRecord,
    Garbage,
    Latest,
    Manifest,
    OpenRecord,
    Quarantine,
    RankManifest,
)
from dtrain.protocol.cluster import Cordon, LeaderRecord, ReplicaRecord
from dtrain.protocol.errors import ErrorCode, Refused
from dtrain.protocol.events import EventReason, EventRecord
from dtrain.protocol.job import Intent, JobSpec, JobStatus
from dtrain.protocol.pb import agent_pb2
from dtrain.protocol.snapshot import NodeRecord, WorkerSnapshot
from tests.skew import old
from tests.skew.old import Release
from tests.skew.record import descriptors

KINDS: dict[str, type] = {
    "leader": LeaderRecord,
    "coordinator": ReplicaRecord,
    "node": NodeRecord,
    "worker": WorkerSnapshot,
    "cordon": Cordon,
    "spec": JobSpec,
    "intent": Intent,
    "status": JobStatus,
    "open": OpenRecord,
    "checkpoint": CommitRecord,
    "latest": Latest,
    "garbage": Garbage,
    "bad": Quarantine,
    "event": EventRecord,
    "manifest": Manifest,
    "rank-manifest": RankManifest,
}
RECORDED = old.RELEASES / f"{old.FORMER}-records.jsonl"

FOR_PEOPLE: tuple[type[enum.Enum], ...] = (EventReason,)
"""What may grow in any release: no daemon decides by it, and a client skips a record with an unknown one."""


# What the former release wrote.


def recorded() -> list[tuple[str, Any]]:
    lines = [json.loads(line) for line in RECORDED.read_text().splitlines()]
    return [(line["kind"], line["record"]) for line in lines]


def test_every_kind_of_record_was_recorded() -> None:
    # Operators put cordons with etcdctl; 0.1.0 itself writes none.
    assert {kind for kind, _ in recorded()} == set(KINDS) - {"cordon"}


def test_what_the_former_release_wrote_is_read_and_written_again_without_loss() -> None:
    for kind, record in recorded():
        value = codec.decode(KINDS[kind], json.dumps(record), bytes_max=1 << 24)
        again = codec.loads(codec.encode(value), bytes_max=1 << 24)
        assert list(lost(record, again, kind)) == []


def lost(before: Any, after: Any, where: str) -> Iterator[str]:
    """What of ``before`` is not in ``after``."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name, item in before.items():
            if name in after:
                yield from lost(item, after[name], f"{where}.{name}")
            else:
                yield f"{where}.{name} is gone"
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for index, (one, other) in enumerate(zip(before, after, strict=True)):
            yield from lost(one, other, f"{where}[{index}]")
    elif before != after:
        yield f"{where}: {before!r} became {after!r}"


def test_a_loss_would_be_seen() -> None:
    assert list(lost({"a": [{"b": 1, "c": 2}]}, {"a": [{"b": 2}], "d": 1}, "x")) == [
        "x.a[0].b: 1 became 2",
        "x.a[0].c is gone",
    ]


# What this release writes.

_READ = """
import importlib, json, sys
from dtrain.protocol import codec
for line in sys.stdin:
    item = json.loads(line)
    kind = getattr(importlib.import_module(item["module"]), item["name"], None)
    try:
        value = codec.decode(kind, json.dumps(item["record"]))
        print(json.dumps({"again": json.loads(codec.encode(value))}))
    except Exception as error:
        print(json.dumps({"problem": f"{type(error).__name__}: {error}"}))
"""


def test_the_former_release_reads_what_this_one_writes(former: Release) -> None:
    """Every field filled, every value of every enumeration: what daemons write while they are upgraded."""
    written = [(name, value) for name, kind in KINDS.items() for value in examples(kind)]
    lines = [
        json.dumps(
            {"module": type(v).__module__, "name": type(v).__name__, "record": json.loads(codec.encode(v))}
        )
        for _, v in written
    ]
    answers = [json.loads(line) for line in former.run("-c", _READ, text="\n".join(lines)).splitlines()]
    assert len(answers) == len(written) > 50
    problems = [
        f"{name}: {answer['problem']}"
        for (name, _), answer in zip(written, answers, strict=True)
        if "problem" in answer
    ]
    assert problems == []
    # What it knows, it has understood: an addition changes the meaning of nothing.
    for (name, value), answer in zip(written, answers, strict=True):
        differs = [
            text
            for text in lost(answer["again"], json.loads(codec.encode(value)), name)
            if " is gone" not in text
        ]
        assert differs == []


def examples(kind: type) -> Iterator[Any]:
    """Values of a record with every field filled: one for each member of each enumeration in it."""
    found: set[type[enum.Enum]] = set()
    yield filled(kind, {}, found)
    for each in sorted(found - set(FOR_PEOPLE), key=lambda one: one.__name__):
        for member in each:
            # Not written while a coordinator of a release that does not know it is there.
            if member not in UNREAD_BEFORE:
                yield filled(kind, {each: member}, found)


def filled(hint: Any, chosen: Mapping[type[enum.Enum], enum.Enum], found: set[type[enum.Enum]]) -> Any:
    """Any value of a type, with nothing in it left empty."""
    while isinstance(hint, typing.NewType):
        hint = hint.__supertype__
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return filled(typing.get_args(hint)[0], chosen, found)
    if origin is tuple:
        return (filled(typing.get_args(hint)[0], chosen, found),)
    if origin is not None:
        return {"k": filled(typing.get_args(hint)[1], chosen, found)}
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        return hint(**{f.name: filled(hints[f.name], chosen, found) for f in dataclasses.fields(hint)})
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        found.add(hint)
        return chosen.get(hint, next(iter(hint)))
    return {str: "x", int: 1, float: 1.5, bool: True, Any: [1]}[hint]


# gRPC.


def breaks(before: FileDescriptorSet, after: FileDescriptorSet) -> Iterator[str]:
    """What a program of ``before`` would miss or misread when it talks to one of ``after``."""
    messages, methods = dict(_messages(after)), dict(_methods(after))
    for name, message in _messages(before):
        if name not in messages:
            yield f"message {name} is gone"
            continue
        fields = {field.number: field for field in messages[name].field}
        for field in message.field:
            now = fields.get(field.number)
            if now is None:
                yield f"{name}.{field.name} (number {field.number}) is gone"
                continue
            for what in ("name", "type", "type_name", "label"):
                if getattr(now, what) != getattr(field, what):
                    old_value, new_value = getattr(field, what), getattr(now, what)
                    yield f"{name}.{field.name}: its {what} was {old_value} and is {new_value}"
            if _oneof(message, field) != _oneof(messages[name], now):
                yield f"{name}.{field.name} has moved into or out of a oneof"
    for name, method in _methods(before):
        if name not in methods:
            yield f"rpc {name} is gone"
        elif methods[name] != method:
            yield f"rpc {name} takes or returns something else"


def _messages(
    files: FileDescriptorSet,
) -> Iterator[tuple[str, DescriptorProto]]:
    for file in files.file:
        waiting = [(f"{file.package}.{message.name}", message) for message in file.message_type]
        while waiting:
            name, message = waiting.pop()
            yield name, message
            waiting += [(f"{name}.{inner.name}", inner) for inner in message.nested_type]


def _methods(files: FileDescriptorSet) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for file in files.file:
        for service in file.service:
            for method in service.method:
                shape = (
                    method.input_type,
                    method.output_type,
                    method.client_streaming,
                    method.server_streaming,
                )
                yield f"{file.package}.{service.name}/{method.name}", shape


def _oneof(message: DescriptorProto, field: FieldDescriptorProto) -> str:
    return message.oneof_decl[field.oneof_index].name if field.HasField("oneof_index") else ""


def kept_descriptors() -> FileDescriptorSet:
    return FileDescriptorSet.FromString((old.RELEASES / f"{old.FORMER}.protos").read_bytes())


def test_no_message_field_or_rpc_of_the_former_release_has_changed() -> None:
    assert list(breaks(kept_descriptors(), descriptors(old.current()))) == []


def test_the_kept_descriptors_are_those_of_the_wheel(former: Release) -> None:
    assert descriptors(former) == kept_descriptors()


def test_every_kind_of_break_would_be_seen() -> None:
    before, after = kept_descriptors(), kept_descriptors()
    by_name = dict(_messages(after))
    header = by_name["dtrain.v1.Header"].field
    header[0].name, header[1].number, header[2].type = "renamed", 77, header[3].TYPE_BYTES
    by_name["dtrain.v1.Command"].field[1].ClearField("oneof_index")
    del after.file[0].service[0].method[0]
    del after.file[1].message_type[0]
    told = "\n".join(breaks(before, after))
    for part in (
        "Header.cluster: its name",
        "Header.term (number 2) is gone",
        "Header.job: its type",
        "Command.prepare has moved",
        "rpc dtrain.v1.Agent/Execute is gone",
        f"message dtrain.v1.{before.file[1].message_type[0].name} is gone",
    ):
        assert part in told, told


# Another major version.


@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
def test_a_record_of_another_major_version_is_refused_in_clear_words(kind: type) -> None:
    document = codec.loads(codec.encode(next(examples(kind)))) | {"v": 2}
    with pytest.raises(Refused, match="has version 2; this dtrain reads version 1") as refused:
        codec.decode(kind, json.dumps(document))
    assert (refused.value.code, "upgrade" in (refused.value.fix or "")) == (ErrorCode.BAD_RECORD, True)


def test_a_command_with_a_job_of_another_major_version_is_refused() -> None:
    header = agent_pb2.Header(cluster="c", term=1, job="j", uid="u", attempt=1, id="prepare.1")
    spec = codec.dumps(codec.loads(codec.encode(next(examples(JobSpec)))) | {"v": 2})
    with pytest.raises(Refused, match="JobSpec has version 2"):
        wire.command_from_pb(agent_pb2.Command(header=header, prepare=agent_pb2.Prepare(spec=spec)))


def test_kept_wheels_are_what_their_sums_say() -> None:
    listed = {line.split()[1] for line in (old.RELEASES / "SHA256SUMS").read_text().splitlines()}
    assert {path.name for path in Path(old.RELEASES).glob("*.whl")} == listed
    assert old.wheel_of(old.FORMER).stat().st_size < 1 << 20
