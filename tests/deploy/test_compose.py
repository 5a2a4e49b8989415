"""deploy/compose: what the two files say, and what the scripts around them do, without an engine."""

import importlib.resources
import json
import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from dtrain.agent import config as agent_config
from dtrain.coordinator import config as coordinator_config

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "deploy" / "compose"
PLAIN, SECURE = ("compose.yaml",), ("compose.yaml", "compose.secure.yaml")
MEMBERS = ["etcd-0", "etcd-1", "etcd-2"]
COORDINATORS = ["c1", "c2", "c3"]
AGENTS = [f"a{number}" for number in range(1, 9)]
KEYS_FOLDER = "/run/dtrain"
Service = dict[str, Any]

VARIABLE = re.compile(r"\$\{([A-Z0-9_]+):-([^}]*)\}")

KNOWN_TO_BOTH = {
    "cap_add",
    "cap_drop",
    "command",
    "depends_on",
    "entrypoint",
    "environment",
    "healthcheck",
    "hostname",
    "image",
    "logging",
    "network_mode",
    "ports",
    "profiles",
    "read_only",
    "restart",
    "security_opt",
    "shm_size",
    "stop_grace_period",
    "tmpfs",
    "ulimits",
    "user",
    "volumes",
}
"""What this folder uses of the compose specification; docker-compose 1.29 and Compose v2 both know it."""


def raw(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((COMPOSE / name).read_text()))


def with_defaults(value: Any) -> Any:
    """The value as compose reads it when no variable is set."""
    if isinstance(value, str):
        return VARIABLE.sub(lambda found: found[2], value)
    if isinstance(value, list):
        return [with_defaults(item) for item in value]
    if isinstance(value, dict):
        return {key: with_defaults(item) for key, item in value.items()}
    return value


def services(files: tuple[str, ...]) -> dict[str, Service]:
    """What a list of files comes to, by compose's rules for what is used here."""
    merged: dict[str, Service] = {}
    for file in files:
        for name, given in with_defaults(raw(file)["services"]).items():
            service = merged.setdefault(name, {})
            for key, value in given.items():
                if key in ("environment", "depends_on", "healthcheck"):
                    service[key] = service.get(key, {}) | value
                elif key == "volumes":
                    service[key] = service.get(key, []) + value
                else:
                    service[key] = value
    return merged


@pytest.fixture(scope="module", params=[PLAIN, SECURE], ids=["plain", "secure"])
def files(request: pytest.FixtureRequest) -> tuple[str, ...]:
    return tuple(request.param)


def test_files_are_valid_compose_files() -> None:
    vendored = importlib.resources.files("check_jsonschema") / "builtin_schemas/vendor/compose-spec.json"
    schema = json.loads(vendored.read_text())
    validator = jsonschema.validators.validator_for(schema)(schema)
    for name in SECURE:
        validator.validate(with_defaults(raw(name)))
    with pytest.raises(jsonschema.ValidationError):
        validator.validate({"services": {"c1": {"imagge": "x"}}})


def test_files_use_only_what_both_generations_of_compose_know() -> None:
    for name in SECURE:
        document = raw(name)
        known = {key for key in document if not key.startswith("x-")}
        assert known <= {"services", "volumes"}
        for service in document["services"].values():
            assert set(service) <= KNOWN_TO_BOTH
        # Nested defaults are v2's; a dollar sign must be doubled.
        assert "$" not in VARIABLE.sub("", (COMPOSE / name).read_text())


def test_every_image_is_a_variable_with_the_default_that_is_listed_once() -> None:
    listed = dict(
        line.split("=", 1)
        for line in (ROOT / "deploy/docker/images.env").read_text().splitlines()
        if "=" in line and not line.startswith("#")
    )
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    defaults = {
        "DTRAIN_IMAGE_COORDINATOR": f"dtrain-coordinator:{version}",
        "DTRAIN_IMAGE_AGENT": f"dtrain-agent:{version}",
    } | {
        f"DTRAIN_IMAGE_{name}": listed[f"{name}_IMAGE"] for name in ("ETCD", "STORE", "PROMETHEUS", "GRAFANA")
    }
    for file in SECURE:
        for name, service in raw(file)["services"].items():
            if file == PLAIN[0] or "image" in service:
                found = VARIABLE.fullmatch(service["image"])
                assert found is not None, name
                assert found[2] == defaults[found[1]], name


def test_the_example_of_settings_names_every_variable_with_its_default() -> None:
    used: dict[str, set[str]] = {}
    for file in PLAIN:
        for name, default in VARIABLE.findall((COMPOSE / file).read_text()):
            used.setdefault(name, set()).add(default.split("@")[0])
    used["DTRAIN_SECURE_DIR"] = {"./secure"}
    secure = {name for name, _ in VARIABLE.findall((COMPOSE / SECURE[1]).read_text())}
    assert secure <= used.keys()
    shown = dict(
        re.findall(r"^#(DTRAIN_[A-Z0-9_]+)=(.*)$", (COMPOSE / ".env.example").read_text(), re.MULTILINE)
    )
    assert {name: {value} for name, value in shown.items()} == used


def test_nothing_runs_with_more_than_it_needs(files: tuple[str, ...]) -> None:
    for name, service in services(files).items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        # Handing files to their holders is all that anybody needs a capability for, and it has no network.
        assert ("cap_add" in service) == (name == "keys"), name
        assert (service.get("network_mode") == "none") == (name == "keys"), name
        # Root without capabilities: public images of etcd and of the store have no other user.
        assert service.get("user") in ((None,) if name[0] in "ac" and len(name) == 2 else (None, "0:0")), name
        if name not in ("keys", "bucket", "cli"):
            assert service["restart"] == "unless-stopped", name


def test_coordinators_have_no_volume(files: tuple[str, ...]) -> None:
    for name in COORDINATORS:
        service = services(files)[name]
        own = [f"./secure/run/{name}:{KEYS_FOLDER}:ro"] if files == SECURE else []
        assert service.get("volumes", []) == own
        assert service["tmpfs"] == ["/tmp"]


def test_what_must_last_is_in_a_volume_of_its_own(files: tuple[str, ...]) -> None:
    named = raw(PLAIN[0])["volumes"]
    owners: dict[str, str] = {}
    for name, service in services(files).items():
        for volume in service.get("volumes", []):
            source, _, rest = volume.partition(":")
            if source.startswith((".", "/")):
                assert rest.endswith(":ro") or name == "keys", (name, volume)
            else:
                assert owners.setdefault(source, name) == name, f"{source} is shared"
    assert owners.keys() == named.keys()
    assert {*MEMBERS, "store", *AGENTS} <= owners.keys()


def test_ports_are_published_on_loopback_only(files: tuple[str, ...]) -> None:
    published = {}
    for name, service in services(files).items():
        for port in service.get("ports", []):
            host, outside, _ = port.split(":")
            assert host == "127.0.0.1", name
            published[int(outside)] = name
    assert {published[port] for port in (7070, 7071, 7072)} == set(COORDINATORS)
    assert published[2379] == "etcd-0"
    assert published[8333] == "store"
    assert not set(published.values()) & set(AGENTS)


@pytest.mark.parametrize("name", COORDINATORS + AGENTS)
def test_settings_are_dtrains(name: str, files: tuple[str, ...], tmp_path: Path) -> None:
    environment: dict[str, str] = services(files)[name]["environment"]
    settings = coordinator_config.SETTINGS if name in COORDINATORS else agent_config.SETTINGS
    # DTRAIN_COORDINATORS is the command line's, for people inside the container.
    known = {setting.env for setting in settings} | {"DTRAIN_COORDINATORS"}
    assert {key for key in environment if key.startswith("DTRAIN_")} <= known
    for file in ("etcd-ca.crt", "etcd.crt", "etcd.key", "grpc-ca.crt", "grpc.crt", "grpc.key", "password"):
        (tmp_path / file).write_text("secret")
    here = {key: str(value).replace(KEYS_FOLDER, str(tmp_path)) for key, value in environment.items()}

    scheme = "https" if files == SECURE else "http"
    endpoints = tuple(f"{scheme}://{member}:2379" for member in MEMBERS)
    if name in COORDINATORS:
        found = coordinator_config.load([], here)
        assert (found.replica, found.advertise, found.listen) == (name, f"{name}:7070", "0.0.0.0:7070")
        assert found.default_store == f"s3://dtrain/?endpoint={scheme}://store:8333&region=us-east-1"
        options, tls, user = found.etcd, found.tls, "coordinator"
    else:
        agent = agent_config.load([], here)
        assert (agent.name, agent.host, agent.advertised(7071)) == (name, name, f"{name}:7071")
        options, tls, user = agent.etcd, agent.tls, f"agent-{name}"
    assert options.endpoints == endpoints
    assert (tls is not None) == (files == SECURE)
    assert (options.user, options.password) == ((user, "secret") if files == SECURE else ("", ""))


def test_containers_get_longer_to_stop_than_agents_take_to_drain(files: tuple[str, ...]) -> None:
    for name in AGENTS:
        service = services(files)[name]
        drain_s = float(service["environment"]["DTRAIN_DRAIN_GRACE"])
        assert float(service["stop_grace_period"].removesuffix("s")) >= drain_s + 20


def test_agents_and_coordinators_wait_for_etcd_and_the_store(files: tuple[str, ...]) -> None:
    all_services = services(files)
    for name in COORDINATORS + AGENTS:
        after = all_services[name]["depends_on"]
        assert after["bucket"] == {"condition": "service_completed_successfully"}
        assert all(after[member] == {"condition": "service_healthy"} for member in MEMBERS)
        assert ("profiles" in all_services[name]) == (name in AGENTS[2:])
    for name in [*MEMBERS, "store"]:
        assert all_services[name]["healthcheck"]["test"], name
        if files == SECURE:
            assert all_services[name]["depends_on"]["keys"] == {"condition": "service_completed_successfully"}


def test_with_tls_nothing_is_spoken_in_plain_text_but_metrics() -> None:
    for name, service in services(SECURE).items():
        if name in ("prometheus", "grafana"):
            continue
        said = json.dumps([service.get("environment"), service.get("command")])
        plain = set(re.findall(r"http://[^\",]*", said)) - {"http://0.0.0.0:2381"}
        assert not plain, name


def test_prometheus_looks_where_the_services_are() -> None:
    jobs = yaml.safe_load((COMPOSE / "monitoring/prometheus.yaml").read_text())["scrape_configs"]
    found = {job["job_name"]: (sd["names"], sd["port"]) for job in jobs for sd in job["dns_sd_configs"]}
    all_services = services(PLAIN)
    ports = {
        "coordinator": (COORDINATORS, all_services["c1"]["environment"]["DTRAIN_HEALTH_LISTEN"]),
        "agent": (AGENTS, all_services["a1"]["environment"]["DTRAIN_HEALTH_LISTEN"]),
        "etcd": (MEMBERS, all_services["etcd-0"]["environment"]["ETCD_LISTEN_METRICS_URLS"]),
        "store": (["store"], ":9327"),
    }
    assert found == {name: (names, int(at.rpartition(":")[2])) for name, (names, at) in ports.items()}
    assert "-metricsPort=9327" in all_services["store"]["command"]


# The scripts, with a docker that only notes what it is asked for.

FAKE_DOCKER = """#!/bin/sh
echo "$*" >>"$FAKE/calls"
case "$*" in
  *"run --rm -T keys"*) cp -r secure/stage/* secure/run/ ;;
  "volume ls"*) cat "$FAKE/volumes" 2>/dev/null ;;
  "ps -q"*) echo container ;;
  "image inspect "*) grep -qx "$3" "$FAKE/images" ;;
  "pull "*) exit 1 ;;
esac
"""


class Scripts:
    """A copy of the folder, and a command docker of our own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.compose = folder / "deploy" / "compose"
        for part in ("compose", "etcd", "grafana"):
            shutil.copytree(
                ROOT / "deploy" / part,
                folder / "deploy" / part,
                ignore=shutil.ignore_patterns(".env", "secure"),
            )
        (folder / "bin").mkdir()
        docker = folder / "bin" / "docker"
        docker.write_text(FAKE_DOCKER)
        docker.chmod(0o755)
        names = {VARIABLE.fullmatch(found["image"]) for found in raw(PLAIN[0])["services"].values()}
        self.images({found[2] for found in names if found is not None})

    def images(self, names: set[str]) -> None:
        (self._folder / "images").write_text("\n".join(sorted(names)) + "\n")

    def run(self, script: str, *words: str) -> "subprocess.CompletedProcess[str]":
        (self._folder / "calls").write_text("")
        env = {
            name: value for name, value in os.environ.items() if not name.startswith(("DTRAIN_", "COMPOSE_"))
        }
        env |= {"PATH": f"{self._folder / 'bin'}:{os.environ['PATH']}", "FAKE": str(self._folder)}
        return subprocess.run(
            [str(self.compose / script), *words],
            capture_output=True, text=True, env=env, timeout=100, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    @property
    def calls(self) -> list[str]:
        return (self._folder / "calls").read_text().splitlines()

    @property
    def settings(self) -> Mapping[str, str]:
        return dict(
            line.split("=", 1)
            for line in (self.compose / ".env").read_text().splitlines()
            if "=" in line and not line.startswith("#")
        )

    def there_are_volumes(self) -> None:
        (self._folder / "volumes").write_text("dtrain_etcd-0\n")


@pytest.fixture
def scripts(tmp_path: Path) -> Scripts:
    return Scripts(tmp_path)


def test_up_writes_down_what_the_cluster_is_made_of(scripts: Scripts) -> None:
    done = scripts.run("up.sh", "--agents", "4")
    assert done.returncode == 0, done.stderr
    assert scripts.settings["COMPOSE_PROFILES"] == "a3,a4"
    assert scripts.settings["COMPOSE_FILE"] == "compose.yaml"
    assert len(scripts.settings["DTRAIN_STORE_SECRET_KEY"]) == 48
    assert (scripts.compose / ".env").stat().st_mode & 0o077 == 0
    assert "exec -i container python - 300 4" in scripts.calls
    assert "stop -t 90 container" in scripts.calls  # a5 to a8, that is
    before = scripts.settings

    done = scripts.run("up.sh", "--monitoring")
    assert done.returncode == 0, done.stderr
    assert scripts.settings == {**before, "COMPOSE_PROFILES": "a3,a4,monitoring"}
    assert not [call for call in scripts.calls if call.startswith("stop")]
    assert "exec -i container python - 300 4" in scripts.calls


def test_up_refuses_numbers_that_it_has_no_place_for(scripts: Scripts) -> None:
    for words in (["--agents", "9"], ["--agents", "1"], ["--agents", "x"], ["--nonsense"]):
        done = scripts.run("up.sh", *words)
        assert done.returncode == 2, words
        assert done.stderr
    assert not (scripts.compose / ".env").exists()


def test_up_without_a_registry_takes_the_images_that_are_built_without_one(scripts: Scripts) -> None:
    scripts.images({f"dtrain-{name}:local" for name in ("coordinator", "agent", "etcd", "store")})
    done = scripts.run("up.sh")
    assert done.returncode == 0, done.stderr
    assert "no registry can be reached" in done.stderr
    assert scripts.settings["DTRAIN_IMAGE_ETCD"] == "dtrain-etcd:local"
    assert scripts.settings["DTRAIN_IMAGE_AGENT"] == "dtrain-agent:local"


def test_a_cluster_that_was_made_without_tls_is_not_given_it_silently(scripts: Scripts) -> None:
    assert scripts.run("up.sh").returncode == 0
    scripts.there_are_volumes()
    done = scripts.run("up.sh", "--secure")
    assert done.returncode == 1
    assert "VOLUMES=1" in done.stderr
    assert scripts.settings["COMPOSE_FILE"] == "compose.yaml"
    assert not [call for call in scripts.calls if " up " in call]


def test_down_keeps_volumes_unless_told_otherwise(scripts: Scripts) -> None:
    assert scripts.run("down.sh").returncode == 1  # there is no cluster
    assert scripts.run("up.sh").returncode == 0
    scripts.there_are_volumes()
    assert scripts.run("down.sh").returncode == 0
    assert "compose down --remove-orphans" in scripts.calls
    assert scripts.run("down.sh", "--volumes").returncode == 0
    assert "compose down --volumes --remove-orphans" in scripts.calls


def test_each_container_has_the_files_it_needs_and_nobody_elses(scripts: Scripts) -> None:
    assert scripts.run("up.sh").returncode == 0
    done = scripts.run("secure.sh", "certs")
    assert done.returncode == 0, done.stderr
    folder = scripts.compose / "secure"
    assert folder.stat().st_mode & 0o077 == 0
    assert not list((folder / "stage").iterdir())

    seen: dict[bytes, str] = {}
    for name, service in services(SECURE).items():
        mounted = [volume for volume in service.get("volumes", []) if KEYS_FOLDER in volume]
        needed = set(re.findall(rf"{KEYS_FOLDER}/([a-z0-9.-]+)", json.dumps(service)))
        if not needed:
            assert not mounted, name
            continue
        assert mounted == [f"./secure/run/{name}:{KEYS_FOLDER}:ro"]
        there = {file.name for file in (folder / "run" / name).iterdir()}
        assert needed <= there, name
        for file in there:
            if file.endswith((".key", "password")):
                content = (folder / "run" / name / file).read_bytes()
                same = content in seen and {seen[content], name} <= set(COORDINATORS)
                # Coordinators are one user of etcd.
                assert content not in seen or (same and file == "password"), (name, file)
                seen[content] = name
    # What signs stays at home.
    authorities = {file.read_bytes() for file in folder.glob("**/ca/*.key")} | {
        (folder / "store/ca.key").read_bytes()
    }
    assert len(authorities) == 4
    assert not authorities & seen.keys()

    before = {file: file.read_bytes() for file in (folder / "run").glob("*/*")}
    assert scripts.run("secure.sh", "certs").returncode == 0
    assert {file: file.read_bytes() for file in (folder / "run").glob("*/*")} == before
