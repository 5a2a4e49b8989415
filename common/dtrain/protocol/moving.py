"""How far a job's checkpoint is on its way, over all of its machines. Pure.

Each machine tells of its own part (``Transfer``). What is said here of all of them is
for whoever looks: lists, ``describe``, the dashboard.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dtrain.protocol.rows import Movement
from dtrain.protocol.snapshot import TransferKind

MOVEMENTS_MAX = 4


@dataclass(frozen=True, slots=True)
class Share:
    """One machine's part of one checkpoint's way."""

    kind: str
    seq: int
    step: int
    done_bytes: int
    total_bytes: int = 0
    """0: not known yet."""
    bytes_per_s: float = 0.0
    told: bool = True
    """It was watched; else it was over before anybody looked."""

    @property
    def over(self) -> bool:
        """All of it has arrived."""
        return 0 < self.total_bytes <= self.done_bytes


@dataclass(frozen=True, slots=True)
class Told:
    """What one machine tells of what it moves for a job."""

    shares: tuple[Share, ...] = ()
    settled: int = 0
    """The highest checkpoint that it knows the outcome of."""


def told(document: Mapping[str, Any]) -> Told:
    """What the JSON of one ``WorkerSnapshot`` says of what moves.

    Parts of an unsettled checkpoint that were durable before anybody had watched them count, too.

    Raises:
        ValueError, TypeError, AttributeError, KeyError: it is none.
    """
    found = [
        Share(
            str(one["kind"]),
            int(one["seq"]),
            int(one["step"]),
            int(one["done_bytes"]),
            int(one.get("total_bytes", 0)),
            float(one.get("bytes_per_s", 0.0)),
        )
        for one in document.get("transfers", ())
    ]
    known = {one.seq for one in found if one.kind == TransferKind.SAVE}
    quick: dict[int, list[tuple[int, int]]] = {}
    for part in document.get("durable", ()):
        if int(part["seq"]) not in known:
            quick.setdefault(int(part["seq"]), []).append((int(part["step"]), int(part["size_bytes"])))
    ranks = len(document.get("ranks", ()))
    for seq, parts in quick.items():
        size = sum(one for _, one in parts)
        total = size if len(parts) >= ranks else 0
        found.append(Share(TransferKind.SAVE.value, seq, parts[0][0], size, total, told=False))
    return Told(tuple(found), int(document.get("seq_over", 0)))


def movements(machines: Iterable[Told], expected: int) -> tuple[Movement, ...]:
    """Sum what ``expected`` machines move; checkpoints that were too quick to be watched are left out.

    A restore is over, and nothing is said of it, once all machines that told of it have everything.
    A save is told until it is settled: that the store has all of it is not yet that it is committed.
    """
    machines = list(machines)
    # All hear of an outcome one after the other: what those that have not yet tell of is over, too.
    settled = max((machine.settled for machine in machines), default=0)
    found: dict[tuple[str, int], list[Share]] = {}
    for machine in machines:
        for share in machine.shares:
            if share.kind != TransferKind.SAVE or share.seq > settled:
                found.setdefault((share.kind, share.seq), []).append(share)
    made = []
    for (kind, _), of_one in sorted(found.items()):
        if not any(one.told for one in of_one):
            continue
        if kind == TransferKind.RESTORE and all(one.over for one in of_one):
            continue
        made.append(_summed(of_one, expected))
    return tuple(made[-MOVEMENTS_MAX:])


def _summed(of_one: Sequence[Share], expected: int) -> Movement:
    first = of_one[0]
    # A restore of a machine that has everything here takes no time that anybody could tell of.
    heard = len(of_one) >= expected or first.kind == TransferKind.RESTORE
    known = heard and all(one.total_bytes for one in of_one)
    left = [one for one in of_one if not one.over]
    left_s: float | None = None
    if known and left and all(one.bytes_per_s > 0 for one in left):
        # The slowest machine is the one that everybody waits for.
        left_s = round(max((one.total_bytes - one.done_bytes) / one.bytes_per_s for one in left), 1)
    return Movement(
        kind=first.kind,
        seq=first.seq,
        step=first.step,
        done_bytes=sum(one.done_bytes for one in of_one),
        total_bytes=sum(one.total_bytes for one in of_one) if known else 0,
        bytes_per_s=sum(one.bytes_per_s for one in left),
        left_s=left_s,
        machines=len(of_one),
        machines_done=len(of_one) - len(left),
        expected=max(expected, len(of_one)),
    )
