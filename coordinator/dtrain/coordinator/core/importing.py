"""Checkpoints whose bytes come from elsewhere: opened, followed and committed like any other.

Only before the first attempt of a job, so that nothing that trains ever finds a
checkpoint it does not come from. Whoever imports asks by an order on a lease of
its own, writes into the folder of the open record, and reports its part in the
order; from there on it is verified and committed like the part of a rank. No
attempt starts meanwhile. An order that is gone, with its lease or taken back,
aborts the checkpoint: what was written is an orphan then.
"""

from dtrain.coordinator.core import checkpoints, committing
from dtrain.coordinator.core.draft import Draft
from dtrain.coordinator.core.tally import Cause
from dtrain.coordinator.core.views import Stored
from dtrain.protocol.checkpoint import Order, OrderKind
from dtrain.protocol.events import EventReason
from dtrain.protocol.job import JobPhase

WORLD = 1
"""Parts of an imported checkpoint."""


def follow(draft: Draft) -> bool:
    """Decide about the import under way; False if there is none."""
    current = next((one for one in committing.own_open(draft) if one.value.imported), None)
    if current is None:
        return False
    record = current.value
    order = draft.job.orders.get(record.imported)
    parts = committing.durable_parts(draft, record)
    verdict = committing.verdict_of(draft, record)
    deadline = current.seen_at + record.timeout_s
    draft.explain("a checkpoint is being imported: the first attempt begins after it")
    if order is None:
        committing.abort(draft, current, "whoever imported it has gone, or has given up", warning=False)
        return True
    if verdict is not None and verdict.ok and parts:
        committing.commit(draft, current, verdict)
    elif verdict is not None and not verdict.ok and not verdict.retry and parts:
        committing.abort(draft, current, verdict.problem, Cause.VERIFY)
    elif draft.now >= deadline:
        why = f": {verdict.problem}" if verdict is not None and verdict.problem else ""
        why = f"it was not imported within {record.timeout_s:g} s{why}"
        committing.abort(draft, current, why, Cause.TIMEOUT)
    else:
        draft.wake(deadline)
        if parts:
            draft.say(f"verifying the imported checkpoint {record.seq}")
            committing.ask_verdict(draft, record, parts)
        return True
    _answered(draft, record.imported, order)
    return True


def begin(draft: Draft, store: str) -> bool:
    """Open the import that was asked for first; True if the first attempt has to wait for one."""
    asked = sorted(
        (
            (order_id, stored)
            for order_id, stored in draft.job.orders.items()
            if stored.value.kind is OrderKind.IMPORT and stored.value.uid == draft.status.uid
        ),
        key=lambda item: item[1].create_revision,
    )
    if _has_trained(draft):
        return False  # it was suspended, or made room: ``answer`` refuses
    if asked and not store:
        refuse(draft, *asked[0], "the job has no store to keep it in")
        return True
    if asked:
        order_id, stored = asked[0]
        draft.set(store=store)
        checkpoints.open_import(draft, order_id, stored.value, WORLD)
        draft.explain("a checkpoint is being imported: the first attempt begins after it")
        return True
    if is_awaited(draft):
        why = "" if store else "; but it has no store to keep one in: set checkpoint.store"
        name = draft.job.name
        draft.explain(f"waiting for a checkpoint to begin from: dtrain checkpoints import {name} PATH{why}")
        return True
    return False


def _has_trained(draft: Draft) -> bool:
    """Whether ranks of this submission have completed a step: what they did would be thrown away."""
    return draft.status.step > 0 and not is_awaited(draft)


def is_awaited(draft: Draft) -> bool:
    """Whether the job may not begin, as it would begin from scratch."""
    return draft.spec.checkpoint.await_import and draft.newest_good() is None


def answer(draft: Draft, order_id: str, stored: Stored[Order]) -> None:
    """Refuse an import that came too late; before the first attempt, ``begin`` answers."""
    status = draft.status
    if status.phase is not JobPhase.QUEUED or _has_trained(draft):
        where = f"at step {status.step}" if status.phase is JobPhase.QUEUED else str(status.phase)
        refuse(draft, order_id, stored, f"the job is {where}, not waiting for its first attempt")


def refuse(draft: Draft, order_id: str, stored: Stored[Order], why: str) -> None:
    """Tell whoever asked that nothing is imported."""
    text = f"no checkpoint is imported: {why}"
    draft.event(EventReason.USER_REQUESTED, text, f"import/{order_id}", warning=True)
    _answered(draft, order_id, stored)


def _answered(draft: Draft, order_id: str, stored: Stored[Order]) -> None:
    draft.delete(draft.keys.order(draft.job.name, order_id), stored.mod_revision)
