"""The tensors of a rank manifest, out of its text.

A model of many small tensors has them whole: one chunk each, that covers all of it. Such an entry is
checked where it stands and goes into the merged manifest as it is, but for the number of its blob; no
value is built of it. All others are parsed, for ``manifest.merge`` to check.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dtrain.coordinator.core.manifest import ITEM_BITS
from dtrain.protocol import codec
from dtrain.protocol.checkpoint import TensorEntry

_PLAIN = r"[ !#-\[\]-~]*"
_NAME = re.compile(rf'"({_PLAIN})":')
_NUMBER = r"(?:0|[1-9][0-9]{0,17})"
_WHOLE = re.compile(
    # Names and numbers as canonical JSON writes them, the origin zero, the size that of the tensor.
    rf'"({_PLAIN})":\{{"chunks":\[\{{"b":({_NUMBER})'
    rf'(,"len":({_NUMBER})(?:,"o":\[(0(?:,0)*)\])?,"off":({_NUMBER})(?:,"s":\[({_NUMBER}(?:,{_NUMBER})*)\])?'
    r'\}\],"dtype":"([A-Z0-9_]+)"(?(7),"shape":\[\7\])\})([,}])'
)


class Odd(Exception):
    """Not as our ranks write it, or it does not fit: for ``judge_in_full`` to decide, and to say why."""


@dataclass(frozen=True, slots=True)
class Tensors:
    """The tensors of one rank."""

    whole: Mapping[str, str]
    """Checked members of the merged manifest's tensors, canonical, by the name of the tensor."""
    others: Mapping[str, TensorEntry]
    ends: Sequence[int]
    """How long each blob of the rank has to be for the whole ones."""


def read(text: str, at: int, *, blobs: int, base: int) -> Tensors:
    """Read the object that begins at ``at`` and closes with the document.

    ``blobs``: how many this rank has; ``base``: how many those before it have.

    Raises:
        Odd, Refused: it cannot be read like this.
    """
    at = past(text, at, "{")
    whole: dict[str, str] = {}
    others: dict[str, Any] = {}
    names: set[str] = set()
    ends = [0] * blobs
    fitting: set[tuple[str, str, str, str]] = set()
    count = 0
    closed = text.startswith("}", at)
    if closed:
        at += 1
    while not closed:
        count += 1
        found = _WHOLE.match(text, at)
        if found is None:
            name, at = member(text, at, names)
            others[name], at = codec.value_at(text, at, levels=None)
            closed = text.startswith("}", at)
            at = at + 1 if closed else past(text, at, ",")
            continue
        name, number, rest, length, origin, offset, shape, dtype, mark = found.groups()
        form = (dtype, length, origin, shape)
        if form not in fitting:
            if not _fits(*form):
                raise Odd
            fitting.add(form)
        blob, end = int(number), int(offset) + int(length)
        if blob >= blobs:
            raise Odd
        ends[blob] = max(ends[blob], end)
        whole[name] = f'"{name}":{{"chunks":[{{"b":{blob + base}{rest}'
        at = found.end()
        closed = mark == "}"
    if text[at:] != "}" or count != len(whole.keys() | others.keys()):
        raise Odd
    codec.check_depth(others, codec.DEPTH_MAX - 1)
    return Tensors(whole, codec.from_json_each(TensorEntry, others), ends)


def joined(ranks: Sequence[Tensors], merged: Mapping[str, TensorEntry]) -> bytes:
    """The tensors of all ranks in canonical JSON; nothing if there are none.

    ``merged``: those that are not whole, of all ranks.

    Raises:
        Odd: two ranks have one that is whole.
    """
    members = {
        name: f"{codec.canonical(name).decode()}:{codec.canonical(codec.to_json(entry)).decode()}"
        for name, entry in merged.items()
    }
    count = len(members)
    for rank in ranks:
        count += len(rank.whole)
        members |= rank.whole
    if count != len(members):
        raise Odd
    return f"{{{','.join(members[name] for name in sorted(members))}}}".encode() if members else b""


def past(text: str, at: int, mark: str) -> int:
    """Return where it goes on behind ``mark``, which must be there."""
    if not text.startswith(mark, at):
        raise Odd
    return at + len(mark)


def member(text: str, at: int, names: set[str]) -> tuple[str, int]:
    """Return the name of a member, which must not be in ``names``, and where its value begins."""
    plain = _NAME.match(text, at)
    if plain is not None:
        name, at = plain[1], plain.end()
    else:
        name, at = codec.value_at(text, at, levels=0)
        at = past(text, at, ":")
    if type(name) is not str or name in names or not codec.is_text(name):
        raise Odd
    names.add(name)
    return name, at


def _fits(dtype: str, length: str, origin: str | None, shape: str | None) -> bool:
    """Whether a chunk at ``origin`` of ``shape`` has so many bytes; None: of a tensor without dimensions."""
    sizes = [int(size) for size in shape.split(",")] if shape else []
    dimensions = origin.count(",") + 1 if origin else 0
    bits = ITEM_BITS.get(dtype)
    return len(sizes) == dimensions and (bits is None or math.prod(sizes) * bits == int(length) * 8)
