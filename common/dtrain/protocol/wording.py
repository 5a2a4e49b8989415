"""Numbers of things in words, and long lists: a few by name, and how many there are besides."""

from collections.abc import Iterable


def some(things: Iterable[object], most: int, *, between: str = ", ") -> str:
    """Return ``a, b and 3 more``: at most ``most`` of ``things`` are named.

    With another sign between them the rest stands behind it, too: ``a; b; and 3 more``.
    """
    listed = list(things)
    rest = more(len(listed), most)
    if rest and between != ", ":
        rest = between.rstrip() + rest
    return between.join(map(str, listed[:most])) + rest


def more(total: int, most: int) -> str:
    """Return what ends a sentence that names ``most`` of ``total``: `` and 3 more``, or nothing."""
    return f" and {total - most} more" if total > most else ""


def count(number: int, noun: str) -> str:
    """Return ``1 rank``, ``2 ranks``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
