"""How far a checkpoint is on its way, in words and as a bar. Pure."""

from dtrain.cli.durations import show_bytes, show_s
from dtrain.protocol.rows import Movement

BAR_CELLS = 20

_TITLES = {"save": "Saving", "restore": "Restoring"}


def title(one: Movement) -> str:
    """What is done."""
    return _TITLES.get(one.kind, one.kind.capitalize())


def sentence(one: Movement) -> str:
    """Of which checkpoint, how much, how fast, and how long it will take."""
    where = " in the store" if one.kind == "save" else ""
    parts = [_amount(one, where), *_pace(one)]
    if one.machines_done and one.machines_done < one.expected:
        parts.append(f"{one.machines_done} of {one.expected} machines are through")
    elif one.machines < one.expected and one.kind == "save":
        parts.append(f"{one.machines} of {one.expected} machines have begun")
    return f"checkpoint {one.seq} (step {one.step}): {', '.join(parts)}"


def line(one: Movement) -> str:
    """The same with what is done before it."""
    return f"{title(one)}: {sentence(one)}"


def short(one: Movement) -> str:
    """As much as a cell of a list has room for."""
    what = f"{title(one).lower()} {one.seq}"
    if not one.total_bytes:
        return f"{what}: {show_bytes(one.done_bytes)}"
    left = f", {show_s(one.left_s)} left" if one.left_s else ""
    return f"{what}: {_percent(one)} % of {show_bytes(one.total_bytes)}{left}"


def bar(one: Movement, width: int) -> str:
    """A bar and the sentence behind it; in less than ``width`` cells the sentence alone, cut."""
    text = line(one)
    if not one.total_bytes or len(text) + BAR_CELLS + 3 > width:
        return text[:width]
    full = min(BAR_CELLS, BAR_CELLS * one.done_bytes // one.total_bytes)
    return f"[{'#' * full}{'.' * (BAR_CELLS - full)}] {text}"


def _amount(one: Movement, where: str) -> str:
    if not one.total_bytes:
        return f"{show_bytes(one.done_bytes)} so far{where}"
    if one.done_bytes >= one.total_bytes:
        return f"all {show_bytes(one.total_bytes)}{where or ' here'}"
    return f"{show_bytes(one.done_bytes)} of {show_bytes(one.total_bytes)} ({_percent(one)} %){where}"


def _pace(one: Movement) -> list[str]:
    if one.total_bytes and one.done_bytes >= one.total_bytes:
        return []
    if one.bytes_per_s <= 0:
        return []
    left = [] if one.left_s is None else [f"about {show_s(one.left_s)} left"]
    return [f"{show_bytes(one.bytes_per_s)}/s", *left]


def _percent(one: Movement) -> int:
    return min(100, 100 * one.done_bytes // one.total_bytes)
