"""The cluster of its own that ``run`` starts where none is configured, from its start to its end."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from dtrain.cli import output, submitting, waiting
from dtrain.cli.client import Client, closing
from dtrain.cli.foreground import Foreground
from dtrain.cli.identity import whoami
from dtrain.cli.jobfile import Pack
from dtrain.cli.pulse import ASK_S, Pulse
from dtrain.cli.records import Job
from dtrain.cli.submitting import Accepted
from dtrain.local.cluster import LocalCluster
from dtrain.protocol.errors import Conflict, DtrainError, ErrorCode, Unavailable
from dtrain.protocol.job import JobPhase, JobSpec
from dtrain.protocol.wording import count

T = TypeVar("T")

CANCEL_S = 60.0
"""After Ctrl-C: how long ranks may take to leave before the cluster is ended around them."""


def run(
    spec: JobSpec,
    folder: Path | None,
    *,
    watch: Callable[[Client, Accepted, Callable[[], None]], Job],
    outcome: Callable[[Job], int],
    log_dir: str | None,
    pack: Pack = Pack.NEVER,
) -> int:
    """Run a job in a cluster of its own; return its exit code, 128 + n for a signal.

    ``folder``: where the cluster lives, and what it leaves there is gone on with by the next run. None:
    in a temporary folder, of which nothing is left. ``watch`` follows the job to its end and calls
    what it was given now and then.

    Raises:
        Unavailable: the cluster did not start, or a part of it ended.
        Conflict: the folder is in use, or holds another job of this name.
    """
    # Short: Unix sockets below it have names of at most 107 bytes.
    place = folder or Path(tempfile.mkdtemp(prefix="dtrain-run-"))
    cluster = LocalCluster(
        place,
        coordinators=1,
        agents=spec.nnodes_max,
        slots=spec.nproc_per_node,
        store="dir",
        name="run",
        remove=folder is None,
    )
    with Foreground(lambda: cluster.stop(clean=False)):
        try:
            machines = count(spec.nnodes_max, "agent")
            output.say(f"no cluster is configured: starting one for this run, on this machine ({machines})")
            cluster.start()
            return _follow(cluster, spec, folder, watch=watch, outcome=outcome, pack=pack)
        except Foreground.Interrupted as interrupted:
            return interrupted.exit_code
        finally:
            _keep_logs(cluster.folder, log_dir)
            cluster.stop()
            if folder is None:
                # If it never started there is nothing that would have removed it.
                shutil.rmtree(place, ignore_errors=True)


def _follow(
    cluster: LocalCluster,
    spec: JobSpec,
    folder: Path | None,
    *,
    watch: Callable[[Client, Accepted, Callable[[], None]], Job],
    outcome: Callable[[Job], int],
    pack: Pack,
) -> int:
    with closing(Client(cluster.addresses)) as client:
        accepted = _accept(client, spec, folder, pack)
        pulse = Pulse(lambda: cluster.etcd_servers.answers(ASK_S), output.say)

        def check() -> None:
            _check(cluster, folder)
            pulse.check()

        try:
            job = watch(client, accepted, check)
        except Foreground.Interrupted as interrupted:
            _stop(client, accepted.name, spec, folder)
            return interrupted.exit_code
    return outcome(job)


def _accept(client: Client, spec: JobSpec, folder: Path | None, pack: Pack) -> Accepted:
    """Submit the job, or go on with what an earlier run has left of it."""
    before = submitting.existing(client, spec) if folder is not None else None
    if before is None or before.finished or before.spec is None:
        return submitting.submit(client, spec, None, "quiet", pack=pack)
    if changes := submitting.changes(before.spec, spec):
        raise Conflict(
            ErrorCode.CONFLICT,
            f"{folder} holds an unfinished job {spec.name}, which is another one",
            cause="; ".join(changes),
            fix="go on with the same command, or choose another --name or --folder",
        )
    output.say(f"going on with {spec.name}: {before.status.reason if before.status else before.phase}")
    revision = client.set_intent(spec.name, wanted="run", by=whoami())
    return Accepted(spec.name, before.spec.uid, revision)


def _check(cluster: LocalCluster, folder: Path | None) -> None:
    """Notice that a part of the cluster has ended: nobody would start it again.

    Raises:
        Unavailable: one has.
    """
    if not (ended := cluster.ended()):
        return
    what, tail = ended
    again = "run it again" if folder is None else "run it again: it goes on from its newest checkpoint"
    raise Unavailable(
        ErrorCode.COORDINATOR_UNAVAILABLE,
        f"the cluster of this run has broken: {what}",
        cause=tail,
        fix=f"{again}; if nobody killed it, look for what did: dmesg, or the machine's memory",
    )


def _stop(client: Client, name: str, spec: JobSpec, folder: Path | None) -> None:
    """End the ranks after a first Ctrl-C; what they did is saved where that outlives the cluster."""
    saves = folder is not None or bool(spec.checkpoint.store)
    if saves:
        output.say(f"saving and stopping {name}; Ctrl-C again stops at once")
    else:
        output.say(f"cancelling {name}; Ctrl-C again stops at once")
    try:
        client.set_intent(name, wanted="suspend" if saves else "cancel", by=whoami())
        limit_s = CANCEL_S + (spec.checkpoint.timeout_s if saves else 0.0)
        job = waiting.until(
            client,
            name,
            lambda job: job.finished or job.phase is JobPhase.SUSPENDED,
            what="its end",
            timeout_s=limit_s,
        )
    except DtrainError as error:
        output.say(f"it did not end by itself: {error.message}")
        return
    if job.status is not None:
        output.say(f"dtrain: {name}: {job.status.reason}")
    if folder is not None and not job.finished:
        output.say("go on with the same command")
    elif folder is None and not saves:
        output.say("nothing of it is kept; with --folder DIR a run can be gone on with")


def _keep_logs(folder: Path, log_dir: str | None) -> None:
    """Copy ``agents/*/logs/RUN/attempt_N/LOCAL_RANK`` to ``log_dir/RUN/...``, merged over agents."""
    if not log_dir:
        return
    several = len(list((folder / "agents").glob("*"))) > 1
    for source in (folder / "agents").glob("*/logs/*"):
        target = Path(log_dir) / source.name
        if several:
            target = Path(log_dir) / source.name / source.parents[1].name
        try:
            shutil.copytree(source, target, dirs_exist_ok=True)
        except (OSError, shutil.Error) as error:
            output.say(f"--log-dir: {source.name} could not be copied: {error}")
