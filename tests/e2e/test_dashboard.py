"""The dashboard in a real browser, on a real cluster that things happen to."""

import base64
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver.common.keys import Keys
from tests.support.browser import Page, chromium
from tests.support.harness import Harness

from dtrain.protocol import codec
from dtrain.protocol.checkpoint import Latest
from dtrain.protocol.ids import JobName, Rank
from dtrain.protocol.job import JobPhase, JobStatus
from dtrain.protocol.snapshot import WorkerSnapshot
from dtrain.protocol.standing import reported_step

ACCESS = (Path(__file__).parents[1] / "support" / "access.js").read_text()

READ_LATER_MAX = 12
"""Revisions that may come while the CLI reads."""

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    """Two replicas with a dashboard and metrics each, two agents with a slot more than most tests need."""
    folder = tmp_path_factory.mktemp("d")
    flags = ("--health-listen", "127.0.0.1:0", "--log-json", "true")
    wanted = {"coordinators": 2, "agents": 2, "slots": (2, 3)}
    with Harness(folder, **wanted, dashboards=True, coordinator_flags=flags) as made:
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


def fetch(address: str, **headers: str) -> Any:
    with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=10) as answer:
        return json.loads(answer.read())


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


def test_a_checkpoint_on_its_way_is_a_bar_that_fills_and_can_be_read_aloud(
    harness: Harness, page: Page, job: JobName
) -> None:
    stop = harness.stop_file("moves")
    # 34 MB of weights and momentum at 3 MB/s.
    args = f"--steps 1000000 --pause-ms 20 --size 2048 --stop-file {stop}"
    slow = harness.start("moves", args, nnodes=1, nproc=1, every_steps=0, bandwidth_mb_s=3.0, marks=False)
    page.open(f"{url(harness)}/jobs/{slow}")
    page.until_text("RUNNING", "h1")
    assert page.run("return document.querySelector('#moving').hidden")
    harness.client.set_intent(slow, checkpoint_token="now")

    bar = "document.querySelector('#moving [role=progressbar]')"

    def percent() -> int:
        return int(page.run(f"return {bar}?.getAttribute('aria-valuenow') ?? -1"))

    first = page.until("a bar", lambda: percent() + 1) - 1
    page.run(f"window.bar = {bar}")
    assert page.run("return window.bar.getAttribute('aria-label')").startswith("Saving checkpoint ")
    page.until("it fills", lambda: percent() > first)
    told = r"^Saving checkpoint \d+ \(step \d+\): [\d.]+ MB of 34 MB \(\d+ %\) in the store, .*MB/s"
    assert re.search(told, page.text("#moving"))
    assert page.run(f"return window.bar === {bar}"), "whoever reads it loses it"
    assert page.run(ACCESS) == []
    page.until("it is gone", lambda: page.run("return document.querySelector('#moving').hidden"))
    assert harness.commits(slow)
    stop.touch()
    harness.await_end(slow)


def test_the_page_draws_what_ranks_report_and_shows_their_log(
    harness: Harness, page: Page, job: JobName
) -> None:
    page.open(f"{url(harness)}/jobs/{job}")
    for name in ("Loss", "Step time", "Steps per second", "Checkpoint stall", "Upload time"):
        page.until(
            f"a curve of {name}",
            lambda name=name: page.run(
                "return [...document.querySelectorAll('figure')].some((f) =>"
                " f.innerText.startsWith(arguments[0]) && f.querySelector('path.line'))",
                name,
            ),
        )
    assert "faults" in page.run("return document.querySelector('#timeline').getAttribute('aria-label')")
    page.until_text("on a1", "#log-title ~ p")


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
        page.until("rows", lambda: page.run("return document.querySelectorAll('tbody tr').length"))
    assert page.complaints() == []


def test_pages_can_be_read_and_used_without_good_eyes_or_a_mouse(
    harness: Harness, page: Page, job: JobName
) -> None:
    for path in ("/", "/agents", "/replicas", "/checkpoints", f"/jobs/{job}"):
        page.open(url(harness) + path)
        page.until("rows", lambda: page.run("return document.querySelectorAll('tbody tr').length"))
        for theme in ("light", "dark"):
            page.run("document.documentElement.dataset.theme = arguments[0]", theme)
            time.sleep(0.3)  # colours fade
            assert page.run(ACCESS) == [], (path, theme)
        nameless = [
            role
            for role, name in page.nodes()
            if not name and role in ("button", "link", "textbox", "searchbox", "combobox", "table", "image")
        ]
        assert nameless == [], path

    page.open(url(harness))
    page.until_text(job)
    walked = []
    for _ in range(30):
        page.press(Keys.TAB)
        focus = page.run(
            "const e = document.activeElement, s = getComputedStyle(e);"
            "const control = ['INPUT', 'SELECT'].includes(e.tagName);"
            "return [control ? e.id : e.innerText, s.outlineStyle !== 'none']"
        )
        walked.append(focus[0])
        assert focus[1], f"nothing shows that {focus[0]!r} has the focus"
        if focus[0] == job:
            break
    assert walked[0] == "Skip to the content"
    for stop in ("Agents", "Theme: auto", "filter", "search", "Name", job):
        assert stop in walked, f"{stop} cannot be reached: {walked}"
    page.press(Keys.ENTER)
    page.until_text("Timeline")
    page.open(url(harness))
    page.until_text(job)
    page.press("/")
    assert page.run("return document.activeElement.id") == "search"
    page.press("no such job")
    page.until_text("No job fits")


def test_an_unknown_name_of_the_machine_and_odd_requests_are_turned_away(harness: Harness) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        fetch(f"{url(harness)}/api/view", Host="rebound.example.org")
    assert refused.value.code == 421
    for path in ("/api/view?page=nothing", "/api/view?limit=100000", "/api/view?offset=x"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            fetch(url(harness) + path)
        assert refused.value.code == 400
    with urllib.request.urlopen(url(harness), timeout=10) as answer:
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert url(harness, "c2") in policy
        assert "<script>" not in answer.read().decode()


def test_dashboard_cli_and_etcd_say_the_same_at_a_revision(harness: Harness, job: JobName) -> None:
    """What the dashboard says with a revision is what etcd held at it; the CLI's may be of a newer one."""
    steps = set()
    for index in range(4):
        view = fetch(f"{url(harness, 'c1' if index % 2 else 'c2')}/api/view?page=job&name={job}")
        head = view["parts"]["head"]
        told = (head["step"], head["attempt"], head["latest"])
        assert told == _in_etcd(harness, job, view["revision"]), view["revision"]
        steps.add(head["step"])
        document = json.loads(
            subprocess.run(
                [*(sys.executable, "-m", "dtrain.cli"), "get", "jobs", job, "-o", "json"],
                env={**os.environ, "DTRAIN_COORDINATORS": ",".join(harness.cluster.addresses)},
                capture_output=True,
                check=True,
                timeout=60,
            ).stdout
        )
        latest = {name: document["latest"][name] for name in ("seq", "step")}
        step = _step(document["status"], document.get("workers", {}).values())
        # It reads in several calls, none of which is older than it says.
        newest = fetch(f"{url(harness)}/api/view")["revision"]
        later = range(document["revision"], 1 + min(newest, document["revision"] + READ_LATER_MAX))
        held = [_in_etcd(harness, job, revision) for revision in later]
        assert step in {one[0] for one in held}, (step, held)
        assert (document["status"]["attempt"], latest) in [one[1:] for one in held], (document, held)
    assert len(steps) > 1, "nothing moved meanwhile: this showed nothing"


def _step(status: dict[str, Any], workers: Any) -> int:
    mine = [one for one in workers if one["attempt"] == status["attempt"] and one["uid"] == status["uid"]]
    return reported_step(
        status.get("step", 0), [rank.get("step", 0) for one in mine for rank in one["ranks"]]
    )


def _in_etcd(harness: Harness, job: JobName, revision: int) -> tuple[int, int, dict[str, int]]:
    """Step, attempt and newest commit as ``etcdctl get --rev`` shows them."""
    keys = harness.keys
    shown = subprocess.run(
        [harness.cluster.etcdctl, "--endpoints", ",".join(harness.cluster.endpoints), "get", "--prefix",
         keys.root, "--rev", str(revision), "-w", "json"],
        env={**os.environ, "ETCDCTL_API": "3"}, capture_output=True, check=True, timeout=60,
    )  # fmt: skip
    found = {
        base64.b64decode(kv["key"]).decode(): base64.b64decode(kv["value"])
        for kv in json.loads(shown.stdout)["kvs"]
    }
    status = codec.decode(JobStatus, found[keys.status(job)])
    latest = codec.decode(Latest, found[keys.latest(job)])
    steps = []
    for key, value in found.items():
        if key.startswith(keys.agents) and key.endswith(f"/workers/{job}"):
            snapshot = codec.decode(WorkerSnapshot, value)
            if (snapshot.uid, snapshot.attempt) == (status.uid, status.attempt):
                steps += [rank.step for rank in snapshot.ranks]
    return reported_step(status.step, steps), status.attempt, {"seq": latest.seq, "step": latest.step}


def _metrics(harness: Harness, replica: str) -> str:
    found = re.findall(r'"event": "status port".*?"address": "([\d.:]+)"', harness.log(replica))
    with urllib.request.urlopen(f"http://{found[-1]}/metrics", timeout=5) as answer:
        return str(answer.read().decode())


def test_without_the_token_nothing_can_be_changed_and_with_it_a_job_is_checkpointed(
    harness: Harness, page: Page, job: JobName
) -> None:
    page.open(f"{url(harness)}/jobs/{job}")
    page.until_text("RUNNING", "h1")
    assert "Checkpoint now" not in page.text("main")
    for headers in ({}, {"Authorization": "Bearer 0123456789abcdef0123"}):
        request = urllib.request.Request(
            f"{url(harness)}/api/jobs/{job}/cancel",
            data=b"{}",
            headers={"Content-Type": "application/json", **headers},
        )
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=10)
        assert refused.value.code == 401
    page.click("Unlock changes")
    token = harness.cluster.dashboard_token.read_text().strip()
    page.run("document.querySelector('#token-input').value = arguments[0]", token)
    page.click("Unlock")
    page.until_text("Checkpoint now")
    page.click("Cancel")
    page.click("Leave it")
    before = harness.status(job).seq_last
    page.click("Suspend")
    page.click("Yes")
    page.until_text("SUSPENDED", "h1")
    assert harness.status(job).phase is JobPhase.SUSPENDED
    assert harness.commits(job)[-1].seq > before
    # Nothing moves now, so that metrics, which have no revision, can be held against the others.
    step, attempt, latest = _in_etcd(harness, job, 0)
    page.until("the page shows etcd's step", lambda: page.text("#fact-step") == str(step))
    assert page.text("#fact-attempt") == str(attempt)
    assert page.text("#fact-newest-checkpoint") == f"{latest['seq']} (step {latest['step']})"
    leader = page.text("#leader").split()[1].rstrip(",")
    shown = {f'dtrain_job_step{{job="{job}"}} {float(step)}'}
    shown.add(f'dtrain_checkpoint_last_committed_step{{job="{job}"}} {float(latest["step"])}')
    harness.until("metrics say so", lambda: shown <= set(_metrics(harness, leader).splitlines()), 30.0)
    assert "dashboard of c1" in page.text("#fact-wanted")
    page.click("Resume")
    page.click("Yes")
    page.until_text("RUNNING", "h1")


def test_a_page_goes_on_from_another_replica_when_its_own_is_gone(
    harness: Harness, page: Page, job: JobName
) -> None:
    leader = fetch(f"{url(harness)}/api/view?page=replicas")["parts"]["cluster"]["leader"]
    page.open(f"{url(harness, leader)}/jobs/{job}")
    page.until_text(f"live from {leader}", "#link")
    page.until_text("RUNNING", "h1")
    shown = int(page.run("return document.documentElement.dataset.revision"))
    harness.cluster.daemon(leader).power_cut()
    other = next(name for name in harness.cluster.dashboards if name != leader)
    page.until_text(f"live from {other}", "#link")
    page.until_text(f"goes on with {other}", "#notice")
    page.until_text(f"Leader {other}", "#leader")
    assert int(page.run("return document.documentElement.dataset.revision")) >= shown
    step = page.text("#fact-step")
    page.until("steps go by again", lambda: page.text("#fact-step") != step)
    harness.cluster.daemon(leader).start()
    harness.await_ready()


def test_a_dashboard_that_dies_is_started_again_and_the_page_finds_it(
    harness: Harness, page: Page, job: JobName
) -> None:
    page.open(f"{url(harness)}/jobs/{job}")
    page.until_text("live from c1", "#link")
    found = [one for one in harness.alive() if "coordinator.web\0--cluster\0e2e\0--id\0c1\0" in _command(one)]
    assert len(found) == 1
    os.kill(found[0], signal.SIGKILL)
    term = harness.term()
    page.until("it is live again", lambda: "live from" in page.text("#link") and _serves(url(harness)))
    assert harness.term() == term, "the coordinator was disturbed"


def _command(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/cmdline") as file:  # noqa: PTH123
            return file.read()
    except OSError:
        return ""


def _serves(address: str) -> bool:
    try:
        return fetch(f"{address}/healthz")["mirror_age_s"] is not None
    except (OSError, ValueError):
        time.sleep(0.1)
        return False


def test_charts_outlive_the_agents_that_remember_them(harness: Harness, job: JobName) -> None:
    attempt = harness.status(job).attempt
    harness.client.set_intent(job, wanted="cancel", by="test")
    harness.await_end(job, JobPhase.CANCELLED)
    for name in ("a1", "a2"):
        pid = harness.cluster.daemon(name).process_pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
    harness.await_ready()
    asked = f"{url(harness, 'c2')}/api/jobs/{job}/series"
    found = harness.until("the archive has them", lambda: fetch(asked)["series"].get("loss"))
    assert attempt >= 2
    assert found[-1][1] > 50
    assert [at for at, _, _ in found] == sorted(at for at, _, _ in found)
