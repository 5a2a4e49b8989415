"""torchrun's own agents meet in etcd, with nothing else of dtrain running. Real processes, real kills."""

import importlib.metadata
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dtrain.local.etcd import EtcdCluster
from dtrain.storage.etcd.port import prefix_end
from dtrain.storage.etcd.transport import GatewayEtcd

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "torchrun_rendezvous" / "train.py"
GROUP = "torchrun.handlers"
LIMIT_S = 100.0


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdCluster]:
    with EtcdCluster(tmp_path_factory.mktemp("rdzv"), fsync=False, cache_dir=ROOT / ".cache") as cluster:
        yield cluster


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The search path on which torch finds the entry point that the project declares."""
    given = os.pathsep.join(each for each in sys.path if each)
    if importlib.metadata.entry_points(group=GROUP, name="dtrain"):
        return given
    # This environment was made before the entry point was declared.
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][GROUP]
    folder = tmp_path_factory.mktemp("declared")
    info = folder / "declared-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: declared\nVersion: 0\n")
    lines = [f"[{GROUP}]", *(f"{name} = {value}" for name, value in declared.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return os.pathsep.join([str(folder), given])


class Agent:
    """One torchrun process and its output."""

    def __init__(self, run: "Run", number: int, nnodes: str, steps: int, conf: str) -> None:
        self.log = run.folder / f"agent-{number}.log"
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--rdzv-backend=dtrain"),
            *(f"--rdzv-endpoint={run.endpoint}", f"--rdzv-id={run.run_id}", f"--rdzv-conf={conf}"),
            *(f"--nnodes={nnodes}", "--nproc-per-node=1", "--max-restarts=3", "--local-addr=127.0.0.1"),
            *(str(SCRIPT), f"--steps={steps}", f"--checkpoint={run.folder / 'saved.pt'}"),
        ]
        with self.log.open("wb") as sink:
            self.process = subprocess.Popen(
                command, stdout=sink, stderr=subprocess.STDOUT, cwd=run.folder, env=run.env
            )

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def await_text(self, pattern: str, count: int = 1, limit_s: float = LIMIT_S) -> re.Match[str]:
        await_true(
            lambda: len(re.findall(pattern, self.text)) >= count or self.process.poll() is not None, limit_s
        )
        found = list(re.finditer(pattern, self.text))
        assert len(found) >= count, f"{pattern!r} is not in:\n{self.text[-3000:]}"
        return found[-1]

    def worker(self) -> int:
        """The process id of its present worker."""
        return int(self.await_text(r"pid (\d+): rank")[1])

    def kill(self, how: signal.Signals = signal.SIGKILL) -> None:
        """End the agent; with SIGKILL its worker, too: the whole machine is gone."""
        if how is signal.SIGKILL:
            worker = self.worker()
            self.process.kill()
            os.kill(worker, signal.SIGKILL)
        else:
            self.process.send_signal(how)

    def done(self) -> int:
        try:
            return self.process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            pytest.fail(f"it does not end:\n{self.text[-3000:]}")


class Run:
    """The agents of one run id."""

    def __init__(self, cluster: EtcdCluster, run_id: str, folder: Path, path: str) -> None:
        self.cluster, self.run_id, self.folder = cluster, run_id, folder
        self.endpoint = ",".join(cluster.endpoints)
        kept = {
            key: value for key, value in os.environ.items() if not key.startswith(("DTRAIN_", "ETCDCTL_"))
        }
        self.env = kept | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        self.agents: list[Agent] = []
        folder.mkdir(exist_ok=True)

    def start(self, nnodes: str, *, steps: int = 100, conf: str = "ttl=3,last_call_timeout=1") -> Agent:
        agent = Agent(self, len(self.agents), nnodes, steps, conf)
        self.agents.append(agent)
        return agent

    def in_etcd(self) -> list[str]:
        return keys_below(self.cluster, f"/dtrain-rdzv/{self.run_id}/")

    def end(self) -> None:
        for agent in self.agents:
            if agent.process.poll() is None:
                agent.process.terminate()
        for agent in self.agents:
            try:
                agent.process.wait(20)
            except subprocess.TimeoutExpired:
                agent.process.kill()
                agent.process.wait()


Start = Callable[[str], Run]


@pytest.fixture
def runs(etcd: EtcdCluster, path: str, tmp_path: Path) -> Iterator[Start]:
    made: list[Run] = []

    def new(run_id: str, cluster: EtcdCluster = etcd) -> Run:
        made.append(Run(cluster, run_id, tmp_path / run_id, path))
        return made[-1]

    yield new
    for run in made:
        run.end()


def keys_below(cluster: EtcdCluster, prefix: str) -> list[str]:
    client = GatewayEtcd(cluster.endpoints)
    try:
        return [kv.key for kv in client.range(prefix, prefix_end(prefix)).items]
    finally:
        client.close()


def await_true(holds: Callable[[], bool], limit_s: float = LIMIT_S) -> None:
    end = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < end, "it does not come true"
        time.sleep(0.05)


def test_a_killed_worker_costs_one_restart_and_nothing_is_left_in_etcd(runs: Start) -> None:
    run, other = runs("worker"), runs("another")
    first, second = run.start("2"), run.start("2")
    alone = other.start("1", steps=20)
    first.await_text(r"rank \d of 2 starts at step 0")
    assert sorted(key.rsplit("/", 1)[0] for key in run.in_etcd()) == [
        "/dtrain-rdzv/worker",
        *["/dtrain-rdzv/worker/nodes"] * 2,
    ]
    await_true(lambda: "step 20 " in first.text + second.text)
    os.kill(second.worker(), signal.SIGKILL)
    assert (first.done(), second.done(), alone.done()) == (0, 0, 0)
    assert re.search(r"rank \d of 2 starts at step [1-9]\d*", first.text + second.text)
    assert "rank 0 of 1 has done all 20 steps" in alone.text, "two runs beside each other do not meet"
    await_true(lambda: not run.in_etcd() + other.in_etcd(), 15)


def test_a_killed_agent_is_missed_within_its_lease_and_the_other_goes_on_alone_until_one_joins(
    runs: Start,
) -> None:
    run = runs("agent")
    first, second = run.start("1:2", steps=300), run.start("1:2", steps=300)
    first.await_text(r"rank \d of 2 starts at step 0")
    await_true(lambda: "step 20 " in first.text + second.text)
    first.kill()
    second.await_text(r"rank 0 of 1 starts at step [1-9]\d*")
    third = run.start("1:2", steps=300)
    third.await_text(r"rank 1 of 2 starts at step [1-9]\d*")
    second.await_text(r"rank 0 of 2 starts at step [1-9]\d*")
    began = time.monotonic()
    # A lease of its own length would end much later than this.
    third.kill(signal.SIGTERM)
    second.await_text(r"rank 0 of 1 starts", count=2)
    assert third.done() != 0
    assert time.monotonic() - began < 20
    assert second.done() == 0
    assert "rank 0 of 1 has done all 300 steps" in second.text


def test_an_agent_that_stood_by_takes_the_place_of_a_killed_one(runs: Start) -> None:
    run = runs("spare")
    first, second = run.start("2", steps=150), run.start("2", steps=150)
    first.await_text(r"rank \d of 2 starts at step 0")
    spare, unneeded = run.start("2", steps=150), run.start("2", steps=150)
    spare.await_text("standing by")
    unneeded.await_text("standing by")
    assert "starts" not in spare.text + unneeded.text
    first.kill()
    assert second.done() == 0
    assert (spare.done(), unneeded.done()) == (0, 0), "not to be needed is no failure"
    took = [agent for agent in (spare, unneeded) if "of 2 has done all 150 steps" in agent.text]
    assert len(took) == 1


def test_a_killed_member_of_etcd_stops_nothing(runs: Callable[..., Run], tmp_path: Path) -> None:
    with EtcdCluster(tmp_path / "three", size=3, fsync=False, cache_dir=ROOT / ".cache") as cluster:
        run = runs("member", cluster)
        first, second = run.start("2", steps=200), run.start("2", steps=200)
        await_true(lambda: "step 10 " in first.text + second.text)
        cluster.members[0].process.kill()  # type: ignore[union-attr]
        time.sleep(4.0)  # longer than the lease: it was renewed through the others
        await_true(lambda: "step 80 " in first.text + second.text)
        assert len(re.findall(r"pid \d+: rank", first.text + second.text)) == 2, "nobody was restarted"
        os.kill(first.worker(), signal.SIGKILL)
        assert (first.done(), second.done()) == (0, 0)
        assert len(re.findall(r"pid \d+: rank", first.text + second.text)) == 4


def test_a_wrong_endpoint_is_told_quickly_and_clearly(runs: Start, tmp_path: Path) -> None:
    run = runs("nowhere")
    run.endpoint = "127.0.0.1:1"
    began = time.monotonic()
    agent = run.start("1", conf="connect_timeout=1")
    assert agent.done() != 0
    assert "DT-3001" in agent.text
    assert "no etcd member at http://127.0.0.1:1 answered" in agent.text
    assert time.monotonic() - began < 40, "most of it are torch's imports on a busy machine"
