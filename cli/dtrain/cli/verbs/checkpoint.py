"""``dtrain checkpoint``: take one now."""

from typing import TYPE_CHECKING

import click

from dtrain.cli.options import SECONDS, complete_job, connected, examples, formatted, settings

if TYPE_CHECKING:
    from dtrain.cli.client import Client


@click.command(
    short_help="Take a checkpoint of a job now.",
    epilog=examples("dtrain checkpoint digits", "dtrain checkpoint digits --wait --timeout 5m"),
)
@click.argument("job", shell_complete=complete_job)
@click.option("--wait", is_flag=True, help="Return only when it is committed, or cannot be.")
@click.option("--timeout", type=SECONDS, default="10m", show_default=True, help="Longest --wait.")
@formatted("table", "json")
@connected
def command(job: str, wait: bool, timeout: float) -> int:
    """Ask for a checkpoint of JOB at one of the next steps."""
    from dtrain.cli import context, output, reading
    from dtrain.cli.client import closing
    from dtrain.cli.identity import new_id, whoami

    token = new_id()
    with closing(context.connect(settings())) as client:
        name = reading.name(client, job)
        before, _ = reading.one(client, name)
        revision = client.set_intent(name, checkpoint_token=token, by=whoami())
        if not wait:
            if settings().output == "json":
                output.document(
                    {"v": 1, "kind": "CheckpointRequest", "job": name, "token": token, "revision": revision},
                    "json",
                )
            else:
                click.echo(f"{name}: checkpoint asked for")
            return 0
        return _wait(client, name, token, before.latest.seq if before.latest else 0, timeout)


def _wait(client: "Client", name: str, token: str, newest_before: int, timeout_s: float) -> int:
    from dtrain.cli import output, waiting
    from dtrain.cli.records import Job
    from dtrain.protocol.errors import Conflict, ErrorCode

    opened: set[int] = set()

    def done(job: Job) -> bool:
        opened.update(seq for seq, intent in job.open.items() if intent.token == token)
        answered = job.status is not None and job.status.token_done == token
        return job.finished or (answered and not opened & job.open.keys())

    job = waiting.until(client, name, done, what="the checkpoint", timeout_s=timeout_s)
    # A fast one may be committed between two reads, its open record never seen.
    seqs = opened or {seq for seq in job.commits if seq > newest_before}
    record = max(
        (job.commits[seq] for seq in seqs if seq in job.commits), key=lambda found: found.seq, default=None
    )
    if record is None:
        why = [
            event.message for _, event in sorted(job.events.items()) if event.reason == "CheckpointAborted"
        ]
        raise Conflict(
            ErrorCode.CONFLICT,
            f"no checkpoint of {name} was committed",
            cause=why[-1] if why else f"the job is {job.phase}",
            fix=f"dtrain get events {name}",
        )
    if settings().output == "json":
        output.document(
            {"v": 1, "kind": "Checkpoint", "job": name, "record": job.raw["checkpoints"][str(record.seq)]},
            "json",
        )
    else:
        click.echo(f"{name}: checkpoint {record.seq} of step {record.step} is committed")
    return 0
