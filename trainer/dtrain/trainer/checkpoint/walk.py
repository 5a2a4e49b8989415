"""Captures the same state again and again, and pays only for what changed since the last time.

Encoding every tensor's name and place anew costs tens of microseconds a tensor, all of it stall.
The state of a training run hardly ever changes its form, so the form is remembered: a capture
compares names, types, dtypes, shapes, strides and addresses with it, and writes the few plain
values that moved on (a learning rate, a position) into JSON text that is otherwise kept. Whatever
differs in any other way is encoded anew by ``state``, the only place that knows how.
"""

import math
import re
import secrets
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dtrain.protocol import codec
from dtrain.trainer.checkpoint import dtypes, sharded, state
from dtrain.trainer.checkpoint.layout import Spec

_MARK = f"hole-{secrets.token_hex(8)}-"
_PATIENCE = 3
"""Captures in a row that find another form, until the form of a value is no longer worth remembering."""

_Check = Callable[[Any, "_Seen"], None]


@dataclass(frozen=True, slots=True)
class Shot:
    """The state at one step boundary: references to tensors, and everything else as text.

    ``specs`` is the same object as in the shot before if nothing in it changed; ``tensors`` are in
    its order. ``objects`` holds an ``ObjectEntry`` as canonical JSON for each name.
    """

    specs: list[Spec]
    tensors: list[Any]
    objects: dict[str, bytes]


class Walk:
    """Captures what one rank tracks."""

    def __init__(self, tracked: Mapping[str, Any], rank: int) -> None:
        self._tracked = tracked
        self._rank = rank
        self._known: dict[str, _Known] = {}
        self._parts: list[list[Spec]] = []
        self._specs: list[Spec] = []

    def capture(self, local: Mapping[str, Any]) -> Shot:
        """Look at everything tracked; ``local`` holds plain values that are this rank's own.

        Raises:
            Refused: STATE_NOT_SAVABLE, naming path and type.
        """
        parts: list[list[Spec]] = []
        tensors: list[Any] = []
        objects: dict[str, bytes] = {}
        renamed = False
        for name, thing in self._tracked.items():
            # Once a capture: a state_dict may be a collective, or may have effects.
            value = state.value_of(thing)
            known = self._known.get(name)
            # Names given out earlier decide over later ones, and all ranks must give out the same.
            found = known.again(value) if known is not None and not renamed else None
            if known is None or found is None:
                before = known.specs if known is not None else None
                known = self._known[name] = _Known(known.misses + 1 if known is not None else 0)
                found = known.encode(name, thing, value, self._rank, _names(parts))
                renamed = renamed or known.specs != before
            parts.append(known.specs)
            tensors += found
            objects[name] = known.text
        captured = state.capture({}, local, self._rank)
        parts.append([leaf.spec for leaf in captured.leaves])
        tensors += [leaf.tensor for leaf in captured.leaves]
        objects |= {name: _entry(codec.canonical(value)) for name, value in captured.objects.items()}
        if not _same(parts, self._parts):
            self._parts = parts
            self._specs = [spec for part in parts for spec in part]
        return Shot(self._specs, tensors, objects)


class _Known:
    """The form of one tracked value, and its JSON.

    No tensor is kept: one that the script has dropped must not live on here.
    """

    def __init__(self, misses: int) -> None:
        self.misses = misses
        self.specs: list[Spec] = []
        self.text = b""
        self._top: dict[str, Any] = {}
        self._check: _Check | None = None
        self._picks: list[tuple[int, bool]] = []
        self._holes: list[tuple[Any, Any]] = []
        self._pieces: list[bytes] = []

    def encode(self, name: str, thing: Any, value: Any, rank: int, names: Iterable[str]) -> list[Any]:
        """Take on the form of ``value``; return its tensors in the order of ``specs``."""
        captured = state.capture({name: thing}, {}, rank, values={name: value}, names=names)
        self.specs = [leaf.spec for leaf in captured.leaves]
        self._top = {"value": captured.objects[name]}
        self.text = _entry(codec.canonical(self._top["value"]))
        if self.misses < _PATIENCE:
            compiler = _Compiler(captured.leaves)
            try:
                self._check = compiler.top(value, self._top)
                self._picks = compiler.picks
            except _Unknown:
                self.misses = _PATIENCE
        return [leaf.tensor for leaf in captured.leaves]

    def again(self, value: Any) -> list[Any] | None:
        """The tensors of ``value`` in the order of ``specs``; None if it has another form than before.

        Plain values that changed are in ``text`` then.
        """
        if self._check is None:
            return None
        seen = _Seen([], [])
        try:
            self._check(value, seen)
        except Exception:  # noqa: BLE001 - whatever is odd about it is for the encoder to say
            return None
        self.misses = 0
        if seen.moved:
            self._rewrite(seen.moved)
        tensors = seen.tensors
        return [
            tensors[index] if plain else dtypes.to_stored(tensors[index].detach())[0]
            for index, plain in self._picks
        ]

    def _rewrite(self, moved: list[tuple[Any, Any, Any]]) -> None:
        """Put the values that moved into the text."""
        for container, key, encoded in moved:
            container[key] = encoded
        known = {(id(container), key) for container, key in self._holes}
        fresh = [(container, key) for container, key, _ in moved if (id(container), key) not in known]
        if fresh:
            self._cut(self._holes + fresh)
        filled = [self._pieces[0]]
        for (container, key), piece in zip(self._holes, self._pieces[1:], strict=True):
            filled += (codec.canonical(container[key]), piece)
        self.text = _entry(b"".join(filled))

    def _cut(self, holes: list[tuple[Any, Any]]) -> None:
        """Split the text at every value that ever moved, in the order in which they appear in it."""
        values = [container[key] for container, key in holes]
        for number, (container, key) in enumerate(holes):
            container[key] = f"{_MARK}{number}"
        text = codec.canonical(self._top["value"])
        for (container, key), value in zip(holes, values, strict=True):
            container[key] = value
        parts = re.split(f'"{_MARK}([0-9]+)"'.encode(), text)
        self._pieces = parts[::2]
        self._holes = [holes[int(number)] for number in parts[1::2]]


@dataclass(slots=True)
class _Seen:
    """What one walk came across: tensors in order, and plain values that differ, with their place."""

    tensors: list[Any]
    moved: list[tuple[Any, Any, Any]]


class _Changed(Exception):
    """The value has another form than the one remembered."""


class _Unknown(Exception):
    """A form that is encoded anew each time."""


class _Compiler:
    """Turns a value and its encoding into a function that checks the next value against them.

    It mirrors ``state``'s encoder, and takes no part of it for granted: what does not look exactly
    as expected is a form that is not remembered.
    """

    def __init__(self, leaves: list[state.Leaf]) -> None:
        self._leaves = leaves
        self._index = {leaf.name: index for index, leaf in enumerate(leaves)}
        self._picked: dict[int, tuple[int, bool]] = {}
        self._count = 0

    @property
    def picks(self) -> list[tuple[int, bool]]:
        """For each leaf, the number of its tensor in a walk, and whether it is stored as it is."""
        return [self._picked[index] for index in range(len(self._leaves))] if self._picked else []

    def top(self, value: Any, holder: dict[str, Any]) -> _Check:
        encoded = holder["value"]
        wrapped = isinstance(encoded, dict) and set(encoded) == {"$value"}
        check = self._compile(value, encoded, "$value") if wrapped else self._compile(value, holder, "value")
        if len(self._picked) != len(self._leaves):
            raise _Unknown
        return check

    def _compile(self, value: Any, container: Any, key: Any) -> _Check:
        encoded = container[key]
        kind = type(value)
        if kind in (bool, int, float, str) or value is None:
            return _scalar(value, container, key)
        if kind is list and type(encoded) is list and len(encoded) == len(value):
            return _sequence(kind, [self._compile(part, encoded, i) for i, part in enumerate(value)])
        if type(encoded) is not dict:
            raise _Unknown
        if kind is tuple or kind.__name__ == "Size":
            flat = encoded.get("$tuple")
            if type(flat) is not list or len(flat) != len(value):
                raise _Unknown
            return _sequence(kind, [self._compile(part, flat, i) for i, part in enumerate(value)])
        if kind in (dict, OrderedDict, Counter):
            return self._mapping(value, encoded)
        if state.is_tensor(value):
            return self._tensor(value, encoded)
        raise _Unknown

    def _mapping(self, value: Any, encoded: dict[str, Any]) -> _Check:
        kind = type(value)
        if any(type(key) not in (str, int) for key in value):
            raise _Unknown
        form = "$ordered" if kind is OrderedDict else "$counter" if kind is Counter else "$dict"
        flat = encoded.get(form)
        parts = []
        if len(encoded) == 1 and type(flat) is list and len(flat) == 2 * len(value):
            for index, (key, part) in enumerate(value.items()):
                if flat[2 * index] != key:
                    raise _Unknown
                parts.append((key, self._compile(part, flat, 2 * index + 1)))
        elif kind is dict and list(encoded) == list(value):
            parts = [(key, self._compile(part, encoded, key)) for key, part in value.items()]
        else:
            raise _Unknown
        return _mapping(kind, parts)

    def _tensor(self, value: Any, encoded: dict[str, Any]) -> _Check:
        import torch

        index = self._index.get(encoded.get("$tensor", ""))
        if index is None or "numpy" in encoded:
            raise _Unknown
        split = sharded.is_sharded(value)
        held = value._local_tensor if split else value
        if type(held) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
            raise _Unknown
        stored = self._leaves[index].tensor
        plain = set(encoded) == {"$tensor"}
        if plain and (stored.data_ptr(), stored.dtype, stored.shape) != (
            held.data_ptr(),
            held.dtype,
            held.shape,
        ):
            raise _Unknown
        self._picked.setdefault(index, (self._count, plain))
        self._count += 1
        return _shard(value) if split else _tensor(value)


def _scalar(known: Any, container: Any, key: Any) -> _Check:
    kind = type(known)
    # -0.0 equals 0.0, and nan nothing; their texts are right.
    last = [repr(known) if kind is float else known]

    def check(value: Any, seen: _Seen) -> None:
        now = repr(value) if type(value) is float else value
        if type(value) is kind and now == last[0]:
            return
        if kind is not type(value) or (kind is float and not math.isfinite(value)) or kind is str:
            raise _Changed
        seen.moved.append((container, key, value))
        last[0] = now

    if type(container[key]) is not kind:
        raise _Unknown
    return check


def _sequence(kind: type[Any], checks: list[_Check]) -> _Check:
    def check(value: Any, seen: _Seen) -> None:
        if type(value) is not kind or len(value) != len(checks):
            raise _Changed
        for part, each in zip(value, checks, strict=True):
            each(part, seen)

    return check


def _mapping(kind: type[Any], parts: list[tuple[Any, _Check]]) -> _Check:
    def check(value: Any, seen: _Seen) -> None:
        if type(value) is not kind or len(value) != len(parts):
            raise _Changed
        for (key, part), (known, each) in zip(value.items(), parts, strict=True):
            # True equals 1: the type counts.
            if key is not known and (key != known or type(key) is not type(known)):
                raise _Changed
            each(part, seen)

    return check


def _tensor(known: Any) -> _Check:
    kind, dtype, shape, stride = type(known), known.dtype, known.shape, known.stride()
    address, conjugate, negative = known.data_ptr(), known.is_conj(), known.is_neg()
    tidy = not (dtype.is_complex or conjugate or negative)

    def check(value: Any, seen: _Seen) -> None:
        # The address tells tied tensors from equal ones: with all of them as before, so are the ties.
        if (
            type(value) is not kind
            or value.data_ptr() != address
            or value.dtype is not dtype
            or value.shape != shape
            or value.stride() != stride
            or value.is_neg() is not negative
            or (not tidy and value.is_conj() is not conjugate)
        ):
            raise _Changed
        seen.tensors.append(value)

    return check


def _shard(known: Any) -> _Check:
    kind, mesh, placements, whole = type(known), known.device_mesh, known.placements, known.shape
    part = _tensor(known._local_tensor)
    # Empty parts have no address: what ties them is their storage.
    storage = None if known._local_tensor.numel() else known._local_tensor.untyped_storage()._cdata

    def check(value: Any, seen: _Seen) -> None:
        if (
            type(value) is not kind
            or value.shape != whole
            or value.placements != placements
            or (value.device_mesh is not mesh and value.device_mesh != mesh)
        ):
            raise _Changed
        part(value._local_tensor, seen)
        if storage is not None and value._local_tensor.untyped_storage()._cdata != storage:
            raise _Changed

    return check


def _names(parts: list[list[Spec]]) -> Iterable[str]:
    return (spec.name for part in parts for spec in part)


def _same(parts: list[list[Spec]], before: list[list[Spec]]) -> bool:
    """Whether no spec differs. Those of a remembered form are the same list, compared in no time."""
    return len(parts) == len(before) and all(
        part is old or part == old for part, old in zip(parts, before, strict=True)
    )


def _entry(text: bytes) -> bytes:
    """An ``ObjectEntry`` around the canonical JSON of its value."""
    return b'{"crc":"%08x","value":%b}' % (zlib.crc32(text), text)
