"""``run``: builds the job from torchrun's flags, finds or starts a cluster, follows to the end."""

import os
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from dtrain.cli import context, exits, jobfile, output, submitting, torchflags, yamlmarks
from dtrain.cli.client import Client, closing
from dtrain.cli.identity import new_id
from dtrain.cli.jobfile import JobFile, Pack
from dtrain.cli.options import settings
from dtrain.cli.records import Job
from dtrain.cli.render import failures
from dtrain.cli.yamlmarks import Document
from dtrain.protocol.job import JobPhase, JobSpec

_SETTINGS = {
    "nnodes": "nnodes",
    "nproc_per_node": "nproc_per_node",
    "max_restarts": "restarts.max",
    "shutdown_timeout": "shutdown_grace",
    "name": "name",
}
"""Flags that, beside a job file, override what the file says."""


def run(given: Mapping[str, Any], chosen: Set[str]) -> int:
    """Run and follow; return the exit code of the failing rank, 0 if there was none.

    ``chosen``: the flags that were given rather than left at their defaults.

    Raises:
        Refused, NotFound: the command line or the job file is wrong.
        Unavailable: the cluster cannot be reached.
    """
    torchflags.check(given)
    addresses = () if given["standalone"] else context.addresses(settings())
    found = build_job(given, chosen, here=not addresses)
    for warning in found.warnings:
        output.say(f"warning: {warning}")
    for line in explanations(given):
        output.say(line)
    if addresses:
        if given["log_dir"]:
            output.say("--log-dir: the logs stay with the agents; dtrain logs shows them")
        if given["folder"]:
            output.say("--folder has no effect: the job runs in the cluster that is configured")
        return _on_cluster(addresses, found, given)
    spec = found.spec

    # Whoever has a cluster needs no etcd, and waits for none of what starts one.
    from dtrain.cli import embedding

    def watch(client: Client, accepted: submitting.Accepted, check: Callable[[], None]) -> Job:
        ranks = shown_ranks(given, spec.nproc_per_node)
        return submitting.watch(client, accepted, ranks=ranks, prefix=bool(given["tee"]), check=check)

    # All its agents are on this machine: the folder itself is where they find it.
    pack = Pack.ALWAYS if found.pack is Pack.ALWAYS else Pack.NEVER
    return embedding.run(
        spec, given["folder"], watch=watch, outcome=outcome, log_dir=given["log_dir"], pack=pack
    )


def build_spec(given: Mapping[str, Any], chosen: Set[str], *, here: bool) -> JobSpec:
    """Return the record of the job that the command line asks for."""
    return build_job(given, chosen, here=here).spec


def build_job(given: Mapping[str, Any], chosen: Set[str], *, here: bool) -> JobFile:
    """Return the job that the command line asks for; ``here``: it runs on this machine."""
    own = () if given.get("working_dir") is None else jobfile.packing(given["working_dir"])
    program, args = given["program"], list(given["args"])
    if program.endswith((".yaml", ".yml")) and not given["module"] and not given["no_python"]:
        if args:
            raise jobfile.BadJobFile(
                program,
                [yamlmarks.Problem(0, 0, "", f"its arguments belong in the file (args), not {args[0]!r}")],
            )
        overrides = _document(given, program, args, here=here)
        changes = [
            f"{key}={overrides[key.partition('.')[0]] if '.' not in key else given[flag]}"
            for flag, key in _SETTINGS.items()
            if flag in chosen
        ]
        return jobfile.read(Path(program), [*changes, *own, *given["changes"]])
    if own and not (given["working_dir"] / program).is_file() and Path(program).is_file():
        # As typed it is one of where the command is given; packed, it is one of the folder.
        program = str(Path(program).absolute())
    document = Document(value=_document(given, program, args, here=here))
    spec = jobfile.parse_values(document, "dtrain run", Path.cwd(), [*own, *given["changes"]])
    return jobfile.checked(spec, "dtrain run", jobfile.pack_wanted(document.value))


def explanations(given: Mapping[str, Any]) -> list[str]:
    """What to say about flags that have no meaning here."""
    return [
        f"--{flag} has no effect: {why}"
        for flag, why in torchflags.EXPLAINED.items()
        if given.get(flag.replace("-", "_")) is not None
    ]


def shown_ranks(given: Mapping[str, Any], nproc: int) -> "Any":
    """Return the function that picks the ranks whose output is shown."""
    everyone = torchflags.tees(given["tee"])
    wanted = torchflags.local_ranks(given["local_ranks_filter"])

    def ranks(job: Job) -> Sequence[int]:
        if wanted and not nproc:
            members = job.status.members if job.status else ()
            return [m.first_rank + local for m in members for local in range(m.nproc) if local in wanted]
        if wanted:
            return [rank for rank in range(job.world_size) if rank % nproc in wanted]
        return range(job.world_size) if everyone else [0]

    return ranks


def outcome(job: Job) -> int:
    """Say how a job ended, last of all which rank the exit code is from; return that code."""
    if job.phase is JobPhase.SUCCEEDED:
        return exits.OK
    failure = job.status.failure if job.status else None
    if job.phase is JobPhase.CANCELLED or failure is None:
        output.say(f"dtrain: {job.name} {job.phase}: {job.reason}")
        return job.exit_code
    code = exits.of_rank(failure.exit_code, failure.signal)
    output.say(f"dtrain: {job.name} FAILED: exit code {code} from {failures.failure_title(failure)}")
    return code


def _document(given: Mapping[str, Any], program: str, args: list[str], *, here: bool) -> dict[str, Any]:
    low, high = torchflags.check_nodes(given["nnodes"])
    nproc = torchflags.local_nproc(
        given["nproc_per_node"], here=here, gpus=torchflags.count_gpus(), cpus=os.cpu_count() or 1
    )
    kind = "module" if given["module"] else "command" if given["no_python"] else "script"
    name = given["name"] or given["rdzv_id"]
    document: dict[str, Any] = {
        # What a folder holds is found again by its name.
        "name": name or torchflags.job_name(program, "" if given["folder"] else new_id()[:4]),
        "nnodes": f"{low}:{high}",
        "nproc_per_node": nproc or "auto",
        kind: [program] if kind == "command" else program,
        "args": args,
        "working_dir": str(Path.cwd()),
    }
    if given["max_restarts"] is not None:
        document["restarts"] = {"max": given["max_restarts"]}
    if given["shutdown_timeout"] is not None:
        document["shutdown_grace"] = given["shutdown_timeout"]
    return document


def _on_cluster(addresses: tuple[str, ...], asked: JobFile, given: Mapping[str, Any]) -> int:
    spec = asked.spec
    with closing(context.client(settings(), addresses, timeout_s=settings().timeout_s)) as client:
        accepted = submitting.submit(client, spec, None, "table", pack=asked.pack)
        ranks = shown_ranks(given, spec.nproc_per_node)
        try:
            job = submitting.watch(client, accepted, ranks=ranks, prefix=bool(given["tee"]))
        except KeyboardInterrupt:
            submitting.say_detached(accepted.name)
            return exits.INTERRUPTED
    return outcome(job)
