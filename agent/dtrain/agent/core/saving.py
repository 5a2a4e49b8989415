"""Checkpoints as an agent sees them: taken on, sealed, uploaded, settled."""

import dataclasses

from dtrain.agent.core.decisions import Action, RankMessage, TransferOrder
from dtrain.agent.core.state import AgentState, JobState, LocalRank, Saving, UploadTry
from dtrain.agent.transferring import CancelUpload, KeepManifest, KeptBlob, Upload
from dtrain.protocol.commands import BeginCheckpoint, ConfirmCheckpoint
from dtrain.protocol.ids import Rank, Seq, Step
from dtrain.protocol.job import CheckpointPolicy
from dtrain.protocol.ranklink import Begin, Durable, Outcome, Report, StopRank
from dtrain.protocol.snapshot import DurablePart, SaveProblem

OUTCOMES_KEPT = 16
UPLOAD_TRIES_MAX = 3
"""Lives of the transfer process that one upload may outlast: it could be what kills it."""

PROBLEM_CHARS_MAX = 500

REASON_LEAD_S, REASON_LEAD_SHARE = 10.0, 0.25
"""An upload that cannot end in time says why so much before its checkpoint's time is over."""


def begin(job: JobState, command: BeginCheckpoint, out: list[Action]) -> JobState:
    """Take a checkpoint on and tell the ranks; those that cannot take part say so at once."""
    if command.seq <= job.seq_over or any(outcome.seq == command.seq for outcome in job.outcomes):
        # The ABORT overtook this BEGIN, or etcd has forgotten it: the seq is over for good.
        return job
    saving = Saving(command.seq, command.nonce, command.step, command.hold_s, command.asked)
    if saving not in job.saving:
        job = dataclasses.replace(job, saving=(*job.saving, saving))
    for rank in job.ranks:
        reason = _cannot(job, rank)
        if reason:
            job = problem(job, SaveProblem(command.seq, rank.rank, False, rank.step, reason))
        elif rank.connection:
            out.append(RankMessage(rank.connection, _order(saving)))
    return job


def remind(job: JobState, rank: LocalRank, out: list[Action]) -> None:
    """Tell a rank that has just (re)connected what it may have missed."""
    held = rank.sealed.seq if rank.sealed else None
    out.extend(
        RankMessage(rank.connection, _order(saving))
        for saving in job.saving
        if saving.seq != held and not _has_problem(job, saving.seq, rank.rank)
    )
    if job.outcomes:
        newest = max(job.outcomes, key=lambda outcome: outcome.seq)
        out.append(RankMessage(rank.connection, newest))


def wish(job: JobState, report: Report) -> Step | None:
    """The step that the rank's script saves, unless an outcome may have answered it already.

    A report that crossed the outcome of what scripts asked for still asks for that very
    checkpoint: published, it would have the leader open another that nobody waits for.
    """
    return report.save_at if report.settled >= job.asked_over else None


def tell_durable(job: JobState, out: list[Action]) -> JobState:
    """Tell each rank that waits for it that its part is in the store."""
    for rank in job.ranks:
        seq = rank.wants_durable
        if seq is None or seq == rank.durable_told or not rank.connection:
            continue
        if _part(job, seq, rank.rank):
            out.append(RankMessage(rank.connection, Durable(seq)))
            job = replace_rank(job, dataclasses.replace(rank, durable_told=seq))
    return job


def heard(job: JobState, rank: LocalRank, report: Report, out: list[Action]) -> JobState:
    """Take in what a rank reports of its checkpoint."""
    if report.sealed is not None:
        sealed = report.sealed
        if any(one.seq == sealed.seq and one.nonce == sealed.nonce for one in job.saving):
            job = replace_rank(job, dataclasses.replace(rank, sealed=sealed))
        else:
            # It has not heard how its checkpoint ended: its slot is still held.
            out.extend(
                RankMessage(rank.connection, outcome)
                for outcome in job.outcomes
                if outcome.seq == sealed.seq and rank.connection
            )
    trouble = report.problem
    if trouble is not None and any(one.seq == trouble.seq for one in job.saving):
        message = trouble.message[:PROBLEM_CHARS_MAX]
        job = problem(job, dataclasses.replace(trouble, rank=rank.rank, message=message))
    return job


def order_uploads(state: AgentState, job: JobState, out: list[Action]) -> JobState:
    """Hand over every sealed part that is neither durable nor given up nor under way."""
    for rank in job.ranks:
        sealed = rank.sealed
        if sealed is None or not any(one.seq == sealed.seq for one in job.saving):
            continue
        if _part(job, sealed.seq, rank.rank) or _has_problem(job, sealed.seq, rank.rank):
            continue
        tries = next((t for t in job.uploads if (t.seq, t.rank) == (sealed.seq, rank.rank)), None)
        if tries is not None and tries.ordered:
            continue
        count = tries.tries + 1 if tries else 1
        if count > UPLOAD_TRIES_MAX:
            why = f"the transfer process ended {UPLOAD_TRIES_MAX} times during the upload"
            job = problem(job, SaveProblem(sealed.seq, rank.rank, False, sealed.step, why))
            continue
        rest = tuple(t for t in job.uploads if (t.seq, t.rank) != (sealed.seq, rank.rank))
        job = dataclasses.replace(job, uploads=(*rest, UploadTry(sealed.seq, rank.rank, count)))
        world = job.prepare.world_size if job.prepare else 0
        policy = job.prepare.spec.checkpoint if job.prepare else CheckpointPolicy()
        out.append(
            TransferOrder(
                Upload(
                    cluster=state.machine.cluster,
                    job=job.name,
                    uid=job.uid,
                    store=job.store,
                    attempt=job.attempt,
                    rank=rank.rank,
                    world=world,
                    step=sealed.step,
                    sealed=sealed,
                    bandwidth_mb_s=policy.bandwidth_mb_s,
                    patience_s=_patience_s(policy.timeout_s),
                )
            )
        )
    return job


def uploaded(job: JobState, part: DurablePart, kept: tuple[KeptBlob, ...] = ()) -> JobState:
    """A part is durable: report it, if it still belongs to a checkpoint in flight."""
    if kept:
        # What lay there before was written over by this snapshot.
        others = (one for one in job.kept if not any(_overlap(one, new) for new in kept))
        job = dataclasses.replace(job, kept=(*others, *kept))
    known = any(one.seq == part.seq and one.nonce == part.nonce for one in job.saving)
    if not known or part.attempt != job.attempt or _part(job, part.seq, part.rank):
        return job
    return dataclasses.replace(job, durable=(*job.durable, part))


def _overlap(one: KeptBlob, other: KeptBlob) -> bool:
    return (
        one.path == other.path
        and one.offset < other.offset + other.size_bytes
        and other.offset < one.offset + one.size_bytes
    )


def upload_failed(job: JobState, seq: Seq, rank: Rank, message: str) -> JobState:
    """A part will not become durable."""
    saving = next((one for one in job.saving if one.seq == seq), None)
    if saving is None:
        return job
    return problem(job, SaveProblem(seq, rank, False, saving.step, message[:PROBLEM_CHARS_MAX]))


def settle(job: JobState, outcome: Outcome, out: list[Action]) -> JobState:
    """The leader has decided: nothing of this checkpoint is held any longer."""
    if not outcome.committed:
        out.append(TransferOrder(CancelUpload(job.name, job.uid, outcome.seq)))
    tell_all(job, outcome, out)
    seq = outcome.seq
    asked = any(one.seq == seq and one.asked for one in job.saving)
    if any(one.seq == seq and one.hold_s > 0 for one in job.saving):
        # How long they were held says nothing about how long a step takes.
        job = dataclasses.replace(job, pace=dataclasses.replace(job.pace, at=0.0))
    asked_over = max(job.asked_over, seq) if asked else job.asked_over
    others = tuple(one for one in job.outcomes if one.seq != seq)
    return dataclasses.replace(
        job,
        saving=tuple(one for one in job.saving if one.seq != seq),
        uploads=tuple(one for one in job.uploads if one.seq != seq),
        durable=tuple(one for one in job.durable if one.seq != seq),
        problems=tuple(one for one in job.problems if one.seq != seq),
        ranks=tuple(
            dataclasses.replace(
                rank,
                sealed=None if rank.sealed and rank.sealed.seq == seq else rank.sealed,
                save_at=None if rank.settled < asked_over else rank.save_at,
            )
            for rank in job.ranks
        ),
        asked_over=asked_over,
        outcomes=(*others, outcome)[-OUTCOMES_KEPT:],
        seq_over=max(job.seq_over, seq),
    )


def keep_manifest(job: JobState, command: ConfirmCheckpoint, out: list[Action]) -> None:
    """Have the committed manifest here: a restart on this machine then needs nothing of the store."""
    held = any(one.seq == command.seq for one in job.saving)
    if held and job.store and command.manifest and command.digest:
        out.append(TransferOrder(KeepManifest(job.store, command.manifest, command.digest)))


def drop(job: JobState, out: list[Action]) -> JobState:
    """The attempt is over and its open checkpoints are settled: let go of all of them.

    One whose local parts were all reported may have been committed without this
    agent having heard of it: cancelling deletes what was written, so it is left
    to the garbage collector, which knows.
    """
    out.extend(
        TransferOrder(CancelUpload(job.name, job.uid, saving.seq))
        for saving in job.saving
        if not job.ranks or not all(_part(job, saving.seq, rank.rank) for rank in job.ranks)
    )
    over = max((job.seq_over, *(saving.seq for saving in job.saving)))
    return dataclasses.replace(
        job, saving=(), uploads=(), durable=(), problems=(), outcomes=(), seq_over=over, asked_over=Seq(0)
    )


def problem(job: JobState, trouble: SaveProblem) -> JobState:
    """Record why a rank has no part; the newest reason wins."""
    others = tuple(one for one in job.problems if (one.seq, one.rank) != (trouble.seq, trouble.rank))
    return dataclasses.replace(job, problems=(*others, trouble))


def tell_all(job: JobState, message: Outcome | StopRank, out: list[Action]) -> None:
    """Send to every connected rank."""
    out.extend(RankMessage(rank.connection, message) for rank in job.ranks if rank.connection)


def replace_rank(job: JobState, rank: LocalRank) -> JobState:
    """The job with this rank replaced."""
    return dataclasses.replace(job, ranks=tuple(rank if one.rank == rank.rank else one for one in job.ranks))


def _patience_s(timeout_s: float) -> float:
    """How long an upload may wait for the store: nearly to the leader's deadline, which knows no reason."""
    return timeout_s - min(REASON_LEAD_S, timeout_s * REASON_LEAD_SHARE)


def _order(saving: Saving) -> Begin:
    return Begin(saving.seq, saving.nonce, saving.step, saving.hold_s, saving.asked)


def _cannot(job: JobState, rank: LocalRank) -> str:
    if not job.store:
        return "the job has no checkpoint store"
    if rank.exit_code is not None:
        return f"rank {rank.rank} has ended"
    if not rank.sdk and rank.restored:
        return f"rank {rank.rank} has not joined through dtrain.trainer"
    return ""


def _part(job: JobState, seq: Seq, rank: Rank) -> bool:
    return any((part.seq, part.rank) == (seq, rank) for part in job.durable)


def _has_problem(job: JobState, seq: Seq, rank: Rank) -> bool:
    return any((one.seq, one.rank) == (seq, rank) for one in job.problems)
