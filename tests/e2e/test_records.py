"""What a person with stock etcdctl sees, and what a leading coordinator leaves alone."""

import json
import os
import stat
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from tests.support.harness import Harness, say

from dtrain.protocol.ids import JobName

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]


class Watch:
    """``etcdctl watch`` as somebody would run it beside a job; its lines as they come."""

    def __init__(self, harness: Harness) -> None:
        self.lines: list[str] = []
        cluster = harness.cluster
        command = [cluster.etcdctl, "--endpoints", ",".join(cluster.endpoints)]
        self._process = subprocess.Popen(
            [*command, "watch", "--prefix", cluster.keys.root], stdout=subprocess.PIPE, text=True
        )
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._thread.join(10)

    def puts(self, part: str) -> list[dict[str, object]]:
        """Values put to keys with ``part`` in them: three lines each, PUT, the key, the value."""
        lines = list(self.lines)
        found = []
        for at, line in enumerate(lines[:-2]):
            if line == "PUT" and part in lines[at + 1]:
                found.append(json.loads(lines[at + 2]))
        return found

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.append(line.rstrip("\n"))


@contextmanager
def watching(harness: Harness) -> Iterator[Watch]:
    watch = Watch(harness)
    try:
        yield watch
    finally:
        watch.close()


def in_order(wanted: list[str], found: list[object]) -> bool:
    rest = iter(found)
    return all(word in rest for word in wanted)


def test_the_story_of_a_job_can_be_watched_with_etcdctl(harness: Harness) -> None:
    with watching(harness) as watch:
        harness.until("the watch has begun", lambda: watch_is_live(harness, watch))
        args = f"--steps 1000000 --pause-ms 10 --stop-file {harness.stop_file('watched')}"
        job = harness.start("watched", args)
        harness.await_commit(job, after=0)
        look_at_the_leader(harness, job)
        harness.cluster.kill_rank(0, job=job)
        harness.await_training(job, after_attempt=1)
        harness.await_commit(job)
        every_value_is_a_versioned_line(harness)
        harness.stop_file(job).touch()
        harness.await_end(job)
        harness.until(
            "the watch has seen the end",
            lambda: any(status["phase"] == "SUCCEEDED" for status in watch.puts(f"jobs/{job}/status")),
        )
        phases = [status["phase"] for status in watch.puts(f"jobs/{job}/status")]
        assert in_order(["QUEUED", "STARTING", "RUNNING", "STARTING", "RUNNING", "SUCCEEDED"], phases) or (
            in_order(["STARTING", "RUNNING", "STARTING", "RUNNING", "SUCCEEDED"], phases)
        )
        reasons = [event["reason"] for event in watch.puts(f"jobs/{job}/events/")]
        story = [
            "JobSubmitted",
            "AttemptStarted",
            "AllRanksTraining",
            "CheckpointCommitted",
            "RankSignaled",
            "AttemptStarted",
            "AllRanksTraining",
            "RestoredFromCheckpoint",
            "CheckpointCommitted",
            "JobSucceeded",
        ]
        assert in_order(story, reasons), reasons
        steps = [
            rank["step"]
            for snapshot in watch.puts(f"workers/{job}")
            for rank in snapshot.get("ranks", ())  # type: ignore[attr-defined]
            if rank["rank"] == 0
        ]
        assert len(set(steps)) > 5, "progress cannot be watched"
    harness.assert_succeeded(job, int(harness.commits(job)[-1].step))


def watch_is_live(harness: Harness, watch: Watch) -> bool:
    harness.etcdctl("put", f"{harness.keys.root}hello", '{"v":1}')
    harness.etcdctl("del", f"{harness.keys.root}hello")
    return bool(watch.puts("hello"))


def every_value_is_a_versioned_line(harness: Harness) -> None:
    lines = harness.etcdctl("get", "--prefix", "/dtrain/").splitlines()
    keys, values = lines[::2], lines[1::2]
    assert len(keys) == len(values) > 10
    assert all(key.startswith(harness.keys.root) and key.isascii() for key in keys), keys
    for key, value in zip(keys, values, strict=True):
        assert json.loads(value)["v"] == 1, key


def look_at_the_leader(harness: Harness, job: JobName) -> None:
    """It leads a job with checkpoints: nothing is written on its machine, and torch is not loaded."""
    assert harness.commits(job)
    name = harness.cluster.leader()
    assert name is not None
    pid = harness.cluster.daemon(name).process_pid
    assert pid is not None
    assert writable_files(pid) == []
    maps = Path(f"/proc/{pid}/maps").read_text()
    assert "libtorch" not in maps
    assert "/torch/" not in maps
    memory = psutil.Process(pid).memory_info().rss / 1e6
    say(f"the leader's resident memory: {memory:.0f} MB")


def writable_files(pid: int) -> list[str]:
    """Regular files that a process has open for writing, its inherited stdout and stderr apart."""
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target, mode = entry.readlink(), entry.stat().st_mode
            flags = int(Path(f"/proc/{pid}/fdinfo/{entry.name}").read_text().split("flags:")[1].split()[0], 8)
        except OSError:
            continue
        if entry.name in ("1", "2") or not stat.S_ISREG(mode) or str(target).startswith("/memfd:"):
            continue
        if flags & os.O_ACCMODE != os.O_RDONLY:
            found.append(str(target))
    return found
