"""Runs checks side by side, each within its limit; what does not answer is a finding, too."""

import threading
import time
from collections.abc import Callable, Sequence

from dtrain.cli.doctor.findings import Check, Finding, Level, Verdict, fail
from dtrain.protocol.errors import DtrainError

Said = Callable[[Sequence[Finding]], None]


def run(checks: Sequence[Check], said: Said) -> list[Finding]:
    """Return what all checks find, in their order; ``said`` hears what each has found.

    A check beyond its limit is left alone: it ends with its own timeouts, or with the process.
    """
    results: list[list[Verdict] | None] = [None] * len(checks)
    done = [threading.Event() for _ in checks]

    def probe(number: int) -> None:
        results[number] = _probed(checks[number])
        done[number].set()

    begun = time.monotonic()
    for number, check in enumerate(checks):
        threading.Thread(target=probe, args=(number,), name=check.name, daemon=True).start()
    found: list[Finding] = []
    for number, check in enumerate(checks):
        done[number].wait(max(0.0, begun + check.limit_s - time.monotonic()))
        verdicts = results[number]
        if verdicts is None:
            verdicts = [
                fail(
                    f"no answer within {check.limit_s:g} s", "see whether it can be reached from here at all"
                )
            ]
        mine = [Finding(check.scope, check.name, one.level, one.measured, one.fix) for one in verdicts]
        said(mine)
        found += mine
    return found


def _probed(check: Check) -> list[Verdict]:
    try:
        return list(check.probe())
    except DtrainError as error:
        cause = f": {error.cause}" if error.cause else ""
        return [fail(f"{error.message}{cause}", error.fix)]
    except Exception as error:  # noqa: BLE001 - one check that is broken must not hide what others find
        return [Verdict(Level.FAIL, f"{type(error).__name__}: {error}", "please report this: a check broke")]
