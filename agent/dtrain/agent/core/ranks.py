"""Ranks on their connections: Hello, reports, and what they are told."""

import dataclasses
import math
from collections.abc import Iterable, Mapping

from dtrain.agent.core import hangs, isolation, saving
from dtrain.agent.core.decisions import Action, DropConnection, RankMessage
from dtrain.agent.core.events import RankConnected, RankDisconnected, RankReported
from dtrain.agent.core.failures import MESSAGE_CHARS_MAX, fail
from dtrain.agent.core.saving import replace_rank
from dtrain.agent.core.state import AgentState, JobState, LocalRank
from dtrain.protocol.ids import Step
from dtrain.protocol.ranklink import Hello, Report, Welcome
from dtrain.protocol.snapshot import Failure, FailureKind, WorkerPhase

METRICS_KEPT = 32
METRIC_NAME_CHARS_MAX = 64
NONFINITE_KEPT = 8


def connected(state: AgentState, event: RankConnected, out: list[Action]) -> AgentState:
    """Welcome a rank of the current attempt; send any other away: a zombie must exit."""
    hello = event.hello
    job = state.jobs.get(hello.job)
    why = _refusal(job, hello)
    if job is None or why:
        out.append(RankMessage(event.connection, Welcome(False, False, why)))
        out.append(DropConnection(event.connection))
        return state
    rank = job.rank(hello.rank)
    assert rank is not None
    rank = dataclasses.replace(
        rank,
        connection=event.connection,
        # Until now it may have been taken for a plain script, which has nothing to restore.
        restored=rank.restored and rank.sdk,
        phase=rank.phase if rank.sdk else WorkerPhase.RESTORING,
        sdk=True,
        plan_sent=False,
        wants_restore=False,
        durable_told=None,
        demands=hello.demands,
        need=None,
        have_sent=False,
    )
    spec = job.prepare.spec if job.prepare else None
    welcome = Welcome(
        True,
        bool(job.store),
        save_timeout_s=spec.checkpoint.timeout_s if spec else 0.0,
        finite=spec.nonfinite.metrics if spec else (),
    )
    out.append(RankMessage(event.connection, welcome))
    saving.remind(job, rank, out)
    return state.with_job(dataclasses.replace(replace_rank(job, rank), sdk=True))


def reported(
    state: AgentState, event: RankReported, now: float, wall: float, out: list[Action]
) -> AgentState:
    """Take over a rank's whole state."""
    found = _of_connection(state, event.connection)
    if found is None:
        return state
    job, rank = found
    report = event.report
    if rank.phase is report.phase is WorkerPhase.TRAINING:
        job = isolation.paced(job, rank.step, report.step, now)
    rank = dataclasses.replace(
        rank,
        phase=_phase(report),
        step=Step(max(0, report.step)),
        last_step=report.last_step,
        metrics=_metrics(report.metrics),
        timing=report.timing,
        nonfinite=_kept(job, report.nonfinite),
        nonfinite_seen={name: report.nonfinite_seen[name] for name in _kept(job, report.nonfinite_seen)},
        section=report.section[:METRIC_NAME_CHARS_MAX],
        beats=report.beats,
        restored=rank.restored or report.phase is not WorkerPhase.RESTORING,
        wants_restore=report.wants_restore,
        plan_sent=rank.plan_sent and report.wants_restore,
        save_at=saving.wish(job, report),
        settled=report.settled,
        wants_durable=report.wants_durable,
        need=report.need,
        have_sent=rank.have_sent and report.need == rank.need,
        collective=report.collective[:METRIC_NAME_CHARS_MAX],
        steps_total=Step(max(0, report.steps_total)),
        held_s=round(max(0.0, report.held_s), 3),
    )
    job, rank = hangs.heard(job, rank, report, now)
    job = saving.heard(replace_rank(job, rank), rank, report, out)
    if report.restore_failed is not None:
        failure = Failure(
            FailureKind.RESTORE,
            report.restore_failed.message[:MESSAGE_CHARS_MAX],
            agent=state.machine.agent,
            attempt=job.attempt,
            rank=rank.rank,
            pid=rank.pid or None,
            at=wall,
        )
        job = fail(job, failure, now)
    return state.with_job(job)


def disconnected(state: AgentState, event: RankDisconnected) -> AgentState:
    """The connection is gone; whether the rank is, its launcher will say."""
    found = _of_connection(state, event.connection)
    if found is None:
        return state
    job, rank = found
    return state.with_job(replace_rank(job, dataclasses.replace(rank, connection=0, plan_sent=False)))


def _refusal(job: JobState | None, hello: Hello) -> str:
    if job is None or job.uid != hello.uid:
        return f"job {hello.job} ({hello.uid}) is not on this machine"
    if job.attempt != hello.attempt:
        return f"attempt {hello.attempt} is over"
    if job.stopping is not None:
        return f"the job is being stopped: {job.stopping.why}"
    if job.phase not in (WorkerPhase.RESTORING, WorkerPhase.TRAINING):
        return f"attempt {hello.attempt} is {job.phase}"
    rank = job.rank(hello.rank)
    if rank is None or rank.exit_code is not None:
        return f"rank {hello.rank} does not run on this machine"
    return ""


def _of_connection(state: AgentState, connection: int) -> tuple[JobState, LocalRank] | None:
    for job in state.jobs.values():
        for rank in job.ranks:
            if rank.connection == connection:
                return job, rank
    return None


def _phase(report: Report) -> WorkerPhase:
    """DONE means an exit with 0; a rank whose loop has ended still runs."""
    if report.phase in (WorkerPhase.RESTORING, WorkerPhase.CHECKPOINTING):
        return report.phase
    return WorkerPhase.TRAINING


def _kept(job: JobState, names: Iterable[str]) -> tuple[str, ...]:
    """A few names, those first that the job wants to be finite: the leader must hear of them."""
    wanted = job.prepare.spec.nonfinite.metrics if job.prepare else ()
    fitting = (name for name in names if len(name) <= METRIC_NAME_CHARS_MAX)
    return tuple(sorted(fitting, key=lambda name: (name not in wanted, name))[:NONFINITE_KEPT])


def _metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Bounded, and finite: JSON has no NaN, and one rank's must not stop all reports."""
    kept = [(name[:METRIC_NAME_CHARS_MAX], value) for name, value in metrics.items() if math.isfinite(value)]
    return dict(kept[:METRICS_KEPT])
