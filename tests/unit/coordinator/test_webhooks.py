"""Webhooks: a real receiver hears of each event at least once, whoever leads, and nothing waits for it."""

import hashlib
import hmac
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from dtrain.coordinator import config
from dtrain.coordinator.core.manifest import merge
from dtrain.coordinator.core.plan import plan
from dtrain.coordinator.main import Coordinator
from dtrain.coordinator.webhooks import message, sender
from dtrain.coordinator.webhooks.sender import Sender
from dtrain.coordinator.webhooks.settings import Webhook, load_webhooks
from dtrain.protocol import codec
from dtrain.protocol.cluster import LeaderRecord, WebhookCursor
from dtrain.protocol.errors import DtrainError, ErrorCode, Refused
from dtrain.protocol.events import EventReason, EventRecord, EventType
from dtrain.protocol.ids import ClusterName, JobName, ReplicaId, Term
from dtrain.protocol.keys import Keys
from dtrain.runtime.clock import SystemClock
from dtrain.storage.etcd.memory import MemoryEtcd
from dtrain.storage.etcd.mirror import Mirror
from dtrain.storage.etcd.port import Delete, Put, Txn
from dtrain.storage.etcd.session import FixedSession

CLUSTER, JOB = ClusterName("default"), JobName("digits")
KEYS = Keys(CLUSTER)
SECRET = "a secret of the receiver"
LEASE = 7


class Receiver:
    """A real HTTP server that keeps what it was sent and answers as it is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[dict[str, str], bytes]] = []
        self.answers: list[tuple[int, dict[str, str]]] = []
        """Of the next calls; after them 200."""
        self.silent = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                data = self.rfile.read(int(self.headers["Content-Length"]))
                outer.calls.append((dict(self.headers.items()), data))
                while outer.silent.is_set():
                    time.sleep(0.01)
                status, headers = outer.answers.pop(0) if outer.answers else (200, {})
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/hook?token=hidden"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def ids(self) -> list[str]:
        return [json.loads(data)["id"] for _, data in self.calls]

    def close(self) -> None:
        self.silent.clear()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.close()


class World:
    """etcd with events of a job, and replicas that follow it."""

    def __init__(self) -> None:
        self.etcd = MemoryEtcd(time.monotonic)
        self.seq = 0
        self.term = Term(0)
        self.lines: list[tuple[str, dict[str, Any]]] = []
        self._ends: list[Callable[[], None]] = []
        self.win()

    def win(self) -> Term:
        """Somebody becomes leader; whoever led does not any more."""
        self.etcd.txn(Txn(success=(Delete(KEYS.leader),)))
        record = LeaderRecord(ReplicaId("c1"), "h:1", "n")
        self.term = Term(self.etcd.txn(Txn(success=(Put(KEYS.leader, codec.encode(record)),))).revision)
        return self.term

    def happen(self, reason: EventReason = EventReason.JOB_FAILED, *, warning: bool = True) -> str:
        """The leader records an event; returns its id."""
        self.seq += 1
        kind = EventType.WARNING if warning else EventType.NORMAL
        event = EventRecord(self.term, self.seq, kind, reason, "rank 3 on <gpu>: killed", "rank/3")
        self.etcd.txn(Txn(success=(Put(KEYS.event(JOB, self.seq), codec.encode(event)),)))
        return f"{CLUSTER}/{JOB}/{self.seq}"

    def lead(self, hook: Webhook, *, term: Term | None = None) -> Sender:
        """A replica with that webhook leads under ``term``."""
        mine = term or self.term
        holder: list[Sender] = []
        mirror = Mirror(
            self.etcd,
            KEYS.root,
            on_changes=lambda changes, _revision: holder[0].note(changes) if holder else None,
            on_alarm=lambda error: None,
            clock=SystemClock(),
        )
        made = Sender(
            hook,
            CLUSTER,
            self.etcd,
            mirror,
            SystemClock(),
            term=lambda: mine if mine == self.term else None,
            log=lambda event, **fields: self.lines.append((event, fields)),
        )
        holder.append(made)
        mirror.start()
        thread = threading.Thread(target=made.run, daemon=True)
        thread.start()

        def end() -> None:
            made.stop()
            thread.join(5.0)
            mirror.close()

        self._ends.append(end)
        return made

    def cursor(self, name: str = "ops") -> int:
        items = self.etcd.range(KEYS.webhook(name)).items
        return codec.decode(WebhookCursor, items[0].value).revision if items else -1

    def close(self) -> None:
        for end in self._ends:
            end()


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.close()


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sender, "RETRY_S_FIRST", 0.02)
    monkeypatch.setattr(sender, "RETRY_S_MAX", 0.05)
    monkeypatch.setattr(sender, "LOOK_S", 0.05)


def until(true: Callable[[], bool], what: str = "it") -> None:
    end = time.monotonic() + 20.0
    while not true():
        assert time.monotonic() < end, f"{what} did not come about"
        time.sleep(0.005)


def hook(receiver: Receiver, **more: Any) -> Webhook:
    return Webhook("ops", receiver.url, SECRET, **more)


def test_an_event_arrives_with_text_id_and_a_signature_that_fits(world: World, receiver: Receiver) -> None:
    world.lead(hook(receiver))
    until(lambda: world.cursor() > 0)
    told = world.happen()
    until(lambda: len(receiver.calls) == 1)
    headers, data = receiver.calls[0]
    found = json.loads(data)
    assert found["text"] == ":warning: *digits* JobFailed (rank/3): rank 3 on &lt;gpu&gt;: killed"
    assert (found["id"], found["job"], found["event"]["reason"]) == (told, "digits", "JobFailed")
    signed = headers["X-Dtrain-Timestamp"].encode() + b"." + data
    expected = hmac.new(SECRET.encode(), signed, hashlib.sha256).hexdigest()
    assert headers["X-Dtrain-Signature"] == f"sha256={expected}"
    assert headers["X-Dtrain-Event"] == told


def test_what_happened_before_a_webhook_was_named_is_no_news(world: World, receiver: Receiver) -> None:
    world.happen()
    world.lead(hook(receiver))
    until(lambda: world.cursor() > 0)
    told = world.happen()
    until(lambda: receiver.ids() == [told])


def test_only_what_is_wanted_is_told(world: World, receiver: Receiver) -> None:
    world.lead(hook(receiver, reasons=frozenset({EventReason.MASS_LOSS, EventReason.RESTORED})))
    until(lambda: world.cursor() > 0)
    world.happen(EventReason.JOB_FAILED)
    first = world.happen(EventReason.RESTORED, warning=False)
    last = world.happen(EventReason.MASS_LOSS)
    until(lambda: receiver.ids() == [first, last])


def test_a_receiver_that_fails_hears_of_it_again_until_it_takes_it(world: World, receiver: Receiver) -> None:
    world.lead(hook(receiver))
    until(lambda: world.cursor() > 0)
    receiver.answers = [(500, {}), (503, {}), (429, {}), (404, {})]
    told = [world.happen(), world.happen()]
    until(lambda: len(receiver.calls) == 6)
    assert receiver.ids() == [told[0]] * 5 + [told[1]]
    assert [call["X-Dtrain-Try"] for call, _ in receiver.calls] == ["1", "2", "3", "4", "5", "1"]


def test_an_event_that_is_refused_for_good_does_not_hold_up_the_others(
    world: World, receiver: Receiver
) -> None:
    world.lead(hook(receiver))
    until(lambda: world.cursor() > 0)
    receiver.answers = [(400, {})] * sender.REFUSED_TIMES_MAX
    told = [world.happen(), world.happen()]
    until(lambda: receiver.ids()[-1:] == [told[1]])
    assert receiver.ids().count(told[0]) == sender.REFUSED_TIMES_MAX


def test_a_receiver_that_was_away_for_long_and_stumbles_once_has_not_refused(
    world: World, receiver: Receiver
) -> None:
    world.lead(hook(receiver))
    until(lambda: world.cursor() > 0)
    receiver.answers = [(503, {})] * (2 * sender.REFUSED_TIMES_MAX) + [(400, {})]
    told = world.happen()
    until(lambda: len(receiver.calls) == 2 * sender.REFUSED_TIMES_MAX + 2)
    assert set(receiver.ids()) == {told}
    until(lambda: world.cursor() >= world.etcd.range(KEYS.event(JOB, 1)).items[0].mod_revision)


def test_a_redirect_is_not_followed(world: World, receiver: Receiver) -> None:
    other = Receiver()
    world.lead(hook(receiver))
    until(lambda: world.cursor() > 0)
    receiver.answers = [(307, {"Location": other.url})]
    world.happen()
    until(lambda: len(receiver.calls) == 2)
    assert other.calls == []
    other.close()


def test_a_new_leader_neither_forgets_nor_begins_anew(world: World, receiver: Receiver) -> None:
    world.lead(hook(receiver))
    until(lambda: world.cursor() > 0)
    early = [world.happen() for _ in range(3)]
    until(lambda: receiver.ids() == early)
    until(lambda: world.cursor() >= world.etcd.range(KEYS.event(JOB, 3)).items[0].mod_revision)
    world.win()
    between = [world.happen() for _ in range(2)]
    time.sleep(0.2)
    assert receiver.ids() == early, "who leads no more sends nothing"
    world.lead(hook(receiver))
    until(lambda: receiver.ids() == early + between)
    late = world.happen()
    until(lambda: receiver.ids() == [*early, *between, late])


def test_a_leader_that_dies_before_its_cursor_is_written_leaves_a_repetition_with_the_same_id(
    world: World, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.lead(hook(receiver))
    until(lambda: world.cursor() > 0)
    receiver.silent.set()
    told = world.happen()
    until(lambda: len(receiver.calls) == 1)
    world.win()
    receiver.silent.clear()
    world.lead(hook(receiver))
    until(lambda: receiver.ids() == [told, told])


def test_a_deposed_leader_cannot_move_the_cursor(world: World, receiver: Receiver) -> None:
    first = world.lead(hook(receiver))
    until(lambda: world.cursor() > 0)
    before = world.cursor()
    old = world.term
    world.win()
    first._term = lambda: old  # it does not know yet
    world.happen()
    until(lambda: len(receiver.calls) >= 1)
    time.sleep(0.2)
    assert world.cursor() == before


def test_an_etcd_that_takes_no_cursor_makes_nobody_hear_twice(world: World, receiver: Receiver) -> None:
    world.lead(hook(receiver))
    until(lambda: world.cursor() > 0)
    before, real = world.cursor(), world.etcd.txn

    def full(txn: Txn, **more: Any) -> Any:
        if any(isinstance(one, Put) and one.key == KEYS.webhook("ops") for one in txn.success):
            raise Refused(ErrorCode.ETCD_NO_SPACE, "etcd is full")
        return real(txn, **more)

    world.etcd.txn = full  # type: ignore[method-assign]
    told = [world.happen(), world.happen()]
    until(lambda: receiver.ids() == told)
    time.sleep(0.3)
    assert receiver.ids() == told
    assert world.cursor() == before
    assert [event for event, _ in world.lines] == ["webhook waits for etcd"], "told once"
    world.etcd.txn = real  # type: ignore[method-assign]
    until(lambda: world.cursor() > before)
    assert receiver.ids() == told


def test_what_waits_for_a_dead_receiver_is_bounded(
    world: World, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender, "DUE_MAX", 3)
    made = world.lead(hook(receiver))
    until(lambda: world.cursor() > 0)
    receiver.silent.set()
    told = [world.happen()]
    until(lambda: len(receiver.calls) == 1)
    told += [world.happen() for _ in range(20)]
    receiver.silent.clear()
    until(lambda: receiver.ids() == told)
    until(lambda: not made._due)


def test_a_dead_receiver_delays_nothing(world: World, receiver: Receiver) -> None:
    """Neither another webhook nor whoever tells of changes."""
    dead = Receiver()
    dead.silent.set()
    stuck = world.lead(Webhook("stuck", dead.url))
    world.lead(hook(receiver))
    until(lambda: world.cursor() > 0 and world.cursor("stuck") > 0)
    told = world.happen()
    until(lambda: len(dead.calls) == 1)
    until(lambda: receiver.ids() == [told])
    began = time.monotonic()
    for _ in range(1000):
        stuck.note(())
    assert time.monotonic() - began < 1.0
    dead.close()


def test_neither_url_nor_secret_is_in_records_or_lines(world: World, receiver: Receiver) -> None:
    receiver.close()
    one = hook(receiver)
    made = world.lead(one)
    until(lambda: world.cursor() > 0)
    world.happen()
    until(lambda: bool(world.lines))
    made._failing_since = -1e9
    stored = b"".join(kv.value for kv in world.etcd.range("/", "0").items)
    shown = f"{one!r} {world.lines!r} {made.problem()} {stored!r}"
    assert "webhook ops has taken nothing" in made.problem()
    assert "hidden" not in shown
    assert SECRET not in shown


def test_a_whole_replica_tells_its_receiver(receiver: Receiver, tmp_path: Path) -> None:
    file = tmp_path / "hooks.json"
    file.write_text(json.dumps({"webhooks": [{"name": "ops", "url": receiver.url, "secret": SECRET}]}))
    etcd = MemoryEtcd(time.monotonic)
    etcd.grant(600, LEASE)
    settings = config.load(
        ["--listen", "127.0.0.1:0", "--id", "c1", "--dashboard-listen", "", "--webhook-file", str(file)], {}
    )
    replica = Coordinator(
        settings,
        etcd,
        FixedSession(LEASE),
        clock=SystemClock(),
        decide=plan,
        merge_manifests=merge,
        end_process=lambda _code: None,
    )
    replica.start()
    try:
        until(lambda: bool(etcd.range(KEYS.webhook("ops")).items))
        event = EventRecord(Term(1), 1, EventType.WARNING, EventReason.MASS_LOSS, "4 of 9 agents vanished")
        etcd.txn(Txn(success=(Put(KEYS.event(JOB, 1), codec.encode(event)),)))
        until(lambda: receiver.ids() == [f"{CLUSTER}/{JOB}/1"])
    finally:
        replica.resign()
        replica.close()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("nonsense", "is not"),
        ('{"webhooks": [{"name": "ops", "url": "ftp://h/hidden"}]}', "is not http:// or https://"),
        ('{"webhooks": [{"name": "ops", "url": "http://h/a b"}]}', "no URL has"),
        ('{"webhooks": [{"name": "ops", "url": "http://h:hidden/"}]}', "needs a name"),
        ('{"webhooks": [{"name": "Ops!", "url": "http://h/"}]}', "needs a name"),
        ('{"webhooks": [{"name": "ops", "url": "http://h/", "reasons": ["Nonsense"]}]}', "no reason of"),
        ('{"webhooks": [{"name": "ops", "url": "http://h/", "more": 1}]}', "may have"),
        ('{"webhooks": [{"name": "a", "url": "http://h"}, {"name": "a", "url": "http://h"}]}', "twice"),
    ],
)
def test_a_wrong_file_is_refused_without_showing_what_it_holds(tmp_path: Path, text: str, why: str) -> None:
    file = tmp_path / "hooks.json"
    file.write_text(text)
    with pytest.raises(DtrainError, match=why) as refused:
        load_webhooks(str(file))
    assert "hidden" not in refused.value.message


def test_the_signature_is_of_time_and_body() -> None:
    one = message.signature("s", "1", b"{}")
    assert one == message.signature("s", "1", b"{}")
    assert len({one, message.signature("s", "2", b"{}"), message.signature("t", "1", b"{}")}) == 3
