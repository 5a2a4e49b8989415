"""What a job file may say: the schema at the edge, translated to ``JobSpec`` once.

Field names and defaults are those of the protocol; pydantic collects every
error, ``jobfile.py`` gives each its place.
"""

import re
import shlex
import signal
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from dtrain.cli.durations import parse_s
from dtrain.protocol import patterns
from dtrain.protocol.errors import Refused
from dtrain.protocol.ids import JobName, Uid, parse_name
from dtrain.protocol.job import (
    RULE_REASONS,
    CheckpointPolicy,
    Entry,
    EntryKind,
    FailureRule,
    HangPolicy,
    JobSpec,
    NonFiniteAction,
    NonFinitePolicy,
    RestartPolicy,
    RuleAction,
)

_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_RANGE = re.compile(r"(\d+)\s*:\s*(\d+)")

NPROC_WORDS = ("auto", "cpu", "gpu")
_HANG = HangPolicy()
_RULE = FailureRule(RuleAction.RESTART)
RULES_MAX = 32
_CHECKPOINT, _RESTARTS, _NONFINITE = CheckpointPolicy(), RestartPolicy(), NonFinitePolicy()
_JOB_GROW_COOLDOWN_S = 60.0


METRIC_NAME_CHARS_MAX = 64
"""Of reported numbers: agents cut longer names."""

PRIORITY_MAX = 1000
BANDWIDTH_MB_S_MIN, BANDWIDTH_MB_S_MAX = 0.1, 1_000_000.0


def _integer(low: int, high: int = 1_000_000_000) -> BeforeValidator:
    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{_show(value)} is not a whole number")
        if not low <= value <= high:
            raise ValueError(f"{value} is out of range: {low} to {high}")
        return value

    return BeforeValidator(check)


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
    if not 1 <= value <= 1024:
        raise ValueError(f"{value} is out of range: 1 to 1024")
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


def _seconds(*, above_zero: bool = False) -> BeforeValidator:
    def check(value: Any) -> float:
        seconds = parse_s(value)
        if above_zero and seconds == 0:
            raise ValueError("must be longer than 0")
        return seconds

    return BeforeValidator(check)


def _megabytes() -> BeforeValidator:
    def check(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{_show(value)} is not a number of megabytes a second")
        if value and not BANDWIDTH_MB_S_MIN <= value <= BANDWIDTH_MB_S_MAX:
            raise ValueError(
                f"{value} is out of range: {BANDWIDTH_MB_S_MIN} to {BANDWIDTH_MB_S_MAX}, or 0 for no cap"
            )
        return float(value)

    return BeforeValidator(check)


def _yes_or_no(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{_show(value)} is neither true nor false")
    return value


def _rules(value: Any) -> Any:
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


def _numbers(low: int, high: int) -> BeforeValidator:
    def check(value: Any) -> tuple[int, ...]:
        for item in _listed(value):
            if isinstance(item, bool) or not isinstance(item, int) or not low <= item <= high:
                raise ValueError(f"{_show(item)} is not a number from {low} to {high}")
        return _listed(value)

    return BeforeValidator(check)


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


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CheckpointSection(_Strict):
    """``checkpoint:``, when and where checkpoints are taken."""

    store: Annotated[str, BeforeValidator(_store)] = _CHECKPOINT.store
    every_steps: Annotated[int, _integer(0)] = _CHECKPOINT.every_steps
    every_seconds: Annotated[float, _seconds()] = _CHECKPOINT.every_seconds
    keep_last: Annotated[int, _integer(1)] = _CHECKPOINT.keep_last
    keep_every_steps: Annotated[int, _integer(0)] = _CHECKPOINT.keep_every_steps
    timeout: Annotated[float, _seconds(above_zero=True)] = _CHECKPOINT.timeout_s
    bandwidth_mb_s: Annotated[float, _megabytes()] = _CHECKPOINT.bandwidth_mb_s
    await_import: Annotated[bool, BeforeValidator(_yes_or_no)] = _CHECKPOINT.await_import


class RestartsSection(_Strict):
    """``restarts:``, at most ``max`` in ``window``."""

    max: Annotated[int, _integer(0)] = _RESTARTS.max_restarts
    window: Annotated[float, _seconds(above_zero=True)] = _RESTARTS.window_s


class HangSection(_Strict):
    """``hang:``, when ranks that complete no step are taken for hung; ``timeout`` 0: after their own pace."""

    enabled: Annotated[bool, BeforeValidator(_yes_or_no)] = _HANG.enabled
    timeout: Annotated[float, _seconds()] = _HANG.timeout_s
    startup: Annotated[float, _seconds(above_zero=True)] = _HANG.startup_s


class RuleSection(_Strict):
    """One of ``failure_rules:``; all it names must be true of a failure."""

    action: Annotated[RuleAction, BeforeValidator(_action)]
    reasons: Annotated[tuple[str, ...], BeforeValidator(_reasons)] = _RULE.reasons
    exit_codes: Annotated[tuple[int, ...], _numbers(1, 255)] = _RULE.exit_codes
    signals: Annotated[tuple[int, ...], BeforeValidator(_signals)] = _RULE.signals
    message: Annotated[str, BeforeValidator(_pattern)] = _RULE.message
    cordon: Annotated[float, _seconds()] = _RULE.cordon_s
    back: Annotated[int, _integer(1, 1000)] = _RULE.back


class NonFiniteSection(_Strict):
    """``nonfinite:``, what follows from a reported number that is NaN or infinite."""

    action: Annotated[str, BeforeValidator(_nonfinite_action)] = _NONFINITE.action.value
    metrics: Annotated[tuple[str, ...], BeforeValidator(_metrics)] = _NONFINITE.metrics
    back: Annotated[int, _integer(1, 1000)] = _NONFINITE.back


class JobModel(_Strict):
    """A whole job file."""

    name: Annotated[str, BeforeValidator(_name)]
    nnodes: Annotated[tuple[int, int], BeforeValidator(_nodes)] = (1, 1)
    nproc_per_node: Annotated[int, BeforeValidator(_nproc)] = 1
    grow_cooldown: Annotated[float, _seconds()] = _JOB_GROW_COOLDOWN_S
    spares: Annotated[int, _integer(0)] = 0
    script: Annotated[str, BeforeValidator(_filled)] | None = None
    module: Annotated[str, BeforeValidator(_module)] | None = None
    command: Annotated[tuple[str, ...], BeforeValidator(_command)] | None = None
    args: Annotated[tuple[str, ...], BeforeValidator(_words)] = ()
    env: Annotated[dict[str, str], BeforeValidator(_env)] = Field(default_factory=dict)
    working_dir: Annotated[str, BeforeValidator(_filled)] = "."
    preload: Annotated[tuple[str, ...], BeforeValidator(_modules)] = ()
    checkpoint: CheckpointSection = CheckpointSection()
    restarts: RestartsSection = RestartsSection()
    hang: HangSection = HangSection()
    failure_rules: Annotated[tuple[RuleSection, ...], BeforeValidator(_rules)] = ()
    nonfinite: NonFiniteSection = NonFiniteSection()
    shutdown_grace: Annotated[float, _seconds()] = 30.0
    isolation_grace: Annotated[float, _seconds()] = 0.0
    reschedule_grace: Annotated[float, _seconds()] = 0.0
    priority: Annotated[int, _integer(-PRIORITY_MAX, PRIORITY_MAX)] = 0


PROGRAMS = ("script", "module", "command")
"""Exactly one of these names the program."""


def entry(model: JobModel) -> Entry:
    """Return the program that the job file names."""
    if model.script is not None:
        return Entry(EntryKind.SCRIPT, model.script, model.args)
    if model.module is not None:
        return Entry(EntryKind.MODULE, model.module, model.args)
    assert model.command is not None
    return Entry(EntryKind.COMMAND, model.command[0], model.command[1:] + model.args)


def to_spec(model: JobModel, folder: Path) -> JobSpec:
    """Translate to the record; ``folder`` is what a relative ``working_dir`` starts from."""
    return JobSpec(
        name=JobName(model.name),
        uid=Uid(""),
        entry=entry(model),
        nnodes_min=model.nnodes[0],
        nnodes_max=model.nnodes[1],
        nproc_per_node=model.nproc_per_node,
        grow_cooldown_s=model.grow_cooldown,
        spares=model.spares,
        working_dir=str((folder / Path(model.working_dir).expanduser()).resolve()),
        env=model.env,
        preload=model.preload,
        checkpoint=CheckpointPolicy(
            store=model.checkpoint.store,
            every_steps=model.checkpoint.every_steps,
            every_seconds=model.checkpoint.every_seconds,
            keep_last=model.checkpoint.keep_last,
            keep_every_steps=model.checkpoint.keep_every_steps,
            timeout_s=model.checkpoint.timeout,
            bandwidth_mb_s=model.checkpoint.bandwidth_mb_s,
            await_import=model.checkpoint.await_import,
        ),
        restarts=RestartPolicy(max_restarts=model.restarts.max, window_s=model.restarts.window),
        hang=HangPolicy(
            enabled=model.hang.enabled, timeout_s=model.hang.timeout, startup_s=model.hang.startup
        ),
        failure_rules=tuple(
            FailureRule(
                rule.action,
                rule.reasons,
                rule.exit_codes,
                rule.signals,
                rule.message,
                cordon_s=rule.cordon,
                back=rule.back,
            )
            for rule in model.failure_rules
        ),
        nonfinite=NonFinitePolicy(
            action=NonFiniteAction(model.nonfinite.action),
            metrics=model.nonfinite.metrics,
            back=model.nonfinite.back,
        ),
        shutdown_grace_s=model.shutdown_grace,
        isolation_grace_s=model.isolation_grace,
        reschedule_grace_s=model.reschedule_grace,
        priority=model.priority,
    )
