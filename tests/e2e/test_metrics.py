"""What Prometheus would see of a cluster while a rank and the leader are killed under a job."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from tests.support.harness import Harness
from tests.support.promtool import promtool

from dtrain.protocol.events import EventReason
from dtrain.protocol.ids import JobName, Rank

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]
GRAFANA = Path(__file__).resolve().parents[2] / "deploy/grafana"
ALERTS, DASHBOARD = GRAFANA / "alerts.yaml", GRAFANA / "dtrain.json"
HEALTH = ("--health-listen", "127.0.0.1:0")


def parse(page: str) -> tuple[Series, set[str]]:
    """Return all samples, and the names of those that must never fall."""
    found: Series = {}
    rising: set[str] = set()
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            found[sample.name, tuple(sorted(sample.labels.items()))] = sample.value
            if family.type in ("counter", "histogram"):
                rising.add(sample.name)
    return found, rising


class Scraper(threading.Thread):
    """Scrapes every daemon again and again, and notes what a monitoring must never see."""

    def __init__(self, harness: Harness) -> None:
        super().__init__(daemon=True)
        self._harness = harness
        self._over = threading.Event()
        self.names = (*harness.cluster.coordinators, *harness.cluster.agents)
        self._lock = threading.Lock()
        self._last: dict[str, Series] = {}
        self._durable: Series = {}
        self.fell: list[str] = []
        self.scrapes = 0

    def address(self, name: str) -> str:
        found = re.search(r'"event": "status port".*?"address": "([\d.:]+)"', self._harness.log(name))
        assert found
        return found[1]

    def page(self, name: str) -> str:
        """The page of one daemon; "" while no process is there to be asked."""
        try:
            with urllib.request.urlopen(f"http://{self.address(name)}/metrics", timeout=5.0) as answer:
                text: str = answer.read().decode()
                return text
        except (urllib.error.HTTPError, OSError):
            return ""

    def series(self, name: str) -> Series:
        return parse(self.page(name))[0]

    def value(self, name: str, metric: str, **labels: str) -> float | None:
        return self.series(name).get((metric, tuple(sorted(labels.items()))))

    def leader(self) -> str | None:
        leads = [
            n for n in self._harness.cluster.coordinators if self.value(n, "dtrain_coordinator_is_leader")
        ]
        return leads[0] if len(leads) == 1 else None

    def run(self) -> None:
        while not self._over.wait(0.3):
            for name in self.names:
                page = self.page(name)
                if page:
                    self._compare(name, *parse(page))

    def _compare(self, name: str, series: Series, rising: set[str]) -> None:
        self.scrapes += 1
        born = series["process_start_time_seconds", ()]
        before = self._last.get(name, {})
        if before.get(("process_start_time_seconds", ())) == born:
            self._note(name, before, series, rising)
        self._last[name] = series
        # Counts of a job are kept in its record: they do not fall whoever shows them.
        kept = {of: value for of, value in series.items() if of[0] in KEPT}
        self._note(f"{name}, after another leader", self._durable, kept, rising)
        self._durable |= kept

    def _note(self, where: str, before: Series, after: Series, rising: set[str]) -> None:
        self.fell += [
            f"{where}: {of} fell from {before[of]} to {value}"
            for of, value in after.items()
            if of[0] in rising and value < before.get(of, 0.0)
        ]

    def __enter__(self) -> "Scraper":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join(20.0)


KEPT = {
    "dtrain_job_attempts_total",
    "dtrain_checkpoint_commits_total",
    "dtrain_checkpoint_committed_bytes_total",
    "dtrain_checkpoint_failures_total",
}


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    with Harness(
        tmp_path_factory.mktemp("m"),
        agents=2,
        coordinator_flags=HEALTH,
        agent_flags=("--report-interval", "0.2", *HEALTH),
    ) as made:
        made.await_ready()
        yield made
        made.assert_clean()


def test_a_failover_neither_resets_nor_doubles_what_is_counted(harness: Harness, tmp_path: Path) -> None:
    with Scraper(harness) as scraper:
        stop = harness.stop_file("seen")
        job = harness.start("seen", f"--steps 100000 --pause-ms 20 --stop-file {stop}", every_steps=15)
        harness.await_commit(job)
        old = harness.until("a leader that shows the job", scraper.leader)
        attempt = harness.status(job).attempt
        os.kill(harness.pids(job)[Rank(1)], signal.SIGKILL)
        harness.await_training(job, after_attempt=attempt)
        pid = harness.cluster.coordinators[old].process_pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)

        def another() -> str | None:
            found = scraper.leader()
            return (
                found if found is not None and harness.cluster.coordinators[old].process_pid != pid else None
            )

        new = harness.until("another leader", another)
        harness.await_commit(job, after=harness.commits(job)[-1].seq)
        _agree(harness, scraper, job, new)
        for name in scraper.names:
            page = scraper.page(name)
            # It says nothing but what it dislikes.
            assert promtool("check", "metrics", given=page) == "", name
            if name != new:
                assert 'job="seen"' not in page or name in harness.cluster.agents, name
        takeovers = [scraper.value(n, "dtrain_takeover_duration_seconds_count") for n in (old, new)]
        if new != old:
            assert takeovers[1] == 1.0
        stop.touch()
        harness.await_end(job)
        _frozen(harness, scraper, job, new)
    assert scraper.scrapes > 20
    assert not scraper.fell, scraper.fell[:10]


def _agree(harness: Harness, scraper: Scraper, job: JobName, leader: str) -> None:
    """What the leader shows is what etcd holds."""

    def counted() -> bool:
        commits = len(harness.events(job, EventReason.CHECKPOINT_COMMITTED))
        shown = scraper.value(leader, "dtrain_checkpoint_commits_total", job=job)
        newest = harness.commits(job)[-1]
        step = scraper.value(leader, "dtrain_checkpoint_last_committed_step", job=job)
        return shown is not None and commits <= shown <= commits + 1 and step == newest.step

    harness.until("the leader counts the commits that there are", counted)
    series = scraper.series(leader)
    attempts = {dict(of[1])["reason"]: v for of, v in series.items() if of[0] == "dtrain_job_attempts_total"}
    assert attempts == {"first": 1.0, "signal": 1.0}
    assert series["dtrain_jobs", (("phase", "RUNNING"),)] == 1.0
    assert 0 < series["dtrain_job_goodput_ratio", (("job", job),)] <= 1
    assert 0 < series["dtrain_job_step", (("job", job),)] <= harness.last_step(job) + 1
    assert series["dtrain_checkpoint_duration_seconds_count", (("stage", "commit"),)] > 0
    assert series["dtrain_checkpoint_duration_seconds_count", (("stage", "verify"),)] > 0
    assert series["dtrain_store_request_duration_seconds_count", (("op", "put"),)] > 0
    assert series["dtrain_plan_duration_seconds_count", ()] > 0
    agents = [scraper.series(name) for name in harness.cluster.agents]
    for stage in ("snapshot", "upload", "restore"):
        name = ("dtrain_checkpoint_duration_seconds_count", (("stage", stage),))
        assert sum(shown[name] for shown in agents) >= 2, stage
    exits = {
        dict(of[1])["reason"]: v
        for shown in agents
        for of, v in shown.items()
        if of[0] == "dtrain_worker_exits_total" and v
    }
    assert exits["signal"] == 1.0
    # Rank 0's machine alone shows the steps of a job.
    steps = [
        s for s in (x.get(("dtrain_job_step_duration_seconds_count", (("job", job),))) for x in agents) if s
    ]
    assert len(steps) == 1
    for shown in (series, *agents):
        assert shown["dtrain_etcd_request_duration_seconds_count", (("op", "txn"),)] > 0
        assert shown["dtrain_lease_renew_duration_seconds_count", ()] > 0
        assert shown["dtrain_lease_remaining_seconds", ()] > 0


def _frozen(harness: Harness, scraper: Scraper, job: JobName, leader: str) -> None:
    """A job that has ended keeps its counts and makes no progress."""

    def over() -> bool:
        return scraper.value(leader, "dtrain_jobs", phase="SUCCEEDED") == 1.0

    harness.until("the end is seen", over)
    series = scraper.series(leader)
    assert series["dtrain_job_step", (("job", job),)] == harness.status(job).step
    assert ("dtrain_job_last_progress_timestamp_seconds", (("job", job),)) not in series


class Prometheus:
    """A real one, that scrapes the cluster every second and evaluates the rules that ship."""

    def __init__(self, harness: Harness, scraper: Scraper, folder: Path) -> None:
        binary = shutil.which("prometheus")
        assert binary, "no prometheus: install Debian's package of that name"
        targets = {
            kind: [scraper.address(name) for name in names]
            for kind, names in (
                ("coordinator", harness.cluster.coordinators),
                ("agent", harness.cluster.agents),
            )
        }
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": ["alerts.yaml"],
            "scrape_configs": [
                {"job_name": kind, "honor_labels": True, "static_configs": [{"targets": found}]}
                for kind, found in targets.items()
            ],
        }
        (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
        (folder / "alerts.yaml").write_text(re.sub(r"interval: \d+s", "interval: 1s", ALERTS.read_text()))
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.address = f"127.0.0.1:{listener.getsockname()[1]}"
        self._log = (folder / "prometheus.log").open("w")
        self._process = subprocess.Popen(
            [
                binary,
                f"--config.file={folder}/prometheus.yaml",
                f"--storage.tsdb.path={folder}/data",
                f"--web.listen-address={self.address}",
            ],
            stdout=self._log,
            stderr=self._log,
        )

    def ask(self, path: str, **query: str) -> Any:
        url = f"http://{self.address}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        try:
            with urllib.request.urlopen(url, timeout=10.0) as answer:
                return json.loads(answer.read())["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{query}: {error.read().decode()}") from error

    def query(self, expr: str) -> list[Any]:
        found: list[Any] = self.ask("query", query=expr)["result"]
        return found

    def ready(self) -> bool:
        try:
            return len(self.query("up == 1")) == 5
        except OSError:
            return False

    def __enter__(self) -> "Prometheus":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(20.0)
        self._log.close()


NOTHING_WRONG = {
    "Slow machines",
    "Errors",
    "What failed",
    "Not committed",
    "Machines cut off from etcd",
    "To be tried again",
}
"""Panels that may be empty while all is well."""


def test_every_panel_shows_something_and_no_alert_comes_while_all_is_well(
    harness: Harness, tmp_path: Path
) -> None:
    scraper = Scraper(harness)
    stop = harness.stop_file("drawn")
    with Prometheus(harness, scraper, tmp_path) as prometheus:
        job = harness.start("drawn", f"--steps 100000 --pause-ms 20 --stop-file {stop}", every_steps=15)
        harness.until("prometheus scrapes all", prometheus.ready)
        attempt = harness.status(job).attempt
        os.kill(harness.pids(job)[Rank(0)], signal.SIGKILL)
        harness.await_training(job, after_attempt=attempt)
        harness.await_commit(job, after=harness.commits(job)[-1].seq if harness.commits(job) else None)
        panels = [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]
        empty: list[str] = []

        def drawn() -> bool:
            empty.clear()
            for panel in panels:
                queries = [
                    target["expr"].replace("$__rate_interval", "30s").replace("$job", ".*")
                    for target in panel["targets"]
                ]
                if not any(prometheus.query(query) for query in queries):
                    empty.append(panel["title"])
            return not set(empty) - NOTHING_WRONG

        try:
            harness.until("every panel shows something", drawn, limit_s=60.0)
        except AssertionError:
            raise AssertionError(f"empty: {set(empty) - NOTHING_WRONG}") from None
        # dtrain's own label, not the name of the scrape.
        assert {one["metric"]["job"] for one in prometheus.query("dtrain_job_step")} >= {"drawn"}

        def evaluated() -> bool:
            groups = prometheus.ask("rules")["groups"]
            health = {rule["name"]: rule["health"] for group in groups for rule in group["rules"]}
            assert "err" not in health.values(), health
            return set(health.values()) == {"ok"}

        harness.until("all rules are evaluated", evaluated)
        # A machine too busy for a checkpoint each 0.3 s makes one pending for a moment.
        harness.until("no alert stays", lambda: not prometheus.ask("alerts")["alerts"], limit_s=60.0)
        stop.touch()
        harness.await_end(job)
