"""What follows from a failure: the job's own rules, in order, then those that hold for every job.

The last of these: what a script does costs a restart, what a machine does costs none. Before that come
exit code 93 and errors of the script itself, which no machine can mend: they end the job.
"""

from collections.abc import Sequence, Set
from dataclasses import dataclass

from dtrain.coordinator.core import failures
from dtrain.coordinator.core.draft import Draft
from dtrain.coordinator.core.failures import Ending
from dtrain.protocol import patterns
from dtrain.protocol.events import EventReason
from dtrain.protocol.ids import AgentName
from dtrain.protocol.job import RULE_REASONS, FailureMark, FailureRule, NonFiniteAction, RuleAction
from dtrain.protocol.snapshot import Failure, FailureKind

MARKS_KEPT = 16
MARKS_AT_ONCE = 4
"""Of one attempt: of a thousand ranks with one error, a few machines say enough."""

SAME_MACHINE_TIMES = 3
"""The same error at the same step, so often on one machine while there was no other one to try."""

USER_ERROR = "user-error"


@dataclass(frozen=True, slots=True)
class Consequence:
    """``why``: why the job ends, or what the rule was; ``charge``: it costs a restart."""

    action: RuleAction
    charge: bool
    why: str = ""
    event: EventReason = EventReason.DO_NOT_RETRY
    cordon_s: float = 0.0
    back: int = 1


def judge(draft: Draft, ending: Ending) -> Consequence:
    """What follows from the end of the draft's attempt; the first rule that fits wins."""
    if ending.failure.hopeless:
        # Before the job's own rules: what it is to run is not there, whoever tries.
        return Consequence(RuleAction.FAIL, False, event=EventReason.PACKAGE_UNUSABLE)
    mistake = users_error(draft, (ending.failure, *ending.others))
    for number, rule in enumerate(draft.spec.failure_rules, start=1):
        if fits(rule, ending.failure, users=bool(mistake)):
            charge = {RuleAction.RESTART_FREE: False, RuleAction.ELSEWHERE: ending.charge}.get(
                rule.action, True
            )
            return Consequence(
                rule.action,
                charge and rule.action is not RuleAction.FAIL,
                f"failure rule {number} of the job says {rule.action}",
                cordon_s=rule.cordon_s,
                back=rule.back,
            )
    if ending.do_not_retry:
        return Consequence(RuleAction.FAIL, False, "exit code 93 means do not retry")
    if ending.failure.kind is FailureKind.NONFINITE:
        policy = draft.spec.nonfinite
        if policy.action is NonFiniteAction.FAIL:
            return Consequence(RuleAction.FAIL, False, event=EventReason.NON_FINITE)
        return Consequence(RuleAction.ROLLBACK, True, back=policy.back)
    if mistake:
        return Consequence(RuleAction.FAIL, False, mistake, EventReason.USER_ERROR)
    return Consequence(RuleAction.RESTART if ending.charge else RuleAction.RESTART_FREE, ending.charge)


def fits(rule: FailureRule, failure: Failure, *, users: bool = False) -> bool:
    """Whether all that ``rule`` names is true of ``failure``; ``users``: it is an error of the script."""
    if rule.reasons:
        kinds = frozenset().union(*(RULE_REASONS.get(reason, frozenset()) for reason in rule.reasons))
        if failure.kind not in kinds and not (users and USER_ERROR in rule.reasons):
            return False
    if rule.exit_codes and failure.exit_code not in rule.exit_codes:
        return False
    if rule.signals and failure.signal not in rule.signals:
        return False
    return not rule.message or patterns.found(rule.message, (failure.message, failure.log_tail))


# Errors of the script ----------------------------------------------------------------


def users_error(draft: Draft, found: Sequence[Failure]) -> str:
    """Say why the first of ``found`` can be no machine's fault; "" if it can.

    The same traceback at the same step as in an earlier attempt, on another machine; or again and again
    on the same one, where no other could be tried. Within one attempt it proves nothing: a
    service that is away fails all ranks alike, and a moment later it is back.
    """
    cause = found[0]
    if not cause.fingerprint:
        return ""
    earlier = _earlier(draft, cause)
    for failure in found:
        if failure.fingerprint != cause.fingerprint or failure.step != cause.step:
            continue
        for mark in reversed(earlier):
            if mark.agent != failure.agent:
                return (
                    f"the same error came at the same step on {mark.agent} in attempt {mark.attempt}: "
                    "it is one of the script or its data, not of a machine"
                )
    times = 1 + len({mark.attempt for mark in earlier if mark.agent == cause.agent})
    if times < SAME_MACHINE_TIMES:
        return ""
    return (
        f"it is the same error at the same step {times} times on {cause.agent}, and there was no other "
        "machine to try: it is taken for one of the script or its data"
    )


def shunned(draft: Draft) -> Set[AgentName]:
    """Machines that the next attempt leaves out, if there are enough others."""
    failure = draft.status.failure
    if failure is None or not failure.agent or failure.attempt != draft.status.attempt:
        return frozenset()
    mistake = users_error(draft, (failure,))
    for rule in draft.spec.failure_rules:
        if fits(rule, failure, users=bool(mistake)):
            return frozenset({failure.agent} if rule.action is RuleAction.ELSEWHERE else ())
    # The same again on the same machine: only another one can tell whose fault it is.
    again = failure.fingerprint and any(mark.agent == failure.agent for mark in _earlier(draft, failure))
    return frozenset({failure.agent} if again else ())


def remember(draft: Draft, found: Sequence[Failure]) -> None:
    """Mark the errors of the attempt that ends, so that they are known again."""
    status = draft.status
    marks: list[FailureMark] = []
    for failure in found:
        mark = FailureMark(status.attempt, failure.agent, failure.fingerprint, failure.step, failure.rank)
        if failure.fingerprint and len(marks) < MARKS_AT_ONCE:
            marks.append(mark)
    if marks:
        draft.set(marks=(*status.marks, *marks)[-MARKS_KEPT:])


def _earlier(draft: Draft, failure: Failure) -> list[FailureMark]:
    """Earlier attempts' marks of the same error at the same step; a commit since then takes them back."""
    newest = failures.newest_commit(draft)
    since = 0 if newest is None else newest.attempt
    return [
        mark
        for mark in draft.status.marks
        if (mark.fingerprint, mark.step) == (failure.fingerprint, failure.step)
        and since <= mark.attempt < draft.status.attempt
    ]
