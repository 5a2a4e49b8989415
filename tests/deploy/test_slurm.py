"""The Slurm script, run for real: srun and scontrol are stand-ins that start the tasks on this machine."""

import itertools
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dtrain.local.etcd import EtcdCluster
from dtrain.protocol import codec
from dtrain.protocol.checkpoint import CommitRecord
from dtrain.protocol.ids import ClusterName, JobName
from dtrain.protocol.job import JobPhase, JobStatus
from dtrain.protocol.keys import Keys
from dtrain.storage.etcd.port import prefix_end
from dtrain.storage.etcd.transport import GatewayEtcd

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

SCRIPT = Path(__file__).parents[2] / "deploy" / "slurm" / "dtrain.sbatch"
IDS = itertools.count(os.getpid() * 10)
NODES = 2

SRUN = """
    #!{python}
    # Starts the command once per node, passes signals on, and ends as the worst of them.
    import os, signal, subprocess, sys
    words = sys.argv[1:]
    options = [word for word in words if word.startswith("--")]
    command = words[len(options):]
    count = int(dict(option[2:].partition("=")[::2] for option in options)["ntasks"])
    tasks = []
    def forward(number, _frame):
        for task in tasks:
            task.send_signal(number)
    signal.signal(signal.SIGTERM, forward)
    for index in range(count):
        env = os.environ | {{"SLURM_NODEID": str(index), "SLURMD_NODENAME": f"Node.{{index}}"}}
        tasks.append(subprocess.Popen(command, env=env))
    sys.exit(max(task.wait() for task in tasks))
"""

SCONTROL = """
    #!/bin/sh
    echo "$@" >> {folder}/scontrol.log
"""

TRAIN = """
    import time
    from pathlib import Path
    import torch
    from dtrain import trainer
    run = trainer.join()
    torch.manual_seed(7)
    model = torch.nn.Linear(4, 4)
    run.track(model=model)
    for step in run.steps(100_000):
        model(torch.ones(4)).sum().backward()
        time.sleep(0.02)
        if Path({stop!r}).exists() and step > {least}:
            raise SystemExit({code})
"""


class Allocation:
    """What Slurm gives a batch script, on this machine."""

    def __init__(self, folder: Path, endpoint: str) -> None:
        self.folder = folder
        self.endpoint = endpoint
        self.job_id = str(next(IDS))
        self.cluster = ClusterName(f"slurm-{self.job_id}")
        self.stop_file = folder / "stop"
        self.script: subprocess.Popen[bytes] | None = None
        (folder / "store").mkdir()
        shims = folder / "bin"
        shims.mkdir()
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            path = shims / name
            path.write_text(textwrap.dedent(text).lstrip().format(python=sys.executable, folder=folder))
            path.chmod(0o755)
        self.path = os.pathsep.join([str(shims), str(Path(sys.executable).parent), os.environ["PATH"]])

    def write_job(self, code: int = 0, least: int = 20) -> Path:
        text = TRAIN.format(stop=str(self.stop_file), code=code, least=least)
        (self.folder / "train.py").write_text(textwrap.dedent(text))
        job = self.folder / "job.yaml"
        job.write_text(
            f"name: tiny\nscript: train.py\nworking_dir: {self.folder}\n"
            f"nnodes: {NODES}\nnproc_per_node: 1\n"
            "checkpoint: {every_steps: 10}\n"
        )
        return job

    def sbatch(self, job: Path, restart: int = 0, **env: str) -> "subprocess.Popen[bytes]":
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("DTRAIN_", "SLURM_", "ETCDCTL_"))}
        slurm = {
            "SLURM_JOB_ID": self.job_id,
            "SLURM_JOB_NUM_NODES": str(NODES),
            "SLURM_RESTART_COUNT": str(restart),
            "DTRAIN_ENDPOINTS": self.endpoint,
            "DTRAIN_DEFAULT_STORE": (self.folder / "store").as_uri(),
            "DTRAIN_DATA_DIR": str(self.folder / "n"),
            "DTRAIN_DRAIN_GRACE": "60",
            "PATH": self.path,
        }
        with (self.folder / "out").open("ab") as out:
            self.script = subprocess.Popen(
                ["bash", str(SCRIPT), str(job)],
                env=clean | slurm | env,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        return self.script

    def until(self, what: Callable[[], bool], timeout_s: float = 120.0) -> None:
        end = time.monotonic() + timeout_s
        while not what():
            assert self.script is not None
            assert self.script.poll() is None, f"ended with {self.script.poll()}:\n{self.output()}"
            assert time.monotonic() < end, self.output()
            time.sleep(0.1)

    def ended(self, timeout_s: float = 150.0) -> int:
        assert self.script is not None
        try:
            return self.script.wait(timeout_s)
        except subprocess.TimeoutExpired:
            pytest.fail(self.output())

    def output(self) -> str:
        return (self.folder / "out").read_text()[-6000:]

    def status(self, etcd: GatewayEtcd) -> JobStatus | None:
        found = etcd.range(Keys(self.cluster).status(JobName("tiny"))).items
        return codec.decode(JobStatus, found[0].value) if found else None

    def commits(self, etcd: GatewayEtcd) -> list[CommitRecord]:
        prefix = Keys(self.cluster).job(JobName("tiny")) + "checkpoints/"
        return [codec.decode(CommitRecord, kv.value) for kv in etcd.range(prefix, prefix_end(prefix)).items]

    def requeued(self) -> list[str]:
        log = self.folder / "scontrol.log"
        return log.read_text().splitlines() if log.exists() else []

    def close(self) -> None:
        """End whatever is left in the script's session; ranks are found by their folder."""
        from dtrain.local import sweeping

        if self.script is not None and self.script.poll() is None:
            os.killpg(self.script.pid, signal.SIGKILL)
            self.script.wait(10)
        sweeping.end_all(self.folder)


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayEtcd]:
    with EtcdCluster(tmp_path_factory.mktemp("etcd"), fsync=False) as servers:
        servers.start()
        servers.wait_ready()
        client = GatewayEtcd(servers.endpoints)
        client_endpoints[client] = servers.endpoints[0]
        yield client
        client.close()


client_endpoints: dict[GatewayEtcd, str] = {}


@pytest.fixture
def allocation(tmp_path: Path, etcd: GatewayEtcd) -> Iterator[Allocation]:
    made = Allocation(tmp_path, client_endpoints[etcd])
    yield made
    made.close()


def trains(allocation: Allocation, etcd: GatewayEtcd) -> bool:
    status = allocation.status(etcd)
    return status is not None and status.phase is JobPhase.RUNNING and bool(allocation.commits(etcd))


def test_the_script_is_sound() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    text = SCRIPT.read_text()
    last_directive = max(i for i, line in enumerate(text.splitlines()) if line.startswith("#SBATCH"))
    first_command = next(i for i, line in enumerate(text.splitlines()) if line and not line.startswith("#"))
    assert last_directive < first_command, "Slurm reads no directive after the first command"
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(SCRIPT)], check=True)


def test_a_job_runs_to_its_end_and_nothing_is_left(allocation: Allocation, etcd: GatewayEtcd) -> None:
    allocation.stop_file.touch()
    allocation.sbatch(allocation.write_job())
    assert allocation.ended() == 0, allocation.output()
    status = allocation.status(etcd)
    assert status is not None
    assert status.phase is JobPhase.SUCCEEDED
    assert not allocation.requeued()
    agents = Keys(allocation.cluster).agents
    assert not etcd.range(agents, prefix_end(agents)).items, "agents have given back their leases"


def test_the_exit_code_of_the_job_is_that_of_the_script(allocation: Allocation, etcd: GatewayEtcd) -> None:
    allocation.stop_file.touch()
    allocation.sbatch(allocation.write_job(code=93))
    assert allocation.ended() == 20, allocation.output()
    assert not allocation.requeued()


def test_the_time_limit_drains_and_a_requeued_allocation_goes_on_from_there(
    allocation: Allocation, etcd: GatewayEtcd
) -> None:
    job = allocation.write_job()
    script = allocation.sbatch(job)
    allocation.until(lambda: trains(allocation, etcd))
    script.send_signal(signal.SIGTERM)
    assert allocation.ended() == 0, allocation.output()
    assert allocation.requeued() == [f"requeue {allocation.job_id}"]
    at_end = allocation.commits(etcd)[-1]
    allocation.stop_file.touch()
    allocation.sbatch(job, restart=1)
    assert allocation.ended() == 0, allocation.output()
    status = allocation.status(etcd)
    assert status is not None
    assert status.phase is JobPhase.SUCCEEDED
    assert status.attempt > 1
    assert status.restore is not None
    assert status.restore.seq == at_end.seq, "it goes on from what the drain has put aside"
