"""What the transfer process asks of stores, told to its agent now and then: the agent has the status port."""

from dtrain.agent.transferring import StoreUse
from dtrain.runtime.metrics import Distribution
from dtrain.storage.blobs.metered import StoreMeter

TELL_EVERY_S = 2.0


class Teller:
    """Knows what has been told. For one thread."""

    def __init__(self, meter: StoreMeter) -> None:
        self._meter = meter
        self._told = meter.seconds.read()
        self._told_retries = meter.retries.read()

    def news(self) -> StoreUse | None:
        """Return what is new since the last call; None: nothing."""
        counts: dict[str, tuple[int, ...]] = {}
        seconds: dict[str, float] = {}
        now = self._meter.seconds.read()
        for labels, value in now.items():
            former = self._told.get(labels)
            assert isinstance(value, Distribution)
            if value == former:
                continue
            before = (
                former if isinstance(former, Distribution) else Distribution((0,) * len(value.counts), 0.0)
            )
            counts[labels[0]] = tuple(n - b for n, b in zip(value.counts, before.counts, strict=True))
            seconds[labels[0]] = max(0.0, value.total - before.total)
        self._told = now
        retries: dict[str, dict[str, float]] = {}
        failed = self._meter.retries.read()
        for labels, times in failed.items():
            more = _number(times) - _number(self._told_retries.get(labels, 0.0))
            if more > 0:
                retries.setdefault(labels[0], {})[labels[1]] = more
        self._told_retries = failed
        return StoreUse(counts, seconds, retries) if counts or retries else None


def _number(value: float | Distribution) -> float:
    assert not isinstance(value, Distribution)
    return value


def take(meter: StoreMeter, use: StoreUse) -> None:
    """Add what a transfer process tells to what its agent knows."""
    for op, counts in use.counts.items():
        meter.seconds.merge(Distribution(tuple(counts), use.seconds.get(op, 0.0)), op)
    for op, codes in use.retries.items():
        for code, times in codes.items():
            meter.retries.add(op, code, amount=times)
