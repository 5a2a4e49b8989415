"""Where a job's time went, and who was told, with its leader, a rank and all coordinators killed."""

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tests.support.harness import Harness, say

from dtrain.protocol.ids import JobName
from dtrain.protocol.job import JobPhase
from dtrain.protocol.ledger import Ledger, goodput

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

STEPS = 800
ABSENT_S = 6.0


class Receiver:
    """Somebody's own receiver of webhooks; it has trouble at first."""

    def __init__(self) -> None:
        self.taken: list[dict[str, Any]] = []
        self.refused = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                told = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                well = outer.refused >= 2
                if well:
                    outer.taken.append(told)
                else:
                    outer.refused += 1
                self.send_response(200 if well else 503)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def reasons(self) -> list[str]:
        return [str(told["event"]["reason"]) for told in self.taken]


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory, receiver: Receiver) -> Iterator[Harness]:
    folder: Path = tmp_path_factory.mktemp("h")
    file = folder / "webhooks.json"
    url = f"http://127.0.0.1:{receiver.server.server_address[1]}/"
    file.write_text(json.dumps({"webhooks": [{"name": "ops", "url": url, "secret": "of the test"}]}))
    with Harness(folder, coordinator_flags=("--webhook-file", str(file))) as made:
        made.await_ready()
        yield made
        made.assert_clean()


def kept_s(harness: Harness, job: JobName) -> float:
    """How long the steps took that were kept, by rank 0's own marks."""
    took: dict[int, float] = {}
    mine = [mark for mark in harness.marks(job) if mark.rank == 0]
    for before, after in pairwise(mine):
        if before.attempt == after.attempt and after.step == before.step + 1:
            took[after.step] = after.at - before.at
    return sum(took.values())


def ledger_of(harness: Harness, job: JobName) -> Ledger:
    found = harness.status(job).ledger
    assert found is not None
    return found


def test_the_ledger_adds_up_to_wall_time_and_knows_what_was_kept(harness: Harness, job_began: float) -> None:
    job = JobName("train")
    harness.await_commit(job)
    harness.cluster.kill_leader_process()
    harness.await_steps(job, 40)
    attempt = harness.status(job).attempt
    harness.cluster.kill_rank(1)
    harness.await_training(job, after_attempt=attempt)
    names = sorted(harness.cluster.coordinators)
    for name in names:
        harness.cluster.kill_guardian(name)
    absent_since = harness.last_step(job)
    time.sleep(ABSENT_S)
    assert harness.last_step(job) > absent_since, "training goes on without coordinators"
    for name in names:
        harness.cluster.start_daemon(name)
    status = harness.await_end(job)
    wall_s = time.time() - job_began
    assert status.phase is JobPhase.SUCCEEDED
    found = goodput(ledger_of(harness, job), time.time())
    kept = kept_s(harness, job)
    say(f"{wall_s:.1f} s: {found.seconds}; steps that were kept took {kept:.1f} s by their own marks")
    assert found.over
    # The test looks a moment after the end.
    assert found.wall_s == pytest.approx(wall_s, rel=0.01, abs=0.5)
    assert sum(found.headlines.values()) == pytest.approx(found.wall_s, abs=0.01)
    aside = found.headlines["stall"] + found.seconds.get("restart.warm_up", 0.0)
    assert kept - aside - 2.0 <= found.headlines["productive"] <= kept + 3.0
    assert found.headlines["restart"] > 0
    assert found.unsaved_s == 0


def test_what_is_over_stays_as_it_is(harness: Harness) -> None:
    job = JobName("train")
    before = ledger_of(harness, job)
    harness.cluster.kill_leader_process()
    harness.await_ready()
    harness.assert_released(job)
    assert ledger_of(harness, job) == before


def test_the_receiver_was_told_of_the_rank_whoever_led(harness: Harness, receiver: Receiver) -> None:
    job = JobName("train")
    told = {f"e2e/{job}/{event.seq}" for event in harness.events(job) if event.type == "Warning"}
    harness.until("all warnings are delivered", lambda: {str(one["id"]) for one in receiver.taken} >= told)
    assert "RankSignaled" in receiver.reasons()
    assert receiver.refused == 2
    assert {str(one["id"]) for one in receiver.taken} == told


@pytest.fixture(scope="module")
def job_began(harness: Harness) -> float:
    began = time.time()
    harness.start("train", f"--steps {STEPS} --pause-ms 20", every_steps=60)
    return began
