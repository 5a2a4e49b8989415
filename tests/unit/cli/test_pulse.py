"""An etcd that is frozen under a run: said, forgiven if it comes back, and not waited for for ever."""

from pathlib import Path

import pytest

from dtrain.cli.pulse import ASK_S, ENDED_S, SAID_S, Pulse
from dtrain.local.etcd import EtcdServer
from dtrain.protocol.errors import Unavailable


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_silence_is_said_once_and_its_end_too() -> None:
    clock, said, answers = Clock(), [], [True]  # type: ignore[var-annotated]
    pulse = Pulse(lambda: answers[0], said.append, monotonic=clock)
    for seconds in range(1, int(ENDED_S) - 1):
        answers[0] = False
        clock.now = 100.0 + seconds
        pulse.check()
    assert len(said) == 1
    assert f"has not answered for {SAID_S:.0f} s" in said[0]
    answers[0] = True
    clock.now += ASK_S
    pulse.check()
    assert said[1:] == [f"etcd answers again, after {clock.now - 100.0:.0f} s"]
    # What was is forgiven: the count begins anew.
    answers[0] = False
    clock.now += SAID_S - 1
    pulse.check()
    assert len(said) == 2


def test_it_is_not_asked_at_every_turn() -> None:
    clock, asked = Clock(), []  # type: ignore[var-annotated]
    pulse = Pulse(lambda: bool(asked.append(1)) or True, lambda _: None, monotonic=clock)
    for _ in range(100):
        clock.now += ASK_S / 50
        pulse.check()
    assert len(asked) == 2


def test_a_frozen_etcd_ends_the_run_in_the_end(tmp_path: Path) -> None:
    clock, said = Clock(), []  # type: ignore[var-annotated]
    with EtcdServer(tmp_path / "etcd", fsync=False) as etcd:
        etcd.wait_ready()
        pulse = Pulse(lambda: etcd.answers(1.0), said.append, monotonic=clock)
        clock.now += ENDED_S
        pulse.check()
        assert said == [], "it answers"
        etcd.freeze()
        clock.now += SAID_S
        pulse.check()
        assert len(said) == 1
        etcd.thaw()
        assert etcd.answers(30.0)
        etcd.freeze()
        clock.now += ENDED_S
        with pytest.raises(Unavailable, match="has not answered for 70 s"):
            pulse.check()
