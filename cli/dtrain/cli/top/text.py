"""Text in the cells of a terminal. Pure."""

import unicodedata

ELLIPSIS = "…"


def cells(text: str) -> int:
    """How many cells a terminal gives to ``text``."""
    return len(text) if text.isascii() else sum(map(_cells, text))


def cut(text: str, width: int, *, left: int = 0) -> str:
    """At most ``width`` cells of ``text``, from cell ``left`` on; what is cut off leaves a mark."""
    if left:
        text = _from(text, left)
    if cells(text) <= width:
        return text
    kept, used = [], 0
    for character in text:
        used += _cells(character)
        if used > width - 1:
            break
        kept.append(character)
    return ("".join(kept) + ELLIPSIS) if width > 0 else ""


def _from(text: str, left: int) -> str:
    for place, character in enumerate(text):
        if left <= 0:
            return text[place:]
        left -= _cells(character)
    return ""


def _cells(character: str) -> int:
    if unicodedata.combining(character) or unicodedata.category(character) in ("Cf", "Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in ("W", "F") else 1
