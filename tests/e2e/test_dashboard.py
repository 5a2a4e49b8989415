"""The dashboard in a real browser, on a real cluster that things happen to."""

import os
import signal
from collections.abc import Iterator

import pytest
from tests.support.browser import Page, chromium
from tests.support.harness import Harness

from dtrain.protocol.ids import JobName, Rank

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    """Two replicas with a dashboard each, two agents."""
    folder = tmp_path_factory.mktemp("d")
    with Harness(folder, coordinators=2, agents=2, dashboards=True) as made:
        made.await_ready()
        yield made
        made.assert_clean()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with chromium(tmp_path_factory.mktemp("chromium")) as made:
        yield made


@pytest.fixture(scope="module")
def job(harness: Harness) -> JobName:
    return harness.start("seen", "--steps 1000000 --pause-ms 20", every_steps=50)


def url(harness: Harness, replica: str = "c1") -> str:
    return harness.cluster.dashboards[replica]


def test_a_killed_rank_shows_as_attempt_2_with_its_reason_on_the_open_page(
    harness: Harness, page: Page, job: JobName
) -> None:
    page.open(f"{url(harness)}/jobs/{job}")
    page.until_text("RUNNING", "h1")
    assert page.text("#fact-attempt") == "1"
    page.run("window.openedOnce = true")
    pid = harness.pids(job)[Rank(1)]

    os.kill(pid, signal.SIGKILL)

    page.until("attempt 2 on the page", lambda: page.text("#fact-attempt") == "2")
    page.until_text("Root cause of attempt 1: rank 1", "#failure")
    assert "SIGKILL" in page.text("#failure")
    assert f"pid {pid}" in page.text("#failure")
    page.until_text("RUNNING", "h1")
    page.until("an event tells of it", lambda: "RankSignaled" in page.text("main"))
    assert page.run("return window.openedOnce"), "the page was loaded again"
    assert "attempt 2" in page.text("#announce")
    assert "null" not in page.text("main")
    assert "undefined" not in page.text("main")


def test_the_list_follows_a_job_and_leads_to_it(harness: Harness, page: Page, job: JobName) -> None:
    page.open(f"{url(harness)}/?phase=active")
    page.until_text(job)
    first = page.until("a step", lambda: page.text("tbody td:nth-child(3)"))
    page.until("another step without a reload", lambda: page.text("tbody td:nth-child(3)") != first)
    page.click(job)
    page.until_text("Timeline")


def test_the_browser_refused_nothing_and_found_no_error(harness: Harness, page: Page, job: JobName) -> None:
    page.complaints()
    for path in ("/", "/agents", "/replicas", "/checkpoints", f"/jobs/{job}"):
        page.open(url(harness) + path)
        page.until_text("live from", "#link")
    assert page.complaints() == []
