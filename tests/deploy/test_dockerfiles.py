"""What can be said of the Dockerfiles without building them."""

import fnmatch
import importlib.util
import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "deploy/docker"
OURS = [DOCKER / "coordinator.Dockerfile", DOCKER / "agent.Dockerfile"]
ALL = [*OURS, *sorted((DOCKER / "local").glob("*.Dockerfile"))]
PINNED = re.compile(r"[a-z0-9./-]+:[\w.-]+@sha256:[0-9a-f]{64}")


def public_images() -> dict[str, str]:
    lines = (DOCKER / "images.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def instructions(file: Path) -> list[tuple[str, str]]:
    """(NAME, rest) of each instruction, continuation lines joined."""
    text = "\n".join(line for line in file.read_text().splitlines() if not line.startswith("#"))
    lines = [line.strip() for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]


def values(file: Path, name: str) -> list[str]:
    return [rest for instruction, rest in instructions(file) if instruction == name]


def test_public_images_are_pinned_by_tag_and_digest() -> None:
    for name, image in public_images().items():
        assert PINNED.fullmatch(image), f"{name}: {image}"
        assert ":latest@" not in image


@pytest.mark.parametrize("file", ALL, ids=lambda file: file.name)
def test_every_base_is_an_argument_with_a_default(file: Path) -> None:
    before_from = []
    for name, rest in instructions(file):
        if name == "FROM":
            break
        assert name == "ARG"
        before_from.append(rest)
    defaults = dict(argument.split("=", 1) for argument in before_from)
    stages = [rest.split(" AS ") for rest in values(file, "FROM")]
    known = {stage[1] for stage in stages if len(stage) == 2}
    for base, *_ in stages:
        if base in known:
            continue
        variable = re.fullmatch(r"\$\{(\w+)\}", base)
        assert variable, f"FROM {base} cannot be replaced by --build-arg"
        assert defaults[variable[1]]
        assert not defaults[variable[1]].endswith(":latest")


@pytest.mark.parametrize(
    ("file", "argument"),
    [("coordinator.Dockerfile", "PYTHON_IMAGE"), ("agent.Dockerfile", "TORCH_IMAGE")],
)
def test_the_default_bases_are_the_listed_ones(file: str, argument: str) -> None:
    assert f"{argument}={public_images()[argument]}" in values(DOCKER / file, "ARG")


@pytest.mark.parametrize("file", OURS, ids=lambda file: file.name)
def test_the_last_stage_is_not_root_and_says_how_it_starts_ends_and_is_well(file: Path) -> None:
    parts = instructions(file)
    last = max(at for at, (name, _) in enumerate(parts) if name == "FROM")
    final = parts[last:]
    assert [rest for name, rest in final if name == "USER"][-1] == "10001:10001"
    assert ("STOPSIGNAL", "SIGTERM") in final
    assert ("ENTRYPOINT", '["tini", "--", "dtrain"]') in final
    role = file.name.removesuffix(".Dockerfile")
    assert ("CMD", f'["{role}"]') in final
    page = {"coordinator": "7080/readyz", "agent": "7081/livez"}[role]
    assert f"http://127.0.0.1:{page}" in next(rest for name, rest in final if name == "HEALTHCHECK")
    labels = " ".join(rest for name, rest in final if name == "LABEL")
    for label in ("title", "version", "revision", "source", "licenses"):
        assert f"org.opencontainers.image.{label}=" in labels


@pytest.mark.parametrize("file", ALL, ids=lambda file: file.name)
def test_dockerfiles_need_no_buildkit_and_name_no_index(file: Path) -> None:
    text = file.read_text()
    assert "RUN --" not in text, "mounts are BuildKit's"
    assert "<<" not in text, "so are here-documents"
    assert not re.search(r"index-url|trusted-host|https?://(?!127\.0\.0\.1)", text)


def test_requirements_are_locked_with_hashes_and_hold_no_torch() -> None:
    entries = (DOCKER / "requirements.lock").read_text().replace("\\\n", " ")
    names = []
    for line in entries.splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = re.match(r"([a-z0-9.-]+)==\S+.*--hash=sha256:[0-9a-f]{64}", line)
        assert match, line
        names.append(match[1])
    assert "boto3" in names
    assert not {"torch", "numpy"} & set(names)


def test_the_lock_has_everything_that_the_package_requires() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["s3"]]
    lock = (DOCKER / "requirements.lock").read_text()
    for requirement in wanted:
        name = re.match(r"[\w.-]+", requirement)
        assert name
        assert re.search(rf"^{name[0].lower()}==", lock, re.MULTILINE), f"{name[0]}: update the lock"


def ignored(path: str) -> bool:
    """As Docker reads the file: the last line that matches a path, or a folder above it, decides."""
    result = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        parents = [path, *(str(parent) for parent in Path(path).parents if str(parent) != ".")]
        if any(fnmatch.fnmatchcase(each, pattern.removeprefix("!")) for each in parents):
            result = not pattern.startswith("!")
    return result


@pytest.mark.parametrize(
    "path", [".git/config", ".venv/bin/python", ".cache/etcd/usr/bin/etcd", "deploy/compose/.env"]
)
def test_what_is_no_part_of_an_image_stays_out_of_the_build(path: str) -> None:
    assert ignored(path)


def test_what_the_dockerfiles_copy_is_let_in() -> None:
    for path in (
        "deploy/docker/venv.sh",
        "deploy/docker/requirements.lock",
        "dist/dtrain-1.2.3-py3-none-any.whl",
        "deploy/docker/wheelhouse/click-8-py3-none-any.whl",
    ):
        assert not ignored(path), path


def test_others_name_the_same_public_images() -> None:
    images = public_images()
    spec = importlib.util.spec_from_file_location("images", ROOT / "testing/dtrain/testing/images.py")
    assert spec
    assert spec.origin
    testing = Path(spec.origin).read_text()
    compose = (ROOT / "deploy/compose/compose.yaml").read_text()
    for name, text in [
        ("ETCD", testing),
        ("STORE", testing),
        ("TOOLS", testing),
        ("ETCD", compose),
        ("STORE", compose),
        ("PROMETHEUS", compose),
        ("GRAFANA", compose),
    ]:
        assert images[f"{name}_IMAGE"] in text, name


@pytest.mark.parametrize(
    "script", ["deploy/docker/build-local.sh", "tools/engine.sh", "tools/test-containers.sh"]
)
def test_scripts_parse_and_can_be_run(script: str) -> None:
    assert os.access(ROOT / script, os.X_OK)
    subprocess.run(["bash", "-n", ROOT / script], check=True)
