"""Kubernetes without a cluster: rendering with the real tools, the API's schemas, and what pods would see.

``kubectl kustomize`` and ``helm template`` come from .cache/kube (tools/fetch_kube_tools.py), else from PATH.
"""

import base64
import functools
import json
import os
import re
import shutil
import subprocess
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import referencing
import yaml

ROOT = Path(__file__).resolve().parents[2]
KUSTOMIZE, CHART = ROOT / "deploy/kubernetes", ROOT / "deploy/helm/dtrain"
TOOLS = ROOT / ".cache/kube"
VERSIONS = ("1.27", "1.37")
"""The oldest that the chart takes, and the newest there is."""

Document = dict[str, Any]
WORKLOADS = ("Deployment", "StatefulSet", "DaemonSet", "Job", "Pod")
SECRET_FILES = (
    "ca.crt",
    "tls.crt",
    "tls.key",
    "etcd-ca.crt",
    "etcd.crt",
    "etcd.key",
    "grpc-ca.crt",
    "coordinator",
)
POD_IP = "10.1.2.3"


def tool(name: str) -> str:
    found = TOOLS / name
    path = str(found) if found.exists() else shutil.which(name)
    assert path, f"no {name}: run tools/fetch_kube_tools.py .cache/kube"
    return path


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@functools.cache
def _rendered(*command: str) -> str:
    return run(*command)


def documents(text: str) -> list[Document]:
    return [document for document in yaml.safe_load_all(text) if document]


def kustomize(folder: Path) -> list[Document]:
    return documents(_rendered(tool("kubectl"), "kustomize", str(folder)))


def composed(folder: Path, *components: str) -> list[Document]:
    """Render the base with ``components``, by a kustomization made in ``folder``."""

    def relative(path: str) -> str:
        return os.path.relpath(KUSTOMIZE / path, folder)

    (folder / "kustomization.yaml").write_text(
        yaml.safe_dump(
            {
                "resources": [relative("base")],
                "components": [relative(f"components/{component}") for component in components],
            }
        )
    )
    return documents(run(tool("kubectl"), "kustomize", str(folder)))


def chart(*settings: str, values: Document | None = None, folder: Path | None = None) -> list[Document]:
    """Render the chart as release ``dtrain``, with ``--set`` for each of ``settings``."""
    command = [tool("helm"), "template", "dtrain", str(CHART), "--namespace", "dtrain"]
    for setting in settings:
        command += ["--set", setting]
    if values is not None:
        assert folder is not None
        (folder / "values.yaml").write_text(yaml.safe_dump(values))
        command += ["--values", str(folder / "values.yaml")]
        return documents(run(*command))
    return documents(_rendered(*command))


@functools.cache
def _archive() -> zipfile.ZipFile:
    path = TOOLS / "schemas.zip"
    assert path.exists(), "no schemas: run tools/fetch_kube_tools.py .cache/kube"
    return zipfile.ZipFile(path)


@functools.cache
def _schema(version: str, name: str) -> Any:
    folder = f"kubernetes_validate/kubernetes-json-schema/v{version}.0-local-strict"
    return json.loads(_archive().read(f"{folder}/{name}.json"))


@functools.cache
def _validator(version: str, kind: str, api_version: str) -> jsonschema.Draft202012Validator:
    own = ROOT / "tests/deploy/crds" / f"{kind}.json"
    if own.exists():
        return jsonschema.Draft202012Validator(json.loads(own.read_text()))
    group, _, number = api_version.rpartition("/")
    name = "-".join(part for part in (kind.lower(), group.split(".")[0], number) if part)
    definitions = referencing.Resource.from_contents(_schema(version, "_definitions"))
    schema = _schema(version, name)
    registry = definitions @ (referencing.Resource.from_contents(schema) @ referencing.Registry())
    return jsonschema.Draft202012Validator(schema, registry=registry)


def problems(document: Document, version: str) -> list[str]:
    """Return what the API server of Kubernetes ``version`` would find wrong with the shape of it."""
    validator = _validator(version, document["kind"], document["apiVersion"])
    return [
        f"{document['kind']}/{document['metadata']['name']} {error.json_path}: {error.message}"
        for error in validator.iter_errors(document)
    ]


def find(given: Iterable[Document], kind: str, name: str) -> Document:
    (found,) = (each for each in given if each["kind"] == kind and each["metadata"]["name"] == name)
    return found


def kinds(given: Iterable[Document], *wanted: str) -> list[Document]:
    return [each for each in given if each["kind"] in wanted]


def template(workload: Document) -> Document:
    return workload if workload["kind"] == "Pod" else workload["spec"]["template"]


def of_component(given: Iterable[Document], component: str) -> Document:
    """Return the workload of ``component``, whatever its kind and name are."""
    (found,) = (
        each
        for each in kinds(given, "Deployment", "StatefulSet", "DaemonSet")
        if template(each)["metadata"]["labels"].get("app.kubernetes.io/component") == component
    )
    return found


def container(workload: Document) -> Document:
    (found,) = template(workload)["spec"]["containers"]
    return found


class Pod:
    """What the container of a workload's pod would see: its environment and its files, below ``folder``.

    Without ``secrets`` (name, file, content) files of Secrets hold a word made of what picked them.
    With them, a Secret for the environment is read from there too, if it is there.
    """

    def __init__(
        self,
        given: Sequence[Document],
        workload: Document,
        folder: Path,
        name: str,
        secrets: Mapping[str, Mapping[str, bytes]] | None = None,
        ip: str = POD_IP,
    ) -> None:
        self._given, self._folder, self._secrets, self._ip = given, folder, secrets, ip
        self._workload, self.name = workload, name
        self.environment = dict(self._environment())
        self._mount()

    def settings(self) -> dict[str, str]:
        """Return the environment with its paths pointing into ``folder``."""
        return {
            key: value.replace("/etc/dtrain", f"{self._folder}/etc/dtrain")
            for key, value in self.environment.items()
        }

    def _environment(self) -> Iterator[tuple[str, str]]:
        seen: dict[str, str] = {}
        for source in container(self._workload).get("envFrom", ()):
            if "configMapRef" in source:
                seen |= find(self._given, "ConfigMap", source["configMapRef"]["name"])["data"]
            else:
                assert source["secretRef"]["optional"], "a pod would wait for a Secret that need not exist"
                secret = (self._secrets or {}).get(source["secretRef"]["name"], {})
                seen |= {name: value.decode() for name, value in secret.items()}
        fields = {
            "status.podIP": self._ip,
            "metadata.name": self.name,
            "spec.nodeName": "node-7",
            "metadata.labels['batch.kubernetes.io/controller-uid']": "0d2b",
        }
        for variable in container(self._workload).get("env", ()):
            if "value" in variable:
                seen[variable["name"]] = expanded(variable["value"], seen)
            else:
                seen[variable["name"]] = fields[variable["valueFrom"]["fieldRef"]["fieldPath"]]
        yield from seen.items()

    def _mount(self) -> None:
        volumes = {volume["name"]: volume for volume in template(self._workload)["spec"].get("volumes", ())}
        for mount in container(self._workload).get("volumeMounts", ()):
            if not mount["mountPath"].startswith("/etc/dtrain"):
                continue
            volume, target = volumes[mount["name"]], self._folder / mount["mountPath"].lstrip("/")
            picked = expanded(mount["subPathExpr"], self.environment) if "subPathExpr" in mount else ""
            if "configMap" in volume:
                data = find(self._given, "ConfigMap", volume["configMap"]["name"])["data"]
                files = {file: content.encode() for file, content in data.items()}
            elif "secret" in volume and self._secrets is not None:
                files = dict(self._secrets[volume["secret"]["secretName"]])
            else:
                files = {file: f"secret-of-{file}".encode() for file in (picked, *SECRET_FILES) if file}
            if picked:
                target.parent.mkdir(parents=True, exist_ok=True)
                # A file that is not there: the pod would wait in CreateContainerConfigError.
                target.write_bytes(files[picked])
            else:
                target.mkdir(parents=True, exist_ok=True)
                for file, content in files.items():
                    (target / file).write_bytes(content)


def expanded(text: str, known: Mapping[str, str]) -> str:
    """Expand ``$(NAME)`` as Kubernetes does: from what was said before it."""

    def value(match: re.Match[str]) -> str:
        assert match[1] in known, f"$({match[1]}) would not be expanded: it is not known yet"
        return known[match[1]]

    return re.sub(r"\$\(([A-Za-z_][A-Za-z0-9_]*)\)", value, text)


def fits(selector: Document, labels: Mapping[str, str]) -> bool:
    """Tell whether a label selector matches."""
    exact = all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())
    listed = all(
        rule["operator"] == "In" and labels.get(rule["key"]) in rule["values"]
        for rule in selector.get("matchExpressions", ())
    )
    return exact and listed


@functools.cache
def _namespace_labels(name: str) -> dict[str, str]:
    return {"kubernetes.io/metadata.name": name}


class Host:
    """An end of a connection: a pod by its labels and namespace, or an address outside the cluster."""

    def __init__(self, labels: Mapping[str, str] | None, namespace: str = "dtrain") -> None:
        self.labels, self.namespace = labels, namespace


def admitted(
    policies: Sequence[Document], source: Host, target: Host, port: int, protocol: str = "TCP"
) -> bool:
    """Tell whether network policies, all of the namespace ``dtrain``, let a connection through."""
    return _direction(policies, "Egress", source, target, port, protocol) and _direction(
        policies, "Ingress", target, source, port, protocol
    )


def _direction(
    policies: Sequence[Document], way: str, own: Host, other: Host, port: int, protocol: str
) -> bool:
    if own.labels is None or own.namespace != "dtrain":
        return True
    chosen = [
        policy["spec"]
        for policy in policies
        if fits(policy["spec"]["podSelector"], own.labels) and way in policy["spec"]["policyTypes"]
    ]
    side = "to" if way == "Egress" else "from"
    rules = [rule for spec in chosen for rule in spec.get(way.lower(), ())]
    return not chosen or any(
        _has_port(rule, port, protocol)
        and (not rule.get(side) or any(_is_peer(peer, other) for peer in rule[side]))
        for rule in rules
    )


def _has_port(rule: Document, port: int, protocol: str) -> bool:
    ports = rule.get("ports")
    return not ports or any(
        each["port"] == port and each.get("protocol", "TCP") == protocol for each in ports
    )


def _is_peer(peer: Document, host: Host) -> bool:
    if "ipBlock" in peer:
        return host.labels is None
    if host.labels is None:
        return False
    if "namespaceSelector" in peer:
        named = fits(peer["namespaceSelector"], _namespace_labels(host.namespace))
    else:
        named = host.namespace == "dtrain"
    return named and fits(peer.get("podSelector", {}), host.labels)


def secrets_of_the_readme(folder: Path, passwords: Mapping[str, str]) -> dict[str, dict[str, bytes]]:
    """Run the README's commands for Secrets, with a kubectl that prints what it would create."""
    folder.mkdir(parents=True, exist_ok=True)
    shim, out = folder / "kubectl", folder / "out"
    shim.write_text(f'#!/bin/sh\nexec >>{out}\n{tool("kubectl")} "$@" --dry-run=client -o yaml && echo ---\n')
    shim.chmod(0o755)
    (folder / "passwords").mkdir(exist_ok=True)
    for user, password in passwords.items():
        (folder / "passwords" / user).write_text(password)
    (folder / "deploy").symlink_to(ROOT / "deploy")
    section = (KUSTOMIZE / "README.md").read_text().partition("## Secrets")[2].partition("## Production")[0]
    blocks = [block for block in re.findall(r"```sh\n(.*?)```", section, re.S) if "setup-auth" not in block]
    assert len(blocks) == 3
    done = subprocess.run(
        ["bash", "-euc", "\n".join(blocks)],
        cwd=folder,
        env={"PATH": f"{folder}:{os.environ['PATH']}", "HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {
        each["metadata"]["name"]: {name: base64.b64decode(value) for name, value in each["data"].items()}
        for each in documents(out.read_text())
    }
