"""Takes the pictures of the dashboard that the README shows: ``python tools/screenshots.py``.

A real cluster, a real job that loses a rank, a real browser; the pictures go to docs/images.
"""

import argparse
import os
import signal
import tempfile
import time
from pathlib import Path

from tests.support.browser import Page, chromium
from tests.support.harness import Harness

from dtrain.protocol.ids import JobName, Rank

ROOT = Path(__file__).parent.parent
BYTES_MAX = 150_000
SIZES = {"jobs": (1280, 520), "job": (1280, 1240)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "docs" / "images")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="dtrain-pictures-") as name,
        Harness(Path(name), coordinators=3, agents=3, dashboards=True, name="demo") as harness,
        chromium(Path(name) / "profile") as page,
    ):
        harness.await_ready()
        job = _story(harness)
        url = harness.cluster.dashboards["c1"]
        for theme in ("light", "dark"):
            for what, path in (("jobs", "/"), ("job", f"/jobs/{job}")):
                _take(page, url + path, theme, SIZES[what], folder / f"dashboard-{what}-{theme}.png")
        for other in ("digits", "sweep-7", "finetune"):
            harness.client.set_intent(other, wanted="cancel", by="tools/screenshots.py")


def _story(harness: Harness) -> JobName:
    """Several jobs, one of them with a past worth looking at."""
    done = harness.start("warmup", "--steps 60 --pause-ms 5", nnodes=1, nproc=1, every_steps=20)
    harness.await_end(done)
    harness.start("sweep-7", "--steps 100000 --pause-ms 80", nnodes=1, nproc=1, every_steps=100)
    job = harness.start("digits", "--steps 100000 --pause-ms 30 --size 512", every_steps=60)
    harness.await_commit(job)
    harness.await_commit(job)
    os.kill(harness.pids(job)[Rank(1)], signal.SIGKILL)
    harness.await_training(job, after_attempt=1)
    harness.await_commit(job)
    harness.submit("finetune", "--steps 100", nnodes=3, nproc=2)
    harness.cluster.daemon(harness.cluster.leader()).power_cut()
    time.sleep(8.0)
    for daemon in harness.cluster.coordinators.values():
        daemon.start()
    harness.await_ready()
    harness.await_commit(job)
    harness.await_commit(job)
    return job


def _take(page: Page, url: str, theme: str, size: tuple[int, int], path: Path) -> None:
    page.driver.set_window_size(*size)
    page.open(url)
    page.run("localStorage.setItem('dtrain-theme', arguments[0])", theme)
    page.open(url)
    page.until("rows", lambda: page.run("return document.querySelectorAll('tbody tr').length > 1"))
    page.until("charts", lambda: "job" not in path.name.split("-")[1] or _drawn(page, path))
    time.sleep(1.5)
    path.write_bytes(page.driver.get_screenshot_as_png())
    assert path.stat().st_size <= BYTES_MAX, f"{path} has {path.stat().st_size} bytes"
    print(f"{path}: {path.stat().st_size} bytes")


def _drawn(page: Page, path: Path) -> bool:
    wanted = 5 if "-job-" in path.name else 0
    return int(page.run("return document.querySelectorAll('path.line').length")) >= wanted


if __name__ == "__main__":
    main()
