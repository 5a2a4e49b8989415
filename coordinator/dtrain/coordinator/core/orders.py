"""What operators ask the leader to do about checkpoints: answered once, by deleting the request.

A request is a record of its own, so that any replica can take it, with or
without a leader, and a repeated one changes nothing. The answer is what the
records show afterwards, and an event. Several are answered one after the other.
"""

from collections.abc import Callable

from dtrain.coordinator.core import importing, quarantine, retention
from dtrain.coordinator.core.draft import Draft
from dtrain.coordinator.core.scrubbing import Depth, inspect, inspection
from dtrain.coordinator.core.views import Stored
from dtrain.protocol.checkpoint import Order, OrderKind
from dtrain.protocol.events import EventReason

INSPECT_RETRY_S = 5.0
"""Pause before a store that did not answer is asked again about a chunk that was reported damaged."""

INSPECT_S = 120.0
"""After that the report is dropped: whoever made it can make it again."""

COLLECT_RETRY_S = 2.0
COLLECT_S = 600.0


def answer(draft: Draft) -> None:
    """Answer the oldest request that can be answered now; ask for the work that the others need."""
    by_kind: dict[OrderKind, Callable[[Draft, str, Stored[Order]], None]] = {
        OrderKind.DELETE: _delete,
        OrderKind.INSPECT: _inspect,
        OrderKind.COLLECT: _collect,
        OrderKind.IMPORT: importing.answer,
    }
    for order_id, stored in sorted(draft.job.orders.items(), key=lambda item: item[1].create_revision):
        if draft.has_writes:
            return  # a decision about training is never held up by it
        if stored.value.uid != draft.status.uid:
            _done(draft, order_id, stored)
        else:
            by_kind[stored.value.kind](draft, order_id, stored)


def _delete(draft: Draft, order_id: str, stored: Stored[Order]) -> None:
    seq = stored.value.seq
    commit = next((one for one in draft.job.commits if one.value.seq == seq), None)
    if commit is None:
        _done(draft, order_id, stored)
        return
    kept = retention.untouchable(retention.shelf(draft)).get(seq)
    if kept:
        _tell(draft, stored, f"checkpoint {seq} is not deleted: it is {kept}", warning=True)
    else:
        retention.retire(draft, commit, _asked_by(stored.value))
        draft.event(
            EventReason.CHECKPOINT_DELETED,
            f"checkpoint {seq} of step {commit.value.step} is deleted, {_asked_by(stored.value)}",
            f"checkpoint/{seq}",
        )
    _done(draft, order_id, stored)


def _inspect(draft: Draft, order_id: str, stored: Stored[Order]) -> None:
    """Have the chunk read again here: one machine's bad memory must not cost a good checkpoint."""
    order = stored.value
    commit = next((one for one in draft.commits() if one.value.seq == order.seq), None)
    if commit is None or order.seq in draft.job.bad or not draft.status.store:
        _done(draft, order_id, stored)
        return
    seen = inspection(draft, order.seq, Depth.CHUNK, order.blob, order.chunk)
    if seen is not None and seen.at >= stored.seen_at and not seen.problem:
        if seen.damage is None:
            text = f"checkpoint {order.seq} was reported damaged ({order.blob}, chunk {order.chunk})"
            text += ", but reads right: look at the machine that reported it"
            _tell(draft, stored, text, warning=True)
        else:
            draft.guard(draft.keys.checkpoint(draft.job.name, order.seq), commit.mod_revision)
            quarantine.put_aside(draft, order.seq, seen.damage)
        _done(draft, order_id, stored)
        return
    if draft.now >= stored.seen_at + INSPECT_S:
        _tell(draft, stored, f"checkpoint {order.seq} could not be inspected in time", warning=True)
        _done(draft, order_id, stored)
        return
    draft.wake(stored.seen_at + INSPECT_S)
    if seen is not None and seen.problem and draft.now < seen.at + INSPECT_RETRY_S:
        draft.wake(seen.at + INSPECT_RETRY_S)
        return
    draft.work(inspect(draft, commit.value, Depth.CHUNK, order.blob, order.chunk))


def _collect(draft: Draft, order_id: str, stored: Stored[Order]) -> None:
    swept_at = draft.job.swept_at
    if not draft.status.store or (swept_at is not None and swept_at >= stored.seen_at):
        found = draft.job.swept_found
        text = found.problem or f"{found.deleted} orphaned objects were deleted"
        if draft.status.store:
            draft.event(
                EventReason.GARBAGE_COLLECTED,
                f"the store was searched for orphans, {_asked_by(stored.value)}: {text}",
                warning=bool(found.problem),
            )
        _done(draft, order_id, stored)
        return
    if draft.now >= stored.seen_at + COLLECT_S:
        _tell(draft, stored, "the store could not be searched for orphans in time", warning=True)
        _done(draft, order_id, stored)
        return
    draft.wake(draft.now + COLLECT_RETRY_S)
    draft.work(retention.orphans(draft))


def _done(draft: Draft, order_id: str, stored: Stored[Order]) -> None:
    draft.delete(draft.keys.order(draft.job.name, order_id), stored.mod_revision)


def _tell(draft: Draft, stored: Stored[Order], text: str, *, warning: bool = False) -> None:
    about = f"checkpoint/{stored.value.seq}" if stored.value.seq else ""
    draft.event(EventReason.USER_REQUESTED, text, about, warning=warning)


def _asked_by(order: Order) -> str:
    return f"asked for by {order.by}" if order.by else "as it was asked for"
