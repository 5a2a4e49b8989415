"""The JSON values of a checkpoint: which tensors they hold, and how they look with tensors put in.

A value is the saved state with each tensor replaced by ``{"$tensor": name}``;
forms that JSON lacks are objects with one key that begins with ``$``.
"""

import base64
import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from dtrain.protocol.checkpoint import Manifest
from dtrain.protocol.errors import ErrorCode, NotFound, Refused

ABOUT = "import/about"
"""Where an imported checkpoint comes from: an object that nothing tracked can be called."""

ABOUT_FILE = "checkpoint.json"
"""In exported folders: values with their tensors' names, and where they come from."""

OF_RANKS = "rng/"
"""What begins so is the state of one rank's generators: for resuming, of no use to anyone else."""

_PAIRS: dict[str, Callable[[], Any]] = {"$dict": dict, "$ordered": OrderedDict, "$counter": dict}


def chosen(manifest: Manifest, only: Iterable[str], *, full: bool = False) -> list[str]:
    """Return the tracked names to export: those in ``only``, else all; ``full``: the ranks' own, too.

    Raises:
        NotFound: the checkpoint has no such name.
    """
    known = [name for name in manifest.objects if full or not name.startswith(OF_RANKS)]
    known = [name for name in known if name != ABOUT]
    wanted = list(dict.fromkeys(only))
    missing = [name for name in wanted if name not in known]
    if missing:
        raise NotFound(
            ErrorCode.NOT_FOUND,
            f"checkpoint {manifest.seq} holds nothing under the name {missing[0]!r}",
            fix=f"it has {', '.join(sorted(known)) or 'no names at all'}",
        )
    return wanted or known


def about(manifest: Manifest) -> dict[str, Any]:
    """Where an export comes from, to be kept with it."""
    return {
        "cluster": manifest.cluster,
        "job": manifest.job,
        "uid": manifest.uid,
        "seq": manifest.seq,
        "step": manifest.step,
        "world": saved_world(manifest),
    }


def write_about(path: Path, manifest: Manifest, names: Iterable[str]) -> None:
    """Write the values of tracked names, and where they come from, beside exported tensors."""
    values = {name: manifest.objects[name].value for name in names}
    path.write_text(json.dumps({"v": 1, **about(manifest), "objects": values}, indent=1))


def saved_world(manifest: Manifest) -> int:
    """Number of ranks that saved what a checkpoint holds, wherever it was imported from."""
    about = manifest.objects.get(ABOUT)
    world = about.value.get("world") if about is not None and isinstance(about.value, dict) else None
    return world if isinstance(world, int) else manifest.world


def tensor_names(manifest: Manifest, names: Iterable[str], *, everything: bool = False) -> list[str]:
    """Return the tensors of these tracked names in the order of the blobs, so that each chunk is read once.

    ``everything``: also those that no value refers to, but for the ranks' own.
    """
    found = {tensor for name in names for tensor in _tensors(manifest.objects[name].value)}
    if everything:
        found |= {name for name in manifest.tensors if not name.startswith(OF_RANKS)}
    missing = sorted(found - manifest.tensors.keys())
    if missing:
        raise Refused(ErrorCode.BAD_RECORD, f"the manifest has no tensor {missing[0]}")

    def place(name: str) -> tuple[int, int, str]:
        first = min(((c.b, c.off) for c in manifest.tensors[name].chunks), default=(0, 0))
        return (*first, name)

    return sorted(found, key=place)


def _tensors(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$tensor"), str):
            yield value["$tensor"]
            return
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list):
        for part in value:
            yield from _tensors(part)


def decode(value: Any, tensor: Callable[[str, str], Any]) -> Any:
    """Rebuild a value; ``tensor`` returns the tensor of a name, given the dtype it had before it was stored.

    Counters become dicts and arrays tensors: what is made can be read by anybody.

    Raises:
        Refused: BAD_RECORD; a form that this release does not know.
    """
    if isinstance(value, list):
        return [decode(part, tensor) for part in value]
    if not isinstance(value, dict):
        return value
    form = next((key for key in value if key.startswith("$")), None)
    if form is None:
        return {key: decode(part, tensor) for key, part in value.items()}
    body = value[form]
    if form == "$value":
        return decode(body, tensor)
    if form == "$tensor":
        return tensor(body, value.get("dtype", ""))
    if form == "$float":
        return float(body)
    if form == "$tuple":
        return tuple(decode(part, tensor) for part in body)
    if form == "$bytes":
        return base64.b64decode(body, validate=True)
    if form in _PAIRS:
        made = _PAIRS[form]()
        for key, part in zip(body[::2], body[1::2], strict=True):
            made[decode(key, tensor)] = decode(part, tensor)
        return made
    raise Refused(
        ErrorCode.BAD_RECORD,
        f"the checkpoint uses the form {form!r}, unknown to this release",
        fix="export it as safetensors, or with the release of dtrain that wrote it",
    )
