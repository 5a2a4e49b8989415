"""Values to JSON and back, driven by their dataclass fields.

Every record carries ``"v": 1``. Unknown fields are ignored, so that a newer
writer does not break an older reader, and kept by whoever rewrites a record;
an unknown major version is refused.
None and empty collections are left out: records are read by people, in
``etcdctl``. Input is bounded in size, depth and number of values before it is
trusted; numbers fit where they go (64 bits, finite) and text is valid Unicode,
so that what was read can always be written and sent on.
"""

import dataclasses
import enum
import functools
import json
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from dtrain.protocol.errors import ErrorCode, Refused

VERSION = 1
RECORD_BYTES_MAX = 256 * 1024
DEPTH_MAX = 32
ITEMS_MAX = 8_000_000
"""Separators in one document: more than a manifest of 8 MiB needs, and less than fills a machine."""

INTEGER_MIN, INTEGER_MAX = -(2**63), 2**63 - 1
"""What protobuf, sqlite and other languages' JSON can hold."""

T = TypeVar("T")


def encode(value: Any, *, over: bytes = b"") -> bytes:
    """Encode a record as one compact line of JSON with its version first.

    ``over``: the record that it replaces. Fields at its top that this release does not
    know come from a newer one, to whom they will matter again: they are kept, if both
    are of one submission (``uid``).
    """
    document = {"v": VERSION, **to_json(value)}
    if over and "uid" in document:
        document |= _unknown_fields(type(value), over, document["uid"])
    return dumps(document)


def decode(kind: type[T], data: bytes | str, *, bytes_max: int = RECORD_BYTES_MAX) -> T:
    """Decode a record.

    Raises:
        Refused: BAD_RECORD; not JSON, too large or deep, of another major
            version, or a field is missing or of the wrong type.
    """
    document = loads(data, bytes_max=bytes_max)
    if not isinstance(document, dict):
        raise _bad(kind.__name__, "is not a JSON object")
    version = document.get("v", VERSION)
    if version != VERSION:
        raise Refused(
            ErrorCode.BAD_RECORD,
            f"{kind.__name__} has version {version!r}; this dtrain reads version {VERSION}",
            fix="upgrade coordinators and agents to the release that wrote it",
        )
    return from_json(kind, document)


def dumps(document: Any) -> bytes:
    """Compact JSON; NaN and infinities are refused: they are not JSON."""
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    # File names that are no UTF-8 reach messages as lone surrogates: written as JSON's own escapes.
    return text.encode(errors="backslashreplace")


def canonical(document: Any) -> bytes:
    """JSON whose bytes are a function of the value, for digests."""
    return json.dumps(
        document, separators=(",", ":"), sort_keys=True, ensure_ascii=True, allow_nan=False
    ).encode()


def loads(data: bytes | str, *, bytes_max: int = RECORD_BYTES_MAX, items_max: int = ITEMS_MAX) -> Any:
    """Parse JSON of the outside world: bounded, finite, and without duplicate keys.

    Raises:
        Refused: BAD_RECORD.
    """
    check_size(data, bytes_max=bytes_max, items_max=items_max)
    try:
        document = json.loads(
            data, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite
        )
    except (ValueError, RecursionError) as error:
        # The sentence only: the error holds the whole document, and that may hold a secret.
        raise _bad("a record", f"is not valid JSON ({_why(error)})") from None
    check_depth(document)
    return document


def check_size(data: bytes | str, *, bytes_max: int, items_max: int = ITEMS_MAX) -> None:
    """Refuse what must not be parsed at all.

    Raises:
        Refused: BAD_RECORD; it has more bytes or values than that.
    """
    if len(data) > bytes_max:
        raise _bad("a record", f"is larger than {bytes_max} bytes")
    # Before parsing: a value of two bytes becomes an object of a hundred.
    comma, colon = (",", ":") if isinstance(data, str) else (b",", b":")
    if len(data) > items_max and data.count(comma) + data.count(colon) > items_max:  # type: ignore[arg-type]
        raise _bad("a record", f"has more than {items_max} values")


def check_depth(document: Any, levels: int = DEPTH_MAX) -> None:
    """Refuse what has more than ``levels`` lists and objects within each other.

    Raises:
        Refused: BAD_RECORD.
    """
    level = [document]
    for _ in range(levels):
        level = [
            part
            for item in level
            for part in (item.values() if isinstance(item, dict) else item if isinstance(item, list) else ())
            if isinstance(part, (dict, list))
        ]
        if not level:
            return
    raise _bad("a record", f"is nested deeper than {DEPTH_MAX}")


def value_at(text: str, at: int, *, levels: int | None) -> tuple[Any, int]:
    """Parse the one JSON value that begins just at ``at``, as ``loads`` would; returns it and its end.

    ``levels``: how many lists and objects may lie within each other; None: ``check_depth`` follows.

    Raises:
        Refused: BAD_RECORD.
    """
    try:
        value, end = _DECODER.raw_decode(text, at)
    except (ValueError, RecursionError) as error:
        raise _bad("a record", f"is not valid JSON ({_why(error)})") from None
    if levels is not None and isinstance(value, (dict, list)):
        check_depth(value, levels)
    return value, end


def is_text(text: str) -> bool:
    """Whether reading a record would leave it as it is: no lone surrogates."""
    return _valid(text) == text


def to_json(value: Any) -> dict[str, Any]:
    """A dataclass as a JSON object, None and empty collections left out."""
    result = {}
    for name, is_any in _written_fields(typing.cast(Any, type(value))):
        item = getattr(value, name)
        if type(item) in _NUMBERS:
            result[name] = item
            continue
        # A user's own value (typed Any) is kept whole: its emptiness means something.
        if not is_any and (item is None or (isinstance(item, _SIZED) and not item)):
            continue
        result[name] = _plain(item)
    return result


def from_json(kind: type[T], document: Any, where: str = "") -> T:
    """Build a ``kind`` (a dataclass) from a JSON object, checking every type."""
    try:
        # A manifest has tens of thousands of values: where each one lies is worked out only if one is wrong.
        return typing.cast(T, _builder(typing.cast(Any, kind))(document))
    except _Wrong:
        return typing.cast(T, _build(kind, document, where or kind.__name__))


def from_json_each(kind: Any, document: Any) -> dict[str, Any]:
    """Build a mapping of names to ``kind`` from a JSON object, checking every type.

    Raises:
        Refused: BAD_RECORD; without saying where.
    """
    try:
        return typing.cast(dict[str, Any], _mapping_builder(_builder(kind))(document))
    except _Wrong:
        raise _bad("a record", f"has a member that is no {kind.__name__}") from None


def _unknown_fields(kind: type, record: bytes, uid: str) -> dict[str, Any]:
    try:
        document = loads(record)
    except Refused:
        return {}
    if not isinstance(document, dict) or (document.get("v", VERSION), document.get("uid")) != (VERSION, uid):
        return {}
    return {name: item for name, item in document.items() if name != "v" and name not in _fields(kind)}


_SIZED = (tuple, list, dict, str, Mapping)
_NUMBERS = frozenset((int, float, bool))
_AS_IT_IS = _NUMBERS | {str, type(None)}


@functools.cache
def _written_fields(kind: Any) -> tuple[tuple[str, bool], ...]:
    return tuple((field.name, field.type is Any) for field in dataclasses.fields(kind))


def _plain(item: Any) -> Any:
    if type(item) in _AS_IT_IS:
        return item
    if isinstance(item, enum.Enum):
        return item.value
    if isinstance(item, (tuple, list)):
        return [_plain(part) for part in item]
    if dataclasses.is_dataclass(item) and not isinstance(item, type):
        return to_json(item)
    if isinstance(item, Mapping):
        return {str(key): _plain(part) for key, part in item.items()}
    return item


class _Wrong(Exception):
    """A value does not fit its type; ``_build`` says which and why."""


@functools.cache
def _builder(kind: Any) -> Callable[[Any], Any]:
    """What ``_build`` does for ``kind``, worked out once; raises ``_Wrong`` instead of telling."""
    if kind is Any:
        return lambda item: item
    while isinstance(kind, typing.NewType):
        kind = kind.__supertype__
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        (arm,) = [arm for arm in typing.get_args(kind) if arm is not types.NoneType]
        inner = _builder(arm)
        return lambda item: None if item is None else inner(item)
    if origin is tuple:
        return _list_builder(_builder(typing.get_args(kind)[0]))
    if origin is not None:  # Mapping[str, X]
        return _mapping_builder(_builder(typing.get_args(kind)[1]))
    if dataclasses.is_dataclass(kind):
        return _record_builder(typing.cast(type, kind))
    return _scalar_builder(kind)


def _list_builder(inner: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def build(item: Any) -> Any:
        if not isinstance(item, list):
            raise _Wrong
        return tuple(map(inner, item))

    return build


def _mapping_builder(inner: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def build(item: Any) -> Any:
        if not isinstance(item, dict):
            raise _Wrong
        return {_valid(key): inner(part) for key, part in item.items()}

    return build


def _record_builder(kind: type) -> Callable[[Any], Any]:
    parts: list[tuple[str, Callable[[Any], Any], Any]] = []

    def build(item: Any) -> Any:
        if not isinstance(item, dict):
            raise _Wrong
        if not parts:  # not before: a record may hold records of its own kind
            parts.extend(
                (name, _builder(hint), _empty(hint) if default is _REQUIRED else _OPTIONAL)
                for name, (hint, default) in _fields(kind).items()
            )
        arguments = {}
        for name, inner, absent in parts:
            if name in item:
                arguments[name] = inner(item[name])
            elif absent is _REQUIRED:
                raise _Wrong
            elif absent is not _OPTIONAL:
                arguments[name] = absent
        return kind(**arguments)

    return build


def _scalar_builder(kind: Any) -> Callable[[Any], Any]:
    if kind is int:

        def integer(item: Any) -> Any:
            if type(item) is not int or not INTEGER_MIN <= item <= INTEGER_MAX:
                raise _Wrong
            return item

        return integer
    if kind is str:

        def text(item: Any) -> Any:
            if type(item) is not str:
                raise _Wrong
            return item if item.isascii() else _valid(item)

        return text

    def other(item: Any) -> Any:
        try:
            return _build_scalar(kind, item, "")
        except Refused as error:
            raise _Wrong from error

    return other


def _build(kind: Any, item: Any, where: str) -> Any:
    if kind is Any:
        return item
    while isinstance(kind, typing.NewType):
        kind = kind.__supertype__
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        (inner,) = [arm for arm in typing.get_args(kind) if arm is not types.NoneType]
        return None if item is None else _build(inner, item, where)
    if origin is tuple:
        if not isinstance(item, list):
            raise _bad(where, "is not a list")
        element = typing.get_args(kind)[0]
        return tuple(_build(element, part, f"{where}[{i}]") for i, part in enumerate(item))
    if origin is not None:  # Mapping[str, X]
        if not isinstance(item, dict):
            raise _bad(where, "is not an object")
        element = typing.get_args(kind)[1]
        return {_valid(key): _build(element, part, f"{where}.{key[:80]}") for key, part in item.items()}
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(typing.cast(type, kind), item, where)
    return _build_scalar(kind, item, where)


def _build_scalar(kind: Any, item: Any, where: str) -> Any:
    if issubclass(kind, enum.Enum):
        try:
            return kind(item)
        except ValueError as error:
            given = repr(item)[:80]
            raise _bad(where, f"is {given}, not one of {', '.join(str(m.value) for m in kind)}") from error
    if type(item) is int and not INTEGER_MIN <= item <= INTEGER_MAX:
        raise _bad(where, "is an integer of more than 64 bits")
    if kind is float and type(item) is int:
        return float(item)
    if type(item) is not kind:
        raise _bad(where, f"is {type(item).__name__}, not {kind.__name__}")
    return _valid(item) if kind is str else item


def _build_dataclass(kind: type, item: Any, where: str) -> Any:
    if not isinstance(item, dict):
        raise _bad(where, "is not an object")
    arguments = {}
    for name, (hint, default) in _fields(kind).items():
        if name in item:
            arguments[name] = _build(hint, item[name], f"{where}.{name}")
        elif default is _REQUIRED:
            # Empty collections and strings are left out when written.
            empty = _empty(hint)
            if empty is _REQUIRED:
                raise _bad(where, f"has no {name}")
            arguments[name] = empty
    return kind(**arguments)


_REQUIRED = object()
_OPTIONAL = object()


@functools.cache
def _fields(kind: type) -> dict[str, tuple[Any, Any]]:
    hints = typing.get_type_hints(kind)
    found = {}
    for field in dataclasses.fields(kind):
        missing = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        found[field.name] = (hints[field.name], _REQUIRED if missing else None)
    return found


def _empty(hint: Any) -> Any:
    while isinstance(hint, typing.NewType):
        hint = hint.__supertype__
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return None
    if origin is tuple:
        return ()
    if origin is not None:
        return {}
    return "" if hint is str else _REQUIRED


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("an object has a key twice")
    return result


def _finite(text: str) -> float:
    value = float(text)
    if value - value != 0.0:
        raise ValueError("a number is too large")
    return value


def _why(error: Exception) -> str:
    return f"{error.msg} at {error.pos}" if isinstance(error, json.JSONDecodeError) else str(error)


def _valid(text: str) -> str:
    """Text that can be encoded: protobuf, terminals and files refuse lone surrogates."""
    return text if text.isascii() else text.encode(errors="replace").decode()


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)


def _bad(where: str, what: str) -> Refused:
    return Refused(ErrorCode.BAD_RECORD, f"{where} {what}")
