"""Retries, in one place, with bounds: the only home of tenacity.

Only ``Unavailable`` is retried, and ``OutcomeUnknown`` where the caller says
that the operation is idempotent. Waits grow with full jitter, so that clients
that failed together do not come back together.
"""

from collections.abc import Callable
from typing import TypeVar

import tenacity

from dtrain.protocol.errors import OutcomeUnknown, Unavailable

T = TypeVar("T")


def call(
    operation: Callable[[], T],
    *,
    attempts: int = 5,
    wait_s_first: float = 0.05,
    wait_s_max: float = 2.0,
    deadline_s: float = 30.0,
    idempotent: bool = False,
    sleep: Callable[[float], None] = tenacity.nap.sleep,
) -> T:
    """Run ``operation`` until it answers, at most ``attempts`` times.

    ``sleep`` waits between two of them; what it raises ends the call. (By default tenacity's own,
    which is where a simulation puts its virtual time.)

    Raises:
        Unavailable, OutcomeUnknown: the last one seen, once attempts or
            ``deadline_s`` are spent. Anything else at once.
    """
    retryable = (Unavailable, OutcomeUnknown) if idempotent else (Unavailable,)
    retrying = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(attempts) | tenacity.stop_after_delay(deadline_s),
        wait=tenacity.wait_random_exponential(multiplier=wait_s_first, max=wait_s_max),
        retry=tenacity.retry_if_exception_type(retryable),
        reraise=True,
        sleep=sleep,
    )
    return retrying(operation)
