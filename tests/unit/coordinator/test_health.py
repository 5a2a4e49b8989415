"""What is wrong is said once when it begins, once when it ends, and stands in between."""

import threading
from typing import Any

import pytest

from dtrain.coordinator.core.decisions import Directed
from dtrain.coordinator.core.restored import UNKNOWN
from dtrain.coordinator.health import EtcdHealth, Health, judge_rejection, judge_unknown
from dtrain.protocol.commands import Header, Stop
from dtrain.protocol.errors import ErrorCode, Unavailable
from dtrain.protocol.ids import AgentName, Attempt, ClusterName, JobName, Term, Uid
from dtrain.storage.etcd.port import Status


class Told:
    """A health with its log, before an etcd that says what a test wants."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, dict[str, Any]]] = []
        self.health = Health(lambda event, **fields: self.lines.append((event, fields)))
        self.age_s = 0.0
        self.away = False
        self.alarms: tuple[str, ...] = ()
        self.looks = 0
        self.looked = threading.Event()
        self.etcd = EtcdHealth(self, self.health, mirror_age_s=lambda: self.age_s)  # type: ignore[arg-type]

    def status(self, *, deadline_s: float = 5.0) -> Status:
        self.looks += 1
        self.looked.set()
        if self.away:
            raise Unavailable(ErrorCode.ETCD_UNAVAILABLE, f"refused, try {self.looks}")
        return Status(1, 1, 1, 4711, "3.5.16", self.alarms)

    def events(self) -> list[str]:
        return [event for event, _ in self.lines]


@pytest.fixture
def told() -> Told:
    return Told()


def test_a_healthy_etcd_is_no_problem_and_tells_its_version(told: Told) -> None:
    told.etcd.look()
    assert told.health.sentences() == []
    assert told.lines == []
    assert told.etcd.version == "3.5.16"


def test_no_space_is_one_line_when_it_begins_and_one_when_it_ends(told: Told) -> None:
    told.alarms = ("NOSPACE",)
    for _ in range(3):
        told.etcd.look()
    [sentence] = told.health.sentences()
    assert "no space" in sentence
    assert "etcdctl compact 4711, then etcdctl defrag --cluster, then etcdctl alarm disarm" in sentence
    assert told.events() == ["problem"]
    told.alarms = ()
    told.etcd.look()
    assert told.health.sentences() == []
    assert told.events() == ["problem", "problem over"]


def test_a_refused_write_tells_of_no_space_before_the_next_look(told: Told) -> None:
    told.etcd.refused_for_space()
    told.etcd.refused_for_space()
    assert len(told.health.sentences()) == 1
    assert told.events() == ["problem"]


def test_an_etcd_that_is_away_is_one_problem_however_it_words_it(told: Told) -> None:
    told.away = True
    told.etcd.look()
    told.etcd.look()
    [sentence] = told.health.sentences()
    assert "cannot be reached" in sentence
    assert "try 2" in sentence
    assert told.events() == ["problem"]


def test_no_space_outlives_a_look_that_etcd_does_not_answer(told: Told) -> None:
    told.alarms = ("NOSPACE",)
    told.etcd.look()
    told.away = True
    told.etcd.look()
    assert len(told.health.sentences()) == 2
    told.away, told.alarms = False, ()
    told.etcd.look()
    assert told.health.sentences() == []


@pytest.mark.parametrize(
    ("age_s", "words"), [(16.0, "16 s old"), (float("inf"), "has not been read yet"), (14.0, "")]
)
def test_a_stale_mirror_is_a_problem(told: Told, age_s: float, words: str) -> None:
    told.age_s = age_s
    for _ in range(3):
        told.etcd.look()
    sentences = told.health.sentences()
    assert bool(sentences) == bool(words)
    assert not words or words in sentences[0]


def test_a_replica_that_has_just_started_is_none(told: Told) -> None:
    told.age_s = float("inf")
    told.etcd.look()
    told.etcd.look()
    assert told.health.sentences() == []


def test_a_corrupt_cluster_is_a_problem(told: Told) -> None:
    told.alarms = ("CORRUPT",)
    told.etcd.look()
    assert "CORRUPT" in told.health.sentences()[0]


def test_an_agent_that_has_obeyed_a_later_term_tells_of_a_restored_etcd(told: Told) -> None:
    judge_rejection(told.health, "a1", "rejected: job train has no attempt 3")
    assert told.health.sentences() == []
    judge_rejection(told.health, "a1", "rejected: term 12 is over; term 40 has been confirmed")
    [sentence] = told.health.sentences()
    assert "restored from an older state" in sentence
    assert "has obeyed term 40" in sentence
    assert "--accept-restored-etcd true" in sentence


def test_the_thread_looks_again_at_once_when_woken_and_ends_when_stopped(told: Told) -> None:
    thread = threading.Thread(target=told.etcd.run)
    thread.start()
    assert told.looked.wait(5.0)
    told.looked.clear()
    told.etcd.refused_for_space()
    assert told.looked.wait(2.0), "it waits for the next regular look"
    told.etcd.stop()
    thread.join(5.0)
    assert not thread.is_alive()


def test_ranks_of_a_job_that_etcd_does_not_know_are_told_of_once(told: Told) -> None:
    def stop(name: str) -> Directed:
        header = Header(ClusterName("c"), Term(9), JobName("late"), Uid("u7"), Attempt(2), name)
        return Directed(AgentName("a1"), "a1:1", Stop(header, 30.0, release=True, why=""))

    judge_unknown(told.health, stop("release.2"))
    assert told.health.sentences() == []
    judge_unknown(told.health, stop(f"{UNKNOWN}2"))
    judge_unknown(told.health, stop(f"{UNKNOWN}2"))
    [sentence] = told.health.sentences()
    assert "etcd knows no job late (u7)" in sentence
    assert "submit it again" in sentence
