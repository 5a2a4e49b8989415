"""Submitting and following: what ``submit`` and ``run`` share."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import click

from dtrain.cli import exits, following, jobfile, loglines, output, packaging, records
from dtrain.cli.client import Client
from dtrain.cli.identity import new_id
from dtrain.cli.jobfile import Pack
from dtrain.cli.live import Looking
from dtrain.cli.records import Job
from dtrain.cli.render import failures, sentences
from dtrain.protocol import codec
from dtrain.protocol.job import JobPhase, JobSpec


@dataclass(frozen=True, slots=True)
class Accepted:
    """A job that the cluster has taken on."""

    name: str
    uid: str
    revision: int


def submit(
    client: Client, spec: JobSpec, request_id: str | None, form: str, *, pack: Pack = Pack.NEVER
) -> Accepted:
    """Submit, and print what was accepted and what to do next (nothing in form ``quiet``).

    Raises:
        Conflict: another job has this name.
        Refused: the cluster does not accept it.
    """
    reply = packaging.submit(client, spec, pack, request_id or new_id())
    # A cluster made for this job fits it, even where the replica has not seen all agents yet.
    for warning in reply.warnings if form != "quiet" else ():
        output.say(f"warning: {warning}")
    accepted = json.loads(reply.spec)
    name, uid = str(accepted["name"]), str(accepted.get("uid", ""))
    if form in ("json", "yaml"):
        document = {
            "v": 1,
            "kind": "Submitted",
            "created": reply.created,
            "revision": reply.revision,
            **records.redacted({"spec": accepted}),
        }
        output.document(document, form)
    elif form == "name":
        click.echo(f"job/{name}")
    elif form != "quiet":
        click.echo(
            f"job {name} submitted" if reply.created else f"job {name} was submitted before: nothing changed"
        )
        budget = spec.restarts
        output.say(f"  restarts up to {budget.max_restarts} times in {budget.window_s:g} s after failures")
        output.say("next:")
        for line in (f"dtrain logs -f {name}", f"dtrain describe job {name}", f"dtrain wait {name}"):
            output.say(f"  {line}")
    return Accepted(name, uid, reply.revision)


def dry_run(client: Client, spec: JobSpec, form: str, *, pack: Pack = Pack.NEVER) -> int:
    """Have the cluster check the job; show it, or how it differs from one of the same name."""
    reply = client.submit(codec.encode(spec), new_id(), dry_run=True)
    for warning in reply.warnings:
        output.say(f"warning: {warning}")
    before = existing(client, spec)
    if before is not None and before.spec is not None:
        lines = changes(before.spec, spec)
        output.say(
            f"job {spec.name} exists and is {before.phase}; " + ("it differs:" if lines else "it is the same")
        )
        for line in lines:
            output.say(f"  {line}")
    show_spec(spec, form, pack=pack)
    return 0


def existing(client: Client, spec: JobSpec) -> Job | None:
    """The job that has this one's name, if there is one."""
    return records.group(client.read(f"jobs/{spec.name}/")).jobs.get(spec.name)


def changes(before: JobSpec, spec: JobSpec) -> list[str]:
    """How ``spec`` differs from what was submitted under its name, a line each."""
    # What a folder would be packed to is known once it is.
    plain = dataclasses.replace(
        before, uid=spec.uid, submitted_at="", request_id=spec.request_id, package=spec.package
    )
    return jobfile.differences(codec.to_json(plain), codec.to_json(spec))


def show_spec(spec: JobSpec, form: str, *, pack: Pack = Pack.NEVER) -> None:
    """Print a job that would be submitted, and what of its working directory would be packed."""
    listing = packaging.preview(spec, pack)
    shown = records.redacted({"spec": codec.to_json(spec)})["spec"]
    if form == "name":
        click.echo(f"job/{spec.name}")
    elif form in ("json", "yaml"):
        packed = {} if listing is None else {"would_pack": packaging.as_json(listing)}
        output.document({"v": 1, "kind": "JobSpec", **shown, **packed}, form)
    else:
        click.echo(f"job {spec.name} is valid")
        if listing is not None:
            packaging.show(listing)


def follow(
    client: Client,
    accepted: Accepted,
    *,
    ranks: Callable[[Job], Sequence[int]],
    prefix: bool,
) -> int:
    """Show logs and changes until the job ends; return the job's exit code, 130 when detached."""
    try:
        job = watch(client, accepted, ranks=ranks, prefix=prefix)
    except KeyboardInterrupt:
        say_detached(accepted.name)
        return exits.INTERRUPTED
    return job.exit_code


def say_detached(name: str) -> None:
    """What Ctrl-C did not do, and how to come back."""
    output.say(f"detached; {name} runs on. Come back: dtrain logs -f {name}")
    output.say(f"  or end it: dtrain cancel {name}")


def watch(
    client: Client,
    accepted: Accepted,
    *,
    ranks: Callable[[Job], Sequence[int]],
    prefix: bool,
    check: Callable[[], None] = lambda: None,
) -> Job:
    """Show logs (stdout to stdout, stderr to stderr) and changes until the job ends.

    ``check`` is called every few seconds at least; what it raises ends the watch.
    """
    changes = sentences.Turns()
    looking = Looking(client, accepted.name)

    def changed(job: Job) -> None:
        looking.see(job)
        for line in changes.lines(job):
            looking.say(f"[dtrain] {line}")

    def write(line: loglines.Line) -> None:
        with looking.aside():
            output.log(following.show(line, prefix=prefix), err=line.stream == "stderr")

    shown: set[int] = set()

    def chosen(job: Job) -> Sequence[int]:
        picked = ranks(job)
        shown.update(picked)
        return picked

    follower = following.Follower(
        client, accepted.name, ranks=chosen, write=write, changed=changed, trouble=looking.say, check=check
    )
    with looking:
        job = follower.run(after_revision=accepted.revision)
    failure = job.status.failure if job.status else None
    if job.phase is JobPhase.FAILED and failure is not None:
        for line in failures.failure_card(failure):
            output.say(line)
    return job
