"""Rows and sentences out of records. Pure: ``now`` is an argument, nothing is printed.

Tables are for people and may change; programs use ``-o json``.
"""

import datetime
import re
import signal as signals
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dtrain.cli import terminal
from dtrain.cli.client import GarbageItem
from dtrain.cli.durations import show_bytes, show_s
from dtrain.cli.records import Agent, Cluster, Job, Replica
from dtrain.protocol.cluster import Suspicion
from dtrain.protocol.events import EventRecord
from dtrain.protocol.job import JobPhase
from dtrain.protocol.snapshot import Failure, FailureKind, Timing, WorkerPhase

if TYPE_CHECKING:
    from dtrain.storage.checkpoints.reading import Damage

UNKNOWN = "–"
RANKS_SHOWN = 4
BLAMES_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Table:
    """Headings and rows of text; the last column may be cut to the width."""

    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def lines(self, width: int = 0) -> list[str]:
        """Aligned lines, each cut to ``width`` if it is given."""
        table = [tuple(terminal.text(cell) for cell in row) for row in (self.headings, *self.rows)]
        widths = [max(len(row[column]) for row in table) for column in range(len(self.headings))]
        lines = []
        for row in table:
            cells = [cell.ljust(size) for cell, size in zip(row, widths, strict=True)]
            line = "   ".join(cells).rstrip()
            lines.append(line if not width or len(line) <= width else line[: max(1, width - 1)] + "…")
        return lines


def age_s(since: str, now: float) -> float | None:
    """Seconds from an ISO-8601 time until ``now`` (epoch seconds); None if it cannot be read."""
    try:
        return max(0.0, now - datetime.datetime.fromisoformat(since).timestamp())
    except ValueError:
        return None


def ago(since: str, now: float) -> str:
    """An age for a column."""
    seconds = age_s(since, now)
    return UNKNOWN if seconds is None else show_s(seconds)


def jobs(cluster: Cluster, now: float, *, wide: bool = False) -> Table:
    """``get jobs``."""
    headings = ("NAME", "PHASE", "STEP", "ATTEMPT", "RANKS", "LAST-CKPT", "AGE")
    extra = ("UID", "MEMBERS", "RESTARTS", "PRIORITY")
    rows = []
    for job in cluster.jobs.values():
        submitted = job.spec.submitted_at if job.spec else ""
        row: tuple[str, ...] = (
            job.name,
            str(job.phase),
            str(job.step),
            str(job.attempt),
            _ranks(job),
            f"{job.latest.seq} (step {job.latest.step})" if job.latest else UNKNOWN,
            ago(submitted, now),
        )
        if wide:
            row += (
                (job.spec.uid if job.spec else "") or UNKNOWN,
                ",".join(member.agent for member in job.status.members) if job.status else UNKNOWN,
                restarts(job, now),
                str(job.spec.priority) if job.spec else UNKNOWN,
            )
        rows.append((*row, reason(job)))
    return Table((*headings, *(extra if wide else ()), "REASON"), tuple(rows))


def agents(cluster: Cluster, now: float, *, wide: bool = False) -> Table:
    """``get agents``."""
    headings = ("NAME", "STATUS", "SLOTS", "JOBS", "VERSION", "SINCE")
    extra = ("ADDRESS", "HOST", "GPUS", "INCARNATION")
    rows = []
    for agent in cluster.agents.values():
        node = agent.node
        busy = sum(len(_live(snapshot.ranks)) for snapshot in agent.workers.values())
        row: tuple[str, ...] = (
            agent.name,
            agent_status(agent),
            f"{busy}/{node.slots}" if node else UNKNOWN,
            ",".join(agent.workers) or UNKNOWN,
            (node.version if node else "") or UNKNOWN,
            ago(node.since, now) if node else UNKNOWN,
        )
        if wide:
            row += (
                (node.address, node.host, str(node.gpus), node.incarnation)
                if node
                else (UNKNOWN,) * len(extra)
            )
        rows.append((*row, agent_reason(agent)))
    return Table((*headings, *(extra if wide else ()), "REASON"), tuple(rows))


def coordinators(
    cluster: Cluster, ages_s: dict[str, float | None], now: float, *, wide: bool = False
) -> Table:
    """``get coordinators``; ``ages_s`` has the mirror's age by replica, None for no answer."""
    headings = ("NAME", "ROLE", "TERM", "ADDRESS", "VERSION", "MIRROR-AGE", "SINCE")
    rows = []
    for replica in sorted(cluster.replicas.values(), key=lambda replica: replica.name):
        record, mirror_age_s = replica.record, ages_s.get(replica.name)
        row: tuple[str, ...] = (
            replica.name,
            "leader" if replica.term else "standby",
            str(replica.term) if replica.term else UNKNOWN,
            record.address if record else UNKNOWN,
            (record.version if record else "") or UNKNOWN,
            UNKNOWN if mirror_age_s is None else show_s(mirror_age_s),
            ago(record.since, now) if record else UNKNOWN,
        )
        rows.append((*row, *((record.host, str(record.pid)) if record else ("", ""))) if wide else row)
    return Table((*headings, *(("HOST", "PID") if wide else ())), tuple(rows))


def problem_lines(found: dict[str, tuple[str, ...]]) -> list[str]:
    """What replicas say is wrong, by replica; what several say is one line."""
    by_sentence: dict[str, list[str]] = {}
    for name in sorted(found):
        for sentence in found[name]:
            by_sentence.setdefault(sentence, []).append(name)
    return [f"PROBLEM ({', '.join(names)}): {sentence}" for sentence, names in by_sentence.items()]


@dataclass(frozen=True, slots=True)
class CheckpointLine:
    """One checkpoint, from whichever of its records there are."""

    seq: int
    step: int
    attempt: int
    world_size: int
    bytes: int | None
    state: str
    latest: bool
    pinned: bool
    since: str
    note: str = ""


def checkpoint_lines(job: Job) -> list[CheckpointLine]:
    """All checkpoints of a job by number: committed, open, bad and those being deleted."""
    lines = {}
    pinned = set(job.pinned)
    if job.status and job.status.restore and not job.finished:
        pinned.add(job.status.restore.seq)
    newest = job.latest.seq if job.latest else -1
    for seq, tomb in job.garbage.items():
        lines[seq] = CheckpointLine(seq, 0, 0, 0, None, "Deleting", False, seq in pinned, "", tomb.reason)
    for seq, intent in job.open.items():
        note = "final" if intent.final else ""
        lines[seq] = CheckpointLine(
            seq, intent.step, intent.attempt, intent.world_size, None, "Open", False, seq in pinned,
            intent.opened_at, note,
        )  # fmt: skip
    for seq, record in job.commits.items():
        damaged = job.bad.get(seq)
        note = f"{damaged.blob} chunk {damaged.chunk}" if damaged else "final" if record.final else ""
        if job.status and seq in job.status.passed_over:
            note = "training was rolled back past it"
        lines[seq] = CheckpointLine(
            seq, record.step, record.attempt, record.world_size, record.bytes,
            "Bad" if damaged else "Committed", seq == newest, seq in pinned, record.committed_at, note,
        )  # fmt: skip
    for seq, damaged in job.bad.items():
        if seq not in lines:
            lines[seq] = CheckpointLine(
                seq, 0, 0, 0, None, "Bad", False, seq in pinned, damaged.at,
                f"{damaged.blob} chunk {damaged.chunk}",
            )  # fmt: skip
    return [lines[seq] for seq in sorted(lines)]


def checkpoints(job: Job, now: float, *, wide: bool = False) -> Table:
    """``get checkpoints``; ``*`` marks the newest committed one, VERIFIED is when one was last read whole."""
    rows = []
    for line in checkpoint_lines(job):
        row: tuple[str, ...] = (
            f"{line.seq}{'*' if line.latest else ''}",
            str(line.step) if line.attempt else UNKNOWN,
            str(line.attempt) if line.attempt else UNKNOWN,
            str(line.world_size) if line.world_size else UNKNOWN,
            UNKNOWN if line.bytes is None else show_bytes(line.bytes),
            line.state,
            "yes" if line.pinned else "",
            ago(job.verified[line.seq].at, now) if line.seq in job.verified else "",
            ago(line.since, now),
        )
        rows.append((*row, line.note) if wide else row)
    headings = ("SEQ", "STEP", "ATTEMPT", "WORLD", "SIZE", "STATE", "PINNED", "VERIFIED", "AGE")
    return Table((*headings, *(("NOTE",) if wide else ())), tuple(rows))


def damage_line(damage: "Damage") -> str:
    """One damaged chunk: what lies in it, and what was found instead."""
    return terminal.text(f"  {damage.where} is {damage.found}, {damage.expected} was committed")


def garbage(items: Sequence[GarbageItem], *, wide: bool = False) -> Table:
    """``checkpoints gc --dry-run``; ``wide``: what stays, too."""
    rows = []
    for item in items:
        row = (
            item.kind,
            str(item.seq) if item.seq else UNKNOWN,
            show_bytes(item.bytes) if item.bytes else UNKNOWN,
            *(("delete" if item.deleted else "keep",) if wide else ()),
            item.why,
            item.what,
        )
        rows.append(row)
    return Table(("KIND", "SEQ", "SIZE", *(("DOES",) if wide else ()), "WHY", "WHAT"), tuple(rows))


def imports(tensors: Mapping[str, tuple[str, Sequence[int], int]]) -> Table:
    """``checkpoints import --dry-run``: dtype, shape and bytes by the name that each tensor gets."""
    rows = [
        (name, dtype, str(list(shape)), show_bytes(size)) for name, (dtype, shape, size) in tensors.items()
    ]
    return Table(("TENSOR", "TYPE", "SHAPE", "SIZE"), tuple(rows))


def events(found: Iterable[tuple[str, EventRecord]], now: float, *, wide: bool = False) -> Table:
    """``get events``, oldest first; pairs of job name and event."""
    rows = []
    for job, event in sorted(found, key=lambda pair: (pair[1].last or pair[1].first, pair[0], pair[1].seq)):
        about = f"job/{job}" + (f" {event.object}" if event.object else "")
        row = (
            ago(event.last or event.first, now),
            str(event.type),
            str(event.reason),
            about,
            str(event.count),
        )
        rows.append((*row, *((str(event.attempt), str(event.term)) if wide else ()), event.message))
    extra = ("ATTEMPT", "TERM") if wide else ()
    return Table(("TIME", "TYPE", "REASON", "OBJECT", "COUNT", *extra, "MESSAGE"), tuple(rows))


def rank_table(job: Job) -> Table:
    """Members and ranks of the current attempt; members without a snapshot are shown as such."""
    rows: list[tuple[str, ...]] = []
    known = job.ranks
    for member in job.status.members if job.status else ():
        for rank in range(member.first_rank, member.first_rank + member.nproc):
            if rank not in known:
                rows.append((str(rank), member.agent, UNKNOWN, "no report", UNKNOWN, UNKNOWN, "", ""))
                continue
            agent, state = known[rank]
            numbers = [f"{name}={value:.4g}" for name, value in sorted(state.metrics.items())]
            metrics = " ".join([f"{name}=not-finite" for name in state.nonfinite] + numbers)
            ended = "" if state.exit_code is None else show_exit(state.exit_code)
            took = show_timing(state.timing)
            rows.append(
                (str(rank), agent, str(state.pid), str(state.phase), str(state.step), took, ended, metrics)
            )
    return Table(("RANK", "AGENT", "PID", "STATE", "STEP", "STEP/OWN/DATA", "EXIT", "METRICS"), tuple(rows))


def show_timing(timing: Timing | None) -> str:
    """What a step took, of it the rank's own part, of that waiting for data: in milliseconds."""
    if timing is None:
        return UNKNOWN
    return (
        "/".join(f"{1000 * seconds:.3g}" for seconds in (timing.step_s, timing.own_s, timing.data_s)) + " ms"
    )


def reason(job: Job) -> str:
    """The leader's sentence on a job."""
    if job.status is None:
        return "waiting for a leader to look at it"
    return "; ".join([job.status.reason, *of_steps(job), *of_ranks(job)])


def of_steps(job: Job) -> list[str]:
    """Ranks that stand still for longer than they may, and what those do that were found at work."""
    if job.phase is not JobPhase.RUNNING:
        return []
    workers = job.current_workers.values()
    stalls = sorted((stall.rank, stall.step) for one in workers for stall in one.stalls)
    moving = sorted((stack.rank, stack.where) for one in workers for stack in one.stacks if stack.moving)
    texts = []
    if stalls:
        step = min(step for _, step in stalls)
        texts.append(f"{_rank_names([rank for rank, _ in stalls])} completed no step after step {step}")
    texts += [f"rank {rank} is at work" + (f" in {where}" if where else "") for rank, where in moving[:1]]
    return texts


def _rank_names(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:RANKS_SHOWN]))
    more = f" and {len(ranks) - RANKS_SHOWN} more" if len(ranks) > RANKS_SHOWN else ""
    return f"rank{'' if len(ranks) == 1 else 's'} {shown}{more}"


def of_ranks(job: Job) -> list[str]:
    """What is said of its ranks while it trains: slow ones, numbers that are not finite."""
    conditions = job.status.conditions if job.status else ()
    return [
        one.message for one in conditions if one.type in ("NonFinite", "Straggling") and one.status == "True"
    ]


def restarts(job: Job, now: float) -> str:
    """Restarts that count against the budget, and the budget."""
    if job.spec is None:
        return UNKNOWN
    start = now - job.spec.restarts.window_s
    used = sum(1 for at in (job.status.restarts if job.status else ()) if at >= start)
    return f"{used}/{job.spec.restarts.max_restarts}"


def agent_status(agent: Agent) -> str:
    """Ready, Draining, Cordoned, Blocked (something on it does not die), or Lost (no lease).

    Draining: it is about to end, or an operator wants it empty and it is not yet.
    """
    if agent.node is None:
        return "Lost"
    if agent.node.draining is not None:
        return "Draining"
    if agent.node.problem:
        return "Blocked"
    if agent.cordon is None:
        return "Ready"
    return "Draining" if agent.cordon.drain and agent.workers else "Cordoned"


def agent_reason(agent: Agent) -> str:
    """Why it is not simply Ready."""
    node = agent.node
    draining = node.draining if node else None
    if draining is not None:
        return f"{draining.reason}: it waits for at most {show_s(draining.grace_s)} for its jobs to move"
    return (node.problem if node else "") or (agent.cordon.reason if agent.cordon else "")


def show_exit(code: int) -> str:
    """An exit code, or the name of the signal for a negative one."""
    return signal_name(-code) if code < 0 else str(code)


def signal_name(number: int) -> str:
    """``SIGKILL`` for 9."""
    try:
        return signals.Signals(number).name
    except ValueError:
        return f"signal {number}"


def failure_title(failure: Failure) -> str:
    """Who failed and how, in one line."""
    who = f"rank {failure.rank}" if failure.rank is not None else ""
    if failure.agent:
        who = f"{who} on {failure.agent}" if who else f"agent {failure.agent}"
    if failure.pid:
        who += f", pid {failure.pid}"
    # The leader's sentence begins with the rank; so do we.
    how = failure.message.removeprefix(f"rank {failure.rank} ")
    if failure.kind is FailureKind.SIGNAL and failure.signal:
        name = signal_name(failure.signal)
        how = how if name in how else f"{name}, {how}" if how else name
    elif failure.exit_code is not None and failure.kind is FailureKind.EXIT and not how:
        how = f"exit code {failure.exit_code}"
    return ": ".join(part for part in (who, how or str(failure.kind)) if part)


def failure_card(failure: Failure, *, lines_max: int = 50) -> list[str]:
    """Who failed first and the end of its log, indented; what failed because of it, folded."""
    at = f" (at step {failure.step})" if failure.step else ""
    card = [f"First failure of attempt {failure.attempt}   {failure_title(failure)}{at}"]
    tail = failure.log_tail.rstrip("\n").splitlines()[-lines_max:] if failure.log_tail else []
    card += [f"    | {line}" for line in tail]
    if failure.also:
        # The leader names some of them, and counts the rest in a last entry of its own.
        uncounted = re.fullmatch(r"(\d+) more", failure.also[-1])
        count = len(failure.also) + (int(uncounted[1]) - 1 if uncounted else 0)
        card.append(f"    + {count} more failed with it: {failure.also[0]}" + ("; ..." if count > 1 else ""))
    return card


def headline(job: Job) -> str:
    """One sentence: how the job is, and why."""
    sentence = f"{job.name} is {job.phase}: {reason(job)}"
    failure = job.status.failure if job.status else None
    if failure is None:
        return sentence
    cause = failure_title(failure)
    # The leader's own sentence mostly has it already.
    if job.finished or " ".join(failure.message.split()) in sentence:
        return sentence
    return f"{sentence}; attempt {failure.attempt} had ended because of {cause}"


def describe_job(job: Job, now: float) -> list[str]:
    """``describe job``: the answer first, then what it rests on."""
    status, spec = job.status, job.spec
    lines = [headline(job)]
    if status and status.failure:
        lines += failure_card(status.failure)
        if status.failure.kind is FailureKind.HANG:
            lines.append(f"    stacks of all ranks: {_stacks_command(job, status.failure.attempt)}")
    if job.intent and job.intent.wanted.value != "run" and not job.finished:
        lines.append(f"  wanted: {job.intent.wanted}" + (f" (by {job.intent.by})" if job.intent.by else ""))
    state = [str(job.phase)]
    if job.attempt:
        state.append(f"attempt {job.attempt}")
    if spec:
        state.append(f"restarts {restarts(job, now)} in {show_s(spec.restarts.window_s)}")
    if status and status.since:
        state.append(f"since {ago(status.since, now)}")
    lines += ["", f"State         {'  '.join(state)}"]
    lines += [_checkpoint_summary(job, now), f"Step          {job.step}"]
    if spec:
        lines += [
            f"Program       {spec.entry.kind} {' '.join((spec.entry.target, *spec.entry.args))}",
            f"Size          {_size(job)}",
            f"Folder        {spec.working_dir}",
            f"Uid           {spec.uid}   submitted {spec.submitted_at}",
        ]
    table = rank_table(job)
    if table.rows:
        lines += ["", "Ranks", *(f"  {line}" for line in table.lines())]
    lines += _stack_lines(job, now)
    workers = sorted(job.workers.items())
    notes = [f"{agent}: {snapshot.note}" for agent, snapshot in workers if snapshot.note]
    notes += [f"{agent}: {snapshot.warning}" for agent, snapshot in workers if snapshot.warning]
    if notes:
        lines += ["", "Notes", *(f"  {line}" for line in notes)]
    if status and status.conditions:
        rows = tuple(
            (condition.type, condition.status, condition.reason, condition.last_transition, condition.message)
            for condition in status.conditions
        )
        table = Table(("TYPE", "STATUS", "REASON", "SINCE", "MESSAGE"), rows)
        lines += ["", "Conditions", *(f"  {line}" for line in table.lines())]
    if job.events:
        newest = [(job.name, job.events[seq]) for seq in sorted(job.events)[-20:]]
        lines += ["", "Events", *(f"  {line}" for line in events(newest, now).lines())]
    return lines


def _stack_lines(job: Job, now: float) -> list[str]:
    """Stacks of this attempt: how many, when, where they are; and what ranks do, if they stand still."""
    found = {agent: snapshot for agent, snapshot in sorted(job.current_workers.items()) if snapshot.dumps}
    if not found:
        return []
    times = max(snapshot.dumps for snapshot in found.values())
    ranks = sum(len(snapshot.ranks) for snapshot in found.values())
    last = max(snapshot.dumped_at for snapshot in found.values())
    often = "" if times == 1 else f"{times} times, the last time "
    when = f"collected {often}{show_s(max(0.0, now - last))} ago"
    text = f"of {ranks} rank{'' if ranks == 1 else 's'}, {when}: {_stacks_command(job, job.attempt)}"
    lines = ["", f"Stacks        {text}"]
    rows = sorted(
        (stack.rank, agent, str(stack.kind), stack.where or UNKNOWN)
        for agent, snapshot in found.items()
        for stack in snapshot.stacks
    )
    if rows:
        table = Table(("RANK", "AGENT", "DOES", "WHERE"), tuple((str(rank), *more) for rank, *more in rows))
        lines += [f"  {line}" for line in table.lines()]
    return lines


def _stacks_command(job: Job, attempt: int) -> str:
    return f"dtrain logs {job.name} --stacks --attempt {attempt}"


def describe_agent(agent: Agent, now: float) -> list[str]:
    """``describe agent``."""
    node = agent.node
    lines = [f"{agent.name}  {agent_status(agent)}" + (f"  since {ago(node.since, now)}" if node else "")]
    if agent.cordon:
        until = f" until {agent.cordon.until}" if agent.cordon.until else ""
        lines.append(
            f"  cordoned{until}: {agent.cordon.reason}"
            + (f" (by {agent.cordon.by})" if agent.cordon.by else "")
        )
    if node and node.problem:
        lines.append(f"  {node.problem}")
    if agent.suspicion and agent.suspicion.blames:
        lines += blames(agent.suspicion, now)
    if node:
        lines += [
            "",
            f"Address       {node.address}   ranks reach it as {node.host}",
            f"Slots         {node.slots}   GPUs {node.gpus}",
            f"Incarnation   {node.incarnation}   pid {node.pid}   version {node.version or UNKNOWN}",
        ]
        if node.labels:
            lines.append(
                "Labels        " + " ".join(f"{name}={value}" for name, value in node.labels.items())
            )
    for job, snapshot in sorted(agent.workers.items()):
        ready = " (warm)" if snapshot.warm and snapshot.phase is WorkerPhase.IDLE else ""
        lines += ["", f"Job {job}   attempt {snapshot.attempt}   {snapshot.phase}{ready}"]
        if snapshot.command:
            outcome = "done" if snapshot.command.ok else f"failed: {snapshot.command.message}"
            lines.append(f"  last command {snapshot.command.kind} {outcome}")
        lines += [f"  {text}" for text in (snapshot.note, snapshot.warning) if text]
        if snapshot.failure:
            lines += [f"  {line}" for line in failure_card(snapshot.failure)]
        rows = tuple(
            (
                str(state.rank),
                str(state.pid),
                str(state.phase),
                str(state.step),
                "" if state.exit_code is None else show_exit(state.exit_code),
            )
            for state in snapshot.ranks
        )
        if rows:
            lines += [f"  {line}" for line in Table(("RANK", "PID", "STATE", "STEP", "EXIT"), rows).lines()]
    return lines


def blames(suspicion: Suspicion, now: float) -> list[str]:
    """What attempts have ended because of a machine, the newest last."""
    shown = suspicion.blames[-BLAMES_SHOWN:]
    more = len(suspicion.blames) - len(shown)
    lines = ["", "Attempts ended because of it" + (f" ({more} more before these)" if more else "")]
    return lines + [
        f"  {show_s(max(0.0, now - blame.at))} ago   attempt {blame.attempt} of {blame.job}: {blame.kind}"
        for blame in shown
    ]


def job_change(job: Job) -> str:
    """One line for someone who follows a job."""
    parts = [job.name, str(job.phase)]
    if job.attempt:
        parts.append(f"attempt {job.attempt}")
    return "  ".join([*parts, reason(job)])


class Changes:
    """What to tell someone who follows a job: each change once, a failed attempt with its cause."""

    def __init__(self) -> None:
        self._told = ""
        self._failed = 0

    def lines(self, job: Job) -> list[str]:
        """Lines for this state of the job, [] if it says nothing new."""
        lines = []
        failure = job.status.failure if job.status else None
        if failure is not None and failure.attempt > self._failed:
            self._failed = failure.attempt
            lines.append(f"{job.name}  attempt {failure.attempt} failed: {failure_title(failure)}")
        line = job_change(job)
        if line != self._told:
            self._told = line
            lines.append(line)
        return lines


def stale_line(mirror_age_s: float) -> str:
    """The warning that reads carry when the replica's mirror is old; "" when it is not."""
    return f"mirror is {show_s(mirror_age_s)} old: etcd unreachable" if mirror_age_s > STALE_S else ""


STALE_S = 10.0
"""An idle etcd tells its watchers every 5 s that nothing is missing: younger than that means nothing."""


def _checkpoint_summary(job: Job, now: float) -> str:
    parts = []
    if job.latest:
        text = f"latest {job.latest.seq} (step {job.latest.step}"
        record = job.commits.get(job.latest.seq)
        if record:
            text += f", {ago(record.committed_at, now)} old, {show_bytes(record.bytes)}"
        parts.append(text + ")")
    parts += [f"{seq} open (step {intent.step})" for seq, intent in sorted(job.open.items())]
    parts += [f"{seq} bad" for seq in sorted(job.bad)]
    if passed := [str(seq) for seq in (job.status.passed_over if job.status else ()) if seq in job.commits]:
        parts.append(f"{', '.join(passed)} rolled back past")
    if not parts:
        store = job.status.store if job.status else ""
        started = job.status is not None and job.status.attempt > 0
        parts.append("none yet" if store or not started else "off: the job has no store")
    if job.status and job.status.restore:
        parts.append(f"attempt {job.attempt} restored {job.status.restore.seq}")
    return "Checkpoints   " + ", ".join(parts)


def _ranks(job: Job) -> str:
    live = len(_live(state for _, state in job.ranks.values()))
    return f"{live}/{job.world_size}" if not job.finished else str(job.world_size)


def _live(states: Iterable[object]) -> list[object]:
    return [state for state in states if getattr(state, "exit_code", None) is None]


def _size(job: Job) -> str:
    """How many machines and ranks a job may have, and who gets ready to join."""
    assert job.spec is not None
    text = f"{_nodes(*job.nodes)} x {job.spec.nproc_per_node or 'as many ranks as slots'}"
    text += " ranks" if job.spec.nproc_per_node else ""
    if job.nodes != (job.spec.nnodes_min, job.spec.nnodes_max):
        text += f" (job file: {_nodes(job.spec.nnodes_min, job.spec.nnodes_max)})"
    if job.status and job.status.joining:
        text += f"; getting ready to join: {', '.join(job.status.joining)}"
    return text


def _nodes(low: int, high: int) -> str:
    return f"{low} machine{'s' if low != 1 else ''}" if low == high else f"{low} to {high} machines"


PHASE_COLOURS = {
    JobPhase.RUNNING: "green",
    JobPhase.SUCCEEDED: "green",
    JobPhase.FAILED: "red",
    JobPhase.RECOVERING: "yellow",
    JobPhase.CANCELLING: "yellow",
}
"""Colour of a phase on a terminal."""


def replica_of(cluster: Cluster, address: str) -> Replica | None:
    """The replica that serves at ``address``."""
    return next(
        (
            replica
            for replica in cluster.replicas.values()
            if replica.record and replica.record.address == address
        ),
        None,
    )


def names(kind: str, found: Sequence[str]) -> list[str]:
    """Lines of ``-o name``."""
    return [f"{kind}/{name}" for name in found]
