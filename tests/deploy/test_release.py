"""The release files: the same bytes from anywhere, with the right content, and a valid bill of materials."""

import json
import os
import shutil
import sys
import tarfile
import time
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from tools import dist, sbom

ROOT = Path(__file__).parents[2]
EPOCH = "1790000000"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist and the wheel of the checkout."""
    return dist.build(ROOT, tmp_path_factory.mktemp("dist"), epoch=EPOCH)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The checkout in another folder, of other times and modes, under another umask, in another time zone."""
    copy = tmp_path / "a folder with another name"
    before = os.umask(0o027)
    try:
        for name in dist.tracked(ROOT):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, copy / name)
            if os.access(ROOT / name, os.X_OK):
                (copy / name).chmod(0o700)
            os.utime(copy / name, (1_000_000_000, 1_000_000_000))
        monkeypatch.setenv("TZ", "Pacific/Auckland")
        time.tzset()
        yield copy
    finally:
        os.umask(before)
        monkeypatch.undo()
        time.tzset()


def test_files_built_twice_are_the_same_bytes(
    built: tuple[Path, Path], elsewhere: Path, tmp_path: Path
) -> None:
    names = dist.tracked(ROOT)
    again = dist.build(elsewhere, tmp_path / "dist", epoch=EPOCH, names=names)
    for one, other in zip(built, again, strict=True):
        sys.stderr.write(f"    {dist.digest(one)}  {one.stat().st_size} bytes  {one.name}\n")
        assert (one.name, dist.digest(one)) == (other.name, dist.digest(other))


def test_another_time_makes_other_bytes(built: tuple[Path, Path], tmp_path: Path) -> None:
    """Or the comparison above compares nothing."""
    with zipfile.ZipFile(built[1]) as packed:
        times = {info.date_time for info in packed.infolist()}
    assert times == {time.gmtime(int(EPOCH))[:6]}


def test_the_files_hold_what_they_should(built: tuple[Path, Path]) -> None:
    assert list(dist.problems(ROOT, *built)) == []
    with zipfile.ZipFile(built[1]) as wheel, tarfile.open(built[0]) as source:
        assert not [name for name in wheel.namelist() if name.startswith("tests")]
        assert not [name for name in source.getnames() if "/tests/" in name]


def test_a_wheel_with_something_wrong_in_it_is_refused(built: tuple[Path, Path], tmp_path: Path) -> None:
    sdist, good = built
    bad = tmp_path / good.name
    stem = f"dtrain-{good.name.split('-')[1]}.dist-info"
    with zipfile.ZipFile(good) as source, zipfile.ZipFile(bad, "w") as target:
        for info in source.infolist():
            data = source.read(info)
            if info.filename == f"{stem}/METADATA":
                data = data.replace(b"License-Expression: Apache-2.0", b"License-Expression: ours")
            if info.filename != "dtrain/agent/py.typed":
                target.writestr(info, data)
        target.writestr("tests/test_x.py", "")
    told = "\n".join(dist.problems(ROOT, sdist, bad))
    for part in ("lacks dtrain/agent/py.typed", "has tests/test_x.py", "digest of", "license", "no py.typed"):
        assert part in told, told


def test_the_build_backend_is_pinned_to_one_release_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (backend,) = project["build-system"]["requires"]
    assert "==" in backend
    assert backend in project["project"]["optional-dependencies"]["test"]
    assert dist.backend_problem(ROOT) == ""


def test_one_place_names_the_version() -> None:
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert version("dtrain") == stated, "the environment is older than the checkout: make setup"
    assert f"## {stated}" in (ROOT / "CHANGELOG.md").read_text()
    for path in dist.tracked(ROOT):
        if "/dtrain/" in path and path.endswith(".py"):
            assert f'"{stated}"' not in (ROOT / path).read_text(), path


def entry(name: str, number: str, *requires: str, **more: object) -> dict[str, object]:
    """One entry of pip's report."""
    metadata = {"name": name, "version": number, "requires_dist": list(requires), **more}
    return {"metadata": metadata, "download_info": {"archive_info": {"hashes": {"sha256": "ab" * 32}}}}


def test_a_bill_of_materials_is_valid_and_the_same_each_time() -> None:
    entries = [
        entry("dtrain", "0.2.0", "Click>=8", 'boto3; extra == "s3"', 'torch; extra == "torch"'),
        entry("click", "8.1.8", 'colorama; platform_system == "Windows"', license_expression="BSD-3-Clause"),
        entry("boto3", "1.40.0", "click", license="Apache License 2.0"),
        entry("odd_one", "1", classifier=["License :: OSI Approved :: MIT License"]),
    ]

    def made(order: list[dict[str, object]]) -> str:
        return sbom.document(sbom.bill(order, "s3", epoch=int(EPOCH), wheel_digest="cd" * 32))

    text = made(entries)
    assert text == made(entries[::-1])
    found = json.loads(text)
    assert found["metadata"]["timestamp"].startswith("2026-09-21T")
    assert {part["name"] for part in found["components"]} == {"click", "boto3", "odd-one"}
    depends = {each["ref"]: each.get("dependsOn", []) for each in found["dependencies"]}
    assert depends["pkg:pypi/dtrain@0.2.0"] == ["pkg:pypi/boto3@1.40.0", "pkg:pypi/click@8.1.8"]
    assert depends["pkg:pypi/click@8.1.8"] == []
    (click,) = [part for part in found["components"] if part["name"] == "click"]
    assert click["licenses"] == [{"license": {"id": "BSD-3-Clause"}}] or "BSD-3-Clause" in str(
        click["licenses"]
    )
    assert click["hashes"] == [{"alg": "SHA-256", "content": "ab" * 32}]
