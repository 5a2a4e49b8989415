"""Where a job's time went, for people. Pure: ``now`` is an argument."""

from dtrain.cli.durations import show_s
from dtrain.cli.records import Job
from dtrain.protocol.ledger import Goodput, goodput, headline

_WORDS = {"lost_work": "lost"}


def of(job: Job, now: float) -> Goodput | None:
    """The job's ledger at ``now``; None if no leader has kept one yet."""
    ledger = job.status.ledger if job.status else None
    return None if ledger is None else goodput(ledger, now)


def lines(job: Job, now: float) -> list[str]:
    """The share of productive time, the headlines, and what each of them is made of."""
    found = of(job, now)
    if found is None:
        return []
    share = "–" if found.ratio is None else f"{100 * found.ratio:.1f} %"
    told = [f"{_WORDS.get(name, name)} {show_s(seconds)}" for name, seconds in found.headlines.items()]
    text = [f"Goodput       {share}   {'  '.join(told)}   of {show_s(found.wall_s)}"]
    parts: dict[str, list[str]] = {}
    for name, seconds in found.seconds.items():
        if "." in name:
            part = name.partition(".")[2].replace("_", "-")
            parts.setdefault(headline(name), []).append(f"{part} {show_s(seconds)}")
    if parts:
        text.append("              " + "; ".join(f"{name}: {', '.join(of)}" for name, of in parts.items()))
    if not found.over and found.unsaved_s > 0 and job.status is not None and job.status.store:
        text.append(f"              {show_s(found.unsaved_s)} of it in no checkpoint yet")
    return text
