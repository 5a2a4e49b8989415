"""Wall-clock times as people read them. They order nothing that safety rests on."""

from datetime import UTC, datetime


def iso(wall: float) -> str:
    """UTC time to the millisecond, such as ``2026-11-22T06:00:00.000Z``."""
    stamp = datetime.fromtimestamp(wall, UTC).isoformat(timespec="milliseconds")
    return stamp.removesuffix("+00:00") + "Z"


def parse_iso(text: str) -> float | None:
    """Epoch seconds of such a time; None if it is none."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None
