"""Where notices of preemption come from: real files, and a real server that answers as clouds do."""

import email.utils
import importlib.metadata
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from dtrain.agent import notice_http, notices
from dtrain.agent.notice_value import REASON_CHARS_MAX, Notice, epoch_s
from dtrain.protocol.errors import Refused
from dtrain.runtime.clock import SystemClock

NOW = 1_800_000_000.0
"""What the machine believes the time to be."""

Handler = Callable[[str, str, dict[str, str]], tuple[int, str]]


class Cloud:
    """An HTTP server on loopback; ``answer`` gets method, path and headers. ``ahead_s``: of its clock."""

    def __init__(self) -> None:
        self.answer: Handler = lambda _method, _path, _headers: (404, "")
        self.asked: list[tuple[str, str]] = []
        self.now = NOW
        cloud = self

        class Handling(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                cloud.asked.append((self.command, self.path))
                headers = {name.lower(): value for name, value in self.headers.items()}
                status, body = cloud.answer(self.command, self.path, headers)
                self.send_response(status)
                self.send_header("Content-Length", str(len(body.encode())))
                self.end_headers()
                self.wfile.write(body.encode())

            do_GET = do_PUT = handle_any  # noqa: N815 - the names are the library's

            def date_time_string(self, timestamp: float | None = None) -> str:
                return email.utils.formatdate(cloud.now, usegmt=True)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handling)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(5)


@pytest.fixture
def cloud() -> Iterator[Cloud]:
    made = Cloud()
    yield made
    made.close()


def look(word: str, now: float = NOW) -> Notice | None:
    return notices.parse(word).look(now)


# Files ------------------------------------------------------------------------------


def test_a_file_that_appears_is_a_notice(tmp_path: Path) -> None:
    path = tmp_path / "preempted"
    for word in (str(path), f"file:{path}", f"file://{path}"):
        assert look(word) is None
    assert look(str(tmp_path / "no" / "such" / "folder")) is None
    path.touch()
    for word in (str(path), f"file:{path}", f"file://{path}"):
        assert look(word) == Notice(f"preemption notice: {path}")


@pytest.mark.parametrize(
    ("text", "reason", "left_s"),
    [
        ("", None, None),
        ("spot market\n", "spot market", None),
        ("120", None, 90.0),
        ("120 spot market", "spot market", 90.0),
        ("2027-01-15T08:02:00Z\nspot market", "spot market", 120.0),
        ("2027-01-15T08:02:00", None, 120.0),
        ("rack 7 loses power", "rack 7 loses power", None),
        ("a\x00b\x1b[31mc", "a b [31mc", None),
    ],
)
def test_a_file_may_say_why_and_when(
    tmp_path: Path, text: str, reason: str | None, left_s: float | None
) -> None:
    path = tmp_path / "preempted"
    path.write_text(text)
    os.utime(path, (NOW - 30, NOW - 30))
    found = look(str(path))
    assert found == Notice(f"preemption notice: {reason or path}", left_s)


def test_a_file_that_is_huge_or_none_of_ours_is_still_a_notice(tmp_path: Path) -> None:
    path = tmp_path / "preempted"
    path.write_bytes(os.urandom(1_000_000))
    found = look(str(path))
    assert found is not None
    assert len(found.reason) < REASON_CHARS_MAX + 32
    assert found.reason.isprintable()
    os.mkfifo(tmp_path / "pipe")
    assert look(str(tmp_path / "pipe")) is not None
    assert look(str(tmp_path)) is not None


# HTTP -------------------------------------------------------------------------------


def test_any_url_is_a_notice_once_it_answers_with_200(cloud: Cloud) -> None:
    word = f"{cloud.url}/preempted?key=secret"
    for status in (204, 404, 410):
        cloud.answer = lambda _method, _path, _headers, status=status: (status, "")  # type: ignore[misc]
        assert look(word) is None
    cloud.answer = lambda _method, _path, _headers: (200, "")
    found = look(word)
    assert found == Notice(f"preemption notice from {cloud.url}/preempted")
    assert cloud.asked[-1] == ("GET", "/preempted?key=secret")
    for status in (302, 403, 500, 503):
        cloud.answer = lambda _method, _path, _headers, status=status: (status, "")  # type: ignore[misc]
        with pytest.raises(notice_http.NoticeFailed):
            look(word)


def test_what_stands_behind_the_hash_has_to_match(cloud: Cloud) -> None:
    cloud.answer = lambda _method, _path, _headers: (200, '{"state": "ok"}')
    assert look(f"{cloud.url}/#gone|going") is None
    cloud.answer = lambda _method, _path, _headers: (200, '{"state": "going away"}')
    assert look(f"{cloud.url}/#gone|going") is not None
    assert look(f"{cloud.url}/#going%20aw%2C?ay") is not None


def test_an_answer_that_never_ends_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notice_http, "CALL_S_MAX", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(TimeoutError):
            look(f"http://127.0.0.1:{port}/")

        def drip() -> None:
            # The one before has been given up.
            silent.accept()[0].close()
            connection, _ = silent.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
                end = time.monotonic() + 10
                try:
                    while time.monotonic() < end:
                        connection.sendall(b"x")
                        time.sleep(0.02)
                except OSError:
                    pass

        thread = threading.Thread(target=drip, daemon=True)
        thread.start()
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            look(f"http://127.0.0.1:{port}/")
        assert time.monotonic() - began < 5
        thread.join(10)


def test_of_a_long_answer_a_part_is_read(cloud: Cloud) -> None:
    cloud.answer = lambda _method, _path, _headers: (200, "x" * 10_000_000 + "last")
    assert look(cloud.url) is not None
    assert look(f"{cloud.url}/#last") is None


def test_metadata_is_never_asked_through_a_proxy(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    cloud.answer = lambda _method, _path, _headers: (200, "")
    assert look(cloud.url) is not None


class Imds:
    """AWS's service: a token, then the action."""

    def __init__(self) -> None:
        self.token = "t1"
        self.action: dict[str, str] | None = None

    def __call__(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, str]:
        if path == "/latest/api/token":
            assert method == "PUT"
            assert headers["x-aws-ec2-metadata-token-ttl-seconds"] == "21600"
            return 200, self.token
        if headers.get("x-aws-ec2-metadata-token") != self.token:
            return 401, ""
        assert path == "/latest/meta-data/spot/instance-action"
        return (404, "") if self.action is None else (200, json.dumps(self.action))


def test_aws_is_asked_with_a_token_that_is_renewed(cloud: Cloud) -> None:
    cloud.answer = imds = Imds()
    source = notices.parse(f"aws:{cloud.url}")
    assert source.look(NOW) is None
    assert source.look(NOW) is None
    assert [method for method, _ in cloud.asked] == ["PUT", "GET", "GET"]
    imds.token = "t2"
    assert source.look(NOW) is None
    imds.action = {"action": "terminate", "time": "2027-01-15T08:02:00Z"}
    found = Notice("AWS: terminate at 2027-01-15T08:02:00Z", 120.0)
    assert source.look(NOW) == found
    # Five minutes wrong: the server's clock counts, on which the time was set.
    assert source.look(NOW + 300) == found
    cloud.now = NOW + 20
    assert source.look(NOW) == Notice(found.reason, 100.0)


@pytest.mark.parametrize("body", ["", "[]", "gone", "\x00"])
def test_an_answer_of_aws_that_is_no_notice_is_a_failure(cloud: Cloud, body: str) -> None:
    cloud.answer = lambda method, _path, _headers: (200, "t" if method == "PUT" else body)
    with pytest.raises(notice_http.NoticeFailed):
        look(f"aws:{cloud.url}")


def test_a_token_that_would_split_the_request_is_refused(cloud: Cloud) -> None:
    cloud.answer = lambda _method, _path, _headers: (200, "t\r\nHost: else")
    with pytest.raises(notice_http.NoticeFailed):
        look(f"aws:{cloud.url}")


def test_gcp_gives_half_a_minute_from_when_it_is_first_seen(cloud: Cloud) -> None:
    said = "FALSE"

    def answer(_method: str, path: str, headers: dict[str, str]) -> tuple[int, str]:
        assert path == "/computeMetadata/v1/instance/preempted"
        return (200, said) if headers.get("metadata-flavor") == "Google" else (403, "")

    cloud.answer = answer
    source = notices.parse(f"gcp:{cloud.url}")
    assert source.look(NOW) is None
    said = "TRUE\n"
    assert source.look(NOW) == Notice("GCP: the machine is preempted", 30.0)
    assert source.look(NOW + 10) == Notice("GCP: the machine is preempted", 20.0)


class ScheduledEvents:
    """Azure's service."""

    def __init__(self) -> None:
        self.events: list[dict[str, object]] = []

    def __call__(self, _method: str, path: str, headers: dict[str, str]) -> tuple[int, str]:
        if headers.get("metadata") != "true":
            return 400, ""
        if path.startswith("/metadata/instance/compute/name?"):
            return 200, "node-3"
        assert path == "/metadata/scheduledevents?api-version=2020-07-01"
        return 200, json.dumps({"DocumentIncarnation": 1, "Events": self.events})

    def add(self, kind: str, *who: str, at: str = "Fri, 15 Jan 2027 08:05:00 GMT", **more: str) -> None:
        event = {"EventId": "e", "EventType": kind, "Resources": list(who), "EventStatus": "Scheduled"}
        self.events.append({**event, "NotBefore": at, **more})


def test_azure_s_events_count_if_they_take_this_machine_away(cloud: Cloud) -> None:
    cloud.answer = service = ScheduledEvents()
    source = notices.parse(f"azure:{cloud.url}")
    assert source.look(NOW) is None
    service.add("Freeze", "node-3")
    service.add("Preempt", "node-4")
    service.add("Reboot", "node-3", EventStatus="Completed")
    assert source.look(NOW) is None
    service.add("Redeploy", "node-4", "node-3", at="Fri, 15 Jan 2027 08:15:00 GMT")
    service.add("Preempt", "node-3")
    assert source.look(NOW) == Notice("Azure: Preempt at Fri, 15 Jan 2027 08:05:00 GMT", 300.0)
    service.add("Terminate", "node-3", at="", EventStatus="Started")
    assert source.look(NOW) == Notice("Azure: Terminate at now", 0.0)


# What is left, and what is refused ----------------------------------------------------


@pytest.mark.parametrize(
    ("left_s", "grace_s"), [(None, 60.0), (120.0, 115.0), (30.0, 25.0), (8.0, 6.0), (0.5, 1.0), (-90.0, 1.0)]
)
def test_a_reserve_is_kept_of_what_a_notice_leaves(left_s: float | None, grace_s: float) -> None:
    assert notices.grace_s(Notice("x", left_s), 60.0) == grace_s


@pytest.mark.parametrize(
    "word",
    [
        "awz",
        "file:relative",
        "file://host/path",
        "/",
        "http://",
        "http:///path",
        "http://user:word@host/",
        "http://host:0/",
        "http://host:99999999/",
        "http://host/a b",
        "http://host/#(",
        "aws:10.0.0.1",
        "aws:http://host/path",
        "aws:ftp://host",
    ],
)
def test_what_is_no_source_is_refused_with_what_would_be(word: str) -> None:
    with pytest.raises(Refused) as caught:
        notices.parse(word)
    assert "--preemption-notice" in caught.value.message
    assert caught.value.fix
    assert "word@" not in caught.value.message


def test_times_are_utc_unless_they_say_otherwise() -> None:
    assert epoch_s("2027-01-15T08:00:00Z") == epoch_s("2027-01-15T08:00:00") == NOW
    assert epoch_s("2027-01-15T10:00:00+02:00") == NOW
    assert epoch_s("tomorrow") is epoch_s("20270115") is epoch_s("") is None


# Code of one's own --------------------------------------------------------------------

asked: list[str] = []
found_next: list[object] = []


def own_source(argument: str) -> Callable[[], object]:
    """What an entry point names."""
    if argument == "broken":
        raise LookupError("no such queue")
    asked.append(argument)
    return lambda: found_next[-1] if found_next else None


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    point = importlib.metadata.EntryPoint("queue", f"{__name__}:own_source", notices.ENTRY_POINTS)

    class Point:
        name = point.name

        def load(self) -> object:
            return own_source

    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda group: [Point()] if group == notices.ENTRY_POINTS else []
    )


@pytest.mark.usefixtures("installed")
def test_code_of_one_s_own_is_called_with_what_stands_behind_the_colon() -> None:
    source = notices.parse("queue:https://scheduler/api")
    assert asked[-1] == "https://scheduler/api"
    assert source.look(NOW) is None
    found_next.append(Notice("preempted by job 7", 40.0))
    assert source.look(NOW) == Notice("preempted by job 7", 40.0)
    found_next.append("going")
    with pytest.raises(TypeError, match="str, not a Notice"):
        source.look(NOW)
    with pytest.raises(Refused, match="no such queue"):
        notices.parse("queue:broken")
    with pytest.raises(Refused) as caught:
        notices.parse("kueue")
    assert "queue" in caught.value.fix


# Looking ------------------------------------------------------------------------------


class Table:
    """A watch over one planned source, whose looks are taken one by one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, clock: Any = None) -> None:
        self.next: Notice | BaseException | None = None
        self.told: list[Notice] = []
        self.lines: list[str] = []
        monkeypatch.setattr(notices, "parse", lambda _word: self)
        self.watch = notices.Watch(
            ("http://host/path?key=secret",),
            interval_s=60.0,
            clock=clock or SystemClock(),
            on_notice=self.told.append,
            log=lambda event, **fields: self.lines.append(f"{event} {fields}"),
        )

    def look(self, wall: float) -> Notice | None:
        del wall
        if isinstance(self.next, BaseException):
            raise self.next
        return self.next

    def turn(self, found: Notice | BaseException | None) -> None:
        self.next = found
        (one,) = self.watch._looking
        self.watch._look(one)


class Still:
    """A clock that is set."""

    def __init__(self) -> None:
        self.at = 0.0

    def monotonic(self) -> float:
        return self.at

    def wall(self) -> float:
        return NOW + self.at


def test_a_notice_is_told_once_and_stands_until_it_is_withdrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table(monkeypatch)
    table.turn(None)
    assert not table.watch.standing
    for left_s in (30.0, 28.0):
        table.turn(Notice("a", left_s))
    assert table.told == [Notice("a", 30.0)]
    assert table.watch.standing
    table.turn(Notice("b", 5.0))
    assert table.told[1:] == [Notice("b", 5.0)]
    table.turn(OSError("gone first"))
    assert table.watch.standing
    table.turn(None)
    assert not table.watch.standing
    table.turn(Notice("b", 30.0))
    assert len(table.told) == 3
    assert not [line for line in table.lines if "secret" in line]


def test_a_source_that_fails_is_a_line_in_ten_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Still()
    table = Table(monkeypatch, clock)
    for _ in range(100):
        clock.at += 2.0
        table.turn(OSError("no route to host"))
        table.turn(SystemExit(1))
        table.turn(None)
    assert len(table.lines) == 2, "one that it fails, one that it works again"
    assert "no route to host" in table.lines[0]
    clock.at += notices.FAILURE_LOG_S
    table.turn(OSError("x" * 100_000))
    assert len(table.lines) == 3
    assert len(table.lines[-1]) < 500
    assert table.told == []


def test_a_source_that_hangs_delays_the_start_by_seconds_and_hides_no_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(notices, "FIRST_LOOK_S_MAX", 0.3)
    path = tmp_path / "preempted"
    path.touch()
    told: list[Notice] = []
    with socket.create_server(("127.0.0.1", 0)) as silent:
        watch = notices.Watch(
            (f"http://127.0.0.1:{silent.getsockname()[1]}/", str(path)),
            interval_s=0.1,
            clock=SystemClock(),
            on_notice=told.append,
            log=lambda *_, **__: None,
        )
        began = time.monotonic()
        watch.start()
        assert time.monotonic() - began < 1.5
        assert told == [Notice(f"preemption notice: {path}")]
        assert watch.standing
        watch.close()
