"""What must hold of dtrain's objects in Kubernetes, however they were rendered."""

from collections.abc import Sequence
from pathlib import Path

from dtrain.agent import config as agent_config
from dtrain.coordinator import config as coordinator_config
from tests.deploy.kube import (
    POD_IP,
    VERSIONS,
    WORKLOADS,
    Document,
    Host,
    Pod,
    admitted,
    container,
    find,
    fits,
    kinds,
    of_component,
    problems,
    template,
)

SETTINGS = {"coordinator": coordinator_config.SETTINGS, "agent": agent_config.SETTINGS}
PORTS = {"coordinator": (7070, 7080), "agent": (7071, 7081)}
"""gRPC and health, as the images preset them."""

HARMLESS_VOLUMES = {"configMap", "secret", "csi", "emptyDir", "persistentVolumeClaim", "downwardAPI"}
"""Kinds of volumes that the restricted profile allows, as far as they are used here."""


def are_valid(given: Sequence[Document]) -> None:
    """Every document is one that the API of the oldest and of the newest version takes."""
    assert given
    for version in VERSIONS:
        assert [problem for each in given for problem in problems(each, version)] == []
    names = [(each["kind"], each["metadata"]["name"]) for each in given]
    assert len(set(names)) == len(names)


def fit_together(given: Sequence[Document]) -> None:
    """What one object says of another by name or label is there."""
    pods = [template(each) for each in kinds(given, "Deployment", "StatefulSet", "DaemonSet")]
    for workload in kinds(given, "Deployment", "StatefulSet", "DaemonSet"):
        assert fits(workload["spec"]["selector"], template(workload)["metadata"]["labels"])
        if workload["kind"] == "StatefulSet":
            assert find(given, "Service", workload["spec"]["serviceName"])["spec"]["clusterIP"] == "None"
        for spread in template(workload)["spec"].get("topologySpreadConstraints", ()):
            assert fits(spread["labelSelector"], template(workload)["metadata"]["labels"])
    for workload in kinds(given, *WORKLOADS):
        pod = template(workload)["spec"]
        volumes = {volume["name"]: volume for volume in pod.get("volumes", ())}
        claimed = {each["metadata"]["name"] for each in workload["spec"].get("volumeClaimTemplates", ())}
        assert {mount["name"] for mount in container(workload)["volumeMounts"]} == set(volumes) | claimed
        ports = {port["name"] for port in container(workload).get("ports", ())}
        for probe in ("livenessProbe", "readinessProbe"):
            if probe in container(workload):
                assert container(workload)[probe]["httpGet"]["port"] in ports
        if "serviceAccountName" in pod:
            find(given, "ServiceAccount", pod["serviceAccountName"])
    for service in kinds(given, "Service"):
        chosen = [
            pod
            for pod in pods
            if fits({"matchLabels": service["spec"]["selector"]}, pod["metadata"]["labels"])
        ]
        assert len(chosen) == 1, service["metadata"]["name"]
        there = {port["name"]: port["containerPort"] for port in chosen[0]["spec"]["containers"][0]["ports"]}
        for port in service["spec"]["ports"]:
            assert there[port["targetPort"]] == port["port"]
    for budget in kinds(given, "PodDisruptionBudget"):
        assert sum(fits(budget["spec"]["selector"], pod["metadata"]["labels"]) for pod in pods) == 1
    for monitor in kinds(given, "ServiceMonitor"):
        services = [
            service
            for service in kinds(given, "Service")
            if fits(monitor["spec"]["selector"], service["metadata"]["labels"])
        ]
        assert len(services) == 2
        for service in services:
            assert monitor["spec"]["endpoints"][0]["port"] in {
                port["name"] for port in service["spec"]["ports"]
            }


def are_restricted(given: Sequence[Document]) -> None:
    """Every pod passes the restricted profile of Pod Security, and more: a root that cannot be written."""
    for workload in kinds(given, *WORKLOADS):
        pod = template(workload)["spec"]
        assert pod["automountServiceAccountToken"] is False
        # Or a Service's variables would stand among the settings, and a near miss of one is refused.
        assert pod["enableServiceLinks"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["fsGroup"] == 10001
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        for volume in pod.get("volumes", ()):
            assert set(volume) - {"name"} <= HARMLESS_VOLUMES
        security = container(workload)["securityContext"]
        assert security["readOnlyRootFilesystem"] is True
        assert security["allowPrivilegeEscalation"] is False
        assert security["capabilities"] == {"drop": ["ALL"]}


def coordinators_survive(given: Sequence[Document]) -> None:
    """Three replicas, one per host, one away at a time, that keep nothing."""
    coordinator = of_component(given, "coordinator")
    pod, labels = template(coordinator)["spec"], template(coordinator)["metadata"]["labels"]
    assert coordinator["spec"]["replicas"] == 3
    (rule,) = pod["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert rule["topologyKey"] == "kubernetes.io/hostname"
    assert fits(rule["labelSelector"], labels)
    (zones,) = pod["topologySpreadConstraints"]
    assert zones["topologyKey"] == "topology.kubernetes.io/zone"
    budget = find(given, "PodDisruptionBudget", coordinator["metadata"]["name"])
    assert budget["spec"]["maxUnavailable"] == 1
    if coordinator["kind"] == "Deployment":
        assert coordinator["spec"]["strategy"]["rollingUpdate"] == {"maxUnavailable": 1, "maxSurge": 1}
    assert all(mount.get("readOnly") for mount in container(coordinator)["volumeMounts"])
    assert not coordinator["spec"].get("volumeClaimTemplates")
    assert container(coordinator)["resources"]["limits"]["memory"]


def daemons_start(given: Sequence[Document], folder: Path, *, agent: str = "dtrain-agent-0") -> None:
    """Each daemon takes the environment and the files that its pod has, and is who its certificate says."""
    workload = of_component(given, "coordinator")
    pod = Pod(given, workload, folder / "coordinator", "dtrain-coordinator-0")
    assert unknown(pod, "coordinator") == set()
    coordinator = coordinator_config.load([], pod.settings())
    assert coordinator.replica == "dtrain-coordinator-0"
    assert coordinator.advertise == f"{POD_IP}:7070"
    assert (coordinator.listen, coordinator.health_listen) == ("0.0.0.0:7070", "0.0.0.0:7080")

    workload = of_component(given, "agent")
    pod = Pod(given, workload, folder / "agent", "dtrain-agent-0")
    assert unknown(pod, "agent") == set()
    machine = agent_config.load([], pod.settings())
    assert machine.name == agent
    assert machine.host == POD_IP
    assert (machine.listen, machine.health_listen) == ("0.0.0.0:7071", "0.0.0.0:7081")
    assert machine.cluster == coordinator.cluster
    assert (machine.tls is None) == (coordinator.tls is None)
    # The drain, then the end of what would not drain, all before Kubernetes' SIGKILL.
    grace_s = template(workload)["spec"]["terminationGracePeriodSeconds"]
    assert grace_s > machine.drain_grace_s + machine.stop_grace_s + 10
    # Sockets and journal lie where something may be written.
    writable = {
        mount["mountPath"] for mount in container(workload)["volumeMounts"] if not mount.get("readOnly")
    }
    assert writable == {"/var/lib/dtrain", "/tmp", "/dev/shm"}
    assert str(machine.data_dir) == "/var/lib/dtrain"
    assert pod.environment["HOME"] in writable
    if machine.etcd.user:
        assert coordinator.etcd.user == "coordinator"
        assert machine.etcd.user == f"agent-{agent}"
        # Its own and no other's: the file is picked by the name.
        assert machine.etcd.password == f"secret-of-agent-{agent}"


def unknown(pod: Pod, daemon: str) -> set[str]:
    """Return the variables of a pod that are no settings of its daemon."""
    return {name for name in pod.environment if name.startswith("DTRAIN_")} - {
        setting.env for setting in SETTINGS[daemon]
    }


def probes_are_patient(given: Sequence[Document]) -> None:
    """Liveness asks for the process alone, for a minute at least; readiness asks quickly."""
    for component, (grpc, health) in PORTS.items():
        here = container(of_component(given, component))
        assert {port["name"]: port["containerPort"] for port in here["ports"]} == {
            "grpc": grpc,
            "health": health,
        }
        live, ready = here["livenessProbe"], here["readinessProbe"]
        assert live["httpGet"]["path"] == "/livez"
        assert live["periodSeconds"] * live["failureThreshold"] >= 60
        assert ready["httpGet"]["path"] == "/readyz"
        assert ready["periodSeconds"] * ready["failureThreshold"] <= 15
        assert "preStop" not in here.get("lifecycle", {})


def network_is_closed(given: Sequence[Document]) -> None:
    """Who may talk to whom, and nobody else."""
    policies = kinds(given, "NetworkPolicy")
    coordinator, agent = (
        Host(template(of_component(given, component))["metadata"]["labels"])
        for component in ("coordinator", "agent")
    )
    assert coordinator.labels
    client = Host({**coordinator.labels, "app.kubernetes.io/component": "client"})
    stranger, prometheus = Host({"app": "web"}), Host({"app": "prometheus"}, "monitoring")
    etcd_or_store = Host(None)

    def may(source: Host, target: Host, port: int, protocol: str = "TCP") -> bool:
        return admitted(policies, source, target, port, protocol)

    assert may(coordinator, agent, 7071)
    assert may(agent, coordinator, 7070)
    assert may(client, coordinator, 7070)
    assert may(coordinator, coordinator, 7070)
    assert all(may(agent, agent, port) for port in (7071, 29500, 45123))
    assert may(prometheus, coordinator, 7080)
    assert may(prometheus, agent, 7081)
    for daemon in (coordinator, agent):
        assert all(may(daemon, etcd_or_store, port) for port in (2379, 443))
        assert not may(daemon, etcd_or_store, 80)
        assert may(daemon, etcd_or_store, 53, "UDP")
    assert not any(may(stranger, coordinator, port) for port in (7070, 7080))
    assert not any(may(stranger, agent, port) for port in (7071, 7081, 29500))
    assert not any(may(prometheus, agent, port) for port in (7071, 29500))
    assert not may(prometheus, coordinator, 7070)
    assert not any(may(client, agent, port) for port in (7071, 29500))
    assert not may(client, etcd_or_store, 2379)
    assert not may(coordinator, agent, 29500)
    assert not may(agent, coordinator, 7080)


def identities(given: Sequence[Document]) -> dict[str, tuple[str, str]]:
    """Return the URI and the DNS name that cert-manager's driver is asked for, by component."""
    found = {}
    for component in PORTS:
        volumes = template(of_component(given, component))["spec"]["volumes"]
        (csi,) = (volume["csi"] for volume in volumes if "csi" in volume)
        assert csi["driver"] == "csi.cert-manager.io"
        asked = csi["volumeAttributes"]
        assert asked["csi.cert-manager.io/fs-group"] == "10001"
        assert {"server auth", "client auth"} <= set(asked["csi.cert-manager.io/key-usages"].split(","))
        find(given, "Issuer", asked["csi.cert-manager.io/issuer-name"])
        found[component] = asked["csi.cert-manager.io/uri-sans"], asked["csi.cert-manager.io/dns-names"]
    return found
