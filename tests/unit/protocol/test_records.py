"""Records survive JSON, keys survive parsing, and bad input is refused with a sentence."""

import dataclasses
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain.protocol import codec, commands, ranklink, wire
from dtrain.protocol.commands import Command, Header
from dtrain.protocol.errors import ErrorCode, Refused
from dtrain.protocol.ids import (
    AgentName,
    Attempt,
    ClusterName,
    JobName,
    Rank,
    ReplicaId,
    Seq,
    Step,
    Term,
    Uid,
    parse_name,
)
from dtrain.protocol.job import Entry, EntryKind, Intent, JobPhase, JobSpec, JobStatus, RestorePoint
from dtrain.protocol.keys import Keys, Parsed
from dtrain.protocol.snapshot import Failure, FailureKind

SPEC = JobSpec(
    JobName("j"), Uid("u"), Entry(EntryKind.SCRIPT, "train.py", ("--lr", "1")), env={"A": "b"}, preload=("x",)
)


@pytest.mark.parametrize("text", ["a", "train-7b", "0", "a" * 63])
def test_ordinary_names_are_accepted(text):
    assert parse_name(text, "job") == text


@pytest.mark.parametrize(
    "text",
    ["", "..", "a/b", "-a", "a-", "A", "a" * 64, "a\n", "ä", "a b", "a\x00", "../../etc/passwd", "a.b"],
)
def test_names_that_could_leave_their_key_or_path_are_refused(text):
    with pytest.raises(Refused) as caught:
        parse_name(text, "job")
    assert caught.value.code == ErrorCode.BAD_NAME
    assert caught.value.fix


@given(st.text())
def test_a_name_never_holds_a_separator(text):
    try:
        name = parse_name(text, "job")
    except Refused:
        return
    assert name.isascii()
    assert not set(name) & set("/.\\ \n\0")


def test_every_key_is_parsed_back_into_what_it_was_built_from():
    keys, job, agent, seq = Keys(ClusterName("c")), JobName("j"), AgentName("a"), Seq(7)
    built = {
        keys.leader: Parsed("leader"),
        keys.coordinator(ReplicaId("r")): Parsed("coordinator", name="r"),
        keys.node(agent): Parsed("node", agent=agent),
        keys.worker(agent, job): Parsed("worker", job=job, agent=agent),
        keys.cordon(agent): Parsed("cordon", agent=agent),
        keys.spec(job): Parsed("spec", job=job),
        keys.intent(job): Parsed("intent", job=job),
        keys.status(job): Parsed("status", job=job),
        keys.latest(job): Parsed("latest", job=job),
        keys.open(job, seq): Parsed("open", job=job, seq=seq),
        keys.checkpoint(job, seq): Parsed("checkpoint", job=job, seq=seq),
        keys.garbage(job, seq): Parsed("garbage", job=job, seq=seq),
        keys.bad(job, seq): Parsed("bad", job=job, seq=seq),
        keys.event(job, 7): Parsed("event", job=job, seq=seq),
        keys.pins(job, seq) + "me": Parsed("pin", job=job, seq=seq, name="me"),
    }
    assert {key: keys.parse(key) for key in built} == built
    assert keys.parse("/dtrain/other/leader") is None
    assert keys.parse(keys.root + "jobs/j/unheard-of") is None


def test_key_order_is_number_order():
    keys = Keys(ClusterName("c"))
    assert sorted([keys.event(JobName("j"), n) for n in (10, 9, 100)]) == [
        keys.event(JobName("j"), n) for n in (9, 10, 100)
    ]


def test_a_record_is_one_readable_line_and_survives():
    status = JobStatus(
        Term(3),
        Uid("u"),
        JobPhase.RUNNING,
        failure=Failure(FailureKind.SIGNAL, "rank 1: killed\nby ä", rank=Rank(1)),
        restore=RestorePoint(Seq(1), Step(2), "m", "d"),
    )
    line = codec.encode(status)
    assert line.startswith(b'{"v":1,')
    assert b"\n" not in line
    assert codec.decode(JobStatus, line) == status
    assert codec.decode(JobSpec, codec.encode(SPEC)) == SPEC


def test_a_newer_writers_fields_are_ignored_but_a_newer_version_is_refused():
    document = codec.loads(codec.encode(SPEC))
    assert codec.decode(JobSpec, codec.dumps({**document, "from_the_future": 1})) == SPEC
    with pytest.raises(Refused, match="version 2"):
        codec.decode(JobSpec, codec.dumps({**document, "v": 2}))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"{", "not valid JSON"),
        (b"[]", "not a JSON object"),
        (b'{"name":"a","name":"b"}', "twice"),
        (b'{"name":NaN}', "not valid JSON"),
        (b'{"name":' + b"[" * 40 + b"]" * 40 + b"}", "nested deeper"),
        (b"[" * 100_000, "not valid JSON"),
        (b'"' + b"a" * 300_000 + b'"', "larger than"),
        (b'{"name":"j","uid":"u","entry":{"kind":"magic","target":"x"}}', "magic"),
        (b'{"name":"j","uid":"u","entry":{"kind":"script","target":"x"},"nnodes_min":"2"}', "nnodes_min"),
        (b'{"name":"j","uid":"u"}', "entry"),
    ],
)
def test_bad_records_are_refused_and_say_what_is_wrong(data, says):
    with pytest.raises(Refused, match=says):
        codec.decode(JobSpec, data)


HEADER = Header(ClusterName("c"), Term(9), JobName("j"), Uid("u"), Attempt(2), "id")
EXAMPLES = {
    "spec": SPEC,
    "header": HEADER,
    "restore": RestorePoint(Seq(3), Step(4), "m", "d"),
    "rendezvous": "h:1",
    "nonce": "n",
    "why": "because",
    "store": "file:///s",
    "manifest": "m",
    "digest": "d",
}


def example(kind):
    values = {}
    for field in dataclasses.fields(kind):
        hint = typing.get_type_hints(kind)[field.name]
        values[field.name] = EXAMPLES.get(field.name, True if hint is bool else 1.5 if hint is float else 5)
    return kind(**values)


@pytest.mark.parametrize("kind", typing.get_args(Command))
def test_every_command_survives_the_wire(kind):
    command = example(kind)
    assert wire.command_from_pb(wire.command_to_pb(command)) == command


def test_a_start_without_a_checkpoint_is_not_a_start_from_checkpoint_zero():
    start = commands.Start(HEADER, "h:1", None)
    assert wire.command_from_pb(wire.command_to_pb(start)) == start


def test_a_line_of_unknown_type_is_refused():
    with pytest.raises(Refused, match="no known type"):
        ranklink.decode_line(b'{"type":"Nonsense"}')
    report = ranklink.Report(ranklink.WorkerPhase.TRAINING, Step(3), metrics={"loss": 0.5})
    assert ranklink.decode_line(ranklink.encode_line(report)) == report


def test_fields_of_a_newer_release_outlive_a_rewrite_by_this_one():
    stored = b'{"v":1,"wanted":"run","uid":"u1","quota":{"gpus":[1,2]},"by":"newer"}'
    intent = codec.decode(Intent, stored)
    again = codec.loads(codec.encode(dataclasses.replace(intent, by=""), over=stored))
    assert again["quota"] == {"gpus": [1, 2]}
    assert "by" not in again, "a field that this release knows is its own to change"
    fresh = dataclasses.replace(intent, uid=Uid("u2"))
    for before in (stored, b"no json", b'{"v":2,"uid":"u2","quota":1}'):
        assert b"quota" not in codec.encode(fresh, over=before)
