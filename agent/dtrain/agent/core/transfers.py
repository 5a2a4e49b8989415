"""What the transfer process reports, and the fetch that a restore begins with."""

import dataclasses
from collections.abc import Mapping
from typing import assert_never

from dtrain.agent.core import moving, packages, saving
from dtrain.agent.core.decisions import Action, RankMessage, TransferOrder
from dtrain.agent.core.failures import MESSAGE_CHARS_MAX, fail
from dtrain.agent.core.saving import replace_rank
from dtrain.agent.core.state import AgentState, JobState, LocalRank
from dtrain.agent.transferring import (
    Demand,
    Fetch,
    Fetched,
    FetchFailed,
    Moved,
    ReleaseFetch,
    Supplied,
    TransferEnded,
    TransferReport,
    Unpacked,
    UnpackFailed,
    Uploaded,
    UploadFailed,
)
from dtrain.protocol.job import RestorePoint
from dtrain.protocol.ranklink import Need, RestorePlan
from dtrain.protocol.snapshot import Failure, FailureKind, WorkerPhase

FETCH_TRIES_MAX = 3

TIERS = (("arena", "snapshots in memory here"), ("cache", "the cache here"), ("store", "the store"))


def reported(
    state: AgentState, report: TransferReport, now: float, wall: float, out: list[Action]
) -> AgentState:
    """Take in one report."""
    match report:
        case Uploaded():
            job = state.jobs.get(report.job)
            return state if job is None else state.with_job(saving.uploaded(job, report.part, report.kept))
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
            state = _count(state, job, report.tiers)
            restore = dataclasses.replace(job.restore, plan=report.plan, tiers=report.tiers)
            return state.with_job(dataclasses.replace(job, restore=restore))
        case Supplied():
            job = _fetching(state, report.id)
            if job is None:
                return state
            return _count(state, job, report.tiers).with_job(_supplied(job, report))
        case FetchFailed():
            job = _fetching(state, report.id)
            return state if job is None else state.with_job(_fetch_failed(state, job, report, now, wall))
        case Moved():
            return moving.moved(state, report, now)
        case Unpacked():
            return packages.unpacked(state, report)
        case UnpackFailed():
            return packages.unpack_failed(state, report, now, wall)
        case TransferEnded():
            for job in state.jobs.values():
                state = state.with_job(packages.forgotten(_forget_orders(job)))
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
        restore = dataclasses.replace(restore, plan=None, released=True)
        if any(restore.tiers.values()) and all(rank.restored for rank in job.ranks):
            job = dataclasses.replace(job, note=_sentence(start.restore, restore.tiers))
        return dataclasses.replace(job, restore=restore)
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
                    on_demand=True,
                    kept=job.kept,
                    ranks=tuple(rank.rank for rank in job.ranks),
                    world=job.prepare.world_size if job.prepare else 0,
                )
            )
        )
    plan = restore.plan if restore.id else RestorePlan(None)
    if plan is None:
        return job
    for rank in job.ranks:
        if rank.wants_restore and rank.connection:
            job = replace_rank(job, _serve(job, rank, plan, out))
    return job


def _serve(job: JobState, rank: LocalRank, plan: RestorePlan, out: list[Action]) -> LocalRank:
    """Give a rank the plan, and then what it says it needs; one that cannot say so waits for everything."""
    if plan.on_demand and not rank.demands:
        need: Need | None = Need(plan.token, 0, whole=True)
    else:
        if not rank.plan_sent:
            out.append(RankMessage(rank.connection, plan))
            rank = dataclasses.replace(rank, plan_sent=True)
        need = rank.need if rank.need is not None and rank.need.plan == plan.token else None
    if need is None:
        return rank
    if rank.asked != need:
        out.append(TransferOrder(Demand(job.restore.id, rank.rank, need, private=not rank.demands)))
        return dataclasses.replace(rank, asked=need, have=None, have_sent=False)
    if rank.have is None or rank.have_sent:
        return rank
    if rank.demands:
        out.append(RankMessage(rank.connection, rank.have))
    elif not rank.plan_sent:
        places = tuple(held.place for held in rank.have.blobs)
        whole = dataclasses.replace(plan, blobs=places, on_demand=False, token="")
        out.append(RankMessage(rank.connection, whole))
    return dataclasses.replace(rank, plan_sent=True, have_sent=True)


def _count(state: AgentState, job: JobState, tiers: Mapping[str, int]) -> AgentState:
    """Add what has come since the last report of this fetch."""
    before = job.restore.tiers
    grown = {tier: size - before.get(tier, 0) for tier, size in tiers.items()}
    total = {tier: state.restored.get(tier, 0) + max(0, size) for tier, size in grown.items()}
    return dataclasses.replace(state, restored={**state.restored, **total})


def _supplied(job: JobState, report: Supplied) -> JobState:
    job = dataclasses.replace(job, restore=dataclasses.replace(job.restore, tiers=report.tiers))
    rank, have = job.rank(report.rank), report.have
    if rank is None or rank.asked is None or (rank.asked.plan, rank.asked.number) != (have.plan, have.number):
        return job  # it has asked for something else since
    return replace_rank(job, dataclasses.replace(rank, have=have, have_sent=False))


def _sentence(point: RestorePoint | None, tiers: Mapping[str, int]) -> str:
    found = ", ".join(f"{tiers[tier] / 1e6:.1f} MB from {name}" for tier, name in TIERS if tiers.get(tier))
    return f"restored checkpoint {point.seq if point else 0}: {found}"


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
        restore=dataclasses.replace(job.restore, ordered=False, plan=None, tiers={}),
        uploads=tuple(dataclasses.replace(one, ordered=False) for one in job.uploads),
        ranks=tuple(
            dataclasses.replace(rank, plan_sent=False, asked=None, have=None, have_sent=False)
            for rank in job.ranks
        ),
    )
