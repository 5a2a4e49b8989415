"""Where the pages' commands are typed: a folder that looks like a checkout, a cluster, an etcd."""

import importlib.metadata
import os
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.docs.pages import ROOT

from dtrain.local.etcd import EtcdCluster, find_etcd

SHOWN = ("examples", "deploy", "docs", "README.md", "Makefile")
READY_S_MAX = 90.0


@dataclass(frozen=True, slots=True)
class Place:
    """Where a page is typed. ``names``: what it says, and what that is called here."""

    folder: Path
    env: dict[str, str]
    names: dict[str, str]


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A folder with what a reader finds in a checkout, and a home of its own."""
    folder = tmp_path_factory.mktemp("docs")
    for name in SHOWN:
        (folder / name).symlink_to(ROOT / name)
    programs = folder / ".programs"
    programs.mkdir()
    for name, module in (("dtrain", "dtrain.cli.main"), ("torchrun", "torch.distributed.run")):
        # Not the scripts of the environment: it may have been made of another tree.
        call = "main()" if name == "torchrun" else "sys.exit(main())"
        text = f"import sys\nfrom {module} import main\nif __name__ == '__main__':\n    {call}\n"
        (programs / name).write_text(f"#!{sys.executable}\n{text}")
        (programs / name).chmod(0o755)
    (programs / "python").symlink_to(sys.executable)
    if found := find_etcd(ROOT / ".cache").etcdctl:
        (programs / "etcdctl").symlink_to(found)
    kept = {
        key: value for key, value in os.environ.items() if not key.startswith(("DTRAIN_", "ETCDCTL_", "XDG_"))
    }
    home = folder / ".home"
    home.mkdir()
    env = kept | {
        "HOME": str(home),
        "PATH": f"{programs}{os.pathsep}{kept['PATH']}",
        "PYTHONPATH": os.pathsep.join([*_declared(folder), *(path for path in sys.path if path)]),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "160",
        "NO_COLOR": "1",
        "DTRAIN_ETCD_BIN": find_etcd(ROOT / ".cache").path,
    }
    (folder / ".scratch").mkdir()
    # Pages write below /tmp; here that is a folder that nobody shares, and that goes away.
    return Place(folder, env, {"/tmp": str(folder / ".scratch")})


def _declared(folder: Path) -> list[str]:
    """The entry points of the project, in case the environment was made before they were declared."""
    group = "torchrun.handlers"
    if importlib.metadata.entry_points(group=group, name="dtrain"):
        return []
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][group]
    info = folder / ".declared" / "declared-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: declared\nVersion: 0\n")
    lines = [f"[{group}]", *(f"{name} = {value}" for name, value in declared.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return [str(info.parent)]


@pytest.fixture(scope="session")
def cluster(checkout: Place) -> Iterator[Place]:
    """What `dtrain up --test` starts, started by it; the current cluster of this home."""
    log = checkout.folder / ".up.log"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            ["dtrain", "up", "--test"],
            cwd=checkout.folder,
            env=checkout.env,
            stdout=sink,
            stderr=subprocess.STDOUT,
        )
    try:
        _await(lambda: "Ctrl-C stops everything" in log.read_text(), process, log)
        # Runbooks ask for a job that there is, whatever became of it.
        for words in (
            ["submit", "examples/digits/job.yaml", "--set", 'args=["--steps=50"]'],
            ["wait", "digits"],
        ):
            subprocess.run(["dtrain", *words], cwd=checkout.folder, env=checkout.env, check=True, timeout=120)
        (at,) = re.findall(r"etcd \S+ at http://([\d.:]+)", log.read_text())
        yield Place(checkout.folder, checkout.env, checkout.names | {"127.0.0.1:2379": at})
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(scope="session")
def etcd(checkout: Place) -> Iterator[Place]:
    """An etcd of its own, where the pages say 127.0.0.1:2379."""
    with EtcdCluster(checkout.folder / ".etcd", cache_dir=ROOT / ".cache", fsync=False) as found:
        at = found.endpoints[0].removeprefix("http://")
        yield Place(checkout.folder, checkout.env, checkout.names | {"127.0.0.1:2379": at})


@pytest.fixture(scope="session")
def none(checkout: Place) -> Place:
    """Nothing but the checkout."""
    return checkout


def _await(holds: Callable[[], bool], process: "subprocess.Popen[bytes]", log: Path) -> None:
    end = time.monotonic() + READY_S_MAX
    while not holds():
        if process.poll() is not None or time.monotonic() > end:
            pytest.fail(f"the cluster does not start:\n{log.read_text()[-3000:]}")
        time.sleep(0.1)
