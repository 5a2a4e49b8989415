"""Everything that is parsed: bounded, finite, and never a way out of its folder or key."""

import contextlib
import gzip
import hashlib
import json
import time
from dataclasses import replace
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain.agent.core.failures import error_message
from dtrain.agent.logs import RankLogs
from dtrain.agent.reporter import fit
from dtrain.cli import jobfile, output, terminal, yamlmarks
from dtrain.cli.complaint import Complaint
from dtrain.cli.render.table import Table
from dtrain.coordinator.api import validate
from dtrain.coordinator.core.manifest import merge
from dtrain.coordinator.work import MANIFEST_BYTES_UNPACKED_MAX, Stores, Worker, unpack
from dtrain.protocol import codec, ranklink, wire
from dtrain.protocol.checkpoint import MANIFEST_BYTES_MAX, BlobEntry, blob_prefix
from dtrain.protocol.errors import ErrorCode, Refused
from dtrain.protocol.ids import AgentName, Attempt, Incarnation, JobName, Rank, Uid, parse_name, parse_token
from dtrain.protocol.job import Entry, EntryKind, Intent, JobSpec
from dtrain.protocol.keys import Keys
from dtrain.protocol.pb import agent_pb2 as pb
from dtrain.protocol.snapshot import SNAPSHOT_BYTES_MAX, Failure, FailureKind, WorkerPhase, WorkerSnapshot
from dtrain.runtime.clock import SystemClock
from dtrain.storage.blobs.port import check_key
from dtrain.storage.etcd.memory import MemoryEtcd
from tests.unit.coordinator.test_work import CLUSTER, ROOT, Store, opened, verify, write_rank

EVIL_NAMES = [
    "..",
    "a/b",
    "a\nb",
    "a\x00b",
    "a\x1b[2J",
    "",
    "-a",
    "A",
    "a" * 64,
    "ａ",
    "a\u202e",
    "a ",
]

# JSON


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"[" * 100_000, "JSON"),
        (b"[" * 40 + b"]" * 40, "deeper"),
        (b'{"a":' * 40 + b"1" + b"}" * 40, "deeper"),
        (b'{"a":1,"a":2}', "twice"),
        (b'{"a":NaN}', "NaN"),
        (b'{"a":-Infinity}', "Infinity"),
        (b'{"a":1e999}', "too large"),
        (b'{"a":' + b"9" * 5000 + b"}", "digits"),
        (b"\xff\xfe", "JSON"),
        (b'"' + b"x" * codec.RECORD_BYTES_MAX + b'"', "larger"),
    ],
)
def test_json_that_could_hurt_is_refused_with_a_sentence(text: bytes, says: str) -> None:
    with pytest.raises(Refused) as caught:
        codec.loads(text)
    assert caught.value.code is ErrorCode.BAD_RECORD
    assert says in caught.value.message
    assert len(caught.value.message) < 300


def test_a_million_values_are_counted_before_they_are_made() -> None:
    text = b"[" + b"0," * (codec.ITEMS_MAX + 1) + b"0]"
    began = time.monotonic()
    with pytest.raises(Refused, match="values"):
        codec.loads(text, bytes_max=len(text))
    assert time.monotonic() - began < 20.0


def test_what_cannot_be_parsed_is_not_kept_in_the_error() -> None:
    secret = "hunter2-hunter2"
    with pytest.raises(Refused) as caught:
        codec.loads(json.dumps({"password": secret})[:-1])
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    assert secret not in repr(caught.value)


@pytest.mark.parametrize("number", [2**63, -(2**63) - 1, 10**400])
def test_an_integer_that_fits_nowhere_is_refused(number: int) -> None:
    snapshot = {"agent": "a", "uid": "u", "incarnation": "i", "attempt": number, "phase": "IDLE"}
    with pytest.raises(Refused, match="64 bits"):
        codec.decode(WorkerSnapshot, json.dumps(snapshot))


def test_text_that_no_encoding_knows_reaches_nobody() -> None:
    """A file name that is no UTF-8 in a rank's message once ended the agent that reported it."""
    message = error_message(json.dumps({"message": {"message": "no such file: /data/\udcff"}}))
    failure = Failure(FailureKind.EXCEPTION, message)
    mine = WorkerSnapshot(
        AgentName("a"), Uid("u"), Incarnation("i"), Attempt(1), WorkerPhase.ERROR, failure=failure
    )
    read = codec.decode(WorkerSnapshot, fit(mine))
    assert read.failure is not None
    assert read.failure.message == "no such file: /data/?"
    read.failure.message.encode()


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200) | st.text(max_size=100).map(lambda text: text.encode(errors="replace")))
def test_no_bytes_make_a_parser_raise_anything_but_a_refusal(data: bytes) -> None:
    for parse in (
        codec.loads,
        lambda found: codec.decode(WorkerSnapshot, found),
        lambda found: codec.decode(JobSpec, found),
        ranklink.decode_line,
        unpack,
    ):
        with contextlib.suppress(Refused):
            parse(data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
FIELDS = ["agent", "uid", "attempt", "phase", "ranks", "failure", "durable", "message", "kind", "v", "type"]


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=11))
def test_no_json_makes_a_record_raise_anything_but_a_refusal(document: dict[str, object]) -> None:
    text = json.dumps(document)
    for kind in (WorkerSnapshot, JobSpec, Intent):
        with contextlib.suppress(Refused):
            codec.encode(codec.decode(kind, text))


# Names


@pytest.mark.parametrize("name", EVIL_NAMES)
def test_no_name_leaves_its_key_or_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(Refused):
        parse_name(name, "job")
    keys = Keys(CLUSTER)
    assert keys.parse(f"{keys.root}agents/{name}/node") is None
    assert keys.parse(f"{keys.root}cordons/{name}") is None
    with pytest.raises(Refused):
        RankLogs(tmp_path).find(name, "u1", 1, 0, "stdout")
    for header in (
        pb.Header(cluster=name, job="j", uid="u"),
        pb.Header(cluster="c", job=name, uid="u"),
    ):
        with pytest.raises(Refused) as caught:
            wire.command_from_pb(pb.Command(header=header, stop=pb.Stop()))
        assert caught.value.code is ErrorCode.BAD_NAME
        assert "\n" not in caught.value.message
        assert "\x1b" not in caught.value.message


@pytest.mark.parametrize("token", ["", "..", "a/b", "../x", "a\n", "é", "x" * 65])
def test_no_uid_or_nonce_leaves_its_folder(token: str) -> None:
    with pytest.raises(Refused):
        parse_token(token, "nonce")
    header = pb.Header(cluster="c", job="j", uid="u")
    with pytest.raises(Refused):
        wire.command_from_pb(pb.Command(header=header, begin_checkpoint=pb.BeginCheckpoint(nonce=token)))
    with pytest.raises(Refused):
        wire.command_from_pb(pb.Command(header=pb.Header(cluster="c", job="j", uid=token), stop=pb.Stop()))


def test_a_number_in_a_key_is_a_short_ascii_one() -> None:
    keys = Keys(CLUSTER)
    for number in ("9" * 5000, "٣", "-1", "1e3", ""):
        assert keys.parse(f"{keys.root}jobs/train/checkpoints/{number}") is None


def test_a_newline_in_a_job_name_does_not_get_into_a_cluster() -> None:
    document = json.dumps({"v": 1, "name": "a\nb", "uid": "u", "entry": {"kind": "script", "target": "t.py"}})
    with pytest.raises(Refused) as caught:
        validate.check(codec.decode(JobSpec, document))
    assert "\n" not in caught.value.message


def spec(**changes: object) -> JobSpec:
    values = {
        "name": JobName("train"),
        "uid": Uid("u1"),
        "entry": Entry(EntryKind.SCRIPT, "train.py"),
        "working_dir": "/srv",
        **changes,
    }
    return JobSpec(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {"entry": Entry(EntryKind.SCRIPT, "t.py", ("x",) * (validate.ARGS_MAX + 1))},
        {"entry": Entry(EntryKind.SCRIPT, "t.py", ("x" * (validate.TEXT_BYTES_MAX + 1),))},
        {"entry": Entry(EntryKind.SCRIPT, "t.py", ("a\0b",))},
        {"env": {f"V{i}": "" for i in range(validate.ENV_VARIABLES_MAX + 1)}},
        {"env": {"V": "x" * (validate.ENV_BYTES_MAX + 1)}},
        {"env": {"A=B": "c"}},
        {"env": {"": "c"}},
        {"preload": ("os; import evil",)},
        {"preload": ("torch",) * (validate.PRELOAD_MAX + 1)},
        {"nnodes_max": validate.NODES_MAX + 1},
        {"nproc_per_node": 10**9},
        {"shutdown_grace_s": float("inf")},
        {"working_dir": "relative"},
    ],
)
def test_a_job_of_unreasonable_size_or_shape_is_refused(changes: dict[str, object]) -> None:
    validate.check(spec())
    with pytest.raises(Refused) as caught:
        validate.check(spec(**changes))
    assert len(caught.value.message) < 300


# Manifests and blobs


@pytest.mark.parametrize("key", ["../other", "/etc/passwd", "a/../b", "a//b", ".hidden", "a\nb", "é", ""])
def test_no_blob_key_leaves_the_store(key: str) -> None:
    with pytest.raises(ValueError, match="bad blob key"):
        check_key(key)


class Reads(Store):
    """Remembers what was read."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []

    def get(self, key: str, *, offset: int = 0, length: int | None = None) -> bytes:
        self.reads.append(key)
        return super().get(key, offset=offset, length=length)


@pytest.fixture
def store() -> Reads:
    return Reads()


@pytest.fixture
def worker(store: Reads) -> Worker:
    return Worker(MemoryEtcd(lambda: 0.0), Stores(lambda _uri: store), merge, SystemClock())


def test_an_agents_manifest_that_names_blobs_outside_its_checkpoint_is_refused(
    store: Reads, worker: Worker
) -> None:
    evil = ("elsewhere/x.st", "{}/../../other/x.st", "{}x/y.st", "/etc/passwd", "{}/\n")
    for seq, key in enumerate(evil, 1):
        record = opened(seq)
        prefix = blob_prefix(ROOT, record.seq, record.attempt, record.nonce)
        entry = BlobEntry(key.format(prefix), Rank(1), 16, "00000000", ("00000000",))
        parts = [write_rank(store, record, 0), write_rank(store, record, 1, blobs=(entry,))]
        verdict = verify(worker, record, parts)
        assert (verdict.ok, verdict.retry) == (False, False), key
        assert "not of this checkpoint" in verdict.problem
        assert "\n" not in verdict.problem


def test_a_report_of_a_manifest_outside_its_checkpoint_is_refused(store: Reads, worker: Worker) -> None:
    record = opened(world=1)
    part = write_rank(store, record, 0)
    for key in ("../secrets", "other/job/manifest.json.gz", "", part.manifest + "/../x"):
        verdict = verify(worker, record, [replace(part, manifest=key)])
        assert (verdict.ok, verdict.retry) == (False, False), key


def test_a_manifest_of_more_than_8_mib_is_not_even_read(store: Reads, worker: Worker) -> None:
    record = opened(world=1)
    part = write_rank(store, record, 0)
    store.write(f"{part.manifest}.big", b"\0" * (MANIFEST_BYTES_MAX + 1))
    store.reads.clear()
    verdict = verify(worker, record, [replace(part, manifest=f"{part.manifest}.big")])
    assert not verdict.ok
    assert "the limit is" in verdict.problem
    assert store.reads == []


def test_a_manifest_that_unpacks_to_gigabytes_is_not_unpacked() -> None:
    """A zip bomb: manifests are the only packed thing that anybody reads."""
    bomb = gzip.compress(b"\0" * (MANIFEST_BYTES_UNPACKED_MAX + 1024), compresslevel=9)
    assert len(bomb) < MANIFEST_BYTES_MAX
    with pytest.raises(Refused, match="unpacks to more"):
        unpack(bomb)


def test_a_manifest_of_a_million_entries_is_refused_before_it_becomes_objects(
    store: Reads, worker: Worker
) -> None:
    record = opened(world=1)
    part = write_rank(store, record, 0)
    entry = '{"dtype":"F32","shape":[1,1],"chunks":[{"o":[0,0],"s":[1,1],"b":0,"off":0,"len":4}]}'
    text = '{"tensors":{' + ",".join(f'"{i}":{entry}' for i in range(1_000_000)) + "}}"
    packed = gzip.compress(text.encode(), compresslevel=6)
    assert len(packed) < MANIFEST_BYTES_MAX
    store.write(f"{part.manifest}x", packed)
    began = time.monotonic()
    verdict = verify(
        worker,
        record,
        [replace(part, manifest=f"{part.manifest}x", digest=hashlib.sha256(packed).hexdigest())],
    )
    assert not verdict.ok
    assert "values" in verdict.problem or "unpacks to more" in verdict.problem
    assert time.monotonic() - began < 60.0


# Records of agents


def test_a_snapshot_is_cut_to_its_limit_before_etcd_sees_it() -> None:
    tail = "x" * 100_000
    failure = Failure(FailureKind.EXCEPTION, "boom", log_tail=tail)
    big = WorkerSnapshot(
        AgentName("a"), Uid("u"), Incarnation("i"), Attempt(1), WorkerPhase.ERROR, failure=failure
    )
    assert len(fit(big)) <= SNAPSHOT_BYTES_MAX


def test_a_rank_may_not_send_lines_without_end() -> None:
    with pytest.raises(Refused):
        ranklink.decode_line(b'{"type":"Report","metrics":{' + b"x" * ranklink.LINE_BYTES_MAX)


# YAML

ALIASES = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
"""A few lines that stand for 9 ** 12 values."""


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: !!python/object/apply:os.system ['true']", "tag"),
        ("a: !!python/name:os.system", "tag"),
        ("a: !!binary aGk=", "tag"),
        ("a: " + "[" * 50 + "]" * 50, "deeper"),
        ("a: " + "[" * 100_000, "deep"),
        ("a: &a [*a]", "itself"),
        (ALIASES, "values"),
        ("a: 1\na: 2", "twice"),
        ("a: " + "9" * 5000, "digits"),
        ("<<: {a: 1}", "merge keys"),
        ("a: 1\n---\nb: 2", "YAML"),
    ],
)
def test_yaml_that_could_hurt_is_a_problem_with_a_place(text: str, says: str) -> None:
    began = time.monotonic()
    document = yamlmarks.parse(text)
    assert any(says in problem.message for problem in document.problems), document.problems[:3]
    assert time.monotonic() - began < 60.0


def test_an_endless_job_file_is_not_read_to_its_end() -> None:
    with pytest.raises(jobfile.BadJobFile) as caught:
        jobfile.read(Path("/dev/zero"))
    assert "larger than" in caught.value.details[0]


# What terminals get


EVIL = "ok\nFAKE LINE\r\x1b[2J\x1b]52;c;ZXZpbA==\x07\u202edlrow\x9b1m\udcff"


def test_prose_of_others_cannot_move_a_terminal() -> None:
    shown = terminal.text(EVIL)
    assert shown == r"ok\nFAKE LINE\r\x1b[2J\x1b]52;c;ZXZpbA==\x07\u202edlrow\x9b1m\udcff"
    assert terminal.text("plain text, ünïcode – too\t") == "plain text, ünïcode – too\t"


def test_tables_details_and_errors_are_made_harmless() -> None:
    table = Table(("NAME", "REASON"), (("a", EVIL),))
    texts = [*table.lines(), *output.coloured([EVIL]), Complaint(1, "DT-1", EVIL, EVIL, EVIL).as_text()]
    for text in texts:
        assert "\x1b" not in text
        assert "FAKE LINE" not in [line.strip() for line in text.split("\n")]
        text.encode()
    assert len(table.lines()) == 2


def test_what_is_said_on_stderr_is_made_harmless() -> None:
    runner = CliRunner()
    result = runner.invoke(click.command()(lambda: output.say(EVIL)))
    assert result.stderr.count("\n") == 1
    assert "\x1b" not in result.stderr


def test_a_log_on_a_terminal_keeps_its_colours_and_loses_its_tricks() -> None:
    line = b"\x1b[31;1mred\x1b[0m\r50%\t\x1b]0;title\x07\x1b[2J\x08\xc2\x9b1m caf\xc3\xa9\n"
    assert terminal.log(line) == (
        b"\x1b[31;1mred\x1b[0m\r50%\t\\x1b]0;title\\x07\\x1b[2J\\x08\\xc2\\x9b1m caf\xc3\xa9\n"
    )
