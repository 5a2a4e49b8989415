"""What a single value of a job file may be: how it is checked, and how the JSON Schema describes it.

The schema is of what people write, which is wider than what comes out: ``90s`` and ``90`` are both 90.0 s.
"""

import re
import shlex
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

from dtrain.cli.durations import parse_s
from dtrain.protocol import labels, patterns
from dtrain.protocol.errors import Refused
from dtrain.protocol.ids import parse_name
from dtrain.protocol.job import RULE_REASONS, NonFiniteAction, RuleAction

Json = dict[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class Form:
    """One type of value: ``check`` raises ValueError with a sentence, ``schema`` is its JSON Schema.

    Compared by identity: a union of annotations hashes what is in it.
    """

    check: Callable[[Any], Any]
    schema: Json

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> Json:
        return dict(self.schema)


_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_RANGE = re.compile(r"(\d+)\s*:\s*(\d+)")

NPROC_WORDS = ("auto", "cpu", "gpu")
RULES_MAX = 32


INTEGER_MAX = 1_000_000_000
EXIT_CODE_MAX = 255
NPROC_MAX = 1024
DURATION = r"^\s*(\d+(\.\d+)?(ms|s|m|h|d)?)+\s*$"
METRIC_NAME_CHARS_MAX = 64
"""Of reported numbers: agents cut longer names."""

PRIORITY_MAX = 1000
BANDWIDTH_MB_S_MIN, BANDWIDTH_MB_S_MAX = 0.1, 1_000_000.0


def integer(low: int, high: int = INTEGER_MAX) -> Form:
    """Return the form of a whole number from ``low`` to ``high``."""

    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{_show(value)} is not a whole number")
        if not low <= value <= high:
            raise ValueError(f"{value} is out of range: {low} to {high}")
        return value

    most = {"maximum": high} if high < INTEGER_MAX else {}
    return Form(check, {"type": "integer", "minimum": low, **most})


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{_show(value)} is not text; put it in quotes if it is meant so")
    if "\0" in value:
        raise ValueError("contains a NUL character")
    return value


def _filled(value: Any) -> str:
    if not _text(value).strip():
        raise ValueError("is empty")
    return _text(value)


def _name(value: Any) -> str:
    try:
        return parse_name(_text(value), "job")
    except Refused as error:
        raise ValueError(f"{error.message}: {error.fix}") from error


def _nodes(value: Any) -> tuple[int, int]:
    if isinstance(value, int) and not isinstance(value, bool):
        low = high = value
    elif isinstance(value, str) and (match := _RANGE.fullmatch(value.strip())):
        low, high = int(match[1]), int(match[2])
    elif isinstance(value, str) and value.strip().isdecimal():
        low = high = int(value)
    else:
        raise ValueError(f"{_show(value)} is neither a number of machines nor a range such as 2:4")
    if low < 1:
        raise ValueError("at least one machine is needed")
    if high < low:
        raise ValueError(f"{low}:{high} is empty: write the smaller number first")
    return low, high


def _nproc(value: Any) -> int:
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value)
    if value == "auto":
        return 0
    if value in NPROC_WORDS:
        raise ValueError(
            f"{value!r} cannot be resolved here: which machines the job gets is not known at submission; "
            "write auto for as many as a machine has slots, or a number"
        )
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{_show(value)} is not a number of processes")
    if not 1 <= value <= NPROC_MAX:
        raise ValueError(f"{value} is out of range: 1 to {NPROC_MAX}")
    return value


def _words(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        try:
            return tuple(shlex.split(value))
        except ValueError as error:
            raise ValueError(f"cannot be split into words: {error}") from error
    if isinstance(value, list):
        return tuple(_text(item) for item in value)
    raise ValueError(f"{_show(value)} is neither a list nor one line of words")


def _command(value: Any) -> tuple[str, ...]:
    words = _words(value)
    if not words or not words[0]:
        raise ValueError("is empty")
    return words


def _env(value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise ValueError(f"{_show(value)} is not a list of NAME: value")
    for name, item in value.items():
        if not _ENV_NAME.fullmatch(name):
            raise ValueError(f"{name!r} cannot name an environment variable")
        if not isinstance(item, str):
            raise ValueError(f'{name} is {_show(item)}, not text; for an empty value write ""')
        if "\0" in item:
            raise ValueError(f"{name} contains a NUL character")
    return value


def _labels(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise ValueError(f"{_show(value)} is not a list of NAME: value")
    if why := labels.problem(value):
        raise ValueError(why)
    return value


def _modules(value: Any) -> tuple[str, ...]:
    names = tuple(value.replace(",", " ").split()) if isinstance(value, str) else _words(value)
    for name in names:
        if not _MODULE.fullmatch(name):
            raise ValueError(f"{name!r} is not the name of a Python module")
    return names


def _module(value: Any) -> str:
    if not _MODULE.fullmatch(_text(value)):
        raise ValueError(f"{value!r} is not the name of a Python module, such as mypackage.train")
    return _text(value)


def _store(value: Any) -> str:
    text = _text(value)
    if not text:
        return text
    if text.startswith("memory:"):
        raise ValueError("memory:// lives in one process only; use s3://bucket/prefix or a shared folder")
    if not re.match(r"(s3://[^/]|file:///|/)", text):
        raise ValueError(f"{text!r} is not a store: write s3://bucket/prefix, file:///folder or /folder")
    if "@" in text.split("://", 1)[-1].split("/", 1)[0]:
        raise ValueError("credentials do not belong in a store's URI, which is stored and shown")
    return text


def duration(*, above_zero: bool = False) -> Form:
    """Return the form of a duration; seconds come out."""

    def check(value: Any) -> float:
        seconds = parse_s(value)
        if above_zero and seconds == 0:
            raise ValueError("must be longer than 0")
        return seconds

    return Form(check, {"type": ["number", "string"], "examples": ["90s", "1h30m", 90], "pattern": DURATION})


def _megabytes(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{_show(value)} is not a number of megabytes a second")
    if value and not BANDWIDTH_MB_S_MIN <= value <= BANDWIDTH_MB_S_MAX:
        raise ValueError(
            f"{value} is out of range: {BANDWIDTH_MB_S_MIN} to {BANDWIDTH_MB_S_MAX}, or 0 for no cap"
        )
    return float(value)


def _yes_or_no(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{_show(value)} is neither true nor false")
    return value


def rules(value: Any) -> Any:
    """Refuse what is no list of rules, or too long a one."""
    if not isinstance(value, list):
        raise ValueError(f"{_show(value)} is not a list of rules, each beginning with '-'")
    if len(value) > RULES_MAX:
        raise ValueError(f"has {len(value)} rules; at most {RULES_MAX} are looked at")
    return value


def _action(value: Any) -> RuleAction:
    try:
        return RuleAction(value)
    except ValueError:
        raise ValueError(f"{_show(value)} is no action: write one of {', '.join(RuleAction)}") from None


def _reasons(value: Any) -> tuple[str, ...]:
    names = _listed(value)
    for name in names:
        if name not in RULE_REASONS:
            raise ValueError(f"{_show(name)} is no reason: write some of {', '.join(RULE_REASONS)}")
    return names


def _signals(value: Any) -> tuple[int, ...]:
    found = []
    for item in _listed(value):
        name = str(item).upper()
        try:
            number = (
                signal.Signals(item)
                if isinstance(item, int)
                else signal.Signals[f"SIG{name.removeprefix('SIG')}"]
            )
        except (ValueError, KeyError):
            raise ValueError(f"{_show(item)} is no signal: write SIGSEGV or 11") from None
        found.append(int(number))
    return tuple(found)


def _exit_codes(value: Any) -> tuple[int, ...]:
    for item in _listed(value):
        if isinstance(item, bool) or not isinstance(item, int) or not 1 <= item <= EXIT_CODE_MAX:
            raise ValueError(f"{_show(item)} is not a number from 1 to {EXIT_CODE_MAX}")
    return _listed(value)


def _listed(value: Any) -> tuple[Any, ...]:
    """A list, or the only thing in it."""
    if isinstance(value, list):
        return tuple(value)
    if value is None or isinstance(value, dict):
        raise ValueError(f"{_show(value)} is not a list")
    return (value,)


def _pattern(value: Any) -> str:
    why = patterns.problem(_text(value))
    if why:
        raise ValueError(f"{value!r} {why}")
    return _text(value)


def _nonfinite_action(value: Any) -> str:
    allowed = [action.value for action in NonFiniteAction]
    if value not in allowed:
        raise ValueError(f"{_show(value)} is none of {', '.join(allowed)}")
    return str(value)


def _metrics(value: Any) -> tuple[str, ...]:
    names = _words(value)
    for name in names:
        if not name or len(name) > METRIC_NAME_CHARS_MAX:
            raise ValueError(
                f"{name!r} is not the name of a number of at most {METRIC_NAME_CHARS_MAX} characters"
            )
    return names


def _show(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    return repr(value)


_TEXT: Json = {"type": "string", "minLength": 1}
_WORDS: Json = {"type": ["string", "array"], "items": {"type": "string"}}
_SOME_NUMBERS: Json = {"type": ["integer", "array"], "items": {"type": "integer"}}

NAME = Form(
    _name, {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$", "examples": ["digits"]}
)
NODES = Form(_nodes, {"type": ["integer", "string"], "minimum": 1, "examples": [4, "2:8"]})
NPROC = Form(
    _nproc, {"type": ["integer", "string"], "minimum": 1, "maximum": NPROC_MAX, "examples": [8, "auto"]}
)
FILLED = Form(_filled, _TEXT)
MODULE = Form(_module, {**_TEXT, "examples": ["mypackage.train"]})
MODULES = Form(_modules, {**_WORDS, "examples": [["sklearn.datasets"]]})
COMMAND = Form(_command, _WORDS)
WORDS = Form(_words, {**_WORDS, "examples": ["--steps 2000", ["--steps", "2000"]]})
ENV = Form(_env, {"type": "object", "additionalProperties": {"type": ["string", "number", "boolean"]}})
LABELS = Form(_labels, {"type": "object", "additionalProperties": {"type": ["string", "number", "boolean"]}})
STORE = Form(_store, {"type": "string", "examples": ["s3://bucket/prefix", "file:///shared/checkpoints"]})
MEGABYTES = Form(_megabytes, {"type": "number", "minimum": 0, "maximum": BANDWIDTH_MB_S_MAX})
YES_OR_NO = Form(_yes_or_no, {"type": "boolean"})
PATTERN = Form(_pattern, {"type": "string", "examples": ["CUDA error"]})
METRICS = Form(_metrics, {**_WORDS, "examples": [["loss", "grad_norm"]]})
ACTION = Form(_action, {"enum": [action.value for action in RuleAction]})
REASONS = Form(_reasons, {"type": ["string", "array"], "items": {"enum": list(RULE_REASONS)}})
EXIT_CODES = Form(_exit_codes, {**_SOME_NUMBERS, "examples": [[134, 139]]})
SIGNALS = Form(
    _signals,
    {
        "type": ["integer", "string", "array"],
        "items": {"type": ["integer", "string"]},
        "examples": [["SIGSEGV", 9]],
    },
)
NONFINITE_ACTION = Form(_nonfinite_action, {"enum": [action.value for action in NonFiniteAction]})
