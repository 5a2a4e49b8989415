"""What systemd hears, over a real datagram socket."""

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dtrain.runtime.notify import Notifier


@pytest.fixture
def heard(tmp_path: Path) -> Iterator[Callable[[], list[str]]]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.setblocking(False)

        def read() -> list[str]:
            found = []
            while True:
                try:
                    found.append(manager.recv(4096).decode())
                except BlockingIOError:
                    return found

        yield read


def notifier(folder: Path, **environ: str) -> Notifier:
    return Notifier({"NOTIFY_SOCKET": str(folder / "notify"), **environ})


def test_ready_is_said_once(tmp_path: Path, heard: Callable[[], list[str]]) -> None:
    tells = notifier(tmp_path)
    assert not tells.is_ready
    tells.ready()
    tells.ready()
    assert tells.is_ready
    assert heard() == ["READY=1"]


def test_a_status_is_said_when_it_changes(tmp_path: Path, heard: Callable[[], list[str]]) -> None:
    tells = notifier(tmp_path)
    for text in ("stands by", "stands by", "leads"):
        tells.status(text)
    assert heard() == ["STATUS=stands by", "STATUS=leads"]


def test_the_watchdog_is_fed_four_times_in_its_time(tmp_path: Path, heard: Callable[[], list[str]]) -> None:
    tells = notifier(tmp_path, WATCHDOG_USEC="20000000", WATCHDOG_PID=str(os.getpid()))
    tells.ready()
    heard()
    for second in range(21):
        tells.beat(100.0 + second)
    assert heard() == ["WATCHDOG=1"] * 5


def test_a_start_that_takes_long_asks_for_more_time_and_then_no_more(
    tmp_path: Path, heard: Callable[[], list[str]]
) -> None:
    tells = notifier(tmp_path)
    for second in range(20):
        tells.beat(float(second))
    assert heard() == ["EXTEND_TIMEOUT_USEC=60000000"] * 2
    tells.ready()
    tells.beat(1000.0)
    assert heard() == ["READY=1"]


def test_the_watchdog_of_another_process_is_not_fed(tmp_path: Path) -> None:
    assert notifier(tmp_path, WATCHDOG_USEC="20000000", WATCHDOG_PID="1").watchdog_s == 0.0
    assert notifier(tmp_path, WATCHDOG_USEC="soon").watchdog_s == 0.0


def test_the_end_names_its_time(tmp_path: Path, heard: Callable[[], list[str]]) -> None:
    notifier(tmp_path).stopping("stopping", 75.0)
    assert heard() == ["STOPPING=1\nSTATUS=stopping\nEXTEND_TIMEOUT_USEC=75000000"]


def test_an_abstract_socket_is_found() -> None:
    name = f"dtrain-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0" + name)
        Notifier({"NOTIFY_SOCKET": "@" + name}).ready()
        assert manager.recv(100) == b"READY=1"


def test_without_systemd_nothing_is_said_and_nothing_fails(tmp_path: Path) -> None:
    for tells in (Notifier({}), notifier(tmp_path)):
        tells.ready()
        tells.beat(1.0)
        tells.stopping("over", 0.0)
