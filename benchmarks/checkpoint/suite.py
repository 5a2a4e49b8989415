"""All measures of checkpoints, or those named."""

from collections.abc import Callable

from benchmarks.checkpoint import balance, restore, saving, tiny, training
from benchmarks.report import Result

MEASURES: dict[str, Callable[[int], list[Result]]] = {
    "checkpoint-save": saving.measure,
    "checkpoint-tiny": tiny.measure,
    "checkpoint-balance": balance.measure,
    "checkpoint-training": training.measure,
    "checkpoint-restore": lambda rounds: restore.measure(max(rounds, restore.ROUNDS)),
}


def measure(rounds: int) -> list[Result]:
    """All of them."""
    return [result for each in MEASURES.values() for result in each(rounds)]
