"""``dtrain logs``: what ranks wrote."""

from typing import TYPE_CHECKING

import click

from dtrain.cli.options import complete_agent, complete_job, connected, examples, formatted, settings

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dtrain.cli.answers import LogPlace
    from dtrain.cli.client import Client
    from dtrain.cli.loglines import Filter, Line
    from dtrain.cli.logreading import Log, Wanted
    from dtrain.cli.records import Job


@click.command(
    short_help="Show what ranks wrote.",
    epilog=examples(
        "dtrain logs digits -f",
        "dtrain logs digits --rank all --tail 20",
        "dtrain logs digits --previous --agent gpu-02",
        "dtrain logs digits --since 10m --grep 'loss|Error' -t",
        "dtrain logs digits --stacks --rank 3",
    ),
)
@click.argument("job", shell_complete=complete_job)
@click.option("-f", "--follow", is_flag=True, help="Go on, across attempts, until the job has ended.")
@click.option("--rank", "ranks", metavar="N,...|all", help="Default: rank 0, and those that failed.")
@click.option("--agent", shell_complete=complete_agent, help="Only the ranks that ran on this machine.")
@click.option("--attempt", type=click.IntRange(1), help="Default: the current one.")
@click.option("-p", "--previous", is_flag=True, help="The attempt before the current one that had ranks.")
@click.option("--uid", default="", help="Of an earlier submission of this name: see 'dtrain archive'.")
@click.option("--since", metavar="TIME", help="Only lines from then on: 10m, 2h, or 2026-05-01T12:00:00Z.")
@click.option("--tail", type=click.IntRange(0), help="Only the last N lines of each.")
@click.option("--grep", metavar="REGEX", help="Only lines that this is found in.")
@click.option("-t", "--timestamps", is_flag=True, help="Say when each line was written (UTC).")
@click.option("--stdout", "stream", flag_value="stdout", help="Only stdout.")
@click.option("--stderr", "stream", flag_value="stderr", help="Only stderr.")
@click.option("--stacks", "stream", flag_value="stacks", help="Stacks of all ranks that were collected.")
@formatted("table", "json")
@connected
def command(
    *,
    job: str,
    follow: bool,
    ranks: str | None,
    agent: str | None,
    attempt: int | None,
    previous: bool,
    uid: str,
    since: str | None,
    tail: int | None,
    grep: str | None,
    timestamps: bool,
    stream: str | None,
) -> int:
    """Show the logs of JOB's ranks, merged by time; with several ranks each line says which it is from.

    They come from the machines that wrote them. What a machine that is lost wrote comes from the
    store, where agents copy it: what is missing then is said on stderr.
    """
    from dtrain.cli import context, following, output
    from dtrain.cli.archived import past_or_present
    from dtrain.cli.client import closing
    from dtrain.cli.logreading import Wanted

    if previous and attempt is not None:
        raise click.UsageError("--previous and --attempt both name an attempt: give one of them")
    if follow and (previous or attempt is not None):
        raise click.UsageError("-f follows the current attempt: leave --attempt and --previous away")
    keep = _filter(since, grep)
    streams = (stream,) if stream else following.STREAMS
    with closing(context.connect(settings())) as client:
        found, past = past_or_present(client, job, uid)
        if past and follow:
            raise click.UsageError(f"{found.name} is over: leave -f away")
        if not found.attempt:
            output.say(
                f"{found.name} has not started: {found.status.reason if found.status else 'no leader yet'}"
            )
            if not follow:
                return 0
        wanted = Wanted(ranks or ("all" if stream == "stacks" else None), agent)
        show = _Show(
            client, found, wanted, streams=streams, keep=keep, tail=tail, timestamps=timestamps, uid=past
        )
        if follow:
            return show.follow()
        if previous:
            attempt = show.previous()
            if attempt < 1:
                output.say(f"{found.name} is at its first attempt")
                return 0
        if stream == "stacks":
            return _stacks(show, found, attempt)
        code, _ = show.until_now(attempt or found.attempt)
        return code


class _Show:
    """One call of the verb: what is wanted, and how it is written."""

    def __init__(
        self,
        client: "Client",
        job: "Job",
        wanted: "Wanted",
        *,
        streams: "Sequence[str]",
        keep: "Filter",
        tail: int | None,
        timestamps: bool,
        uid: str = "",
    ) -> None:
        self._uid = uid
        self.client, self.job, self.wanted, self.streams = client, job, wanted, streams
        self.keep, self.tail = keep, tail
        self._as_json = settings().output == "json"
        self._timestamps = timestamps
        self._places: Sequence[LogPlace] | None = None

    def places(self) -> "Sequence[LogPlace]":
        """Which logs there are."""
        from dtrain.cli import output

        if self._places is None:
            self._places, problem = self.client.log_places(self.job.name, uid=self._uid)
            if problem:
                output.say(f"former machines are not known: {problem}")
        return self._places

    def previous(self) -> int:
        """The newest attempt before the current one in which ranks ran; 0: there is none.

        One that was given up before its ranks began has nothing to say.
        """
        before = [place.attempt for place in self.places() if place.attempt < self.job.attempt]
        return max(before, default=self.job.attempt - 1)

    def until_now(self, attempt: int, *, goes_on: bool = False) -> "tuple[int, Sequence[Log]]":
        """Print logs up to now; return the exit code and what was read."""
        from dtrain.cli import exits, logreading, output

        ranks = self.wanted.of(self.job, attempt, self.places)
        logs = [
            logreading.Log(self.client, self.job.name, attempt, rank, stream, goes_on=goes_on, uid=self._uid)
            for rank in ranks
            for stream in self.streams
        ]
        shown = logreading.show(logs, self.writer(len(ranks) > 1), keep=self.keep, tail=self.tail)
        for sentence in (*shown.notes, *(() if goes_on else shown.problems)):
            output.say(f"[dtrain] {sentence}")
        lost = bool(logs) and len(shown.problems) == len(logs)
        return exits.NOT_FOUND if lost else exits.OK, shown.logs if shown.lines or goes_on else ()

    def follow(self) -> int:
        """What there is up to now, in order, and then whatever comes."""
        from dtrain.cli import following, output
        from dtrain.cli.render import failures, sentences

        changes = sentences.Turns()

        def changed(now: "Job") -> None:
            for line in changes.lines(now):
                output.say(f"[dtrain] {line}")

        several, without = self.wanted.several, 0

        def ranks(now: "Job") -> list[int]:
            nonlocal several, without
            found = self.wanted.followed(now)
            several = several or len(found) > 1
            if not found and now.attempt > without:
                without = now.attempt
                output.say(f"[dtrain] attempt {now.attempt} has none of these ranks on {self.wanted.agent}")
            return found

        try:
            read: Sequence[Log] = ()
            if self.job.status and self.job.status.members:
                read = self.until_now(self.job.attempt, goes_on=True)[1]
            plain, prefixed = self.writer(False), self.writer(True)

            def write(line: "Line") -> None:
                (prefixed if several else plain)(line)

            follower = following.Follower(
                self.client,
                self.job.name,
                ranks=ranks,
                write=lambda line: write(line) if self.keep(line) else None,
                changed=changed,
                streams=self.streams,
                trouble=output.say,
                start_at={(log.attempt, log.rank, log.stream): log.offset for log in read},
            )
            ended = follower.run()
        except KeyboardInterrupt:
            output.say(f"stopped following; {self.job.name} goes on: dtrain logs -f {self.job.name}")
            return 130
        if ended.status and ended.status.failure and ended.phase == "FAILED":
            for line in failures.failure_card(ended.status.failure):
                output.say(line)
        return 0

    def writer(self, prefix: bool) -> "Callable[[Line], None]":
        """What writes one line as it was asked for."""
        from dtrain.cli import following, output

        def write(line: "Line") -> None:
            if self._as_json:
                click.echo(_json(self.job.name, line))
                return
            start = f"{_time(line.at_ms)} ".encode() if self._timestamps else b""
            output.log(start + following.show(line, prefix=prefix))

        return write


def _stacks(show: _Show, job: "Job", attempt: int | None) -> int:
    """Of the attempt asked for, else the current one, else the newest one that was ended for a hang."""
    from dtrain.cli import exits, output
    from dtrain.protocol.snapshot import FailureKind

    failure = job.status.failure if job.status else None
    hung = failure.attempt if failure is not None and failure.kind is FailureKind.HANG else 0
    taken = any(snapshot.dumps for snapshot in job.current_workers.values())
    which = attempt or (hung if hung and not taken else job.attempt)
    code, logs = show.until_now(which)
    if code == exits.OK and not logs:
        output.say(f"attempt {which} has no stacks; 'dtrain stacks {job.name}' collects those of now")
        return exits.NOT_FOUND
    return code


def _filter(since: str | None, grep: str | None) -> "Filter":
    import re

    from dtrain.cli.loglines import Filter

    try:
        pattern = re.compile(grep) if grep else None
    except re.error as error:
        raise click.UsageError(f"--grep {grep}: {error}") from error
    return Filter(_since_ms(since) if since else 0, pattern)


def _since_ms(text: str) -> int:
    import datetime
    import time

    from dtrain.cli.durations import parse_s

    try:
        return int((time.time() - parse_s(text)) * 1000)
    except ValueError:
        pass
    try:
        moment = datetime.datetime.fromisoformat(text)
    except ValueError as error:
        raise click.UsageError(
            f"--since {text}: write how long ago, such as 10m, or a time such as 2026-05-01T12:00:00Z"
        ) from error
    return int((moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)).timestamp() * 1000)


def _time(at_ms: int) -> str:
    from dtrain.runtime.clock import iso

    return iso(at_ms / 1000) if at_ms else "-" * 24


def _json(job: str, line: "Line") -> str:
    import json

    return json.dumps(
        {
            "time": _time(line.at_ms) if line.at_ms else "",
            "job": job,
            "attempt": line.attempt,
            "rank": line.rank,
            "agent": line.agent,
            "stream": line.stream,
            "line": line.text.decode("utf-8", "replace").rstrip("\n"),
        },
        ensure_ascii=False,
    )
