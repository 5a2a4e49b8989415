"""What a job file may say: the schema at the edge, translated to ``JobSpec`` once.

Field names and defaults are those of the protocol; pydantic collects every
error, ``jobfile.py`` gives each its place. What is said of each field is what
``dtrain submit --schema`` and ``docs/job-file.md`` show.
"""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from dtrain.cli import jobvalues as form
from dtrain.protocol.ids import JobName, Uid
from dtrain.protocol.job import (
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

_RULE = FailureRule(RuleAction.RESTART)
_CHECKPOINT, _RESTARTS, _NONFINITE = CheckpointPolicy(), RestartPolicy(), NonFinitePolicy()
_HANG = HangPolicy()
_JOB_GROW_COOLDOWN_S = 60.0


PROGRAMS = ("script", "module", "command")
"""Exactly one of these names the program."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _says(text: str, default: Any = None) -> Any:
    """Describe a field; ``default`` is how a job file would write it, where that differs."""
    return Field(description=text, json_schema_extra=None if default is None else {"default": default})


class CheckpointSection(_Strict):
    """When and where checkpoints are taken, and which stay."""

    store: Annotated[
        str,
        form.STORE,
        _says("Where they go; empty: the coordinators' `--default-store`. See docs/stores.md"),
    ] = _CHECKPOINT.store
    every_steps: Annotated[int, form.integer(0), _says("Steps between two; 0: none by steps")] = (
        _CHECKPOINT.every_steps
    )
    every_seconds: Annotated[float, form.duration(), _says("Time between two; 0: none by time")] = (
        _CHECKPOINT.every_seconds
    )
    keep_last: Annotated[int, form.integer(1), _says("How many of the newest stay")] = _CHECKPOINT.keep_last
    keep_every_steps: Annotated[
        int,
        form.integer(0),
        _says("The first one at or after each multiple of this stays, too; 0: no others"),
    ] = _CHECKPOINT.keep_every_steps
    timeout: Annotated[
        float,
        form.duration(above_zero=True),
        _says("From opening one to its commit; after that it is aborted"),
    ] = _CHECKPOINT.timeout_s
    bandwidth_mb_s: Annotated[
        float,
        form.MEGABYTES,
        _says("Megabytes a second that each agent sends for this job at most; 0: no bound"),
    ] = _CHECKPOINT.bandwidth_mb_s
    await_import: Annotated[
        bool,
        form.YES_OR_NO,
        _says("Never begin from scratch: wait for `dtrain checkpoints import` before the first attempt"),
    ] = _CHECKPOINT.await_import


class RestartsSection(_Strict):
    """The budget: how many attempts may fail before the job does."""

    max: Annotated[int, form.integer(0), _says("Restarts that count, at most, in one window")] = (
        _RESTARTS.max_restarts
    )
    window: Annotated[float, form.duration(above_zero=True), _says("Its length")] = _RESTARTS.window_s


class HangSection(_Strict):
    """When ranks that complete no step are taken for hung. See docs/hangs.md."""

    enabled: Annotated[bool, form.YES_OR_NO, _says("Whether they are at all")] = _HANG.enabled
    timeout: Annotated[
        float, form.duration(), _says("Longest time without a step; 0: it follows the job's own step times")
    ] = _HANG.timeout_s
    startup: Annotated[
        float, form.duration(above_zero=True), _says("Longest time until the first step of an attempt")
    ] = _HANG.startup_s


class RuleSection(_Strict):
    """What follows from a failure. All that a rule names must be true of it; the first that fits counts."""

    action: Annotated[RuleAction, form.ACTION, _says("What follows")]
    reasons: Annotated[tuple[str, ...], form.REASONS, _says("Any of these; none: any reason")] = _RULE.reasons
    exit_codes: Annotated[tuple[int, ...], form.EXIT_CODES, _says("Any of these, 1 to 255")] = (
        _RULE.exit_codes
    )
    signals: Annotated[tuple[int, ...], form.SIGNALS, _says("Any of these, by name or number")] = (
        _RULE.signals
    )
    message: Annotated[
        str, form.PATTERN, _says("A regular expression found in the error or the last lines of the log")
    ] = _RULE.message
    cordon: Annotated[
        float, form.duration(), _says("How long the machine that failed gets no new ranks, of any job")
    ] = _RULE.cordon_s
    back: Annotated[int, form.integer(1, 1000), _says("With `rollback`: how many checkpoints")] = _RULE.back


class NonFiniteSection(_Strict):
    """What follows from a reported number that is NaN or infinite. See docs/numbers.md."""

    action: Annotated[str, form.NONFINITE_ACTION, _says("What follows")] = _NONFINITE.action.value
    metrics: Annotated[tuple[str, ...], form.METRICS, _says("Reported numbers that must stay finite")] = (
        _NONFINITE.metrics
    )
    back: Annotated[int, form.integer(1, 1000), _says("With `rollback`: how many checkpoints")] = (
        _NONFINITE.back
    )


class JobModel(_Strict):
    """A whole job file."""

    model_config = ConfigDict(
        title="dtrain job file",
        json_schema_extra={"oneOf": [{"required": [program]} for program in PROGRAMS]},
    )

    name: Annotated[
        str, form.NAME, _says("Lower-case letters, digits and dashes; unique among the jobs that there are")
    ]
    nnodes: Annotated[
        tuple[int, int], form.NODES, _says("Machines, or a range MIN:MAX. See docs/elastic.md", 1)
    ] = (1, 1)
    nproc_per_node: Annotated[
        int, form.NPROC, _says("Ranks on each machine; `auto`: as many as it has slots")
    ] = 1
    script: Annotated[
        Annotated[str, form.FILLED] | None, _says("A Python file, relative to `working_dir`")
    ] = None
    module: Annotated[Annotated[str, form.MODULE] | None, _says("A Python module, as with `python -m`")] = (
        None
    )
    command: Annotated[
        Annotated[tuple[str, ...], form.COMMAND] | None, _says("Any program with its arguments")
    ] = None
    args: Annotated[
        tuple[str, ...], form.WORDS, _says("Arguments of the script or module: a list, or one line")
    ] = ()
    env: Annotated[dict[str, str], form.ENV, _says("Environment variables of the ranks; values are text")] = (
        Field(default_factory=dict)
    )
    labels: Annotated[
        dict[str, str],
        form.LABELS,
        _says("For people, to find jobs by: `dtrain get jobs -l team=vision`"),
    ] = Field(default_factory=dict)
    working_dir: Annotated[
        str,
        form.FILLED,
        _says(
            "Folder that ranks start in. Relative to the job file: it is packed. An absolute path: it is one "
            "on each machine. See docs/working-directory.md"
        ),
    ] = "."
    pack: Annotated[
        Annotated[bool, form.YES_OR_NO] | None,
        _says("Whether `working_dir` is packed, whatever its path; not given: if its path is relative"),
    ] = None
    preload: Annotated[
        tuple[str, ...],
        form.MODULES,
        _says("Modules that a machine imports once, before it forks ranks. See docs/recovery.md"),
    ] = ()
    checkpoint: CheckpointSection = CheckpointSection()
    restarts: RestartsSection = RestartsSection()
    failure_rules: Annotated[tuple[RuleSection, ...], BeforeValidator(form.rules)] = ()
    hang: HangSection = HangSection()
    nonfinite: NonFiniteSection = NonFiniteSection()
    spares: Annotated[
        int, form.integer(0), _says("Machines kept warm beyond the job's own, without being reserved")
    ] = 0
    grow_cooldown: Annotated[
        float, form.duration(), _says("Shortest time between two growths of a job with a range")
    ] = _JOB_GROW_COOLDOWN_S
    priority: Annotated[
        int,
        form.integer(-form.PRIORITY_MAX, form.PRIORITY_MAX),
        _says("Higher ones are placed first and may suspend lower ones. See docs/jobs.md"),
    ] = 0
    shutdown_grace: Annotated[
        float, form.duration(), _says("From SIGTERM to SIGKILL when ranks are stopped on purpose")
    ] = 30.0
    isolation_grace: Annotated[
        float,
        form.duration(),
        _says("How long ranks go on on a machine without etcd; 0: ten minutes or two checkpoint intervals"),
    ] = 0.0
    reschedule_grace: Annotated[
        float, form.duration(), _says("How long a machine whose lease has ended is waited for; 0: not at all")
    ] = 0.0


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of a job file, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **JobModel.model_json_schema()}


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
        labels=model.labels,
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
