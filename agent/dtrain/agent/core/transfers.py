"""What the transfer process reports, and the fetch that a restore begins with."""

import dataclasses
from typing import assert_never

from dtrain.agent.core import saving
from dtrain.agent.core.decisions import Action, RankMessage, TransferOrder
from dtrain.agent.core.failures import MESSAGE_CHARS_MAX, fail
from dtrain.agent.core.saving import replace_rank
from dtrain.agent.core.state import AgentState, JobState
from dtrain.agent.transferring import (
    Fetch,
    Fetched,
    FetchFailed,
    ReleaseFetch,
    TransferEnded,
    TransferReport,
    Uploaded,
    UploadFailed,
)
from dtrain.protocol.ranklink import RestorePlan
from dtrain.protocol.snapshot import Failure, FailureKind, WorkerPhase

FETCH_TRIES_MAX = 3


def reported(
    state: AgentState, report: TransferReport, now: float, wall: float, out: list[Action]
) -> AgentState:
    """Take in one report."""
    match report:
        case Uploaded():
            job = state.jobs.get(report.job)
            return state if job is None else state.with_job(saving.uploaded(job, report.part))
        case UploadFailed():
            job = state.jobs.get(report.job)
            if job is None:
                return state
            return state.with_job(saving.upload_failed(job, report.seq, report.rank, report.message))
        case Fetched():
            job = _fetching(state, report.id)
            if job is None:
                # Nobody waits for it any more; its memory must not stay.
                out.append(TransferOrder(ReleaseFetch(report.id)))
                return state
            return state.with_job(
                dataclasses.replace(job, restore=dataclasses.replace(job.restore, plan=report.plan))
            )
        case FetchFailed():
            job = _fetching(state, report.id)
            return state if job is None else state.with_job(_fetch_failed(state, job, report, now, wall))
        case TransferEnded():
            for job in state.jobs.values():
                state = state.with_job(_forget_orders(job))
            return state
        case _:
            assert_never(report)


def order_fetch(state: AgentState, job: JobState, now: float, out: list[Action]) -> JobState:
    """Fetch what the ranks restore from, hand it out, and let it go once all have it."""
    restore, start = job.restore, job.start
    if start is None:
        return job
    if restore.id and not restore.released and _is_over(job):
        out.append(TransferOrder(ReleaseFetch(restore.id)))
        return dataclasses.replace(job, restore=dataclasses.replace(restore, plan=None, released=True))
    if job.phase is not WorkerPhase.RESTORING or restore.released:
        return job
    if restore.id and not restore.ordered:
        if restore.tries >= FETCH_TRIES_MAX:
            failure = Failure(
                FailureKind.RESTORE,
                f"the transfer process ended {FETCH_TRIES_MAX} times during the fetch",
                agent=state.machine.agent,
                attempt=job.attempt,
            )
            return fail(job, failure, now)
        restore = dataclasses.replace(restore, ordered=True, tries=restore.tries + 1)
        job = dataclasses.replace(job, restore=restore)
        assert start.restore is not None
        point = start.restore
        out.append(
            TransferOrder(
                Fetch(
                    id=restore.id,
                    job=job.name,
                    uid=job.uid,
                    store=job.store,
                    seq=point.seq,
                    step=point.step,
                    manifest=point.manifest,
                    digest=point.digest,
                )
            )
        )
    plan = restore.plan if restore.id else RestorePlan(None)
    if plan is None:
        return job
    for rank in job.ranks:
        if rank.wants_restore and not rank.plan_sent and rank.connection:
            out.append(RankMessage(rank.connection, plan))
            job = replace_rank(job, dataclasses.replace(rank, plan_sent=True))
    return job


def _is_over(job: JobState) -> bool:
    running = job.phase is WorkerPhase.RESTORING and job.stopping is None
    return not running or all(rank.restored or rank.exit_code is not None for rank in job.ranks)


def _fetching(state: AgentState, fetch_id: str) -> JobState | None:
    for job in state.jobs.values():
        if job.restore.id == fetch_id and not job.restore.released:
            return job
    return None


def _fetch_failed(state: AgentState, job: JobState, report: FetchFailed, now: float, wall: float) -> JobState:
    failure = Failure(
        FailureKind.RESTORE,
        report.message[:MESSAGE_CHARS_MAX],
        agent=state.machine.agent,
        attempt=job.attempt,
        rank=report.bad.rank if report.bad else None,
        at=wall,
    )
    return fail(dataclasses.replace(job, bad=report.bad), failure, now)


def _forget_orders(job: JobState) -> JobState:
    """What was fetched lay in the process that ended; its uploads ended with it."""
    return dataclasses.replace(
        job,
        restore=dataclasses.replace(job.restore, ordered=False, plan=None),
        uploads=tuple(dataclasses.replace(one, ordered=False) for one in job.uploads),
        ranks=tuple(dataclasses.replace(rank, plan_sent=False) for rank in job.ranks),
    )
