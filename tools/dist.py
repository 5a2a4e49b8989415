"""Build the release files: sdist, wheel and their sums, the same bytes wherever and whenever they are built.

What is packed is what git tracks, copied to a folder of its own: a stray file in the checkout, the name of
its folder, the umask and the clock change nothing. The wheel is built from the sdist, which proves that one
complete. Times inside are those of the last commit, or ``SOURCE_DATE_EPOCH``.
"""

import argparse
import base64
import csv
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from packaging.metadata import Metadata

ROOT = Path(__file__).parent.parent
SUMS = "SHA256SUMS"


def tracked(root: Path) -> list[str]:
    """Files of the checkout that are there: tracked, or new and not ignored."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, capture_output=True, check=True, text=True).stdout
    return sorted({name for name in listed.split("\0") if name and (root / name).is_file()})


def commit_time(root: Path) -> str:
    """Seconds since the epoch of the last commit."""
    command = ["git", "log", "-1", "--format=%ct"]
    return subprocess.run(command, cwd=root, capture_output=True, check=True, text=True).stdout.strip()


def build(root: Path, out: Path, *, epoch: str, names: Sequence[str] | None = None) -> tuple[Path, Path]:
    """Build the sdist from ``names`` below ``root`` (what git tracks), the wheel from it, into ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as made:
        tree = Path(made) / "tree"
        for name in tracked(root) if names is None else names:
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / name, tree / name)
            # What git knows of a mode, and nothing of this machine's umask.
            (tree / name).chmod(0o755 if os.access(root / name, os.X_OK) else 0o644)
        sdist = _hatchling("sdist", tree, out, epoch)
        with tarfile.open(sdist) as packed:
            packed.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.4
            packed.extractall(made)
        wheel = _hatchling("wheel", Path(made) / sdist.name.removesuffix(".tar.gz"), out, epoch)
    return sdist, wheel


def _hatchling(target: str, tree: Path, out: Path, epoch: str) -> Path:
    before = set(out.iterdir())
    # An environment of its own would be fetched anew each time; `backend_problem` holds us to the pinned one.
    command = [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", str(out)]
    env = {key: value for key, value in os.environ.items() if not key.startswith("HATCH_")}
    subprocess.run(
        command, cwd=tree, env=env | {"SOURCE_DATE_EPOCH": epoch}, check=True, stdout=subprocess.DEVNULL
    )
    (made,) = set(out.iterdir()) - before
    return made


def backend_problem(root: Path) -> str:
    """What is wrong with the installed build backend: other releases of it may write other bytes."""
    from importlib.metadata import PackageNotFoundError, version

    (wanted,) = tomllib.loads((root / "pyproject.toml").read_text())["build-system"]["requires"]
    try:
        found = f"hatchling=={version('hatchling')}"
    except PackageNotFoundError:
        found = "no hatchling"
    return "" if found == wanted else f"{found} is installed, {wanted} is what releases are built with"


def problems(root: Path, sdist: Path, wheel: Path) -> Iterator[str]:
    """What is wrong with the files: names, content, metadata."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    stem = f"{project['name']}-{project['version']}"
    if (sdist.name, wheel.name) != (f"{stem}.tar.gz", f"{stem}-py3-none-any.whl"):
        yield f"the files are called {sdist.name} and {wheel.name}"
    with zipfile.ZipFile(wheel) as packed:
        contents = {name: packed.read(name) for name in packed.namelist()}
        if len({info.date_time for info in packed.infolist()}) != 1:
            yield "files in the wheel are of different times"
    yield from _content_problems(root, contents, stem)
    yield from _record_problems(contents, stem)
    yield from _metadata_problems(contents, stem)
    with tarfile.open(sdist) as source:
        names = {name.removeprefix(f"{stem}/") for name in source.getnames()}
    for wanted in ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "PKG-INFO"):
        if wanted not in names:
            yield f"the sdist has no {wanted}"
    if strays := sorted(name for name in names if name.endswith((".pyc", ".whl", ".so"))):
        yield f"the sdist holds {', '.join(strays[:3])}"


def _content_problems(root: Path, contents: dict[str, bytes], stem: str) -> Iterator[str]:
    info = f"{stem}.dist-info"
    ours = {name for name in contents if not name.startswith(f"{info}/")}
    targets = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]
    portions = tuple(f"{folder}/" for folder in targets["wheel"]["only-include"])
    wanted = {name.partition("/")[2] for name in tracked(root) if name.startswith(portions)}
    if missing := sorted(wanted - ours):
        yield f"the wheel lacks {', '.join(missing[:5])}"
    # The namespace itself has no __init__.py: another portion may lie elsewhere.
    if strays := sorted(name for name in ours - wanted if name) + (
        ["dtrain/__init__.py"] if "dtrain/__init__.py" in ours else []
    ):
        yield f"the wheel has {', '.join(strays[:5])}"
    for package in sorted({"/".join(name.split("/")[:2]) for name in ours}):
        if f"{package}/py.typed" not in ours:
            yield f"{package} has no py.typed"
    if f"{info}/licenses/LICENSE" not in contents:
        yield "the wheel has no licence"


def _record_problems(contents: dict[str, bytes], stem: str) -> Iterator[str]:
    """The list of files inside, with its digests."""
    name = f"{stem}.dist-info/RECORD"
    rows = {row[0]: row[1] for row in csv.reader(io.StringIO(contents[name].decode()))}
    for path in sorted(contents.keys() ^ rows.keys()):
        yield f"RECORD and content differ about {path}"
    for path, digest in rows.items():
        found = (
            base64.urlsafe_b64encode(hashlib.sha256(contents.get(path, b"")).digest()).decode().rstrip("=")
        )
        if path != name and digest != f"sha256={found}":
            yield f"RECORD has another digest of {path}"


def _metadata_problems(contents: dict[str, bytes], stem: str) -> Iterator[str]:
    """What an index would refuse."""
    raw = contents[f"{stem}.dist-info/METADATA"]
    try:
        metadata = Metadata.from_email(raw, validate=True)
    except ExceptionGroup as group:
        yield from (f"metadata: {error}" for error in group.exceptions)
        return
    if metadata.description_content_type != "text/markdown" or not metadata.description:
        yield "metadata: no description in Markdown"
    if not metadata.requires_python or metadata.license_expression is None:
        yield "metadata: no Requires-Python or no licence expression"
    for requirement in metadata.requires_dist or []:
        if requirement.url:
            yield f"metadata: {requirement} cannot be had from an index"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description="Build sdist, wheel and their sums.")
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    out: Path = parser.parse_args().out
    if problem := backend_problem(ROOT):
        print(f"dist: {problem}: pip install -e '.[dev,test]'", file=sys.stderr)
        return 1
    changed = subprocess.run(
        ["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    if changed:
        print(
            "dist: there are changes that are not committed; nobody else can build these files",
            file=sys.stderr,
        )
    shutil.rmtree(out, ignore_errors=True)
    files = build(ROOT, out, epoch=os.environ.get("SOURCE_DATE_EPOCH") or commit_time(ROOT))
    wrong = list(problems(ROOT, *files))
    for each in wrong:
        print(f"dist: {each}", file=sys.stderr)
    (out / SUMS).write_text("".join(f"{digest(file)}  {file.name}\n" for file in files))
    for file in files:
        print(f"{digest(file)}  {file.stat().st_size:>8}  {file}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
