"""``pause`` and ``unpause``: what is asked of the cluster, and what became of it."""

import click

from dtrain.cli import context, exits, output, reading, waiting
from dtrain.cli.client import closing
from dtrain.cli.identity import whoami
from dtrain.cli.options import settings
from dtrain.cli.records import Job

_KINDS = {"pause": "Paused", "unpause": "Unpaused"}


def ask(job: str, what: str, *, wait_s: float | None) -> int:
    """Ask for ``what``, wait for it if so wished, and say what came of it; return the exit code."""
    with closing(context.connect(settings())) as client:
        name = reading.name(client, job)
        revision = client.set_intent(name, pause=what, by=whoami())
        told, code = f"{what} accepted", exits.OK
        if wait_s is not None:
            found = waiting.until(
                client,
                name,
                lambda job: job.finished or _is_done(job, what),
                what=f"its {what}",
                timeout_s=wait_s,
            )
            told = found.status.reason if found.status else ""
            if found.finished or (what == "pause" and not _is_held(found)):
                code = exits.CONFLICT
    if settings().output == "json":
        output.document({"v": 1, "kind": _KINDS[what], "name": name, "revision": revision}, "json")
    elif settings().output == "name":
        click.echo(f"job/{name}")
    else:
        click.echo(f"{name}: {told}")
    return code


def _is_held(job: Job) -> bool:
    return job.status is not None and bool(job.status.held)


def _is_done(job: Job, what: str) -> bool:
    if what == "unpause":
        return not _is_held(job)
    conditions = () if job.status is None else job.status.conditions
    return _is_held(job) or any(one.type == "Paused" and one.reason == "CannotPause" for one in conditions)
