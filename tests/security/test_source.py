"""What no line of the product may do, examples and benchmarks included: read off the syntax trees."""

import ast
import functools
from dataclasses import dataclass
from pathlib import Path

import pytest

from dtrain.protocol.pb import agent_pb2, coordinator_pb2

ROOT = Path(__file__).parents[2]
FOLDERS = (
    "common",
    "storage",
    "coordinator",
    "agent",
    "trainer",
    "cli",
    "local",
    "testing",
    "integrations",
    "examples",
    "benchmarks",
    "tools",
)
SOURCES = [
    path
    for folder in FOLDERS
    for path in sorted((ROOT / folder).rglob("*.py"))
    if "/pb/" not in path.as_posix()
]

MODULES = {
    "pickle",
    "_pickle",
    "cPickle",
    "cloudpickle",
    "dill",
    "joblib",
    "jsonpickle",
    "marshal",
    "shelve",
    "multiprocessing",  # its queues and pipes are pickles
    "xmlrpc",
    "telnetlib",
    "ftplib",
}
CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "tempfile.mktemp",
    "yaml.load",
    "yaml.load_all",
    "yaml.unsafe_load",
    "yaml.full_load",
    "ssl._create_unverified_context",
    "ssl._create_default_https_context",
}
PICKLED_COLLECTIVES = {
    "all_gather_object",
    "broadcast_object_list",
    "gather_object",
    "scatter_object_list",
    "send_object_list",
    "recv_object_list",
}


@dataclass(frozen=True)
class Call:
    """One call in the source; ``called`` is the dotted name, as far as it has one."""

    called: str
    place: str
    keywords: dict[str, str]
    first: type[ast.AST] | None


@functools.cache
def calls() -> list[Call]:
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                keywords = {word.arg or "**": ast.unparse(word.value) for word in node.keywords}
                first = type(node.args[0]) if node.args else None
                place = f"{path.relative_to(ROOT)}:{node.lineno}"
                found.append(Call(dotted(node.func), place, keywords, first))
    return found


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def imported(text: str) -> set[str]:
    """Names of the top-level modules that a source imports."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found


def test_there_is_something_to_look_at() -> None:
    assert len(SOURCES) > 150
    assert {path.relative_to(ROOT).parts[0] for path in SOURCES} >= {"common", "agent", "trainer", "cli"}
    assert len(calls()) > 5000


@pytest.mark.parametrize(
    ("code", "caught"),
    [("import pickle", True), ("from multiprocessing import Queue", True), ("import json", False)],
)
def test_the_search_finds_what_it_looks_for(code: str, caught: bool) -> None:
    assert bool(imported(code) & MODULES) is caught


def test_nothing_that_reads_pickles_is_imported() -> None:
    for path in SOURCES:
        assert not imported(path.read_text()) & MODULES, path


def test_no_call_parses_code_or_goes_through_a_shell() -> None:
    for call in calls():
        assert call.called not in CALLS, f"{call.place}: {call.called}"
        assert "shell" not in call.keywords, f"{call.place}: a shell"
        if call.called.startswith("subprocess."):
            assert call.first not in (ast.Constant, ast.JoinedStr), (
                f"{call.place}: a command is a list of words"
            )


def test_whatever_loads_tensors_loads_weights_only() -> None:
    for call in calls():
        if call.called.endswith("torch.load"):
            assert call.keywords.get("weights_only") == "True", call.place
            # The last is an operator's command, about a file that the operator names.
            may = ("examples", "benchmarks", "storage/dtrain/storage/checkpoints/importing_torch.py:")
            assert call.place.startswith(may), f"{call.place}: use safetensors files"
        if call.called in ("np.load", "numpy.load"):
            assert call.keywords.get("allow_pickle", "False") == "False", call.place
        last = call.called.rpartition(".")[2]
        assert last not in PICKLED_COLLECTIVES, f"{call.place}: {last} unpickles what a peer sends"


def test_nobody_skips_the_verification_of_a_certificate() -> None:
    for call in calls():
        assert call.keywords.get("verify") != "False", call.place
    for path in SOURCES:
        text = path.read_text()
        for word in ("CERT_NONE", "check_hostname = False", "InsecureRequestWarning"):
            assert word not in text, f"{path}: {word}"


def test_every_call_of_a_service_has_a_deadline() -> None:
    names = {
        method.name
        for file in (agent_pb2, coordinator_pb2)
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    found = 0
    for call in calls():
        target, _, last = call.called.removesuffix(".future").rpartition(".")
        if target and last in names:
            found += 1
            assert "timeout" in call.keywords, f"{call.place} waits for ever"
    assert found >= 7


def test_channels_ports_and_servers_are_made_in_one_place() -> None:
    made = {"insecure_channel", "secure_channel", "add_insecure_port", "add_secure_port"}
    for call in calls():
        if call.called.rpartition(".")[2] in made:
            assert call.place.startswith("common/dtrain/runtime/grpc_tls.py"), f"{call.place} goes around TLS"
        if call.called == "grpc.server":
            assert "Gate(" in call.keywords.get("interceptors", ""), f"{call.place} asks nobody who may call"
