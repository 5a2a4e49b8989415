"""What the headlines of a job's ledger are made of, for people. Pure: ``now`` is an argument."""

from dtrain.cli.durations import show_s
from dtrain.protocol.ledger import Ledger, goodput, headline


def details(ledger: Ledger, now: float, *, saves: bool) -> list[str]:
    """Categories by headline, and what a failure now would take away of a job that ``saves``."""
    found = goodput(ledger, now)
    parts: dict[str, list[str]] = {}
    for name, seconds in found.seconds.items():
        if "." in name:
            part = name.partition(".")[2].replace("_", "-")
            parts.setdefault(headline(name), []).append(f"{part} {show_s(seconds)}")
    text = "; ".join(f"{name}: {', '.join(of)}" for name, of in parts.items())
    lines = [f"              {text}"] if text else []
    if saves and not found.over and found.unsaved_s > 0:
        lines.append(f"              {show_s(found.unsaved_s)} of it in no checkpoint yet")
    return lines
