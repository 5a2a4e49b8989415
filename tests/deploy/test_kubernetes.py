"""deploy/kubernetes, rendered by kustomize: valid, and what it is said to be."""

import copy
import itertools
import re
from pathlib import Path

import pytest
import yaml

from dtrain.agent import config as agent_config
from dtrain.cli import context
from dtrain.coordinator import config as coordinator_config
from dtrain.runtime import grpc_tls
from dtrain.runtime.config import ETCD, etcd_options, parse
from dtrain.runtime.tls import Role, agent_server_name, coordinator_server_name, parse_peer, tls_files
from tests.deploy import claims
from tests.deploy.kube import (
    KUSTOMIZE,
    ROOT,
    Document,
    Pod,
    composed,
    container,
    documents,
    find,
    kinds,
    kustomize,
    of_component,
    problems,
    secrets_of_the_readme,
    template,
)

COMBINATIONS = (
    (),
    ("gpu",),
    ("daemonset",),
    ("daemonset", "gpu", "tls", "monitoring"),
    ("daemonset", "etcd-roles", "tls-secrets"),
    ("persistent-data", "etcd-tls"),
    ("etcd-tls", "etcd-roles", "tls-secrets", "networkpolicy"),
)


@pytest.fixture(scope="module")
def base() -> list[Document]:
    return kustomize(KUSTOMIZE / "base")


@pytest.fixture(scope="module")
def production() -> list[Document]:
    return kustomize(KUSTOMIZE / "overlays/production")


@pytest.mark.parametrize("overlay", ["base", "overlays/example", "overlays/production", "etcd-example"])
def test_what_ships_renders_to_objects_that_the_api_takes(overlay: str) -> None:
    given = kustomize(KUSTOMIZE / overlay)
    claims.are_valid(given)
    claims.fit_together(given)
    claims.are_restricted(given)


@pytest.mark.parametrize("components", COMBINATIONS, ids="+".join)
def test_components_combine(components: tuple[str, ...], tmp_path: Path) -> None:
    given = composed(tmp_path, *components)
    claims.are_valid(given)
    claims.fit_together(given)
    claims.are_restricted(given)
    claims.coordinators_survive(given)
    claims.probes_are_patient(given)
    by_node = "daemonset" in components and "tls" not in components
    claims.daemons_start(given, tmp_path, agent="node-7" if by_node else "dtrain-agent-0")


def test_every_component_is_tried() -> None:
    tried = {*itertools.chain(*COMBINATIONS)}
    assert tried == {path.name for path in (KUSTOMIZE / "components").iterdir()}


def test_a_misspelt_field_is_found(base: list[Document]) -> None:
    wrong = yaml.safe_load(yaml.safe_dump(of_component(base, "coordinator")))
    wrong["spec"]["template"]["spec"]["containers"][0]["readinesProbe"] = {}
    assert all(problems(wrong, version) for version in claims.VERSIONS)


def test_production_keeps_what_the_base_promises(production: list[Document], tmp_path: Path) -> None:
    claims.coordinators_survive(production)
    claims.probes_are_patient(production)
    claims.daemons_start(production, tmp_path)
    claims.network_is_closed(production)
    assert kinds(production, "ServiceMonitor")
    assert kinds(production, "PrometheusRule")


def test_a_pod_without_the_roles_has_no_user(base: list[Document], tmp_path: Path) -> None:
    pod = Pod(base, of_component(base, "agent"), tmp_path, "dtrain-agent-0")
    assert not {"DTRAIN_USER", "DTRAIN_PASSWORD_FILE", "DTRAIN_TLS_CERT"} & set(pod.environment)


def test_certificates_name_the_overlays_cluster_and_the_pod(production: list[Document]) -> None:
    named = claims.identities(production)
    uri, dns = (text.replace("${POD_NAME}", "dtrain-agent-3") for text in named["agent"])
    peer = parse_peer(uri)
    assert (peer.cluster, peer.role, peer.name) == ("prod", Role.AGENT, "dtrain-agent-3")
    assert dns == agent_server_name("prod", "dtrain-agent-3")
    uri, dns = named["coordinator"]
    peer = parse_peer(uri.replace("${POD_NAME}", "dtrain-coordinator-6c9f7d5b8-x2x4z"))
    assert (peer.cluster, peer.role) == ("prod", Role.COORDINATOR)
    assert dns == coordinator_server_name("prod")
    (operator,) = find(production, "Certificate", "dtrain-operator")["spec"]["uris"]
    assert parse_peer(operator).role is Role.OPERATOR
    assert parse_peer(operator).cluster == "prod"


def test_with_a_daemonset_certificates_and_agents_have_one_name(tmp_path: Path) -> None:
    # The driver can only write a pod's name into a certificate, and an agent refuses another's.
    given = composed(tmp_path, "daemonset", "tls")
    pod = Pod(given, of_component(given, "agent"), tmp_path, "dtrain-agent-x2x4z")
    assert pod.environment["DTRAIN_NAME"] == "dtrain-agent-x2x4z"
    assert claims.identities(given)["agent"][0] == "dtrain://default/agent/${POD_NAME}"


def test_without_cert_manager_coordinators_have_names_that_are_known_before(tmp_path: Path) -> None:
    given = composed(tmp_path, "tls-secrets")
    coordinator = of_component(given, "coordinator")
    assert coordinator["kind"] == "StatefulSet"
    assert "strategy" not in coordinator["spec"]
    for component in ("coordinator", "agent"):
        workload = of_component(given, component)
        name = f"dtrain-{component}-1"
        pod = Pod(given, workload, tmp_path / component, name)
        key = Path(pod.settings()["DTRAIN_TLS_KEY"])
        assert key.read_text() == f"secret-of-{name}.key"
        # Nothing shows a pod the whole Secret with everybody's keys.
        whole = [mount for mount in container(workload)["volumeMounts"] if mount["name"] == "tls"]
        assert all("subPathExpr" in mount for mount in whole)


def test_endpoints_are_followed_and_settings_roll_the_pods(base: list[Document]) -> None:
    find(base, "ConfigMap", "dtrain-etcd")
    for workload in (of_component(base, "coordinator"), of_component(base, "agent")):
        (mount,) = (each for each in container(workload)["volumeMounts"] if each["name"] == "etcd")
        # A single file would keep what it was at the start.
        assert not {"subPath", "subPathExpr"} & set(mount)
        for source in container(workload)["envFrom"]:
            if "configMapRef" in source:
                assert re.fullmatch(r"dtrain-.*settings-[a-z0-9]{10}", source["configMapRef"]["name"])


def test_gpus_are_asked_for_as_limits(tmp_path: Path) -> None:
    given = composed(tmp_path, "gpu")
    agent = of_component(given, "agent")
    assert container(agent)["resources"]["limits"]["nvidia.com/gpu"] == 8
    assert template(agent)["spec"]["tolerations"][0]["key"] == "nvidia.com/gpu"


def test_daemonset_and_statefulset_run_the_same_pod(base: list[Document], tmp_path: Path) -> None:
    daemonset = composed(tmp_path, "daemonset")
    assert not [
        each for each in kinds(daemonset, "PodDisruptionBudget") if "agent" in each["metadata"]["name"]
    ]
    one, other = (
        copy.deepcopy(template(of_component(given, "agent"))["spec"]) for given in (base, daemonset)
    )
    assert other.pop("nodeSelector") == {"dtrain/agent": "true"}
    assert one.pop("affinity")
    for pod in (one, other):
        env = {each["name"]: each for each in pod["containers"][0]["env"]}
        field = env["DTRAIN_NAME"]["valueFrom"].pop("fieldRef")["fieldPath"]
        assert field == ("metadata.name" if pod is one else "spec.nodeName")
    assert one == other


@pytest.mark.parametrize("component", ["coordinator", "agent"])
def test_the_command_line_takes_the_environment_of_a_daemons_pod(
    component: str, production: list[Document], tmp_path: Path
) -> None:
    # kubectl exec ... dtrain get jobs: replicas are looked up with etcd's settings, beside others there.
    pod = Pod(production, of_component(production, component), tmp_path, "dtrain-agent-0")
    context._refuse_misspelt(pod.environment)
    options = etcd_options(parse("dtrain", "", ETCD, (), pod.settings()))
    assert options.endpoints[0] == "https://etcd-0.example.com:2379"
    assert options.user


@pytest.mark.parametrize("name", ["submit.yaml", "submit-tls.yaml"])
def test_a_submission_is_a_pod_that_may_talk_to_coordinators(
    name: str, base: list[Document], tmp_path: Path
) -> None:
    given = documents((KUSTOMIZE / "jobs" / name).read_text())
    claims.are_valid(given)
    claims.are_restricted(given)
    (job,) = given
    pod = Pod(given, job, tmp_path, "submit-chargpt-abcde")
    assert {key for key in pod.environment if key.startswith("DTRAIN_")} <= set(context._VARIABLES)
    host, _, port = pod.environment["DTRAIN_COORDINATORS"].partition(":")
    service = find(base, "Service", host)
    assert int(port) in {each["port"] for each in service["spec"]["ports"]}
    assert template(job)["metadata"]["labels"]["app.kubernetes.io/component"] == "client"


def test_etcd_gets_the_flags_that_dtrain_wants() -> None:
    etcd = find(kustomize(KUSTOMIZE / "etcd-example"), "StatefulSet", "etcd")
    flags = set(container(etcd)["args"])
    wanted = re.findall(
        r"^\| `(--auto-compaction[^`]*|--quota[^`]*|--experimental[^`]*)`",
        (ROOT / "docs/etcd.md").read_text(),
        re.M,
    )
    assert len(wanted) == 3
    assert set(" ".join(wanted).split()) <= flags
    assert etcd["spec"]["replicas"] == 3
    members = next(flag for flag in flags if flag.startswith("--initial-cluster=etcd-0"))
    assert members.count("=http://") == 3


def test_the_readme_names_the_secrets_that_pods_mount(production: list[Document], tmp_path: Path) -> None:
    readme = (KUSTOMIZE / "README.md").read_text()
    for given in (production, composed(tmp_path, "tls-secrets")):
        for workload in kinds(given, "Deployment", "StatefulSet"):
            for volume in template(workload)["spec"]["volumes"]:
                if "secret" in volume:
                    assert f"generic {volume['secret']['secretName']}" in readme
                    assert volume["secret"]["defaultMode"] in (0o440, 0o444)


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    users = ("root", "coordinator", "agent-dtrain-agent-0", "agent-dtrain-agent-1")
    folder = tmp_path_factory.mktemp("secrets")
    return secrets_of_the_readme(folder, {user: f"password-of-{user}" for user in users})


def test_the_readmes_secrets_let_daemons_start_with_tls_and_users(
    secrets: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    """Real certificates, mounted as the pods mount them, are taken by the daemons' own code."""
    settings = tmp_path / "overlay"
    settings.mkdir()
    given = composed(settings, "etcd-tls", "etcd-roles", "tls-secrets")
    (common,) = (each["data"] for each in kinds(given, "ConfigMap") if "DTRAIN_CLUSTER" in each["data"])
    common["DTRAIN_CLUSTER"] = "prod"
    for component, name in (("coordinator", "dtrain-coordinator-2"), ("agent", "dtrain-agent-1")):
        pod = Pod(given, of_component(given, component), tmp_path / name, name, secrets)
        config = (
            coordinator_config.load([], pod.settings())
            if component == "coordinator"
            else agent_config.load([], pod.settings())
        )
        loaded = grpc_tls.load(config.tls, config.cluster, Role(component), name)
        assert loaded is not None
        assert loaded.peer.uri == f"dtrain://prod/{component}/{name}"
        user = "coordinator" if component == "coordinator" else f"agent-{name}"
        assert (config.etcd.user, config.etcd.password) == (user, f"password-of-{user}")
        for path in (config.etcd.cacert, config.etcd.cert, config.etcd.key):
            assert "-----BEGIN" in Path(path).read_text()
    assert "root" not in secrets["dtrain-etcd-agents"]
    submit = documents((KUSTOMIZE / "jobs/submit-tls.yaml").read_text())
    operator = Pod(submit, submit[0], tmp_path / "submit", "s", secrets)
    files = tls_files(
        {
            name: operator.settings()[f"DTRAIN_TLS_{name[4:].upper()}"]
            for name in ("tls-cert", "tls-key", "tls-cacert")
        }
    )
    assert files is not None
    assert grpc_tls.Credentials(files).peer.uri == "dtrain://prod/operator/jobs"
