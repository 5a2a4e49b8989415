"""The JSON Schema of job files says what the reader of job files accepts."""

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from dtrain.cli import jobfile, jobschema
from dtrain.cli.jobfile import BadJobFile

ROOT = Path(__file__).parents[3]
FILES = [path for top in ("examples", "deploy") for path in ROOT.joinpath(top).rglob("job.yaml")]
SCHEMA = jsonschema.Draft202012Validator(jobschema.json_schema())

GOOD = (
    "nnodes: 2:8",
    "nnodes: 4",
    "nproc_per_node: auto",
    "args: --lr 0.1",
    "args: [--lr, '0.1']",
    "env: {THREADS: 1, DEBUG: true, NAME: x}",
    "preload: torch",
    "shutdown_grace: 1h30m",
    "shutdown_grace: 90",
    "priority: -1000",
    "checkpoint: {store: 's3://bucket/prefix', every_seconds: 10m, bandwidth_mb_s: 2.5}",
    "restarts: {max: 0, window: 1d}",
    "failure_rules: [{action: elsewhere, exit_codes: 3, signals: [SIGSEGV, 9], cordon: 2h, reasons: exit}]",
    "nonfinite: {action: rollback, metrics: [loss, grad_norm], back: 2}",
)
BAD = (
    "nnodes: 0",
    "nproc_per_node: 1025",
    "priority: 1001",
    "shutdown_grace: soon",
    "restart: {max: 1}",
    "restarts: {max: -1}",
    "restarts: {maximum: 1}",
    "module: other",
    "checkpoint: {keep_last: 0}",
    "checkpoint: {await_import: 1}",
    "failure_rules: [{action: explode}]",
    "failure_rules: [{cordon: 1h}]",
    "nonfinite: {action: ignore}",
)


def parsed(line: str) -> tuple[str, Any]:
    text = f"name: digits\nscript: train.py\n{line}\n"
    return text, yaml.safe_load(text)


def test_the_schema_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(jobschema.json_schema())


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_job_file_of_ours_fits(path: Path) -> None:
    SCHEMA.validate(yaml.safe_load(path.read_text()))


@pytest.mark.parametrize("line", GOOD)
def test_what_the_reader_accepts_fits(line: str) -> None:
    text, value = parsed(line)
    jobfile.parse(text, "job.yaml", Path("/jobs"), ())
    SCHEMA.validate(value)


@pytest.mark.parametrize("line", BAD)
def test_what_it_refuses_does_not(line: str) -> None:
    text, value = parsed(line)
    with pytest.raises(BadJobFile):
        jobfile.parse(text, "job.yaml", Path("/jobs"), ())
    assert not SCHEMA.is_valid(value)


def test_every_field_says_what_it_is() -> None:
    def fields(schema: Any) -> Any:
        yield from schema.get("properties", {}).items()
        for section in schema.get("$defs", {}).values():
            yield from fields(section)

    silent = [
        name
        for name, field in fields(jobschema.json_schema())
        if not field.get("description") and "$ref" not in field and "$ref" not in field.get("items", {})
    ]
    assert silent == []
