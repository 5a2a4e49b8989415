"""Labels: names and values by which people sort their jobs. Nothing is decided by them. Pure."""

import re
from collections.abc import Mapping

LABELS_MAX = 32
CHARACTERS_MAX = 63

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._/-]*[A-Za-z0-9])?")
_VALUE = re.compile(r"([A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?)?")


def problem(labels: Mapping[str, str]) -> str:
    """Why a selector on a command line could not name these labels; "": it can."""
    if len(labels) > LABELS_MAX:
        return f"there are {len(labels)} labels, at most {LABELS_MAX} may be"
    for name, value in labels.items():
        if len(name) > CHARACTERS_MAX or not _NAME.fullmatch(name):
            return (
                f"{name[:CHARACTERS_MAX]!r} is no name of a label: at most {CHARACTERS_MAX} letters, digits "
                "and . _ / -"
            )
        if len(value) > CHARACTERS_MAX or not _VALUE.fullmatch(value):
            return (
                f"{value[:CHARACTERS_MAX]!r} is no value of a label: at most {CHARACTERS_MAX} letters, "
                "digits and . _ -"
            )
    return ""
