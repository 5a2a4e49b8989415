"""A published release beside the working tree: an environment of its own that runs nothing else.

``dtrain`` is a namespace package, and those *merge*: with the old release on PYTHONPATH and the tree in
the environment, modules that the old one lacks would come from the new one, silently. So a release gets a
virtual environment that holds its wheel and, by a ``.pth`` line, the libraries of ours: a path that comes
from a ``.pth`` has its own ``.pth`` files ignored, and that is where an editable dtrain hides. ``alone``
proves it.
"""

import hashlib
import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

RELEASES = Path(__file__).parent / "releases"
ROOT = Path(__file__).parents[2]
FORMER = "0.1.0"
"""The release before this tree's."""

_ENTRY_POINTS = ("agent.main", "agent.launcher", "agent.transfer", "coordinator.main", "cli.main", "trainer")

_LOOK = """
import importlib, json, sys
from importlib.metadata import version
for name in sys.argv[1:]:
    importlib.import_module("dtrain." + name)
import dtrain
ours = [(name, module) for name, module in sys.modules.items() if name.startswith("dtrain.")]
files = {name: getattr(module, "__file__", None) for name, module in ours}
print(json.dumps({"version": version("dtrain"), "path": list(dtrain.__path__), "modules": files}))
"""


@dataclass(frozen=True, slots=True)
class Release:
    """An installed release: ``python -m dtrain...`` of ``python`` is that release."""

    version: str
    python: str
    folder: Path

    def run(self, *words: str, cwd: Path | None = None, text: str = "", **env: str) -> str:
        """Run ``python`` with ``words``, ``text`` as its input, and return what it printed."""
        done = subprocess.run(
            [self.python, *words],
            env=clean_env(**env),
            input=text,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            cwd=cwd or self.folder,
        )
        told = f"{self.version}: {words[:4]}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert done.returncode == 0, told
        return done.stdout

    def foreign_modules(self, **env: str) -> list[str]:
        """Modules of dtrain that are not of this release, once everything is imported that it runs."""
        looked = json.loads(self.run("-c", _LOOK, *_ENTRY_POINTS, cwd=ROOT, **env))
        assert looked["version"] == self.version
        own = f"{self.folder.resolve()}{os.sep}"
        # A namespace has no file: its folders count instead.
        places = {name: file for name, file in looked["modules"].items() if file is not None}
        places |= {f"dtrain.__path__[{index}]": path for index, path in enumerate(looked["path"])}
        assert len(places) > 100, "nothing was looked at"
        return sorted(f"{name}: {place}" for name, place in places.items() if not place.startswith(own))


def clean_env(**more: str) -> dict[str, str]:
    """Our environment without what names a cluster, or a place to import from."""
    names = ("DTRAIN_", "ETCDCTL_", "PET_", "PYTHON")
    return {key: value for key, value in os.environ.items() if not key.startswith(names)} | more


def wheel_of(version: str) -> Path:
    """The kept wheel of a release, its digest checked."""
    wheel = RELEASES / f"dtrain-{version}-py3-none-any.whl"
    digests = dict(reversed(line.split()) for line in (RELEASES / "SHA256SUMS").read_text().splitlines())
    assert hashlib.sha256(wheel.read_bytes()).hexdigest() == digests[wheel.name], (
        f"{wheel.name} is another file"
    )
    return wheel


def install(wheel: Path, folder: Path) -> Release:
    """Install a wheel of dtrain into a new environment in ``folder``; its libraries are ours."""
    version = wheel.name.split("-")[1]
    venv.EnvBuilder(with_pip=False, symlinks=True).create(folder)
    place = folder / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(place)
    ours = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (place / "libraries.pth").write_text("".join(f"{path}\n" for path in ours))
    release = Release(version, str(folder / "bin" / "python"), folder)
    assert not (foreign := release.foreign_modules()), (
        f"{version} is mixed with another release: {foreign[:5]}"
    )
    return release


def current() -> Release:
    """The working tree, as this interpreter runs it."""
    from importlib.metadata import version

    return Release(version("dtrain"), sys.executable, ROOT)
