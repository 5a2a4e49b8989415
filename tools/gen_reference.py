"""Write docs/job-file.md and docs/configuration.md from the code that reads them; --check proves it fresh."""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dtrain.agent import config as agent
from dtrain.cli import jobschema
from dtrain.cli.durations import show_s
from dtrain.coordinator import config as coordinator
from dtrain.runtime.config import Setting

DOCS = Path(__file__).parent.parent / "docs"

JOB_FILE = """# Job file

YAML. Every mistake is listed with line and column, all at once, before anything is submitted; an unknown or
repeated key is one. Exactly one of `script`, `module` and `command` names the program. `dtrain submit --set
checkpoint.every_steps=50` changes a field for one submission, `--dry-run` shows what would be submitted,
and what differs from the job of that name.

`dtrain submit --schema > dtrain-job.json` is the same as JSON Schema, for editors: `# yaml-language-server:
$schema=dtrain-job.json` as the file's first line.

Durations are seconds or `500ms`, `90s`, `10m`, `1h30m`, `2d`. Lists of words may be one line: `args: --lr
0.1`.
"""

CONFIGURATION = """# Configuration

Daemons are configured by flags, or by environment variables of the same name. A flag wins over the
variable, the variable over the default; an unknown `DTRAIN_*` variable is refused, with the name that was
probably meant. Secrets have no flag: they come from files or the environment.

Where the command line finds a cluster: `--coordinators` or `--endpoints`, then `DTRAIN_COORDINATORS` or
`DTRAIN_ENDPOINTS`, then the cluster of the last `dtrain up`. What a job may say is in the [job
file](job-file.md).
"""


def main(argv: Sequence[str]) -> int:
    """Write both pages, or with ``--check`` compare them; return the exit code."""
    pages = {
        DOCS / "job-file.md": JOB_FILE + "\n" + "\n\n".join(_job_file()) + "\n",
        DOCS / "configuration.md": CONFIGURATION + "\n" + "\n\n".join(_configuration()) + "\n",
    }
    stale = [path for path, text in pages.items() if not path.exists() or path.read_text() != text]
    if "--check" in argv:
        for path in stale:
            print(f"{path} is stale: run 'python tools/gen_reference.py'", file=sys.stderr)
        return 1 if stale else 0
    for path, text in pages.items():
        path.write_text(text)
    return 0


def _job_file() -> Iterator[str]:
    schema = jobschema.json_schema()
    yield _fields(schema["properties"])
    for name, field in schema["properties"].items():
        reference = field.get("$ref") or field.get("items", {}).get("$ref")
        if reference:
            section = schema["$defs"][reference.rpartition("/")[2]]
            table = _fields(section["properties"], schema)
            yield f"## {name}\n\n{_linked(section['description'])}\n\n{table}"


def _fields(fields: dict[str, Any], schema: dict[str, Any] | None = None) -> str:
    rows = ["| field | what may stand there | default | |", "|---|---|---|---|"]
    for name, field in fields.items():
        if "$ref" in field or "$ref" in field.get("items", {}):
            rows.append(f"| `{name}` | [below](#{name}) | | |")
            continue
        shape = next((one for one in field.get("anyOf", ()) if one.get("type") != "null"), field)
        if "$ref" in shape:
            assert schema is not None
            shape = schema["$defs"][shape["$ref"].rpartition("/")[2]]
        default = _default(field, shape)
        rows.append(f"| `{name}` | {_shape(shape)} | {default} | {_linked(field.get('description', ''))} |")
    return "\n".join(rows)


def _shape(shape: dict[str, Any]) -> str:
    if "enum" in shape:
        return ", ".join(f"`{one}`" for one in shape["enum"])
    if "enum" in shape.get("items", {}):
        return "some of " + ", ".join(f"`{one}`" for one in shape["items"]["enum"])
    if "90s" in shape.get("examples", ()):
        return "a duration"
    words = {
        "integer": "a whole number",
        "number": "a number",
        "boolean": "`true`, `false`",
        "object": "`NAME: value`",
        "array": "a list",
        "string": "text",
    }
    kinds = [shape["type"]] if isinstance(shape["type"], str) else shape["type"]
    text = " or ".join(words[kind] for kind in kinds)
    if "minimum" in shape and kinds == ["integer"]:
        text += (
            f", {shape['minimum']} to {shape['maximum']}"
            if "maximum" in shape
            else f", {shape['minimum']} or more"
        )
    shown = ", ".join(
        f"`{one if isinstance(one, str) else json.dumps(one)}`" for one in shape.get("examples", ())
    )
    return f"{text}: {shown}" if shown else text


def _default(field: dict[str, Any], shape: dict[str, Any]) -> str:
    value = field.get("default")
    if value is None or value in ("", []):
        return ""
    if "90s" in shape.get("examples", ()):
        return f"`{show_s(value) if value else 0}`"
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _linked(text: str) -> str:
    """Turn ``See docs/x.md`` into a link of a page that lies beside x.md."""
    head, found, name = text.partition("See docs/")
    if not found:
        return text.strip()
    name = name.rstrip(".")
    return f"{head}See [{name.removesuffix('.md')}]({name})"


def _configuration() -> Iterator[str]:
    for title, settings in (("Coordinator", coordinator.SETTINGS), ("Agent", agent.SETTINGS)):
        yield f"## {title}\n\n{_settings(settings)}"


def _settings(settings: Sequence[Setting]) -> str:
    rows = ["| flag | variable | default | |", "|---|---|---|---|"]
    for setting in settings:
        flag = f"`--{setting.name}`" if setting.flag else "–"
        variable = f"`{setting.env}`" + (f", `{setting.fallback_env}`" if setting.fallback_env else "")
        default = "" if setting.default in (None, "", ()) else f"`{_plain(setting.default)}`"
        rows.append(f"| {flag} | {variable} | {default} | {setting.help.replace('|', chr(92) + '|')} |")
    return "\n".join(rows)


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
