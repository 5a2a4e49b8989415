"""No secret is shown: not in etcd, logs, command lines, errors, nor by the command line's verbs."""

import secrets
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from dtrain.cli import jobfile
from dtrain.cli.client import Client, closing
from dtrain.cli.main import run
from dtrain.coordinator import config as coordinator_config
from dtrain.coordinator.api import validate
from dtrain.local.cluster import LocalCluster
from dtrain.protocol import codec
from dtrain.protocol.errors import DtrainError, Refused
from dtrain.protocol.ids import JobName, Uid
from dtrain.protocol.job import (
    CheckpointPolicy,
    Entry,
    EntryKind,
    JobPhase,
    JobSpec,
    JobStatus,
    RestartPolicy,
)
from dtrain.runtime import redact
from dtrain.runtime.config import EtcdOptions
from dtrain.runtime.tls import Role
from dtrain.storage.blobs.open import open_store
from dtrain.storage.etcd.access import Access, check_endpoints
from dtrain.storage.etcd.endpoints import parse_endpoint
from dtrain.storage.etcd.guardian import GuardianConfig, Policy
from dtrain.storage.etcd.transport import GatewayEtcd
from tests.support.certificates import Authority, arguments, authority

CLUSTER = "shy"
JOB = JobName("shy-job")
SCRIPT = """
print("starting", flush=True)
print("step by step", flush=True)
raise RuntimeError("boom")
"""


@dataclass(frozen=True)
class Run:
    """A cluster in which a job has failed, and what must not be seen of it."""

    cluster: LocalCluster
    ca: Authority
    secrets: dict[str, str]
    folder: Path

    def tls(self, role: Role, name: str) -> list[str]:
        return arguments(self.ca.issue(role, name, cluster=CLUSTER))


@pytest.fixture(scope="module")
def shy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    folder = tmp_path_factory.mktemp("shy")
    ca = authority(folder / "ca")
    hidden = {name: secrets.token_hex(12) for name in ("etcd password", "session token", "job's token")}
    agent = arguments(ca.issue("agent", "a1", cluster=CLUSTER))
    coordinator = arguments(ca.issue("coordinator", "c1", cluster=CLUSTER))
    hidden["key"] = Path(agent[3]).read_text().splitlines()[1]
    cluster = LocalCluster(
        folder / "cluster",
        coordinators=1,
        agents=1,
        name=CLUSTER,
        etcd_fsync=False,
        agent_flags=agent,
        coordinator_flags=coordinator,
        env={
            "DTRAIN_PASSWORD": hidden["etcd password"],
            "AWS_SESSION_TOKEN_OF_TESTS": hidden["session token"],
        },
    )
    (folder / "train.py").write_text(SCRIPT)
    spec = JobSpec(
        JOB,
        Uid(""),
        Entry(EntryKind.SCRIPT, "train.py"),
        working_dir=str(folder),
        env={"WANDB_API_KEY": hidden["job's token"], "EPOCHS": "3"},
        checkpoint=CheckpointPolicy(every_steps=10),
        restarts=RestartPolicy(max_restarts=0),
        shutdown_grace_s=1.0,
    )
    with cluster:
        hidden["S3 secret"] = cluster.store_env["AWS_SECRET_ACCESS_KEY"]
        files = ca.issue("operator", "ann", cluster=CLUSTER)
        with closing(Client(cluster.addresses, tls=files)) as client:
            client.submit(codec.encode(spec), "q1")
        end = time.monotonic() + 90.0
        while _phase(cluster) is not JobPhase.FAILED:
            assert time.monotonic() < end, "the job does not end"
            time.sleep(0.2)
        yield Run(cluster, ca, hidden, folder)


def _phase(cluster: LocalCluster) -> JobPhase | None:
    found = cluster.etcd.range(cluster.keys.status(JOB)).items
    return codec.decode(JobStatus, found[0].value).phase if found else None


def test_etcd_holds_no_secret_but_a_jobs_own_environment(shy: Run) -> None:
    items = shy.cluster.etcd.range("/", "0").items
    assert any(item.key.endswith("/status") for item in items)
    for item in items:
        found = [name for name, secret in shy.secrets.items() if secret.encode() in item.value]
        allowed = ["job's token"] if item.key == shy.cluster.keys.spec(JOB) else []
        assert found == allowed, item.key


def test_no_command_line_holds_a_secret(shy: Run) -> None:
    seen = 0
    for process in Path("/proc").iterdir():
        if not process.name.isdecimal():
            continue
        try:
            line = (process / "cmdline").read_bytes()
        except OSError:
            continue
        seen += str(shy.folder).encode() in line
        for name, secret in shy.secrets.items():
            assert secret.encode() not in line, f"{name}: {line!r}"
    assert seen >= 4


def test_no_log_and_no_file_that_others_can_read_holds_a_secret(shy: Run) -> None:
    logs = 0
    for path in shy.folder.rglob("*"):
        if not path.is_file() or path.is_symlink():
            continue
        data = path.read_bytes()
        found = [name for name, secret in shy.secrets.items() if secret.encode() in data]
        is_log = path.suffix == ".log" or path.name == "error.json"
        logs += is_log
        if is_log:
            assert found == [], path
        elif found:
            assert _is_private(path, shy.folder), f"{path} holds {found} and others can read it"
    assert logs >= 4


def _is_private(path: Path, top: Path) -> bool:
    while path != top:
        if not stat.S_IMODE(path.stat().st_mode) & 0o077:
            return True
        path = path.parent
    return False


@pytest.mark.parametrize("role", [Role.OPERATOR, Role.READER])
@pytest.mark.parametrize(
    "words",
    [
        ["describe", "job", JOB],
        ["describe", "job", JOB, "-o", "json"],
        ["describe", "job", JOB, "-o", "yaml"],
        ["describe", "agent", "a1"],
        ["get", "jobs", "-o", "wide"],
        ["get", "jobs", "-o", "json"],
        ["get", "events", "-o", "json"],
        ["get", "agents", "-o", "json"],
        ["get", "coordinators", "-o", "json"],
        ["logs", JOB],
    ],
    ids=" ".join,
)
def test_no_verb_shows_a_secret(
    words: list[str], role: Role, shy: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--coordinators", ",".join(shy.cluster.addresses), *shy.tls(role, "ann")]
    assert run([*words, *where]) == 0
    shown = "".join(capsys.readouterr())
    assert len(shown) > 20
    for name, secret in shy.secrets.items():
        assert secret not in shown, name
    if "json" in words and "job" in words:
        assert '"WANDB_API_KEY": "***"' in shown


def test_readers_and_agents_get_no_environment_of_jobs_at_all(shy: Run) -> None:
    for role, expected in ((Role.OPERATOR, True), (Role.READER, False), (Role.AGENT, False)):
        files = shy.ca.issue(role, "a1", cluster=CLUSTER, file=f"look-{role}")
        with closing(Client(shy.cluster.addresses, tls=files)) as client:
            items = client.read("jobs/").items
        specs = [item.value for item in items if item.key.endswith("/spec")]
        assert len(specs) == 1
        assert (shy.secrets["job's token"].encode() in specs[0]) is expected
        assert codec.decode(JobSpec, specs[0]).env["EPOCHS"] == ("3" if expected else redact.HIDDEN)


def test_a_submission_warns_of_a_secret_and_a_difference_hides_it(tmp_path: Path) -> None:
    (tmp_path / "train.py").touch()
    path = tmp_path / "job.yaml"
    path.write_text(
        "name: j\nscript: train.py\nenv: {HF_TOKEN: hunter2, HF_TOKEN_FILE: /run/hf, EPOCHS: 3}\n"
    )
    job = jobfile.read(path)
    assert [warning.split()[0] for warning in job.warnings] == ["env.HF_TOKEN"]
    assert "hunter2" not in " ".join(job.warnings)
    changed = codec.to_json(jobfile.read(path, ["env.HF_TOKEN=hunter3"]).spec)
    assert jobfile.differences(codec.to_json(job.spec), changed) == ["env.HF_TOKEN: *** -> ***"]


SECRET = "hunter2hunter2"


@pytest.mark.parametrize(
    "store",
    [
        f"s3://AKIA:{SECRET}@bucket/prefix",
        f"s3://bucket?secret_key={SECRET}",
        f"s3://bucket?endpoint=http://a:{SECRET}@host:9000",
        f"s3://bucket?endpoint=http%3A%2F%2Fa%3A{SECRET}%40host",
    ],
)
def test_a_store_with_credentials_is_refused_without_repeating_them(store: str) -> None:
    spec = JobSpec(JOB, Uid(""), Entry(EntryKind.SCRIPT, "t.py"), checkpoint=CheckpointPolicy(store=store))
    for attempt in (
        lambda: validate.check(spec),
        lambda: coordinator_config.load(["--default-store", store], {}),
        lambda: open_store(store),
    ):
        with pytest.raises(Refused) as caught:
            attempt()
        assert SECRET not in f"{caught.value} {caught.value.cause} {caught.value.fix}"
    for fine in ("file:///data/me@host/x", "/data/me@host", "s3://bucket/p?endpoint=http://h:9000&region=r"):
        assert not validate.holds_credentials(fine)


def test_an_endpoint_with_a_password_is_refused_without_repeating_it() -> None:
    url = f"http://root:{SECRET}@etcd:2379"
    with pytest.raises(DtrainError) as caught:
        parse_endpoint(url)
    assert SECRET not in str(caught.value)
    with pytest.raises(ValueError, match=r"\*\*\*@etcd") as raised:
        check_endpoints((url,))
    assert SECRET not in str(raised.value)
    assert redact.url(f"x {url} y") == "x http://***@etcd:2379 y"


def test_values_that_hold_a_password_do_not_print_it() -> None:
    etcd = GatewayEtcd(("http://127.0.0.1:1",), user="u", password=SECRET)
    for value in (
        EtcdOptions(("http://h:1",), user="u", password=SECRET),
        Access(("http://h:1",), user="u", password=SECRET),
        GuardianConfig(
            argv=("x",),
            endpoints=("http://h:1",),
            policy=Policy.AGENT,
            component="agent/a",
            user="u",
            password=SECRET,
        ),
        etcd,
    ):
        assert SECRET not in repr(value)
    with pytest.raises(DtrainError) as caught:
        etcd.range("/x", deadline_s=0.3)
    error: BaseException | None = caught.value
    while error is not None:
        assert SECRET not in f"{error!r} {error}"
        error = error.__cause__ or error.__context__
    etcd.close()


FAILING = """
import sys
from dtrain.runtime import log

def fails(password):
    raise RuntimeError(f"no luck with {len(password)} characters")

log.configure(json_lines=sys.argv[1] == "True")
try:
    fails(sys.stdin.read())
except RuntimeError:
    log.get("test").error("it failed", exc_info=True)
"""
"""Its own process: logs are set up once in one, for good."""


@pytest.mark.parametrize("json_lines", [True, False])
def test_a_traceback_in_a_log_shows_no_local_variables(json_lines: bool) -> None:
    command = [sys.executable, "-c", FAILING, str(json_lines)]
    shown = subprocess.run(command, input=SECRET, capture_output=True, text=True, timeout=60, check=True)
    assert "no luck with 14 characters" in shown.stderr
    assert SECRET not in shown.stderr + shown.stdout


def test_ranks_inherit_no_setting_of_the_agent() -> None:
    from dtrain.agent.core.torch_env import base_env

    given = {"DTRAIN_PASSWORD": SECRET, "ETCDCTL_PASSWORD": SECRET, "DTRAIN_TLS_KEY": "/k", "PATH": "/bin"}
    assert base_env(given) == {"PATH": "/bin"}


def test_names_of_secrets_are_known_and_paths_are_none() -> None:
    for name in (
        "AWS_SECRET_ACCESS_KEY",
        "WANDB_API_KEY",
        "HF_TOKEN",
        "DB_PASSWORD",
        "GPG_KEY",
        "PGPASSWORD",
    ):
        assert redact.is_secret(name), name
    for name in (
        "PATH",
        "HF_TOKEN_FILE",
        "KEYBOARD",
        "OMP_NUM_THREADS",
        "MONKEY",
        "TOKENIZERS_DIR",
        "SSL_KEY_PATH",
    ):
        assert not redact.is_secret(name), name
