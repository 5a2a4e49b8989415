"""Between attempts: every open checkpoint is committed or deleted before a restore point is chosen."""

from dtrain.coordinator.core import committing, nonfinite, sealed
from dtrain.coordinator.core.draft import Draft
from dtrain.coordinator.core.tally import Cause
from dtrain.coordinator.core.views import Stored
from dtrain.protocol.checkpoint import OpenRecord
from dtrain.protocol.ids import Rank
from dtrain.protocol.job import JobPhase
from dtrain.protocol.wording import some

SETTLE_S = 15.0
"""How long a new attempt waits for a complete checkpoint of the old one to be verified."""


def settle(draft: Draft, *, patient: bool) -> bool:
    """Commit each complete open checkpoint and delete the others; False while one is verified.

    A new attempt starts only after this: between choosing a restore point and
    restoring, no older checkpoint may still be committed. Not ``patient``: what
    is not verified by now is dropped.
    """
    waits = draft.status.phase in (JobPhase.RECOVERING, JobPhase.SUSPENDING)
    since = draft.in_phase_since if waits else None
    deadline = None if since is None else since + SETTLE_S
    settled = True
    for stored in reversed(committing.own_open(draft)):  # newest first: ``latest`` is put once
        if draft.deletes_key(draft.keys.open(draft.job.name, stored.value.seq)):
            continue  # this very decision has committed or aborted it
        settled = _settle_one(draft, stored, patient, deadline) and settled
    return settled


def _settle_one(draft: Draft, stored: Stored[OpenRecord], patient: bool, deadline: float | None) -> bool:
    record = stored.value
    if record.imported:
        # Only before the first attempt, which is not to come.
        committing.abort(draft, stored, "the job ended while it was imported", warning=False)
        return True
    if unfit := nonfinite.refusal(draft, record):
        committing.abort_unfit(draft, stored, unfit)
        return True
    parts = committing.durable_parts(draft, record)
    verdict = committing.verdict_of(draft, record)
    if not committing.is_complete(parts, record):
        missing = [Rank(rank) for rank in range(record.world_size) if rank not in parts]
        if patient and sealed.is_awaited(draft, record, missing):
            return False
        why = f"the attempt ended before ranks {some(missing, committing.TOLD_MAX)} were durable"
        committing.abort(draft, stored, why, warning=False)
        return True
    if verdict is not None and verdict.ok:
        committing.commit(draft, stored, verdict, settled=True)
        return True
    if verdict is not None and not verdict.retry:
        committing.abort(draft, stored, verdict.problem, Cause.VERIFY)
        return True
    if not patient or (deadline is not None and draft.now >= deadline):
        committing.abort(draft, stored, "it could not be verified in time", Cause.TIMEOUT)
        return True
    if deadline is not None:
        draft.wake(deadline)
    draft.say(f"verifying checkpoint {record.seq} of step {record.step} before the next attempt")
    if not committing.remember_departed(draft, stored):
        committing.ask_verdict(draft, record, parts)
    return False
