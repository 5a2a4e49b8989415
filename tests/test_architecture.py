"""The house is still the house: imports, banned calls, documents that match the code."""

import ast
import dataclasses
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from dtrain.protocol import checkpoint, cluster, commands, events, job, snapshot
from dtrain.protocol.errors import ErrorCode

ROOT = Path(__file__).parent.parent
FOLDERS = ("common", "storage", "coordinator", "agent", "trainer", "cli", "local", "testing", "integrations")
SOURCES = [
    path
    for folder in FOLDERS
    for path in sorted((ROOT / folder).rglob("*.py"))
    if "/pb/" not in path.as_posix()
]

BANNED = {
    "pickle": "records are JSON, blobs are safetensors files",
    "marshal": "records are JSON",
    "shelve": "records are JSON",
    "asyncio": "one forgotten blocking call on an event loop loses a lease: use a thread",
    "etcd3": "etcd is reached through dtrain.storage.etcd",
}
BANNED_CALLS = {
    "eval": "parse it",
    "exec": "parse it",
    "os.system": "use subprocess with an argument list",
    "os.popen": "use subprocess with an argument list",
    "yaml.load": "use dtrain.cli.jobfile",
    "torch.load": "checkpoints are safetensors files",
    "client.lock": "etcd3gw's lock runs its body without holding it",
}
# A process of its own, which holds no lease.
MAY_IMPORT = {"asyncio": "coordinator/dtrain/coordinator/web/"}
# An operator's command reads the file that the operator names; tests/security holds it to weights_only.
MAY_CALL = {"torch.load": {"storage/dtrain/storage/checkpoints/importing_torch.py"}}


def run_python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60, cwd="/"
    ).stdout


def test_import_contracts_hold():
    command = [Path(sys.executable).parent / "lint-imports"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=110, check=False)
    assert result.returncode == 0, result.stdout


def test_there_is_no_dtrain_init_file():
    assert not list(ROOT.glob("*/dtrain/__init__.py")), "it would hide the other portions of the namespace"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_banned_import_or_call(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            for name in names:
                top = name.split(".")[0]
                may = top in MAY_IMPORT and path.relative_to(ROOT).as_posix().startswith(MAY_IMPORT[top])
                assert may or top not in BANNED, f"{path}:{node.lineno}: {top}: {BANNED[top]}"
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            may = path.relative_to(ROOT).as_posix() in MAY_CALL.get(called, ())
            assert may or called not in BANNED_CALLS, (
                f"{path}:{node.lineno}: {called}: {BANNED_CALLS[called]}"
            )
            shell = [k for k in node.keywords if k.arg == "shell"]
            assert not shell, f"{path}:{node.lineno}: processes are started without a shell"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_package_says_what_lives_in_it(path):
    if path.name == "__init__.py" and "pb" not in path.parts:
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), f"{path} opens with no paragraph on what belongs there"


@pytest.mark.parametrize(
    ("statement", "forbidden"),
    [
        (
            "from dtrain import trainer",
            {
                "torch",
                "grpc",
                "google",
                "boto3",
                "etcd3gw",
                "pydantic",
                "click",
                "yaml",
                "structlog",
                "crc32c",
            },
        ),
        ("import dtrain.coordinator.main", {"torch", "boto3", "click", "pydantic"}),
        ("import dtrain.agent.main", {"torch", "boto3", "click", "pydantic"}),
        ("import dtrain.cli.main", {"torch", "grpc", "rich", "pydantic", "etcd3gw", "boto3", "yaml"}),
        ("import dtrain.storage.etcd.guardian", {"etcd3gw", "requests", "grpc", "structlog", "psutil"}),
        ("import dtrain.protocol.job, dtrain.protocol.commands", {"google", "grpc"}),
    ],
)
def test_start_up_loads_only_what_it_needs(statement, forbidden):
    loaded = set(run_python(f"import sys; {statement}; print(*sys.modules)").split())
    assert not {name.split(".")[0] for name in loaded} & forbidden


def test_the_guardian_loads_the_standard_library_only():
    code = (
        "import sys; before = set(sys.modules); import dtrain.storage.etcd.guarded;"
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    assert set(run_python(code).split()) - set(sys.stdlib_module_names) == {"dtrain"}


def test_no_path_of_a_developers_machine_is_in_the_tree():
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    for name in listed.split():
        path = ROOT / name
        if path.suffix in {".py", ".md", ".toml", ".sh", ".yaml", ".proto"} and path != Path(__file__):
            text = path.read_text()
            found = re.search(r"(?<![\w/}])/(root|home|work)/", text)
            assert not found, f"{name} names {found}"


def test_the_documented_records_match_the_code():
    subprocess.run([sys.executable, "tools/gen_protocol_doc.py", "--check"], check=True, cwd=ROOT, timeout=30)


def test_the_reference_of_job_file_and_settings_matches_the_code():
    subprocess.run([sys.executable, "tools/gen_reference.py", "--check"], check=True, cwd=ROOT, timeout=60)


def test_the_reference_of_the_command_line_matches_the_commands():
    subprocess.run([sys.executable, "tools/gen_cli_doc.py", "--check"], check=True, cwd=ROOT, timeout=60)


def test_every_stored_record_is_documented():
    text = (ROOT / "docs" / "protocol.md").read_text()
    for module in (cluster, snapshot, job, checkpoint, events):
        for name, kind in vars(module).items():
            if dataclasses.is_dataclass(kind) and kind.__module__ == module.__name__:
                assert f"### `{name}`" in text, f"{name} is not in docs/protocol.md"


def test_every_command_is_documented():
    text = (ROOT / "docs" / "protocol.md").read_text()
    for kind in typing.get_args(commands.Command):
        assert f"`{kind.__name__}`" in text


def test_every_error_code_has_a_section_in_troubleshooting():
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    for code in ErrorCode:
        assert f"### {code.value} " in text, f"{code.name} ({code.value}) is not explained"


def test_every_fault_has_a_row_and_every_test_named_there_exists():
    text = (ROOT / "docs" / "faults.md").read_text()
    rows = {int(number) for number in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)}
    assert rows == set(range(1, 55)), f"missing or unknown rows: {rows ^ set(range(1, 55))}"
    for row in re.findall(r"^\| \d+ \|.*$", text, re.MULTILINE):
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row)
        assert named, f"no test shows this: {row}"
        for file, test in named:
            path = ROOT / file
            assert path.exists(), f"docs/faults.md names {file}"
            assert f"def {test}(" in path.read_text(), f"docs/faults.md names {file}::{test}"


def test_every_invariant_of_checkpoints_has_a_row_and_every_test_named_there_exists():
    text = (ROOT / "docs" / "checkpoint-invariants.md").read_text()
    rows = re.findall(r"^\| (\d+) \|.*$", text, re.MULTILINE)
    assert [int(number) for number in rows] == list(range(1, 18))
    for row in re.findall(r"^\| \d+ \|.*$", text, re.MULTILINE):
        named = re.findall(r"`(tests/[\w/]+\.(?:py|txt))(?:::(\w+))?`", row)
        assert named, f"no test shows this: {row}"
        for file, test in named:
            path = ROOT / file
            assert path.exists(), f"docs/checkpoint-invariants.md names {file}"
            assert not test or f"def {test}(" in path.read_text(), f"it names {file}::{test}"


def test_every_event_reason_is_documented():
    text = (ROOT / "docs" / "protocol.md").read_text()
    for reason in events.EventReason:
        assert f"`{reason.value}`" in text
