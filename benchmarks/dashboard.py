"""How long the dashboard's lists and a job's page take to appear, in a crowd that goes on reporting.

A real Chromium without a screen, its cache emptied each time; measured in the page,
from the start of the navigation until the rows are there. The peer is an empty
answer of the same server in the same browser.
"""

import tempfile
import time
import urllib.request
from pathlib import Path
from urllib.parse import urlencode

from tests.support.browser import Page, chromium

from benchmarks.listing.crowd import RANKS, Bustle, Crowd, write
from benchmarks.report import Result, result
from dtrain.local.cluster import LocalCluster

CROWDS = ((200, 1000), (100, 12_500))
"""Jobs and machines of eight ranks: that of the bar, and 100 jobs of 1,000 ranks each."""

BAR_MS = 1000.0
BAR_KB = 200.0
PER_ROUND = 3
LIMIT_S = 60.0


def measure(rounds: int) -> list[Result]:
    """Open each page ``rounds`` times PER_ROUND times."""
    return [one for jobs, agents in CROWDS for one in _of_crowd(jobs, agents, rounds)]


def _of_crowd(jobs: int, agents: int, rounds: int) -> list[Result]:
    with (
        tempfile.TemporaryDirectory(prefix="dtrain-bench-") as name,
        LocalCluster(
            Path(name) / "c", coordinators=1, agents=0, store="dir", etcd_fsync=False, dashboards=True
        ) as cluster,
        chromium(Path(name) / "profile") as page,
    ):
        crowd = Crowd(cluster.keys, jobs, agents, time.time())
        records = write(cluster.etcd, crowd.puts())
        bustle = Bustle(cluster.etcd, crowd)
        bustle.start()
        url = cluster.dashboards["c1"]
        pages = {
            "jobs": ("/", min(100, jobs), {"page": "jobs"}),
            "agents": ("/agents", 100, {"page": "agents"}),
            "job": ("/jobs/job-007", RANKS + 1, {"page": "job", "name": "job-007"}),
        }
        took: dict[str, list[float]] = {title: [] for title in [*pages, "empty"]}
        try:
            _open(page, url + "/", "tbody tr", 1)
            for _ in range(rounds * PER_ROUND):
                for title, (path, rows, _) in pages.items():
                    took[title].append(_open(page, url + path, "tbody tr", rows))
                took["empty"].append(_open(page, url + "/healthz", "body", 1))
            sizes = {title: _kilobytes(page, url, *found[::2]) for title, found in pages.items()}
        finally:
            bustle.close()
    print(f"{records} records, {bustle.rounds} reports of every machine meanwhile")
    found = []
    for title, times in took.items():
        if title == "empty":
            continue
        name = f"dashboard: {title}, {jobs} jobs on {agents} machines"
        peer, label = took["empty"], "an empty answer in the browser"
        found.append(result(name, "ms", times, peer, label, ours_max=BAR_MS))
        found.append(result(f"{name}: first load", "kB", [sizes[title]], [], "", ours_max=BAR_KB))
    return found


def _open(page: Page, url: str, selector: str, count: int) -> float:
    """Milliseconds from the start of the navigation until ``count`` elements are there."""
    page.driver.execute_cdp_cmd("Network.clearBrowserCache", {})  # type: ignore[no-untyped-call]
    page.open(url)
    script = "return document.querySelectorAll(arguments[0]).length >= arguments[1] ? performance.now() : 0"
    return float(page.until(f"{count} of {selector}", lambda: page.run(script, selector, count), LIMIT_S))


def _kilobytes(page: Page, url: str, path: str, query: dict[str, str]) -> float:
    """What the browser loaded, with the first event of the stream, in kB as transferred."""
    page.driver.execute_cdp_cmd("Network.clearBrowserCache", {})  # type: ignore[no-untyped-call]
    page.open(url + path)
    time.sleep(1.0)
    loaded = page.run(
        "return performance.getEntries().reduce((sum, one) => sum + (one.transferSize || 0), 0)"
    )
    view = f"{url}/api/view?{urlencode({**query, 'limit': '100'})}"
    with urllib.request.urlopen(view, timeout=30) as answer:
        return (float(loaded) + len(answer.read())) / 1000
