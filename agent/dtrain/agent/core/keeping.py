"""Which attempts' logs a machine still keeps, and which may go: by age, and by the room that there is."""

from collections.abc import Sequence
from dataclasses import dataclass

YOUNG_S = 3600.0
"""What was written to so lately stays, whatever the room: it may be of an attempt that is just being made."""

UNCOPIED_TIMES = 4
"""What has no copy is kept so many times as long as what has one."""


@dataclass(frozen=True, slots=True)
class Kept:
    """Logs of one attempt on this machine."""

    folder: str
    age_s: float
    """Since anything of it was written."""
    size: int
    running: bool
    """Its ranks may still write, or its logs are about to be copied."""
    here: bool
    """Its job is not over on this machine."""
    copied: bool
    """The store has what is kept of it."""


def surplus(found: Sequence[Kept], *, keep_s: float, bytes_max: int) -> tuple[Kept, ...]:
    """What is to be deleted, the oldest first. 0 means no limit, of age or of room.

    Never what runs. Of a job that is here only what the store has too, and only for want of room. For want of
    room, copies go before what there is only once.
    """
    free = sorted(
        (one for one in found if not one.running and (one.copied or not one.here) and one.age_s >= YOUNG_S),
        key=lambda one: (-one.age_s, one.folder),
    )
    gone = [one for one in free if not one.here and _is_old(one, keep_s)]
    if bytes_max:
        excess = sum(one.size for one in found) - sum(one.size for one in gone)
        rest = [one for one in free if one not in gone]
        for one in sorted(rest, key=lambda one: (not one.copied, one.here, -one.age_s)):
            if excess <= bytes_max:
                break
            gone.append(one)
            excess -= one.size
    return tuple(gone)


def _is_old(one: Kept, keep_s: float) -> bool:
    return keep_s > 0 and one.age_s >= keep_s * (1 if one.copied else UNCOPIED_TIMES)
