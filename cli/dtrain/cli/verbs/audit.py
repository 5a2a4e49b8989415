"""``dtrain audit``: replays etcd's history and names every broken promise."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dtrain.cli.options import connected, examples, formatted, settings

if TYPE_CHECKING:
    import threading

    from dtrain.cli.auditing import Replay, Sink
    from dtrain.protocol.audit import Auditor, Violation
    from dtrain.protocol.ids import ClusterName
    from dtrain.storage.etcd.port import Etcd

CATCH_UP_S = 600.0
"""How long a history may take to be read once."""

STEP_S = 1.0


@click.command(
    short_help="Check etcd's history against the promises.",
    epilog=examples(
        "dtrain audit",
        "dtrain audit --endpoints http://etcd-1:2379 --cluster prod --follow",
        "dtrain audit --record history.jsonl.gz --verify-blobs latest",
        "dtrain audit --from history.jsonl.gz -o json",
    ),
)
@click.option("--follow", "-f", is_flag=True, help="Keep watching, and tell violations as they come.")
@click.option(
    "--record",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the history to FILE while checking.",
)
@click.option(
    "--from",
    "recorded",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="Check a recorded history instead of etcd's.",
)
@click.option(
    "--verify-blobs",
    type=click.Choice(["latest", "all"]),
    help="Read checkpoints in the store, too: the newest of each job, or all that are kept.",
)
@formatted("table", "json", "yaml")
@partial(connected, etcd=True)
def command(
    *,
    follow: bool,
    record: Path | None,
    recorded: Path | None,
    verify_blobs: str | None,
) -> int:
    """Replay the records' history and check the invariants that docs/guarantees.md lists.

    Reads from the oldest revision that etcd still has to the present one, and writes nothing. What
    was compacted away before is not judged. Exit code 0: nothing is broken; 8: something is.
    """
    if recorded is not None and (follow or record is not None or verify_blobs):
        raise click.UsageError("--from reads a file: --follow, --record and --verify-blobs need etcd")
    if recorded is not None:
        return _recorded(recorded)
    return _live(follow=follow, record=record, verify_blobs=verify_blobs)


def _recorded(path: Path) -> int:
    from dtrain.cli.auditing import Recorded
    from dtrain.protocol.audit import Auditor

    source = Recorded(path)
    auditor = Auditor(source.cluster)
    source.play(auditor)
    return _tell(auditor, source.cluster, str(path), note="" if source.whole else "the recording was cut off")


def _live(*, follow: bool, record: Path | None, verify_blobs: str | None) -> int:
    from dtrain.cli.auditblobs import BlobAudit
    from dtrain.cli.auditing import Recorder, Replay
    from dtrain.protocol.audit import Auditor

    etcd, cluster = _etcd()
    auditor = Auditor(cluster)
    sinks: list[Sink] = [auditor]
    recorder = Recorder(record, cluster) if record is not None else None
    if recorder is not None:
        sinks.append(recorder)
    replay = Replay(etcd, cluster, *sinks)
    blobs = BlobAudit(etcd, cluster, everything=verify_blobs == "all") if verify_blobs else None
    damaged: list[Violation] = []
    try:
        replay.catch_up(CATCH_UP_S)
        if blobs is not None:
            damaged = list(blobs.check())
        if follow:
            told_to_stop = _on_ctrl_c()
            for violation in [*auditor.violations, *damaged]:
                _tell_one(violation)
            for violation in _follow(replay, auditor, told_to_stop):
                _tell_one(violation)
    finally:
        replay.close()
        if recorder is not None:
            recorder.close()
        etcd.close()
    read = f", {blobs.checkpoints} checkpoints of {blobs.bytes} bytes verified" if blobs is not None else ""
    note = f"compaction overtook the audit {replay.gaps} times" if replay.gaps else ""
    return _tell(auditor, cluster, f"etcd{read}", note=note, more=damaged, listed=not follow)


def _on_ctrl_c() -> "threading.Event":
    """Return what the first Ctrl-C sets; the second interrupts.

    An exception raised by a signal can come up inside a destructor, where Python drops it: a
    follower that was told to end would then go on for ever.
    """
    import signal
    import threading

    told = threading.Event()
    before = signal.getsignal(signal.SIGINT)

    def once(_number: int, _frame: object) -> None:
        signal.signal(signal.SIGINT, before)
        told.set()

    signal.signal(signal.SIGINT, once)
    return told


def _follow(replay: "Replay", auditor: "Auditor", told_to_stop: "threading.Event") -> Iterator["Violation"]:
    """Yield violations as they come, until told to stop; an etcd that is away is waited for."""
    from dtrain.cli import output
    from dtrain.cli.auditing import RETRY_S
    from dtrain.protocol.errors import OutcomeUnknown, Unavailable

    output.say(f"checked up to revision {replay.revision}; watching, Ctrl-C ends it")
    told, complained = len(auditor.violations), False
    while not told_to_stop.is_set():
        try:
            replay.step(STEP_S)
            complained = False
        except (Unavailable, OutcomeUnknown) as error:
            if not complained:
                output.say(f"etcd does not answer: {error.message}")
            complained = True
            told_to_stop.wait(RETRY_S)
        yield from auditor.violations[told:]
        told = len(auditor.violations)


def _etcd() -> "tuple[Etcd, ClusterName]":
    """Open the etcd of the cluster that is meant: flags, environment, then the context file."""
    import os

    from dtrain.cli import meant
    from dtrain.runtime.config import ETCD, etcd_options, parse
    from dtrain.storage.etcd.open import open_etcd

    cluster, options = meant.find(
        settings(),
        etcd_options(parse("dtrain audit", "", ETCD, settings().etcd_flags(), os.environ)),
        why="an audit reads etcd, and no etcd is configured",
        fix="give --endpoints URL,..., start a local cluster (dtrain up), or give --from FILE",
    )
    return open_etcd(options), cluster


def _tell_one(violation: "Violation") -> None:
    import dataclasses
    import json
    import sys

    if settings().output == "table":
        click.echo(str(violation))
    else:
        click.echo(json.dumps({"v": 1, "kind": "Violation", **dataclasses.asdict(violation)}))
    sys.stdout.flush()


def _tell(
    auditor: "Auditor",
    cluster: "ClusterName",
    source: str,
    *,
    note: str,
    more: "list[Violation] | tuple[()]" = (),
    listed: bool = True,
) -> int:
    """Write what was found, and return the exit code."""
    import dataclasses
    import json

    from dtrain.cli import exits, output

    violations = [*auditor.violations, *more]
    found = len(violations) + auditor.violations_more
    if settings().output != "table":
        document = {
            "v": 1,
            "kind": "Audit",
            "cluster": cluster,
            "clean": not found,
            "begun_at": auditor.begun_at,
            "revisions": auditor.revisions,
            "terms": auditor.terms,
            "attempts": auditor.attempts,
            "commits": auditor.commits,
            "snapshots": auditor.snapshots,
            "note": note,
            "violations_total": found,
            "violations": [dataclasses.asdict(violation) for violation in violations],
        }
        if listed:
            output.document(document, settings().output)
        else:
            # After the violations that were told line by line, one line more.
            click.echo(json.dumps(document | {"violations": []}))
        return exits.CHECK_FAILED if found else exits.OK
    if listed:
        for violation in violations:
            click.echo(str(violation))
    if auditor.violations_more:
        click.echo(f"and {auditor.violations_more} more")
    if auditor.begun_at:
        output.say(f"history before revision {auditor.begun_at} is compacted: judged from there on")
    if note:
        output.say(f"note: {note}")
    click.echo(
        f"cluster {cluster}, {source}: {auditor.revisions} revisions, {auditor.terms} terms, "
        f"{auditor.attempts} attempts, {auditor.commits} commits, {auditor.snapshots} snapshots checked: "
        + (f"{found} violations" if found else "no violation")
    )
    return exits.CHECK_FAILED if found else exits.OK
