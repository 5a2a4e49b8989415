"""Going back past the newest checkpoints: what ended the attempt may be in them already.

They stay committed, and what they hold stays; only no attempt begins from them any more.
"""

from dtrain.coordinator.core import committing
from dtrain.coordinator.core.draft import Draft
from dtrain.protocol.events import EventReason


def pass_over(draft: Draft, back: int, *, to_scratch: bool = False) -> bool:
    """Pass over the newest ``back`` checkpoints that an attempt could begin from; True: an older one is left.

    With fewer than that, the oldest one stays: nothing goes back to the beginning by itself, unless
    ``to_scratch`` says that a beginning from scratch is better than from any of them. What is
    open is aborted, as it would be the newest one. Call it in the decision that ends the attempt.
    """
    good = sorted(draft.good_commits(), key=lambda commit: commit.seq)
    passed = good[max(0 if to_scratch else 1, len(good) - back) :] if back > 0 else []
    if not passed:
        return False
    for stored in committing.own_open(draft):
        if not draft.deletes_key(draft.keys.open(draft.job.name, stored.value.seq)):
            committing.abort(draft, stored, "training is rolled back past it", warning=False)
    # Those that retention has removed meanwhile need no mention any more.
    known = {stored.value.seq for stored in draft.commits()} | {commit.seq for commit in draft.committed}
    over = {seq for seq in draft.status.passed_over if seq in known} | {commit.seq for commit in passed}
    draft.set(passed_over=tuple(sorted(over)))
    target = good[-1 - len(passed)] if len(passed) < len(good) else None
    names = ", ".join(str(commit.seq) for commit in passed)
    where = "the beginning" if target is None else f"checkpoint {target.seq} of step {target.step}"
    draft.event(
        EventReason.ROLLED_BACK,
        f"training goes back to {where}, past {names}",
        "" if target is None else f"checkpoint/{target.seq}",
        warning=True,
    )
    return target is not None
