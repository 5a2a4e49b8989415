"""Reads job files: every error at once, each with file, line and column."""

import contextlib
import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from dtrain.cli import yamlmarks
from dtrain.cli.jobschema import PROGRAMS, CheckpointSection, JobModel, RestartsSection, RuleSection, to_spec
from dtrain.cli.yamlmarks import Document, Problem, show_path
from dtrain.protocol.errors import ErrorCode, NotFound, Refused
from dtrain.protocol.job import EntryKind, JobSpec
from dtrain.runtime import redact

_SECTIONS: dict[str, type[BaseModel]] = {
    "checkpoint": CheckpointSection,
    "restarts": RestartsSection,
    "failure_rules": RuleSection,
}
_AS_TYPED = ("args", "env", "command", "labels")
"""Numbers in here are meant as they were typed: ``1e-3`` stays ``1e-3``."""


class Pack(Enum):
    """Whether a working directory is packed. IF_POSSIBLE: where the cluster has a store to keep it in."""

    NEVER = "never"
    IF_POSSIBLE = "if possible"
    ALWAYS = "always"


class BadJobFile(Refused):
    """A job file with errors; ``details`` has one line for each."""

    def __init__(self, name: str, problems: Sequence[Problem]) -> None:
        count = len(problems)
        super().__init__(
            ErrorCode.BAD_JOB_FILE,
            f"{name} has {count} error{'s' if count != 1 else ''}",
            fix=f"correct {'them' if count != 1 else 'it'}; 'dtrain submit --dry-run {name}' checks again",
        )
        self.details = tuple(problem.show(name) for problem in sorted(problems))


@dataclass(frozen=True, slots=True)
class JobFile:
    """A valid job, and what is odd about it without being wrong."""

    spec: JobSpec
    warnings: tuple[str, ...] = ()
    pack: Pack = Pack.NEVER


def read(path: Path, changes: Sequence[str] = ()) -> JobFile:
    """Read the job file at ``path`` with ``changes`` (``a.b=c``) made to it.

    Raises:
        NotFound: there is no such file.
        BadJobFile: with all its errors.
    """
    try:
        with path.open("rb") as file:
            # Not all of it: the path may be of a device, or of a checkpoint.
            data = file.read(yamlmarks.BYTES_MAX + 1)
    except FileNotFoundError as error:
        raise NotFound(
            ErrorCode.NOT_FOUND, f"there is no job file {path}", fix="give the path of a YAML file"
        ) from error
    except OSError as error:
        raise Refused(ErrorCode.BAD_JOB_FILE, f"{path} cannot be read: {error.strerror}") from error
    if len(data) > yamlmarks.BYTES_MAX:
        raise BadJobFile(str(path), [Problem(1, 1, "", yamlmarks.TOO_LARGE)])
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise BadJobFile(str(path), [Problem(line, 1, "", "is not UTF-8 text")]) from error
    document = _document(text, str(path))
    spec = parse_values(document, str(path), path.resolve().parent, changes)
    return checked(spec, str(path), pack_wanted(document.value))


def parse(text: str, name: str, folder: Path, changes: Sequence[str] = ()) -> JobSpec:
    """Return the job that ``text`` describes.

    Raises:
        BadJobFile: with all its errors.
    """
    return parse_values(_document(text, name), name, folder, changes)


def _document(text: str, name: str) -> Document:
    document = yamlmarks.parse(text)
    if document.value is None and not document.problems:
        document.problems.append(Problem(1, 1, "", "the file is empty: at least name and script are needed"))
    elif document.value is not None and not isinstance(document.value, dict):
        document.problems.append(Problem(1, 1, "", "a job file is a mapping: lines of 'key: value'"))
    if not isinstance(document.value, dict):
        raise BadJobFile(name, document.problems)
    return document


def packing(folder: Path) -> tuple[str, str]:
    """The changes (``a=b``) that have ``folder`` packed, whatever the job file says."""
    # A JSON string is one in YAML too, whatever the path has in it.
    return f"working_dir={json.dumps(str(folder.resolve()))}", "pack=true"


def pack_wanted(values: Mapping[str, Any]) -> Pack:
    """Whether a valid job's working directory is packed: by ``pack``, else if its path is relative.

    A folder beside the job file is one of the machine that submits; an absolute path is one of those that
    train, as it has always been.
    """
    given, folder = values.get("pack"), values.get("working_dir")
    if given is not None:
        return Pack.ALWAYS if given else Pack.NEVER
    relative = isinstance(folder, str) and not folder.startswith(("/", "~"))
    return Pack.IF_POSSIBLE if relative else Pack.NEVER


def parse_values(document: Document, name: str, folder: Path, changes: Sequence[str] = ()) -> JobSpec:
    """The same for values that are read already.

    Raises:
        BadJobFile: with all its errors.
    """
    for change in changes:
        _apply(document, change)
    return build(document, name, folder)


def build(document: Document, name: str, folder: Path) -> JobSpec:
    """Validate plain values and translate them.

    Raises:
        BadJobFile: with all errors, those that reading found included.
    """
    problems = list(document.problems)
    _keep_as_typed(document)
    model = None
    try:
        model = JobModel.model_validate(document.value)
    except ValidationError as error:
        problems += [_problem(document, found) for found in error.errors(include_url=False)]
    given = [word for word in PROGRAMS if document.value.get(word) is not None]
    if not given:
        problems.append(Problem(*document.place(()), "", f"one of {', '.join(PROGRAMS)} is missing"))
    for extra in given[1:]:
        place = document.place((extra,), of_key=True)
        problems.append(Problem(*place, extra, f"{given[0]} is given already; a job has one program"))
    if problems or model is None:
        raise BadJobFile(name, _unique(problems))
    return to_spec(model, folder)


def checked(spec: JobSpec, name: str, pack: Pack = Pack.NEVER) -> JobFile:
    """Check what can be checked on this machine, which need not be one that trains.

    Raises:
        NotFound: the working directory is here, and the script is not in it.
    """
    folder = Path(spec.working_dir)
    if not folder.is_dir() and pack is not Pack.ALWAYS:
        missing = f"{folder} does not exist on this machine; it must exist on every agent's machine"
        return JobFile(spec, (missing, *_secrets(spec)))
    if not folder.is_dir():
        raise NotFound(
            ErrorCode.NOT_FOUND, f"{name}: there is no folder {folder} to pack", fix="correct working_dir"
        )
    spec = _inside(spec) if pack is not Pack.NEVER else spec
    script = folder / spec.entry.target
    if spec.entry.kind is EntryKind.SCRIPT and not script.is_file():
        raise NotFound(
            ErrorCode.SCRIPT_NOT_FOUND,
            f"{name}: there is no script {script}",
            fix="script is relative to working_dir, which is relative to the job file's folder",
        )
    return JobFile(spec, tuple(_secrets(spec)), pack)


def _inside(spec: JobSpec) -> JobSpec:
    """A script that is given by its place on this machine is the one in the packed folder."""
    target = Path(spec.entry.target)
    if spec.entry.kind is not EntryKind.SCRIPT or not target.is_absolute():
        return spec
    with contextlib.suppress(ValueError):
        inside = target.resolve().relative_to(Path(spec.working_dir).resolve())
        return replace(spec, entry=replace(spec.entry, target=inside.as_posix()))
    return spec


def differences(old: Any, new: Any) -> list[str]:
    """Lines ``field: old -> new`` between two plain records."""
    before = {show_path(path): value for path, value in yamlmarks.leaves(old)}
    after = {show_path(path): value for path, value in yamlmarks.leaves(new)}
    return [
        f"{path}: {_shown(path, before)} -> {_shown(path, after)}"
        for path in sorted(before.keys() | after.keys())
        if before.get(path) != after.get(path)
    ]


def _shown(path: str, values: dict[str, Any]) -> str:
    if path not in values:
        return "(unset)"
    place, _, name = path.partition(".")
    return redact.HIDDEN if place == "env" and redact.is_secret(name) else str(values[path])


def _secrets(spec: JobSpec) -> list[str]:
    return [
        f"env.{name} looks like a secret, and a job's environment is stored in etcd: give a file's path, "
        f"such as {name}_FILE, or set it where the agents run"
        for name, value in spec.env.items()
        if value and redact.is_secret(name)
    ]


def _apply(document: Document, change: str) -> None:
    key, found, text = change.partition("=")
    path = tuple(key.strip().split("."))
    if not found or not all(path):
        document.problems.append(Problem(0, 0, f"--set {change}", "write it as key=value or a.b=value"))
        return
    inner = yamlmarks.parse(text)
    document.problems += [Problem(0, 0, f"--set {change}", problem.message) for problem in inner.problems]
    target = document.value
    for part in path[:-1]:
        if target.get(part) is None:
            target[part] = {}
        target = target[part]
        if not isinstance(target, dict):
            document.problems.append(Problem(0, 0, f"--set {change}", f"{part} has no parts"))
            return
    target[path[-1]] = inner.value
    # An overridden value no longer stands in the file.
    for places in (document.values, document.keys, document.texts):
        for known in [known for known in places if known[: len(path)] == path]:
            del places[known]
    document.values[path] = document.keys[path] = (0, 0)
    document.texts |= {(*path, *rest): typed for rest, typed in inner.texts.items()}


def _keep_as_typed(document: Document) -> None:
    for path, text in document.texts.items():
        if len(path) != 2 or path[0] not in _AS_TYPED:
            continue
        parent = document.value[path[0]]
        if parent[path[1]] is not None:
            parent[path[1]] = text
    for word in ("args", "command"):
        # `args: 5` is one argument.
        if isinstance(document.value.get(word), int | float) and (word,) in document.texts:
            document.value[word] = document.texts[word,]


def _problem(document: Document, found: Any) -> Problem:
    path = tuple(found["loc"])
    kind = found["type"]
    if kind == "extra_forbidden":
        model = _SECTIONS.get(str(path[0]), JobModel) if len(path) > 1 else JobModel
        return Problem(*document.place(path, of_key=True), show_path(path), _unknown(str(path[-1]), model))
    if kind == "missing":
        return Problem(*document.place(path[:-1]), show_path(path), "is missing")
    if kind == "model_type":
        return Problem(*document.place(path), show_path(path), "is not a mapping of settings")
    line, column = document.place(path)
    shown = show_path(path) if line else f"--set {show_path(path)}"
    return Problem(line, column, shown, found["msg"].removeprefix("Value error, "))


_ELSEWHERE = {
    "every_steps": "checkpoint.every_steps",
    "every_seconds": "checkpoint.every_seconds",
    "keep_last": "checkpoint.keep_last",
    "store": "checkpoint.store",
    "max_restarts": "restarts.max",
    "world_size": "nnodes and nproc_per_node",
    "nodes": "nnodes",
    "nproc": "nproc_per_node",
    "replicas": "nnodes",
    "environment": "env",
    "cwd": "working_dir",
    "retain_last": "checkpoint.keep_last",
}


def _unknown(key: str, model: type[BaseModel]) -> str:
    guess = _ELSEWHERE.get(key, "") if model is JobModel else ""
    if not guess:
        near = difflib.get_close_matches(key, model.model_fields, n=1, cutoff=0.6)
        guess = near[0] if near else ""
    if not guess and model is JobModel:
        near = difflib.get_close_matches(key, _ELSEWHERE, n=1, cutoff=0.8)
        guess = _ELSEWHERE[near[0]] if near else ""
    if guess:
        return f"is not a setting; did you mean {guess}?"
    return f"is not a setting; known here: {', '.join(model.model_fields)}"


def _unique(problems: Sequence[Problem]) -> list[Problem]:
    return list(dict.fromkeys(problems))
