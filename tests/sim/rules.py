"""Failure rules that the jobs of a run may have, by name."""

from dtrain.protocol.job import FailureRule, JobSpec, NonFiniteAction, RuleAction

RULES = {
    "crashes are free": FailureRule(RuleAction.RESTART_FREE, reasons=("signal",)),
    "killed: elsewhere": FailureRule(RuleAction.ELSEWHERE, signals=(9,)),
    "segfault: machine kept free": FailureRule(RuleAction.RESTART, signals=(11,), cordon_s=20.0),
    "peer lost: elsewhere": FailureRule(RuleAction.ELSEWHERE, reasons=("collective",), message="by peer"),
    "hang: back": FailureRule(RuleAction.ROLLBACK, reasons=("hang",)),
    "hang: elsewhere": FailureRule(RuleAction.ELSEWHERE, reasons=("hang",), cordon_s=15.0),
    "not finite: free": FailureRule(RuleAction.RESTART_FREE, reasons=("nonfinite",)),
    "not finite: back": FailureRule(RuleAction.ROLLBACK, reasons=("nonfinite",), back=3),
    "machine lost: back": FailureRule(RuleAction.ROLLBACK, reasons=("node-lost",)),
    "not finite: end": FailureRule(RuleAction.FAIL, reasons=("nonfinite",)),
    "code 77: end": FailureRule(RuleAction.FAIL, exit_codes=(77,)),
}


def may_end_of_numbers(spec: JobSpec) -> bool:
    """Whether a loss that is not finite may end the job."""
    about = [rule for rule in spec.failure_rules if "nonfinite" in rule.reasons]
    if about:
        return about[0].action is RuleAction.FAIL
    return spec.nonfinite.action is NonFiniteAction.FAIL


def ends_with(spec: JobSpec, code: int) -> bool:
    """Whether a rank that exits with ``code`` ends the job."""
    return code == 93 or any(code in rule.exit_codes for rule in spec.failure_rules)
