"""Which memory each stored tensor goes to.

Parameters, buffers, DTensor shards and tracked tensors are filled where they are.
Everything else, such as the state of an optimizer that has none yet, gets new
memory: for DTensors only as much as this rank holds, for others the whole.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from dtrain.protocol.checkpoint import TensorEntry
from dtrain.protocol.errors import ErrorCode, Refused
from dtrain.trainer.checkpoint import dtypes, regions, sharded, state
from dtrain.trainer.checkpoint.filling import Filling, Target

Node = dict[str, Any]
"""An encoded tensor: ``{"$tensor": name, ...}``."""


def prepare(name: str, tracked: Any, encoded: Any, filling: Filling) -> Callable[[], None]:
    """Give every stored tensor of ``encoded`` its place; call the result once they are filled.

    Raises:
        Refused: RESTORE_FAILED.
    """
    inner = state.unwrap(tracked)
    if state.is_tensor(inner):
        _in_place(inner, _node_of(name, encoded), name, filling, must_fit=True)
        return lambda: None
    live: Any = None
    if state.is_module(inner):
        live = inner.state_dict()
        if _fills_in_place(name, inner, live, encoded, filling):
            return lambda: _tell_loaded(inner)
    places = _Places(name, filling)
    places.add_all(encoded, _like(inner, live, encoded))
    return lambda: state.apply(name, tracked, state.decode_nodes(encoded, places.filled))


def prepare_plain(name: str, encoded: Any, filling: Filling) -> Callable[[], Any]:
    """Like ``prepare`` for a value without an object; the result returns it."""
    places = _Places(name, filling)
    places.add_all(encoded, lambda _path: None)
    return lambda: state.decode_nodes(encoded, places.filled)


class _Places:
    """New memory for the tensors of one value."""

    def __init__(self, name: str, filling: Filling) -> None:
        self._name = name
        self._filling = filling
        self._made: dict[int, Any] = {}

    def add_all(self, encoded: Any, like: Callable[[tuple[Any, ...]], Any]) -> None:
        """``like`` finds, by path, a tensor that tells how to spread the new one."""
        for path, node in tensors(encoded):
            found = like(path)
            where = ".".join((self._name, *map(str, path)))
            self._made[id(node)] = self._make(node, found, where)

    def filled(self, node: Node) -> Any:
        return self._made[id(node)]

    def _make(self, node: Node, like: Any, path: str) -> Any:
        import torch

        entry = self._filling.entry(node["$tensor"])
        original = node.get("dtype", "")
        if sharded.is_sharded(like) and _global_shape(entry, original) == tuple(like.shape):
            dtype = getattr(torch, original) if original else dtypes.stored_dtype(entry.dtype)
            made = sharded.empty_like(like, dtype)
            _in_place(made, node, path, self._filling, must_fit=True)
            return made
        fresh = torch.empty(entry.shape, dtype=dtypes.stored_dtype(entry.dtype))
        boxes = (regions.whole(entry.shape),) if fresh.numel() else ()
        self._filling.add(Target(node["$tensor"], fresh, boxes))
        return dtypes.from_stored(fresh, original)


def tensors(encoded: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Node]]:
    """Every encoded tensor with the keys that lead to it."""
    if isinstance(encoded, list):
        for index, item in enumerate(encoded):
            yield from tensors(item, (*path, index))
        return
    if not isinstance(encoded, dict):
        return
    if "$tensor" in encoded:
        yield path, encoded
    elif "$value" in encoded:
        yield from tensors(encoded["$value"], path)
    elif "$tuple" in encoded:
        yield from tensors(encoded["$tuple"], path)
    else:
        pairs = next((encoded[form] for form in ("$dict", "$ordered", "$counter") if form in encoded), None)
        if pairs is None:
            for key, item in encoded.items():
                yield from tensors(item, (*path, key))
            return
        for key, item in zip(pairs[::2], pairs[1::2], strict=True):
            plain = key if not isinstance(key, dict | list) else state.decode(key, _no_tensor)
            yield from tensors(item, (*path, plain))


def _no_tensor(name: str) -> Any:
    raise Refused(ErrorCode.RESTORE_FAILED, f"the tensor {name} is the key of a dict")


def _node_of(name: str, encoded: Any) -> Node:
    if isinstance(encoded, dict) and "$tensor" in encoded:
        return encoded
    raise Refused(ErrorCode.RESTORE_FAILED, f"{name} is a tensor, the checkpoint has another kind")


def _global_shape(entry: TensorEntry, original: str) -> tuple[int, ...]:
    return entry.shape[:-1] if original.startswith("complex") else entry.shape


def _in_place(
    live: Any, node: Node, path: str, filling: Filling, *, must_fit: bool, only_ask: bool = False
) -> bool:
    """Fill ``live`` itself; False if it is not made for that, which ``must_fit`` forbids."""
    entry = filling.entry(node["$tensor"])
    original = node.get("dtype", "")
    spread = sharded.is_sharded(live)
    if _global_shape(entry, original) != tuple(live.shape):
        if not (must_fit or spread):
            return False
        stored = _global_shape(entry, original)
        raise Refused(
            ErrorCode.RESTORE_FAILED, f"{path} has shape {tuple(live.shape)}, the checkpoint {tuple(stored)}"
        )
    if live.device.type == "meta":
        raise Refused(
            ErrorCode.RESTORE_FAILED,
            f"{path} is on the meta device: there is no memory to restore it to",
            fix="call to_empty(device=...) before steps() or restore()",
        )
    part = sharded.part(live) if spread else live.detach()
    if part.is_conj() or part.is_neg() or "numpy" in node:
        return _unfit(path, must_fit)
    stored, _, as_original = dtypes.to_stored(part)
    if as_original != original:
        return _unfit(path, must_fit)
    if only_ask:
        return True
    if spread:
        try:
            piece = regions.held(sharded.spread(live, filling.rank), entry.shape, filling.rank)
        except ValueError as error:
            raise Refused(ErrorCode.RESTORE_FAILED, f"{path}: {error}") from error
        boxes = piece.boxes if piece is not None else ()
    else:
        boxes = (regions.whole(entry.shape),) if math.prod(entry.shape) else ()
    filling.add(Target(node["$tensor"], stored, boxes))
    return True


def _unfit(path: str, must_fit: bool) -> bool:
    if must_fit:
        raise Refused(ErrorCode.RESTORE_FAILED, f"{path} has another kind of dtype than in the checkpoint")
    return False


# Modules ---------------------------------------------------------------------------


def _fills_in_place(name: str, module: Any, live: Any, encoded: Any, filling: Filling) -> bool:
    """Fill the module through its state_dict; False, and nothing done, if load_state_dict has to do it."""
    nodes = {path[0]: node for path, node in tensors(encoded) if len(path) == 1}
    if not _loads_plainly(module) or set(nodes) != set(live) or len(nodes) != _size(encoded):
        return False
    for only_ask in (True, False):
        for key, node in nodes.items():
            if not state.is_tensor(live[key]):
                return False
            path = f"{name}.{key}"
            if not _in_place(live[key], node, path, filling, must_fit=False, only_ask=only_ask):
                return False
    return True


def _size(encoded: Any) -> int:
    pairs = encoded.get("$ordered", encoded.get("$dict")) if isinstance(encoded, dict) else None
    return len(pairs) // 2 if pairs is not None else len(encoded)


def _loads_plainly(module: Any) -> bool:
    """True if loading would do nothing but copy into what state_dict refers to."""
    import torch

    stock = torch.nn.Module
    for part in module.modules():
        kind = type(part)
        if (
            kind.state_dict is not stock.state_dict
            or kind.load_state_dict is not stock.load_state_dict
            or kind.get_extra_state is not stock.get_extra_state
            or not _of_torch(kind._save_to_state_dict)
            or not _of_torch(kind._load_from_state_dict)
            or {"state_dict", "load_state_dict"} & vars(part).keys()
        ):
            return False
        for hooks in (
            "_state_dict_hooks",
            "_state_dict_pre_hooks",
            "_load_state_dict_pre_hooks",
            "_load_state_dict_post_hooks",
        ):
            if not all(_of_torch(hook) for hook in getattr(part, hooks, {}).values()):
                return False
    return True


def _tell_loaded(module: Any) -> None:
    """FSDP2 looks after loading whether its shards are still where it knows them."""
    from torch.nn.modules.module import _IncompatibleKeys

    for part in module.modules():
        for hook in getattr(part, "_load_state_dict_post_hooks", {}).values():
            hook(part, _IncompatibleKeys([], []))


def _of_torch(function: Any) -> bool:
    """Torch's own modules only upgrade older forms; FSDP2's hooks only see to it that shards are in place."""
    where = getattr(getattr(function, "hook", function), "__module__", None) or ""
    return where.startswith(("torch.nn.modules.", "torch.distributed.fsdp._fully_shard."))


# What tells how to spread new memory -------------------------------------------------


def _like(inner: Any, live: Any, encoded: Any) -> Callable[[tuple[Any, ...]], Any]:
    if hasattr(inner, "param_groups") and hasattr(inner, "state"):
        return _by_parameter(inner, encoded)
    if live is None:
        live = inner
        if not isinstance(inner, dict | list):
            # Asked only where it matters: taking the state of a data loader starts its workers.
            if not any(node.get("sharded") for _, node in tensors(encoded)):
                return lambda _path: None
            live = inner.state_dict()
    return functools.partial(_at, live)


def _by_parameter(optimizer: Any, encoded: Any) -> Callable[[tuple[Any, ...]], Any]:
    """State of an optimizer is spread like its parameter: before the first step there is none to look at."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    # The optimizer's own numbering of parameters need not be that of the checkpoint.
    value = state.decode_nodes(encoded, lambda _node: None)
    groups = value.get("param_groups", []) if isinstance(value, dict) else []
    numbers = [number for group in groups for number in group.get("params", [])]
    owner = dict(zip(numbers, parameters, strict=False))
    own = optimizer.state

    def find(path: tuple[Any, ...]) -> Any:
        if len(path) < 3 or path[0] != "state" or path[1] not in owner:
            return None
        parameter = owner[path[1]]
        held = _at(own.get(parameter), path[2:]) if parameter in own else None
        return held if sharded.is_sharded(held) else parameter

    return find


def _at(live: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        if isinstance(live, Mapping):
            live = live.get(key)
        elif isinstance(live, list | tuple) and isinstance(key, int) and 0 <= key < len(live):
            live = live[key]
        else:
            return None
    return live
