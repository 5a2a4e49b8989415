"""Install the built wheel into clean environments, one per extra, and check what that extra promises.

``python tools/test_install.py`` does all of them, with arguments only those extras ("none": the bare wheel).
Environments are made with ``venv`` and filled by pip as it is configured here; nothing of the checkout is on
their path. Versions are held by ``constraints.txt``.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent

ABSENT = """
import importlib.util, sys
found = [name for name in sys.argv[1:] if importlib.util.find_spec(name) is not None]
sys.exit(f"it is installed: {found}" if found else 0)
"""

SCRIPT = """
from dtrain import trainer
run = trainer.join()
for step in run.steps(5):
    run.report(loss=1.0)
print("trained to the end", flush=True)
"""


@dataclass(frozen=True, slots=True)
class Place:
    """A clean environment with the wheel in it."""

    folder: Path

    def run(self, *words: str, limit_s: float = 120.0) -> str:
        """Run a program of the environment; return what it printed.

        Raises:
            SystemExit: it failed; with its output.
        """
        names = ("DTRAIN_", "ETCDCTL_", "PET_", "PYTHON", "VIRTUAL_ENV")
        env = {key: value for key, value in os.environ.items() if not key.startswith(names)}
        env |= {"PATH": f"{self.folder / 'bin'}{os.pathsep}{env['PATH']}", "HOME": str(self.folder / "home")}
        command = [str(self.folder / "bin" / words[0]), *words[1:]]
        done = subprocess.run(
            command,
            env=env,
            cwd=self.folder / "home",
            capture_output=True,
            text=True,
            timeout=limit_s,
            check=False,
        )
        if done.returncode:
            sys.exit(f"{' '.join(words)[:200]}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done.stdout

    def python(self, code: str, *words: str) -> str:
        """Run a piece of Python."""
        return self.run("python", "-c", textwrap.dedent(code), *words)


def bare(place: Place, version: str) -> None:
    """The client and coordinators: no torch, no boto3."""
    place.python(ABSENT, "torch", "boto3", "numpy", "pytest")
    assert place.run("dtrain", "--version").strip() == f"dtrain {version}"
    assert "Examples" in place.run("dtrain", "--help")
    assert "--listen" in place.run("dtrain", "coordinator", "--help")
    place.python("import dtrain.coordinator.main, dtrain.cli.main, dtrain.storage.etcd.mirror")


def s3(place: Place, version: str) -> None:
    """The S3 store; still no torch."""
    place.python(ABSENT, "torch")
    place.python("import boto3, dtrain.storage.blobs.s3")
    assert version in place.run("dtrain", "--version")


def sdk(place: Place, _version: str) -> None:
    """What a training script imports brings no gRPC or protobuf into it, and runs alone."""
    place.python(
        """
        import sys
        from dtrain import trainer
        import torch
        foreign = ("grpc", "boto3", "etcd3gw", "pydantic")
        heavy = [name for name in sys.modules if name.split(".")[0] in foreign]
        heavy += [name for name in sys.modules if name.startswith("google.protobuf")]
        sys.exit(f"loaded: {heavy}" if heavy else 0)
        """
    )
    (place.folder / "home" / "train.py").write_text(SCRIPT)
    assert "trained to the end" in place.run("python", "train.py")


def agent(place: Place, _version: str) -> None:
    """An agent's machine: torch for its ranks, S3 for its uploads."""
    assert "--data-dir" in place.run("dtrain", "agent", "--help-settings")
    place.python("import torch, boto3, dtrain.agent.main, dtrain.agent.launcher")
    sdk(place, _version)


def rendezvous(place: Place, _version: str) -> None:
    """The backend is found by its entry point; that it then finds no etcd is as it should be."""
    (place.folder / "home" / "train.py").write_text("print('started without a rendezvous')")
    place.python(
        """
        import subprocess
        words = ["torchrun", "--rdzv-backend=dtrain", "--rdzv-endpoint=127.0.0.1:1", "--rdzv-id=x"]
        done = subprocess.run([*words, "train.py"], capture_output=True, text=True)
        assert done.returncode and "DT-3001" in done.stderr, done.stderr
        """
    )


def local(place: Place, _version: str) -> None:
    """A cluster of one's own, in one command, from nothing but the environment."""
    (place.folder / "home" / "train.py").write_text(SCRIPT)
    told = place.run("dtrain", "run", "--nnodes", "2", "--nproc-per-node", "1", "train.py", limit_s=300.0)
    assert "trained to the end" in told, told


def kit(place: Place, _version: str) -> None:
    """The fixtures for users' own failover tests."""
    place.python("import dtrain.testing; dtrain.testing.ProcessCluster, dtrain.testing.DtrainCluster")
    local(place, _version)


EXTRAS: dict[str, tuple[str, Callable[[Place, str], None]]] = {
    "none": ("", bare),
    "s3": ("[s3]", s3),
    "trainer": ("[trainer]", sdk),
    "agent": ("[agent]", agent),
    "local": ("[local,torch]", local),
    "rendezvous": ("[rendezvous]", rendezvous),
    "testing": ("[testing]", kit),
}


def install(wheel: Path, extra: str, folder: Path) -> Place:
    """Make the environment. Our own pip fills it: installing one there would take as long as the rest."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    command = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "-qq"]
    command += [
        "--disable-pip-version-check",
        "--constraint",
        str(ROOT / "constraints.txt"),
        f"{wheel}{extra}",
    ]
    subprocess.run(command, check=True, cwd=folder)
    subprocess.run([*command[:5], "check"], check=True, cwd=folder, stdout=subprocess.DEVNULL)
    (folder / "home").mkdir()
    return Place(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description="Install the wheel into clean environments and try it.")
    parser.add_argument("extras", nargs="*", metavar="EXTRA", help=", ".join(EXTRAS))
    parser.add_argument("--dist", type=Path, default=ROOT / "dist")
    args = parser.parse_args()
    if unknown := set(args.extras) - set(EXTRAS):
        parser.error(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(EXTRAS)}")
    wheels = sorted(args.dist.resolve().glob("dtrain-*.whl"))
    if len(wheels) != 1:
        sys.exit(f"{args.dist} holds {len(wheels)} wheels of dtrain, not one: run `make dist`")
    version = wheels[0].name.split("-")[1]
    for name in args.extras or EXTRAS:
        extra, check = EXTRAS[name]
        with tempfile.TemporaryDirectory(prefix="dt-") as made:
            began = time.monotonic()
            place = install(wheels[0], extra, Path(made))
            installed = time.monotonic()
            check(place, version)
            size = sum(path.stat().st_size for path in Path(made).rglob("*") if path.is_file()) / 1e6
            took = f"installed in {installed - began:.0f} s, checked in {time.monotonic() - installed:.0f} s"
            print(f"{name:8} {wheels[0].name}{extra}: {took}, {size:.0f} MB", flush=True)
            shutil.rmtree(made, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
