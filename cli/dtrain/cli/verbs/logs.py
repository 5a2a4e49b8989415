"""``dtrain logs``: what ranks wrote."""

from typing import TYPE_CHECKING

import click

from dtrain.cli.options import complete_job, connected, examples, settings

if TYPE_CHECKING:
    from dtrain.cli.client import Client
    from dtrain.cli.following import Line
    from dtrain.cli.records import Job


@click.command(
    short_help="Show what ranks wrote.",
    epilog=examples(
        "dtrain logs digits -f",
        "dtrain logs digits --rank all --tail 20",
        "dtrain logs digits --attempt 2 --stderr",
        "dtrain logs digits --stacks --rank 3",
    ),
)
@click.argument("job", shell_complete=complete_job)
@click.option("-f", "--follow", is_flag=True, help="Go on, across attempts, until the job has ended.")
@click.option("--rank", "ranks", metavar="N,...|all", help="Default: rank 0, and the one that failed.")
@click.option("--attempt", type=click.IntRange(1), help="Default: the current one.")
@click.option("--tail", type=click.IntRange(0), help="Only the last N lines of each.")
@click.option("--stdout", "stream", flag_value="stdout", help="Only stdout.")
@click.option("--stderr", "stream", flag_value="stderr", help="Only stderr.")
@click.option("--stacks", "stream", flag_value="stacks", help="Stacks of all ranks that were collected.")
@connected
def command(
    *, job: str, follow: bool, ranks: str | None, attempt: int | None, tail: int | None, stream: str | None
) -> int:
    """Show the logs of JOB's ranks; with several ranks each line says which it is from."""
    from dtrain.cli import context, following, output, reading
    from dtrain.cli.client import closing

    streams = (stream,) if stream else following.STREAMS
    with closing(context.connect(settings())) as client:
        found, _ = reading.job(client, job)
        if not found.attempt:
            output.say(
                f"{found.name} has not started: {found.status.reason if found.status else 'no leader yet'}"
            )
            if not follow:
                return 0
        if follow and attempt is None:
            return _follow(client, found, ranks, streams)
        if stream == "stacks":
            return _stacks(client, found, attempt=attempt, ranks=ranks or "all", tail=tail)
        code, _ = _dump(
            client, found, attempt=attempt or found.attempt, ranks=ranks, streams=streams, tail=tail
        )
        return code


def _stacks(client: "Client", job: "Job", *, attempt: int | None, ranks: str, tail: int | None) -> int:
    """Of the attempt asked for, else the current one, else the newest one that was ended for a hang."""
    from dtrain.cli import exits, output
    from dtrain.protocol.snapshot import FailureKind

    failure = job.status.failure if job.status else None
    hung = failure.attempt if failure is not None and failure.kind is FailureKind.HANG else 0
    taken = any(snapshot.dumps for snapshot in job.current_workers.values())
    which = attempt or (hung if hung and not taken else job.attempt)
    code, lines = _dump(client, job, attempt=which, ranks=ranks, streams=("stacks",), tail=tail)
    if code == exits.OK and not lines:
        output.say(f"attempt {which} has no stacks; 'dtrain stacks {job.name}' collects those of now")
        return exits.NOT_FOUND
    return code


def chosen(job: "Job", ranks: str | None, attempt: int) -> list[int]:
    """Ranks to show: as asked for, else rank 0 and the one that failed."""
    world_size = job.world_size
    if ranks == "all":
        return list(range(world_size))
    if ranks:
        parts = [part.strip() for part in ranks.split(",") if part.strip()]
        if not all(part.isdecimal() for part in parts):
            raise click.UsageError(f"--rank {ranks}: write numbers such as 0,3, or all")
        return sorted({int(part) for part in parts})
    failure = job.status.failure if job.status else None
    failed = failure.rank if failure and failure.attempt == attempt else None
    return sorted({0} | ({int(failed)} if failed is not None else set()))


def _dump(
    client: "Client",
    job: "Job",
    *,
    attempt: int,
    ranks: str | None,
    streams: tuple[str, ...],
    tail: int | None,
) -> tuple[int, int]:
    """Print logs; return the exit code and how many lines there were."""
    import sys
    from collections import deque

    from dtrain.cli import exits, following, output

    wanted = chosen(job, ranks, attempt)
    problems = written = 0

    def write(line: "Line") -> None:
        nonlocal written
        written += 1
        _write(line, prefix=len(wanted) > 1)

    for rank in wanted:
        for stream in streams:
            lines: deque[Line] = deque(maxlen=tail)
            reader = following.Tail(
                client,
                job.name,
                attempt=attempt,
                rank=rank,
                stream=stream,
                write=lines.append if tail is not None else write,
            )
            reader.over.set()
            reader.run()
            for line in lines:
                write(line)
            if reader.problem:
                problems += 1
                output.say(f"rank {rank} {stream}: {reader.problem}")
    sys.stdout.flush()
    return exits.NOT_FOUND if problems == len(wanted) * len(streams) else exits.OK, written


def _follow(client: "Client", job: "Job", ranks: str | None, streams: tuple[str, ...]) -> int:
    from dtrain.cli import following, output
    from dtrain.cli.render import failures, sentences

    changes = sentences.Changes()

    def changed(now: "Job") -> None:
        for line in changes.lines(now):
            output.say(f"[dtrain] {line}")

    prefix = ranks is not None and len(chosen(job, ranks, job.attempt)) > 1
    follower = following.Follower(
        client,
        job.name,
        ranks=lambda now: chosen(now, ranks, now.attempt),
        write=lambda line: _write(line, prefix=prefix),
        changed=changed,
        streams=streams,
        trouble=output.say,
    )
    try:
        ended = follower.run()
    except KeyboardInterrupt:
        output.say(f"stopped following; {job.name} goes on: dtrain logs -f {job.name}")
        return 130
    if ended.status and ended.status.failure and ended.phase == "FAILED":
        for line in failures.failure_card(ended.status.failure):
            output.say(line)
    return 0


def _write(line: "Line", *, prefix: bool) -> None:
    from dtrain.cli import following, output

    output.log(following.show(line, prefix=prefix))
