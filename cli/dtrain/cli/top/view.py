"""What is looked at, and what a key makes of it. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Literal

FILTER_MAX = 100
SHIFT = 8
"""Columns that an arrow moves by."""


class View(StrEnum):
    """Lists, in the order of their number keys."""

    JOBS = "jobs"
    AGENTS = "agents"
    EVENTS = "events"
    REPLICAS = "replicas"


VIEWS = tuple(View)


class Sort(StrEnum):
    """Orders of jobs: those that go on before those that have ended, or by one column."""

    ACTIVE = "active"
    NAME = "name"
    PHASE = "phase"
    STEP = "step"
    RATE = "steps/s"
    AGE = "age"


SORTS = tuple(Sort)


@dataclass(frozen=True, slots=True)
class Page:
    """One job or agent as a whole."""

    kind: Literal["job", "agent"]
    name: str


@dataclass(frozen=True, slots=True)
class Target:
    """A row: what identifies it while rows come and go, and what Enter opens."""

    key: str
    opens: Page | None = None


@dataclass(frozen=True, slots=True)
class Look:
    """Where somebody has got to. ``settled`` makes it fit what there is."""

    view: View = View.JOBS
    page: Page | None = None
    sort: Sort = Sort.ACTIVE
    backwards: bool = False
    filter: str = ""
    typing: bool = False
    """Keys go into the filter."""
    help: bool = False
    key: str = ""
    """Of the selected row."""
    index: int = 0
    """Where that was: its neighbour is selected when it goes."""
    top: int = 0
    """First line of the list, or of the page, that is shown."""
    left: int = 0
    over: bool = False


def settled(look: Look, targets: Sequence[Target], height: int, page_lines: int) -> Look:
    """Keep the selected row selected and in sight; ``height``: lines that the list or page has."""
    if look.page is not None or look.help:
        return replace(look, top=max(0, min(look.top, page_lines - height)))
    if not targets:
        return replace(look, key="", index=0, top=0)
    places = {target.key: place for place, target in enumerate(targets)}
    index = places.get(look.key, max(0, min(look.index, len(targets) - 1)))
    top = max(0, min(look.top, index, len(targets) - height))
    top = max(top, index - height + 1)
    return replace(look, key=targets[index].key, index=index, top=top)


def press(look: Look, key: str, targets: Sequence[Target], height: int) -> Look:
    """What is looked at after a key: a character, or the name of one such as "up"."""
    if look.typing:
        return _typed(look, key)
    if look.help:
        return replace(look, help=False, top=0)
    if key == "q":
        return replace(look, over=True)
    if key == "?":
        return replace(look, help=True, top=0)
    if key == "left":
        return replace(look, left=max(0, look.left - SHIFT))
    if key == "right":
        return replace(look, left=look.left + SHIFT)
    step = _step(key, height)
    if look.page is not None:
        if key in ("esc", "backspace", "enter"):
            return replace(look, page=None, top=0, left=0)
        return _list(look, key) or replace(look, top=max(0, look.top + step))
    return _in_list(look, key, targets, step)


def _in_list(look: Look, key: str, targets: Sequence[Target], step: int) -> Look:
    if key == "enter" and look.index < len(targets):
        opens = targets[look.index].opens
        return look if opens is None else replace(look, page=opens, top=0, left=0)
    if key == "/":
        return replace(look, typing=True)
    if key == "esc":
        return replace(look, filter="", left=0)
    if key == "s" and look.view is View.JOBS:
        return replace(look, sort=SORTS[(SORTS.index(look.sort) + 1) % len(SORTS)])
    if key == "r" and look.view is View.JOBS:
        return replace(look, backwards=not look.backwards)
    if step and targets:
        index = max(0, min(look.index + step, len(targets) - 1))
        return replace(look, index=index, key=targets[index].key)
    return _list(look, key) or look


def _list(look: Look, key: str) -> Look | None:
    """Another list; None: the key does not choose one."""
    place = VIEWS.index(look.view)
    if key in ("tab", "backtab"):
        place += 1 if key == "tab" else -1
    elif key in ("1", "2", "3", "4"):
        place = int(key) - 1
    else:
        return None
    return Look(VIEWS[place % len(VIEWS)], sort=look.sort, backwards=look.backwards)


def _typed(look: Look, key: str) -> Look:
    if key == "enter":
        return replace(look, typing=False)
    if key == "esc":
        return replace(look, typing=False, filter="")
    if key == "backspace":
        return replace(look, filter=look.filter[:-1])
    if key == "space":
        key = " "
    if len(key) != 1 or not key.isprintable() or len(look.filter) >= FILTER_MAX:
        return look
    return replace(look, filter=look.filter + key)


def _step(key: str, height: int) -> int:
    """Lines that a key moves by; 0: it moves nothing."""
    far = 1 << 30
    return {
        "up": -1,
        "k": -1,
        "down": 1,
        "j": 1,
        "pageup": -max(1, height - 1),
        "pagedown": max(1, height - 1),
        "space": max(1, height - 1),
        "home": -far,
        "g": -far,
        "end": far,
        "G": far,
    }.get(key, 0)
