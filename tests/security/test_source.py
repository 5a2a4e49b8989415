"""What no line of the product may do, examples and benchmarks included: read off the syntax trees."""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

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


@functools.cache
def everything() -> list[tuple[Path, ast.AST]]:
    return [(path, node) for path in SOURCES for node in ast.walk(ast.parse(path.read_text()))]


def nodes(kind: type[ast.AST]) -> Iterator[tuple[Path, ast.AST]]:
    return ((path, node) for path, node in everything() if isinstance(node, kind))


def calls() -> Iterator[tuple[str, Path, ast.Call]]:
    for path, node in nodes(ast.Call):
        assert isinstance(node, ast.Call)
        yield ast.unparse(node.func), path, node


def keyword(call: ast.Call, name: str) -> str:
    return next((ast.unparse(found.value) for found in call.keywords if found.arg == name), "")


def test_there_is_something_to_look_at() -> None:
    assert len(SOURCES) > 150
    assert {path.relative_to(ROOT).parts[0] for path in SOURCES} >= {"common", "agent", "trainer", "cli"}


def test_nothing_that_reads_pickles_is_imported() -> None:
    for path, node in nodes(ast.Import):
        assert isinstance(node, ast.Import)
        for alias in node.names:
            assert alias.name.split(".")[0] not in MODULES, f"{path}:{node.lineno}"
    for path, found in nodes(ast.ImportFrom):
        assert isinstance(found, ast.ImportFrom)
        top = (found.module or "").split(".")[0]
        assert top not in MODULES, f"{path}:{found.lineno}"


def test_no_call_parses_code_or_goes_through_a_shell() -> None:
    for called, path, call in calls():
        assert called not in CALLS, f"{path}:{call.lineno}: {called}"
        assert not keyword(call, "shell"), f"{path}:{call.lineno}: a shell"
        if called.startswith("subprocess.") and call.args:
            command = call.args[0]
            assert not isinstance(command, ast.Constant | ast.JoinedStr), (
                f"{path}:{call.lineno}: a command is a list of words"
            )


def test_whatever_loads_tensors_loads_weights_only() -> None:
    for called, path, call in calls():
        if called.endswith("torch.load"):
            assert keyword(call, "weights_only") == "True", f"{path}:{call.lineno}"
        if called in ("np.load", "numpy.load"):
            assert keyword(call, "allow_pickle") in ("", "False"), f"{path}:{call.lineno}"
        last = called.rpartition(".")[2]
        assert last not in PICKLED_COLLECTIVES, f"{path}:{call.lineno}: {last} unpickles what a peer sends"
    product = [path for path in SOURCES if path.relative_to(ROOT).parts[0] not in ("examples", "benchmarks")]
    for path in product:
        assert "torch.load(" not in path.read_text(), f"{path}: checkpoints are safetensors files"


def test_nobody_skips_the_verification_of_a_certificate() -> None:
    for called, path, call in calls():
        assert keyword(call, "verify") != "False", f"{path}:{call.lineno}: {called}"
    for path in SOURCES:
        text = path.read_text()
        for word in ("CERT_NONE", "check_hostname = False", "InsecureRequestWarning"):
            assert word not in text, f"{path}: {word}"


@pytest.mark.parametrize(
    ("code", "caught"),
    [("import pickle", True), ("from multiprocessing import Queue", True), ("import json", False)],
)
def test_the_search_finds_what_it_looks_for(code: str, caught: bool) -> None:
    tops = {
        alias.name.split(".")[0]
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Import)
        for alias in node.names
    } | {
        (node.module or "").split(".")[0]
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.ImportFrom)
    }
    assert bool(tops & MODULES) is caught
