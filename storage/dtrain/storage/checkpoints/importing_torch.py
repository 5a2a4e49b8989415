"""What is in a file of ``torch.save``, read with ``weights_only=True`` and in no other way.

Torch's own restricted reader makes tensors and plain values and refuses anything
else; nothing outside an operator's command ever calls this. Values are encoded as
the SDK encodes what a script tracks. Imports torch, like ``torch_files``.
"""

import base64
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dtrain.protocol.errors import ErrorCode, Refused
from dtrain.storage.checkpoints.importing import Contents, Tensor
from dtrain.storage.checkpoints.torch_files import TORCH_DTYPES

DEPTH_MAX = 24
ORIGIN = "dtrain"
"""Key under which an export tells where it comes from."""

_DTYPES = {name: stored for stored, name in TORCH_DTYPES.items()}
_AS_BYTES = ("float8_e4m3fnuz", "float8_e5m2fnuz")


def read(path: Path, about: Mapping[str, Any] | None = None, *, converted: bool = False) -> Contents:
    """Return what is in a file of ``torch.save``.

    A dict of nothing but tensors is taken for the weights of one module; any
    other for states by tracked name. ``converted``: it was a folder of DCP, which
    keeps keys as text only; ``about`` is what an export wrote into that beside it.

    Raises:
        Refused: it holds more than tensors and plain values, or torch cannot read it.
    """
    kind = "dcp" if converted else "torch"
    try:
        import torch
    except ImportError as error:
        why = "torch is not installed here, and its files are read by it"
        raise _refused(why, "run this where it is, or import safetensors files") from error
    try:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:
            # Of the time before zip files, which cannot be mapped.
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch, zipfile and the restricted reader raise
        why = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        raise _refused(
            f"{path} cannot be read as tensors and plain values alone: {why}",
            "save state_dicts instead of objects, or convert it where you trust it",
        ) from error
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise _refused(f"{path} holds a {type(state).__name__}", "save a dict of states by name")
    origin = state.pop(ORIGIN, {}) if isinstance(state.get(ORIGIN), dict) else {}
    encoder = _Encoder(torch)
    if about is not None:
        values = about.get("objects")
        if not isinstance(values, dict) or about.get("v") != 1:
            raise _refused("what the export wrote beside its tensors is malformed", "export it again")
        for name, value in values.items():
            encoder.find(value, state.get(name), name)
        origin = {key: value for key, value in about.items() if key not in ("v", "objects")}
        return Contents("dcp", encoder.tensors, values, origin)
    if not origin and state and all(isinstance(value, torch.Tensor) for value in state.values()):
        for name, value in state.items():
            encoder.tensor(value, name, share=False)
        return Contents(kind, encoder.tensors, None, {})
    if origin:
        state.pop("tensors", None)  # those that no value refers to: nothing restores them
    objects = {}
    for name, value in state.items():
        encoded = encoder.encode(_renumbered(value) if converted else value, name, 1)
        objects[name] = encoded if isinstance(encoded, dict) and encoded else {"$value": encoded}
    return Contents(kind, encoder.tensors, objects, origin)


def _renumbered(value: Any) -> Any:
    """The state of an optimizer with numbers for keys again; anything else as it is."""
    if not isinstance(value, dict) or set(value) != {"state", "param_groups"}:
        return value
    groups, state = value["param_groups"], value["state"]
    if not isinstance(groups, list) or not isinstance(state, dict):
        return value
    numbers = {
        str(number): number
        for group in groups
        if isinstance(group, dict)
        for number in group.get("params", ())
        if type(number) is int
    }
    if not state.keys() <= numbers.keys():
        return value
    return {**value, "state": {numbers[key]: part for key, part in state.items()}}


class _Encoder:
    """Turns values into what manifests hold, as the SDK does, and gathers their tensors."""

    def __init__(self, torch: Any) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._torch = torch
        self._seen: dict[Any, str] = {}

    def encode(self, value: Any, path: str, depth: int) -> Any:
        if depth > DEPTH_MAX:
            raise _refused(f"{path} is nested deeper than {DEPTH_MAX}", "flatten it")
        kind = type(value)
        if value is None or kind in (bool, int, str):
            return value
        if kind is float:
            return value if math.isfinite(value) else {"$float": repr(value)}
        if kind is bytes:
            return {"$bytes": base64.b64encode(value).decode("ascii")}
        if kind is list:
            return [self.encode(part, f"{path}.{i}", depth + 1) for i, part in enumerate(value)]
        if kind is tuple or kind is self._torch.Size:
            return {"$tuple": [self.encode(part, f"{path}.{i}", depth + 2) for i, part in enumerate(value)]}
        if kind in (dict, OrderedDict, Counter):
            return self._mapping(value, path, depth)
        if isinstance(value, self._torch.Tensor):
            kept, original = self._kept(value)
            return {"$tensor": self.tensor(kept, path), **({"dtype": original} if original else {})}
        raise _refused(f"{path} is a {kind.__name__}, neither a tensor nor a plain value", "leave it out")

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
                raise _refused(f"{path} has a key of type {type(key).__name__}", "use text or numbers")
            flat.append(self.encode(key, f"{path}.<key>", depth + 2))
            flat.append(self.encode(part, f"{path}.{key}", depth + 2))
        return {"$ordered" if kind is OrderedDict else "$counter" if kind is Counter else "$dict": flat}

    def _kept(self, value: Any) -> tuple[Any, str]:
        """A tensor as it is stored, and the type that it is of where that is another one."""
        name = str(value.dtype).removeprefix("torch.")
        return (value.view(self._torch.uint8), name) if name in _AS_BYTES else (value, "")

    def find(self, encoded: Any, value: Any, path: str, key: Any = None) -> None:
        """Take the tensors that an encoded value refers to from a value of the same form."""
        if key is not None:
            # DCP knows keys as text only.
            found = value.get(key, value.get(str(key))) if isinstance(value, dict) else None
            if isinstance(value, list | tuple) and isinstance(key, int) and key < len(value):
                found = value[key]
            value, path = found, f"{path}.{key}"
        if isinstance(encoded, list):
            for index, part in enumerate(encoded):
                self.find(part, value, path, index)
            return
        if not isinstance(encoded, dict):
            return
        form = next((form for form in ("$tuple", "$value") if form in encoded), "")
        pairs = next((encoded[form] for form in ("$dict", "$ordered", "$counter") if form in encoded), None)
        if "$tensor" in encoded:
            if not isinstance(value, self._torch.Tensor):
                raise _refused(f"{path} is not among the tensors", "export it again, and copy all of it")
            if encoded["$tensor"] not in self.tensors:
                self.tensor(self._kept(value)[0], encoded["$tensor"], share=False)
        elif form:
            self.find(encoded[form], value, path)
        elif pairs is not None:
            for inner, part in zip(pairs[::2], pairs[1::2], strict=True):
                if isinstance(inner, str | int):
                    self.find(part, value, path, inner)
        else:
            for inner, part in encoded.items():
                if not inner.startswith("$"):
                    self.find(part, value, path, inner)

    def tensor(self, value: Any, path: str, *, share: bool = True) -> str:
        """Keep a tensor; return the name it is kept under: that of another one, if both are tied."""
        torch = self._torch
        value = value.detach()
        if type(value) is not torch.Tensor or value.layout is not torch.strided or value.is_quantized:
            raise _refused(
                f"{path} is a {type(value).__name__} of layout {value.layout}, no plain tensor",
                "gather it, or make it dense, before it is saved",
            )
        if value.device.type != "cpu":
            raise _refused(
                f"{path} has no values: it is on the {value.device.type} device", "save its values"
            )
        dtype = _DTYPES.get(str(value.dtype).removeprefix("torch."))
        if dtype is None:
            raise _refused(f"{path} has the type {value.dtype}, which checkpoints do not keep", "convert it")
        same = (value.data_ptr(), value.dtype, value.shape, value.stride())
        if share and value.numel() and same in self._seen:
            return self._seen[same]
        name = path
        while name in self.tensors:
            name += "~"
        self._seen[same] = name
        self.tensors[name] = Tensor(dtype, tuple(value.shape), _reader(torch, value))
        return name


def _reader(torch: Any, value: Any) -> Callable[[int, int], memoryview]:
    def read(offset: int, length: int) -> memoryview:
        plain = value.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
        return memoryview(plain.numpy())[offset : offset + length]

    return read


def _refused(message: str, fix: str) -> Refused:
    return Refused(ErrorCode.USAGE, message, fix=fix)
