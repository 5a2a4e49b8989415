"""Committed checkpoints that turned out damaged: put aside with the evidence, never used again."""

from dtrain.coordinator.core.draft import Draft
from dtrain.coordinator.core.stamps import iso
from dtrain.protocol.checkpoint import Quarantine
from dtrain.protocol.events import EventReason
from dtrain.protocol.ids import AgentName, Rank, Seq


def put_aside(
    draft: Draft,
    seq: Seq,
    *,
    blob: str,
    chunk: int,
    expected: str,
    found: str,
    agent: AgentName | str = "",
    rank: Rank | None = None,
    tensors: str = "",
) -> None:
    """Quarantine a checkpoint, once: every restore from here on uses the one before it.

    ``tensors`` says which of them lie in the damaged chunk, for people.
    """
    draft.quarantined.add(seq)
    if seq in draft.job.bad:
        return
    stamp = iso(draft.moment.wall)
    record = Quarantine(draft.fleet.term, seq, blob, chunk, expected, found, agent, rank, stamp)
    draft.put(draft.keys.bad(draft.job.name, seq), record, 0)
    draft.event(
        EventReason.CHECKPOINT_QUARANTINED,
        f"checkpoint {seq} is damaged ({blob}, chunk {chunk}:"
        f" expected {expected}, found {found}{tensors and f'; {tensors}'}); the one before it will be used",
        f"checkpoint/{seq}",
        warning=True,
    )
