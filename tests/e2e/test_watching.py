"""What a watch and the lists tell is what etcd holds, through the loss of replicas and of the leader."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.support.harness import Harness

from dtrain.protocol.ids import JobName
from dtrain.storage.etcd.port import prefix_end

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

COMMAND = (sys.executable, "-m", "dtrain.cli")


def environment(harness: Harness) -> dict[str, str]:
    env = {key: value for key, value in os.environ.items() if not key.startswith("DTRAIN_")}
    return env | {
        "DTRAIN_COORDINATORS": ",".join(harness.cluster.addresses),
        "XDG_CONFIG_HOME": str(harness.folder / "config"),
    }


def watched(path: Path) -> list[tuple[int, str, bool]]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [(one["revision"], one["key"], one["deleted"]) for one in found]


def history(harness: Harness, job: JobName, after: int) -> list[tuple[int, str, bool]]:
    """What etcd itself tells of a job's records."""
    prefix = harness.keys.job(job)
    stream = harness.cluster.etcd.watch(prefix, prefix_end(prefix), after + 1)
    last = max(kv.mod_revision for kv in harness.cluster.etcd.range(prefix, prefix_end(prefix)).items)
    found: list[tuple[int, str, bool]] = []
    try:
        while not found or found[-1][0] < last:
            batch = stream.next(10.0)
            assert batch is not None, "etcd tells nothing more"
            found += [
                (one.kv.mod_revision, one.kv.key.removeprefix(prefix), one.kind == "delete")
                for one in batch.events
            ]
    finally:
        stream.close()
    return found


def test_a_watch_tells_each_change_once_though_leader_and_replicas_are_killed(harness: Harness) -> None:
    stop = harness.stop_file("seen")
    job = harness.start("seen", f"--steps 100000 --pause-ms 5 --stop-file {stop}", every_steps=40)
    path = harness.folder / "watched"
    with path.open("wb") as file:
        watch = subprocess.Popen(
            [*COMMAND, "watch", job, "-o", "json"],
            env=environment(harness),
            stdout=file,
            stderr=subprocess.PIPE,
        )
    harness.until("the watch has begun", lambda: path.stat().st_size)
    first = max(revision for revision, _, _ in watched(path))
    for _ in range(2):
        term = harness.term()
        harness.cluster.kill_leader_process()
        harness.until("there is a new leader", lambda term=term: harness.term() not in (0, term))
        harness.await_commit(job)
    stop.touch()
    harness.until("the job has ended", lambda: harness.status(job).phase == "SUCCEEDED")
    assert watch.wait(60) == 0, watch.stderr.read() if watch.stderr else ""
    told = [one for one in watched(path) if one[0] > first]
    happened = [one for one in history(harness, job, first) if one[0] <= told[-1][0]]
    # One transaction has no order within.
    assert sorted(told) == sorted(happened)
    assert [revision for revision, _, _ in told] == sorted(revision for revision, _, _ in told)


def test_lists_tell_what_etcd_holds_whichever_replica_answers(harness: Harness) -> None:
    stop = harness.stop_file("listed")
    job = harness.start("listed", f"--steps 100000 --pause-ms 5 --stop-file {stop}", every_steps=40)
    harness.await_commit(job)
    stop.touch()
    harness.until("the job has ended", lambda: harness.status(job).phase == "SUCCEEDED")
    status, newest = harness.status(job), harness.commits(job)[-1]
    for address in harness.cluster.addresses:
        env = environment(harness) | {"DTRAIN_COORDINATORS": address}

        def get(*words: str, env: dict[str, str] = env) -> str:
            return subprocess.run(
                [*COMMAND, "get", *words], env=env, capture_output=True, text=True, timeout=60, check=True
            ).stdout

        heading, *rows = get("jobs", "listed", "-o", "wide").splitlines()
        cells: dict[str, Any] = dict(
            zip(heading.split(), rows[0].replace(" (step", "(step").split(), strict=False)
        )
        assert (cells["PHASE"], cells["STEP"], cells["PROGRESS"]) == ("SUCCEEDED", str(status.step), "100%")
        assert cells["LAST-CKPT"] == f"{newest.seq}(step"
        assert cells["GOODPUT"].endswith("%")
        assert get("jobs", "-o", "name", "--phase", "finished").split() >= ["job/listed"]
        assert json.loads(get("jobs", "listed", "-o", "json"))["status"]["step"] == status.step
        assert sorted(get("agents", "-o", "name").split()) == ["agent/a1", "agent/a2", "agent/a3"]
