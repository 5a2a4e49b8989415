"""Durations and sizes, between people and numbers. Pure."""

import math
import re

_UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")


def parse_s(value: object) -> float:
    """Return seconds from a number, ``"30"``, ``"30s"``, ``"500ms"`` or ``"1h30m"``.

    Raises:
        ValueError: with a sentence saying what is accepted.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        seconds = float(value)
    else:
        text = value.strip().lower() if isinstance(value, str) else ""
        if re.fullmatch(r"\d+(\.\d+)?", text):
            seconds = float(text)
        elif text and "".join(match[0] for match in _PART.finditer(text)) == text:
            seconds = sum(float(match[1]) * _UNITS_S[match[2]] for match in _PART.finditer(text))
        else:
            raise ValueError(
                f"{value!r} is not a duration: write seconds or a unit, such as 30s, 10m or 1h30m"
            )
    if not math.isfinite(seconds) or seconds < 0:
        raise ValueError(f"{value!r} is not a duration: it is negative or not finite")
    return seconds


def show_s(seconds: float) -> str:
    """Return a duration for people, with its two leading units: ``3m12s``."""
    if seconds < 1:
        return f"{max(0.0, seconds) * 1000:.0f}ms" if seconds > 0 else "0s"
    left = int(seconds)
    parts: list[str] = []
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        if left >= size or (parts and len(parts) < 2):
            parts.append(f"{left // size}{unit}")
            left %= size
    while len(parts) > 1 and parts[-1].startswith("0"):
        parts.pop()
    return "".join(parts[:2])


def show_bytes(count: float) -> str:
    """Return a size for people, in powers of 1000: ``1.2 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
