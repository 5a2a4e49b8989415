"""deploy/helm/dtrain, rendered by helm: valid, refusing nonsense, and the same as deploy/kubernetes."""

import importlib.util
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from dtrain.runtime.tls import agent_server_name, coordinator_server_name
from tests.deploy import claims
from tests.deploy.kube import (
    CHART,
    KUSTOMIZE,
    ROOT,
    Document,
    Pod,
    chart,
    composed,
    container,
    kinds,
    kustomize,
    of_component,
    run,
    template,
    tool,
)

PRODUCTION = (
    "cluster=prod",
    "etcd.endpoints={https://etcd-0.example.com:2379,https://etcd-1.example.com:2379}",
    "etcd.tls.enabled=true",
    "etcd.auth.enabled=true",
    "tls.enabled=true",
    "networkPolicy.enabled=true",
    "serviceMonitor.enabled=true",
    "prometheusRule.enabled=true",
    "grafanaDashboard.enabled=true",
    "store.default=s3://training/dtrain?region=eu-central-1",
)
SETS: dict[str, tuple[str, ...]] = {
    "default": (),
    "production": PRODUCTION,
    "gpu": ("agent.gpu.count=8",),
    "daemonset": ("agent.kind=DaemonSet", "agent.nodeSelector.pool=gpu"),
    "daemonset with tls": ("agent.kind=DaemonSet", "tls.enabled=true", "networkPolicy.enabled=true"),
    "secrets": ("tls.enabled=true", "tls.source=secrets", "etcd.auth.enabled=true", "etcd.tls.enabled=true"),
    "persistent": (
        "agent.data.persistent=true",
        "agent.data.storageClass=fast",
        "agent.workspace.claim=code",
    ),
}


@pytest.mark.parametrize("name", SETS)
def test_the_chart_renders_to_objects_that_the_api_takes(name: str, tmp_path: Path) -> None:
    given = chart(*SETS[name])
    claims.are_valid(given)
    # The pod of helm test is a client, with mounts or without.
    daemons = [each for each in given if each["kind"] != "Pod"]
    claims.fit_together(daemons)
    claims.are_restricted(given)
    claims.coordinators_survive(given)
    claims.probes_are_patient(given)
    writable = [each for each in daemons if each]
    if "workspace" not in str(SETS[name]):
        by_node = name == "daemonset"
        claims.daemons_start(writable, tmp_path, agent="node-7" if by_node else "dtrain-agent-0")


def test_lint_finds_nothing() -> None:
    assert "0 chart(s) failed" in run(tool("helm"), "lint", "--strict", str(CHART))


def test_production_is_closed_and_named(tmp_path: Path) -> None:
    given = chart(*PRODUCTION)
    claims.network_is_closed(given)
    named = claims.identities(given)
    assert named["coordinator"] == ("dtrain://prod/coordinator/${POD_NAME}", coordinator_server_name("prod"))
    assert named["agent"] == ("dtrain://prod/agent/${POD_NAME}", agent_server_name("prod", "${POD_NAME}"))


def normal(pod: Document) -> Document:
    """Take away in what kustomize and the chart rightly differ: labels of a release, names with a hash."""
    text = yaml.safe_dump(pod, sort_keys=True)
    text = re.sub(r"\n\s*app.kubernetes.io/instance: .*", "", text)
    text = re.sub(r"(name: dtrain-(?:[a-z]+-)?settings)-[a-z0-9]{10}", r"\1", text)
    text = re.sub(r"\n\s*csi.cert-manager.io/issuer-kind: Issuer", "", text)
    found: Document = yaml.safe_load(text)
    here = found["containers"][0]
    here["volumeMounts"].sort(key=lambda mount: mount["mountPath"])
    found["volumes"].sort(key=lambda volume: volume["name"])
    return found


@pytest.mark.parametrize(
    ("components", "settings"),
    [
        ((), ()),
        (
            ("etcd-tls", "etcd-roles", "tls"),
            ("etcd.tls.enabled=true", "etcd.auth.enabled=true", "tls.enabled=true"),
        ),
        (("tls-secrets",), ("tls.enabled=true", "tls.source=secrets")),
        (("daemonset",), ("agent.kind=DaemonSet", "agent.nodeSelector.dtrain/agent=yes")),
    ],
    ids=["plain", "certificates and users", "secrets", "daemonset"],
)
def test_chart_and_kustomize_run_the_same_pods(
    components: tuple[str, ...], settings: tuple[str, ...], tmp_path: Path
) -> None:
    one, other = composed(tmp_path, *components), chart(*settings)
    for component in ("coordinator", "agent"):
        left, right = of_component(one, component), of_component(other, component)
        assert left["kind"] == right["kind"]
        pods = [normal(template(each)["spec"]) for each in (left, right)]
        for pod in pods:
            pod.pop("nodeSelector", None)
        assert pods[0] == pods[1]
        environments = [
            Pod(given, of_component(given, component), tmp_path / side, "dtrain-x-0").environment
            for side, given in (("one", one), ("other", other))
        ]
        assert environments[0] == environments[1]


def test_a_changed_setting_rolls_the_pods_and_a_changed_endpoint_does_not() -> None:
    def checksums(*settings: str) -> list[str]:
        given = chart(*settings)
        return [
            template(of_component(given, component))["metadata"]["annotations"]["checksum/settings"]
            for component in ("coordinator", "agent")
        ]

    coordinator, agent = checksums()
    assert checksums("etcd.endpoints={http://elsewhere:2379}") == [coordinator, agent]
    assert checksums("store.default=s3://b/p") == [checksums("store.default=s3://b/p")[0], agent]
    assert checksums("store.default=s3://b/p")[0] != coordinator
    assert checksums("agent.slots=4")[1] != agent


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("agnt.replicas=3",), "agnt"),
        (("agent.kind=Deployment",), "agent"),
        (("store.default=s3://key:secret@host/b",), "store"),
        (("settings.DTRAN_TTL=5",), "DTRAN_TTL"),
        (("etcd.endpoints={etcd:2379}",), "endpoints"),
        (("cluster=Prod",), "cluster"),
        (("agent.terminationGracePeriodSeconds=75",), "drain is cut short"),
        (("agent.workspace.configMap=a", "agent.workspace.claim=b"), "not both"),
        (("agent.kind=DaemonSet", "agent.data.persistent=true"), "StatefulSet"),
        (("agent.kind=DaemonSet", "etcd.auth.enabled=true", "tls.enabled=true"), "names are known"),
    ],
)
def test_nonsense_is_refused_with_the_reason(settings: tuple[str, ...], said: str) -> None:
    words = [part for setting in settings for part in ("--set", setting)]
    done = subprocess.run(
        [tool("helm"), "template", "dtrain", str(CHART), *words],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode != 0
    assert said in done.stderr


def test_ipv6_addresses_stand_in_brackets(tmp_path: Path) -> None:
    given = chart("ipv6=true")
    pod = Pod(given, of_component(given, "coordinator"), tmp_path, "dtrain-coordinator-0")
    assert pod.environment["DTRAIN_ADVERTISE"] == "[10.1.2.3]:7070"
    assert pod.environment["DTRAIN_LISTEN"] == "[::]:7070"


def test_two_releases_do_not_meet() -> None:
    mine, other = (
        chart(),
        [each for each in yaml.safe_load_all(run(tool("helm"), "template", "second", str(CHART))) if each],
    )
    names = [{(each["kind"], each["metadata"]["name"]) for each in given} for given in (mine, other)]
    assert not names[0] & names[1]
    labels = template(of_component(mine, "agent"))["metadata"]["labels"]
    for each in kinds(other, "Service"):
        assert not each["spec"]["selector"].items() <= labels.items()


def test_gpus_are_added_to_the_limits_that_were_given() -> None:
    agent = of_component(chart("agent.gpu.count=4", "agent.gpu.resource=amd.com/gpu"), "agent")
    assert container(agent)["resources"]["limits"] == {"memory": "16Gi", "amd.com/gpu": 4}
    assert template(agent)["spec"]["tolerations"] == [
        {"key": "amd.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
    ]


def test_the_readmes_production_values_render(tmp_path: Path) -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", (CHART / "README.md").read_text(), re.S)
    given = chart(values=yaml.safe_load(block), folder=tmp_path)
    claims.are_valid(given)
    claims.network_is_closed(given)


def test_schema_and_table_of_values_are_fresh() -> None:
    spec = importlib.util.spec_from_file_location("reference", ROOT / "tools/gen_helm_reference.py")
    assert spec
    assert spec.loader
    reference: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    assert reference.main(check=True) == 0


def test_chart_images_and_manifests_are_of_one_version() -> None:
    version = yaml.safe_load((CHART / "Chart.yaml").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert version["version"] == version["appVersion"] == project
    for component in ("coordinator", "agent"):
        image = container(of_component(kustomize(KUSTOMIZE / "base"), component))["image"]
        assert image == f"dtrain-{component}:{version['appVersion']}"
    assert f"dtrain-coordinator:{version['appVersion']}" in (KUSTOMIZE / "jobs/submit.yaml").read_text()
