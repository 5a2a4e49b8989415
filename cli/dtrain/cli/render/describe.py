"""``describe``: the answer first, then what it rests on. Pure: ``now`` is an argument."""

from dtrain.cli.durations import show_bytes, show_s
from dtrain.cli.records import Agent, Job
from dtrain.cli.render import moving, timeshare
from dtrain.cli.render.failures import failure_card, show_exit
from dtrain.cli.render.lists import events, progress, restarts
from dtrain.cli.render.table import UNKNOWN, Table, When, ago
from dtrain.protocol.cluster import Suspicion
from dtrain.protocol.events import EventReason
from dtrain.protocol.job import JobSpec
from dtrain.protocol.ledger import Ledger, goodput
from dtrain.protocol.rows import JobRow
from dtrain.protocol.snapshot import FailureKind, Timing, WorkerPhase
from dtrain.protocol.wording import count

BLAMES_SHOWN = 8
EVENTS_SHOWN = 20


def job(job: Job, now: float, *, whole: bool = False) -> list[str]:
    """``describe job``; ``whole``: everything that is folded or cut otherwise, too."""
    status, spec, row = job.status, job.spec, job.row(now)
    state = [job.name, str(job.phase)]
    if job.attempt:
        state.append(f"attempt {job.attempt}")
    if spec:
        state.append(f"restarts {restarts(row, now)} in {show_s(spec.restarts.window_s)}")
    if status and status.since:
        state.append(f"since {status.since} ({ago(status.since, now)})")
    lines = ["  ".join(state), f"  {job.reason}"]
    if job.intent and job.intent.wanted.value != "run" and not job.finished:
        lines.append(f"  wanted: {job.intent.wanted}" + (f" (by {job.intent.by})" if job.intent.by else ""))
    if status and status.failure:
        lines += failure_card(status.failure, whole=whole)
        if status.failure.kind is FailureKind.HANG:
            lines.append(f"    stacks of all ranks: {_stacks_command(job, status.failure.attempt)}")
        lines += _consequence(job, status.failure.attempt)
    lines += ["", _checkpoint_summary(job, now), f"Step          {_progress(row)}"]
    lines += [f"{moving.title(one):13} {moving.sentence(one)}" for one in row.moving]
    if status and status.ledger:
        lines.append(f"Goodput       {_goodput(status.ledger, now)}")
        lines += timeshare.details(status.ledger, now, saves=bool(status.store))
    if spec:
        lines += [
            f"Program       {spec.entry.kind} {' '.join((spec.entry.target, *spec.entry.args))}",
            f"Size          {_size(job)}",
            f"Folder        {_folder(spec)}",
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
        shown = sorted(job.events)[0 if whole else -EVENTS_SHOWN :]
        left = f" (the last {EVENTS_SHOWN}; --all shows more)" if len(shown) < len(job.events) else ""
        table = events([(job.name, job.events[seq]) for seq in shown], When(now, iso=True))
        lines += ["", f"Events{left}", *(f"  {line}" for line in table.lines())]
    return lines


def _consequence(job: Job, failed: int) -> list[str]:
    """What was done about it."""
    later = [event for _, event in sorted(job.events.items()) if event.attempt > failed]
    begun = next((event for event in later if event.reason is EventReason.ATTEMPT_STARTED), None)
    return [f"  dtrain: {begun.message}"] if begun is not None else []


def _progress(row: JobRow) -> str:
    if not row.steps_total:
        return str(row.step)
    left = "" if row.eta_s is None else f", {show_s(row.eta_s)} left at its recent pace"
    return f"{row.step} of {row.steps_total} ({progress(row)}){left}"


def _goodput(ledger: Ledger, now: float) -> str:
    """The share of its time that counted, and where the rest went."""
    found = goodput(ledger, now)
    ratio = UNKNOWN if found.ratio is None else f"{100 * found.ratio:.1f}%"
    words = {"lost_work": "lost"}
    parts = [f"{words.get(name, name)} {show_s(seconds)}" for name, seconds in found.headlines.items()]
    return f"{ratio}   {'  '.join(parts)}"


def agent(agent: Agent, now: float) -> list[str]:
    """``describe agent``."""
    node = agent.node
    lines = [f"{agent.name}  {agent.row.status}" + (f"  since {ago(node.since, now)}" if node else "")]
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


def blames(suspicion: Suspicion, now: float) -> list[str]:
    """What attempts have ended because of a machine, the newest last."""
    shown = suspicion.blames[-BLAMES_SHOWN:]
    more = len(suspicion.blames) - len(shown)
    lines = ["", "Attempts ended because of it" + (f" ({more} more before these)" if more else "")]
    return lines + [
        f"  {show_s(max(0.0, now - blame.at))} ago   attempt {blame.attempt} of {blame.job}: {blame.kind}"
        for blame in shown
    ]


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
    text = f"of {count(ranks, 'rank')}, {when}: {_stacks_command(job, job.attempt)}"
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


def _folder(spec: JobSpec) -> str:
    if spec.package is None:
        return spec.working_dir
    size = show_bytes(spec.package.files_bytes)
    return f"{spec.package.source} (packed: {spec.package.files} entries, {size}, {spec.package.digest[:12]})"
