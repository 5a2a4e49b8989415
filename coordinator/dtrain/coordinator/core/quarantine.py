"""Committed checkpoints that turned out damaged: put aside with the evidence, never used again."""

from dtrain.coordinator.core.draft import Draft
from dtrain.coordinator.core.stamps import iso
from dtrain.coordinator.core.views import Damage
from dtrain.protocol.checkpoint import Quarantine
from dtrain.protocol.events import EventReason
from dtrain.protocol.ids import AgentName, Seq


def put_aside(draft: Draft, seq: Seq, damage: Damage, agent: AgentName | str = "") -> None:
    """Quarantine a checkpoint, once: every restore from here on uses the one before it.

    ``agent`` is whoever met the damage, "" for the leader itself.
    """
    draft.quarantined.add(seq)
    if seq in draft.job.bad:
        return
    stamp = iso(draft.moment.wall)
    record = Quarantine(
        draft.fleet.term,
        seq,
        damage.blob,
        damage.chunk,
        damage.expected,
        damage.found,
        agent,
        damage.rank,
        stamp,
    )
    draft.put(draft.keys.bad(draft.job.name, seq), record, 0)
    draft.event(
        EventReason.CHECKPOINT_QUARANTINED,
        f"checkpoint {seq} is damaged ({damage.blob}, chunk {damage.chunk}: expected {damage.expected},"
        f" found {damage.found}{damage.tensors and f'; {damage.tensors}'}); the one before it will be used",
        f"checkpoint/{seq}",
        warning=True,
    )
