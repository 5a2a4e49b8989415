"""Prometheus's own judge of metrics and rules: ``promtool``, from .cache/promtool or PATH."""

import shutil
import subprocess
from pathlib import Path

CACHED = Path(__file__).resolve().parents[2] / ".cache/promtool/usr/bin/promtool"


def promtool(*words: str, given: str = "", folder: Path | None = None) -> str:
    """Run it; return what it says, complaints included, and fail if it is not content."""
    path = str(CACHED) if CACHED.exists() else shutil.which("promtool")
    assert path, "no promtool: install Debian's package prometheus, or Prometheus itself"
    done = subprocess.run(
        [path, *words], input=given, capture_output=True, text=True, timeout=120, check=False, cwd=folder
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    return said
