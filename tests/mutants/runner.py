"""Applies mutants to copies of the tree and runs their killers there.

A killer must pass on the unmutated copy and fail, by an assertion or a violation, on the mutated one: a
mutant that cannot even be imported proves nothing about the suite.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tests.mutants.mutant import Mutant

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("common", "storage", "coordinator", "agent", "trainer", "cli", "local", "testing", "integrations")
BESIDE = (".cache",)
"""What git ignores and tests need: the etcd servers."""

KILLER_S_MAX = 300.0
_OWN_FAULT = re.compile(r"^E +(Syntax|Indentation|Import|ModuleNotFound|Name|UnboundLocal)Error\b", re.M)


@dataclass(frozen=True, slots=True)
class Ran:
    """How a killer ended. ``outcome``: passed, failed (as it should on a mutant) or broken."""

    outcome: str
    seconds: float
    output: str


class Copy:
    """A copy of the working tree, whose packages hide the installed ones."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            check=True,
            capture_output=True,
        ).stdout
        for name in listed.decode().split("\0"):
            source = ROOT / name
            if name and source.is_file():
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target)
        for name in BESIDE:
            if (ROOT / name).exists():
                (folder / name).symlink_to(ROOT / name)
        self._stamp = time.time() + 10
        paths = [str(folder / name) for name in FOLDERS]
        self.env = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")} | {
            "PYTHONPATH": os.pathsep.join([str(folder), *paths]),
        }

    def foreign(self) -> list[str]:
        """Return the packages that would not be imported from the copy."""
        code = (
            "import importlib.util as u, sys\nfor name in sys.argv[1:]: print(name, u.find_spec(name).origin)"
        )
        packages = [f"dtrain.{path.parent.name}" for path in self.folder.glob("*/dtrain/*/__init__.py")]
        names = [*sorted(packages), "tests.mutants"]
        done = subprocess.run(
            [sys.executable, "-c", code, *names],
            cwd=self.folder,
            env=self.env,
            capture_output=True,
            text=True,
            check=True,
        )
        return [line for line in done.stdout.splitlines() if str(self.folder) not in line]

    def write(self, name: str, text: str) -> None:
        """Replace a file. Its time moves on by more than a compiled module's clock can miss."""
        path = self.folder / name
        path.write_text(text, "utf-8")
        self._stamp += 10
        os.utime(path, (self._stamp, self._stamp))

    def run(self, killer: tuple[str, ...]) -> Ran:
        """Run a killer: pytest nodes, or the arguments of ``python -m`` for a simulation."""
        as_test = is_test(killer)
        if as_test:
            plain = ["-q", "-x", "-n0", "-p", "no:randomly", "-p", "no:cacheprovider", "--tb=short"]
            command = [sys.executable, "-m", "pytest", *plain, *killer]
        else:
            command = [sys.executable, "-m", *killer]
        began = time.monotonic()
        try:
            done = subprocess.run(
                command,
                cwd=self.folder,
                env=self.env,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=KILLER_S_MAX + 10.0 * len(killer),
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            return Ran("broken", time.monotonic() - began, f"did not end within {error.timeout:.0f} s")
        finally:
            self.sweep()
        output = done.stdout + done.stderr
        verdict = _of_tests if as_test else _of_simulation
        return Ran(verdict(done.returncode, output), time.monotonic() - began, output)

    def sweep(self) -> None:
        """Kill what a killer left: some mutants break the very code that ends processes."""
        mark = os.fsencode(f"PYTHONPATH={self.folder}{os.pathsep}")
        for path in Path("/proc").glob("[0-9]*/environ"):
            # Only a descendant of a killer has this copy's path in its environment.
            with contextlib.suppress(OSError):
                if mark in path.read_bytes():
                    os.kill(int(path.parent.name), signal.SIGKILL)

    def judge(self, mutant: Mutant) -> Ran:
        """Apply the mutant, run its killer, and take it back."""
        before = (self.folder / mutant.file).read_text("utf-8")
        if before.count(mutant.old) != 1:
            return Ran("broken", 0.0, f"its text occurs {before.count(mutant.old)} times in {mutant.file}")
        self.write(mutant.file, before.replace(mutant.old, mutant.new))
        try:
            return self.run(mutant.killer)
        finally:
            self.write(mutant.file, before)


def is_test(killer: tuple[str, ...]) -> bool:
    """Tell pytest nodes from the arguments of a module."""
    return "::" in killer[0] or killer[0].endswith(".py")


def _of_tests(code: int, output: str) -> str:
    if code == 0:
        return "passed"
    # 1: a test failed. Anything else is a run that did not get so far.
    named = re.search(r"^FAILED ", output, re.M)
    return "failed" if code == 1 and named and not _OWN_FAULT.search(output) else "broken"


def _of_simulation(code: int, output: str) -> str:
    if code == 0:
        return "passed"
    return "failed" if code == 1 and re.search(r"\b(FAILED|VIOLATION)\b", output) else "broken"
