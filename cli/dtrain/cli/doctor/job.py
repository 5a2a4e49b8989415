"""Looks at a job file: that it is valid, that what it names is there, and whether the fleet can take it."""

import ast
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from dtrain.cli import jobfile
from dtrain.cli.doctor import judging
from dtrain.cli.doctor.findings import Check, Verdict, fail, passed, warn
from dtrain.cli.jobfile import BadJobFile
from dtrain.protocol.job import EntryKind, JobSpec

Slots = Callable[[], tuple[Sequence[int], Sequence[int]]]


def checks(path: Path, slots: Slots | None) -> tuple[list[Check], JobSpec | None]:
    """What to look at, and the job if its file is valid; ``slots`` None: there is no cluster."""
    try:
        job = jobfile.read(path, ())
    except BadJobFile as error:
        found = [fail(line, "correct it: docs/job-file.md") for line in error.details]
        return [Check("job", "file", lambda: found)], None
    looks = [
        Check("job", "file", lambda: [passed(f"{path} is valid")]),
        Check("job", "program", lambda: [_program(job.spec)]),
    ]
    if slots is not None:
        looks.append(Check("job", "fits", lambda: _fits(job.spec, slots)))
    return looks, job.spec


def _program(spec: JobSpec) -> Verdict:
    if spec.entry.kind is not EntryKind.SCRIPT:
        return passed(f"{spec.entry.kind} {spec.entry.target}")
    script = Path(spec.working_dir) / spec.entry.target
    if not script.is_file():
        return warn(
            f"there is no {script} on this machine",
            "if those that train lack it too, no rank will start",
        )
    try:
        ast.parse(script.read_bytes(), str(script))
    except (SyntaxError, ValueError) as error:
        return fail(f"{script} is no Python: {error}", "correct it: every rank would end with this")
    return passed(f"{script} is there, and is Python")


def _fits(spec: JobSpec, slots: Slots) -> Iterator[Verdict]:
    free, total = slots()
    each = spec.nproc_per_node or 1
    yield judging.fits(spec.nnodes_min, each, free, total)
