"""What a script tracks, flattened into tensors and one JSON value per tracked name.

The JSON value is the state with each tensor replaced by ``{"$tensor": name}``,
so the structure (int keys, tuples, order of keys) survives exactly. Forms that
JSON lacks are objects with one key that begins with ``$``. Nothing is pickled:
what is neither a tensor nor JSON is refused with its path and type.
"""

import base64
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dtrain.protocol.errors import ErrorCode, Refused
from dtrain.trainer.checkpoint import dtypes, sharded
from dtrain.trainer.checkpoint.layout import Spec
from dtrain.trainer.checkpoint.regions import Spread

DEPTH_MAX = 24
"""Nesting of an encoded value; manifests as a whole may be 32 deep."""

_Dict: dict[str, Callable[[], Any]] = {"$dict": dict, "$ordered": OrderedDict, "$counter": Counter}


@dataclass(frozen=True, slots=True)
class Leaf:
    """One tensor to store, viewed as safetensors dtype ``dtype``.

    ``owner`` fixes the rank that writes it; None lets the layout choose.
    ``local``: only this rank has it, under a name of its own. ``spread``: ``tensor``
    is this rank's part of a sharded tensor of ``shape``, which otherwise is its own.
    """

    name: str
    tensor: Any
    dtype: str
    owner: int | None
    local: bool
    shape: tuple[int, ...]
    spread: Spread | None = None

    @property
    def spec(self) -> Spec:
        """The tensor without its values."""
        return Spec(self.name, self.dtype, self.shape, self.owner, self.local, self.spread)


@dataclass(slots=True)
class Captured:
    """The state at one step boundary. Tensors are references, not copies."""

    leaves: list[Leaf] = field(default_factory=list)
    objects: dict[str, Any] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)


def unwrap(tracked: Any) -> Any:
    """The module inside DistributedDataParallel, DataParallel and torch.compile wrappers.

    Saved names must not depend on whether a run was distributed or compiled.
    """
    while True:
        kind = type(tracked).__name__
        if kind in ("DistributedDataParallel", "DataParallel"):
            tracked = tracked.module
        elif kind == "OptimizedModule":
            tracked = tracked._orig_mod
        else:
            return tracked


def check_trackable(name: str, tracked: Any) -> None:
    """Refuse what could be saved but never be restored in place.

    Raises:
        Refused: STATE_NOT_SAVABLE.
    """
    if "/" in name or not name.isascii() or not name.isprintable() or not name:
        raise Refused(ErrorCode.STATE_NOT_SAVABLE, f"{name!r} cannot name tracked state")
    if _is_stateful(tracked) or is_tensor(tracked) or type(tracked) in (dict, list):
        return
    raise Refused(
        ErrorCode.STATE_NOT_SAVABLE,
        f"cannot track {name}: {_type_name(tracked)} has no state_dict and load_state_dict",
        fix="track an object with both methods, a tensor, or a dict or list that you change in place",
    )


def value_of(tracked: Any) -> Any:
    """What is saved of a tracked object: its ``state_dict()``, or itself."""
    inner = unwrap(tracked)
    return inner.state_dict() if _is_stateful(inner) else inner


def capture(
    tracked: Mapping[str, Any],
    local: Mapping[str, Any],
    rank: int,
    *,
    values: Mapping[str, Any] | None = None,
    names: Iterable[str] = (),
) -> Captured:
    """Flatten tracked objects; ``local`` holds plain values that are this rank's own.

    ``values``: by name, what ``value_of`` returned a moment ago. ``names``: of tensors, taken already.

    Raises:
        Refused: STATE_NOT_SAVABLE, naming path and type.
    """
    result = Captured(names=set(names))
    for name, thing in tracked.items():
        inner = unwrap(thing)
        value = values[name] if values is not None else value_of(thing)
        encoder = _Encoder(result, rank, local=False, rank_zero=_buffers(name, inner))
        result.objects[name] = encoder.top(name, value)
    for name, value in local.items():
        encoder = _Encoder(result, rank, local=True, rank_zero=frozenset())
        result.objects[name] = encoder.top(name, value)
    return result


def apply(name: str, tracked: Any, value: Any) -> None:
    """Put a decoded value back into a tracked object."""
    inner = unwrap(tracked)
    if _is_stateful(inner):
        if is_module(inner):
            # Modules read the versions of their parts from this attribute.
            metadata = getattr(inner.state_dict(), "_metadata", None)
            value = OrderedDict(value)
            if metadata is not None:
                value._metadata = metadata
        inner.load_state_dict(value)
    elif is_tensor(inner):
        import torch

        if tuple(inner.shape) != tuple(value.shape):
            raise Refused(
                ErrorCode.RESTORE_FAILED,
                f"{name} has shape {tuple(inner.shape)}, the checkpoint {tuple(value.shape)}",
            )
        with torch.no_grad():
            inner.copy_(value)
    elif type(inner) is dict and isinstance(value, dict):
        inner.clear()
        inner.update(value)
    elif type(inner) is list and isinstance(value, list):
        inner[:] = value
    else:
        raise Refused(
            ErrorCode.RESTORE_FAILED, f"{name} is {_type_name(inner)}, the checkpoint has another kind"
        )


def is_tensor(value: Any) -> bool:
    """True for torch tensors; does not import torch."""
    return hasattr(value, "dtype") and hasattr(value, "data_ptr") and hasattr(value, "layout")


def decode(encoded: Any, tensor: Callable[[str], Any]) -> Any:
    """Rebuild a value; ``tensor`` returns the stored tensor of a name.

    Raises:
        Refused: RESTORE_FAILED; a form that this release does not know.
    """
    return decode_nodes(
        encoded, lambda node: dtypes.from_stored(tensor(node["$tensor"]), node.get("dtype", ""))
    )


def decode_nodes(encoded: Any, tensor: Callable[[dict[str, Any]], Any]) -> Any:
    """Like ``decode``; ``tensor`` gets all that was written of a tensor and returns it in its own dtype."""
    if isinstance(encoded, list):
        return [decode_nodes(part, tensor) for part in encoded]
    if not isinstance(encoded, dict):
        return encoded
    form = next((key for key in encoded if key.startswith("$")), None)
    if form is None:
        return {key: decode_nodes(part, tensor) for key, part in encoded.items()}
    body = encoded[form]
    if form == "$value":
        return decode_nodes(body, tensor)
    if form == "$tensor":
        return _as_numpy(tensor(encoded), encoded.get("numpy", ""))
    if form == "$float":
        return float(body)
    if form == "$tuple":
        return tuple(decode_nodes(part, tensor) for part in body)
    if form == "$bytes":
        return base64.b64decode(body, validate=True)
    if form in _Dict:
        made = _Dict[form]()
        for key, part in zip(body[::2], body[1::2], strict=True):
            made[decode_nodes(key, tensor)] = decode_nodes(part, tensor)
        return made
    raise Refused(ErrorCode.RESTORE_FAILED, f"the checkpoint uses the form {form!r}, unknown to this release")


def _as_numpy(value: Any, form: str) -> Any:
    if not form or value is None:  # None: only the structure is asked for
        return value
    array = value.numpy()
    return array[()] if form == "scalar" else array


class _Encoder:
    """Encodes one tracked value, adding its tensors to ``captured``."""

    def __init__(self, captured: Captured, rank: int, *, local: bool, rank_zero: frozenset[str]) -> None:
        self._captured = captured
        self._rank = rank
        self._owner = rank if local else None
        self._local = local
        self._rank_zero = rank_zero
        self._seen: dict[Any, str] = {}

    def top(self, name: str, value: Any) -> Any:
        encoded = self.encode(value, name, 1)
        # Records leave out fields that are empty; a value of its own must not look absent.
        return encoded if isinstance(encoded, dict) and encoded else {"$value": encoded}

    def encode(self, value: Any, path: str, depth: int) -> Any:
        if depth > DEPTH_MAX:
            raise Refused(ErrorCode.STATE_NOT_SAVABLE, f"{path} is nested deeper than {DEPTH_MAX}")
        kind = type(value)
        if value is None or kind is bool or kind is int:
            return value
        if kind is float:
            return value if math.isfinite(value) else {"$float": repr(value)}
        if kind is str:
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise Refused(ErrorCode.STATE_NOT_SAVABLE, f"{path} is not valid Unicode") from error
            return value
        if kind is bytes:
            return {"$bytes": base64.b64encode(value).decode("ascii")}
        if kind is list:
            return [self.encode(part, f"{path}.{i}", depth + 1) for i, part in enumerate(value)]
        if kind is tuple or kind.__name__ == "Size":
            return {"$tuple": [self.encode(part, f"{path}.{i}", depth + 2) for i, part in enumerate(value)]}
        if kind in (dict, OrderedDict, Counter):
            return self._mapping(value, path, depth)
        if is_tensor(value):
            return self._tensor(value, path, "")
        if kind.__module__.partition(".")[0] == "numpy" and hasattr(value, "dtype"):
            return self._numpy(value, path)
        raise Refused(
            ErrorCode.STATE_NOT_SAVABLE,
            f"cannot save {path}: {_type_name(value)} is neither a tensor nor JSON",
            fix="leave it out of state_dict, or turn it into tensors, numbers, strings, lists and dicts",
        )

    def _mapping(self, value: Any, path: str, depth: int) -> Any:
        kind = type(value)
        keys = list(value)
        plain = kind is dict and all(type(key) is str and not key.startswith("$") for key in keys)
        # Manifests are written with sorted keys, so only a sorted dict keeps its order as an object.
        if plain and keys and keys == sorted(keys):
            return {key: self.encode(part, f"{path}.{key}", depth + 1) for key, part in value.items()}
        flat: list[Any] = []
        for key, part in value.items():
            if key is not None and type(key) not in (str, int, float, bool, tuple):
                raise Refused(
                    ErrorCode.STATE_NOT_SAVABLE, f"cannot save {path}: it has a key of type {_type_name(key)}"
                )
            flat.append(self.encode(key, f"{path}.<key>", depth + 2))
            flat.append(self.encode(part, f"{path}.{key}", depth + 2))
        form = "$ordered" if kind is OrderedDict else "$counter" if kind is Counter else "$dict"
        return {form: flat}

    def _tensor(self, value: Any, path: str, numpy: str) -> Any:
        spread = None
        held, shape = value, tuple(value.shape)
        if sharded.is_sharded(value):
            try:
                spread = sharded.spread(value, self._rank)
            except ValueError as error:
                raise Refused(ErrorCode.STATE_NOT_SAVABLE, f"cannot save {path}: {error}") from error
            held = sharded.part(value)
        _check_tensor(held, path)
        try:
            stored, dtype, original = dtypes.to_stored(held.detach())
        except Refused as error:
            raise Refused(error.code, f"cannot save {path}: {error.message}") from error
        # A complex number is stored as two: its tensor has one dimension more.
        shape += tuple(stored.shape[held.dim() :])
        extra: dict[str, Any] = {"dtype": original} if original else {}
        if numpy:
            extra["numpy"] = numpy
        if spread is not None:
            extra["sharded"] = True
        # Tied weights: one memory under several names is stored once.
        same = _memory(stored, spread, shape)
        if math.prod(shape) and same in self._seen and not numpy:
            return {"$tensor": self._seen[same], **extra}
        name = path
        while name in self._captured.names:  # {"a.b": .., "a": {"b": ..}}
            name += "~"
        self._captured.names.add(name)
        self._seen[same] = name
        owner = 0 if path in self._rank_zero else self._owner
        self._captured.leaves.append(Leaf(name, stored, dtype, owner, self._local, shape, spread))
        return {"$tensor": name, **extra}

    def _numpy(self, value: Any, path: str) -> Any:
        import numpy as np
        import torch

        # ascontiguousarray makes one dimension out of none.
        array = np.ascontiguousarray(value).reshape(np.shape(value))
        try:
            # A copy: it may be read-only, which torch does not know.
            tensor = torch.from_numpy(array.copy())
        except TypeError as error:
            raise Refused(
                ErrorCode.STATE_NOT_SAVABLE, f"cannot save {path}: an array of {array.dtype}"
            ) from error
        return self._tensor(tensor, path, "scalar" if isinstance(value, np.generic) else "array")


def _check_tensor(value: Any, path: str) -> None:
    import torch

    kind = type(value)
    why = ""
    if kind.__name__ == "ShardedTensor":
        why = "ShardedTensor is of the first FSDP; use fully_shard, whose state is made of DTensors"
    elif kind not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
        why = f"it is a {_type_name(value)}"
    elif value.layout is not torch.strided or value.is_quantized or value.is_nested:
        why = f"its layout is {value.layout}"
    elif value.device.type == "meta":
        why = "it is on the meta device and has no values"
    if why:
        raise Refused(ErrorCode.STATE_NOT_SAVABLE, f"cannot save {path}: {why}")


def _memory(stored: Any, spread: Spread | None, shape: tuple[int, ...]) -> Any:
    """What two names of one tensor have in common, and two tensors do not."""
    if spread is None:
        return (stored.data_ptr(), stored.dtype, shape, stored.stride(), stored.device)
    # Ranks whose shard is empty must find the same tensors tied as the others: an empty
    # tensor has no address, but a storage of its own.
    storage = stored.untyped_storage()._cdata
    return (storage, stored.storage_offset(), stored.dtype, shape, spread.cuts)


def _buffers(name: str, tracked: Any) -> frozenset[str]:
    """Paths that rank 0 must write.

    Buffers such as running means differ between the ranks of a DDP job, and rank
    0's are the ones that the next forward broadcasts: any other rank's would make
    a resumed run differ from an uninterrupted one.
    """
    return (
        frozenset(f"{name}.{key}" for key, _ in tracked.named_buffers())
        if is_module(tracked)
        else frozenset()
    )


def is_module(tracked: Any) -> bool:
    """True for torch modules; does not import torch."""
    return hasattr(tracked, "named_buffers") and hasattr(tracked, "load_state_dict")


def _is_stateful(tracked: Any) -> bool:
    return callable(getattr(tracked, "state_dict", None)) and callable(
        getattr(tracked, "load_state_dict", None)
    )


def _type_name(value: Any) -> str:
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
