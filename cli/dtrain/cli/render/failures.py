"""A failure as a title, and as the card of a root cause. Pure."""

import re
import signal as signals

from dtrain.protocol.snapshot import Failure, FailureKind


def failure_title(failure: Failure) -> str:
    """Who failed and how, in one line."""
    who = f"rank {failure.rank}" if failure.rank is not None else ""
    if failure.agent:
        who = f"{who} on {failure.agent}" if who else f"agent {failure.agent}"
    if failure.pid:
        who += f", pid {failure.pid}"
    # The leader's sentence begins with the rank; so do we.
    how = failure.message.removeprefix(f"rank {failure.rank} ")
    if failure.kind is FailureKind.SIGNAL and failure.signal:
        name = signal_name(failure.signal)
        how = how if name in how else f"{name}, {how}" if how else name
    elif failure.exit_code is not None and failure.kind is FailureKind.EXIT and not how:
        how = f"exit code {failure.exit_code}"
    return ": ".join(part for part in (who, how or str(failure.kind)) if part)


def failure_card(failure: Failure, *, lines_max: int = 50, whole: bool = False) -> list[str]:
    """Who failed first and the end of its log, indented; what failed because of it, folded or ``whole``."""
    at = f" (at step {failure.step})" if failure.step else ""
    card = [f"Root cause of attempt {failure.attempt}   {failure_title(failure)}{at}"]
    tail = failure.log_tail.rstrip("\n").splitlines()[-lines_max:] if failure.log_tail else []
    card += [f"    | {line}" for line in tail]
    if failure.also:
        # The leader names some of them, and counts the rest in a last entry of its own.
        uncounted = re.fullmatch(r"(\d+) more", failure.also[-1])
        count = len(failure.also) + (int(uncounted[1]) - 1 if uncounted else 0)
        told = [f"    + {also}" for also in failure.also]
        if not whole:
            told = [f"    + {count} more failed with it: {failure.also[0]}" + ("; ..." if count > 1 else "")]
        card += told
    return card


def show_exit(code: int) -> str:
    """An exit code, or the name of the signal for a negative one."""
    return signal_name(-code) if code < 0 else str(code)


def signal_name(number: int) -> str:
    """``SIGKILL`` for 9."""
    try:
        return signals.Signals(number).name
    except ValueError:
        return f"signal {number}"
