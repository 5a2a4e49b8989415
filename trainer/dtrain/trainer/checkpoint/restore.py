"""From verified bytes back into the tracked objects, for any number of ranks."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

from dtrain.protocol.checkpoint import Manifest
from dtrain.protocol.errors import DtrainError, ErrorCode, Refused
from dtrain.trainer.checkpoint import destinations, plain, rng
from dtrain.trainer.checkpoint.filling import Filling
from dtrain.trainer.checkpoint.source import Source

ABOUT = "import/about"
"""Object that says where an imported checkpoint comes from, and whether it is whole."""

log = logging.getLogger("dtrain.trainer")


def load(source: Source, tracked: Mapping[str, Any], rank: int, world: int) -> Manifest:
    """Load every tracked object and the generators from the checkpoint behind ``source``.

    Only the bytes that this rank holds are asked for. After an error the tracked
    objects are in no defined state: the rank must not train.

    Raises:
        Refused: RESTORE_FAILED.
    """
    manifest = source.manifest
    try:
        about = _imported(manifest)
        tracked = _present(tracked, manifest, partial=bool(about.get("partial")))
        filling = Filling(source, rank)
        # First where everything goes, then all bytes at once, then what objects make of them.
        finishers = [_prepare(name, thing, filling) for name, thing in tracked.items()]
        finishers.append(_prepare_rng(filling, world, about))
        known = {"rng", ABOUT.partition("/")[0], *(name.partition("/")[0] for name in tracked)}
        # Behind a slash: what ranks saved under names of their own.
        unused = [n for n in manifest.objects if n not in tracked and n.partition("/")[0] not in known]
        if unused:
            log.warning("checkpoint %d also holds %s, which is not tracked", manifest.seq, ", ".join(unused))
        filling.fill()
        for finish in finishers:
            finish()
    except DtrainError as error:
        if error.code is ErrorCode.RESTORE_FAILED:
            raise
        raise Refused(
            ErrorCode.RESTORE_FAILED, f"checkpoint {manifest.seq}: {error}", fix=error.fix
        ) from error
    except Exception as error:  # whatever load_state_dict of a user's object raises
        message = f"checkpoint {manifest.seq} cannot be loaded: {type(error).__name__}: {error}"
        raise Refused(ErrorCode.RESTORE_FAILED, message) from error
    return manifest


def _imported(manifest: Manifest) -> Mapping[str, Any]:
    """What is told of a checkpoint that was imported; of another one, nothing."""
    entry = manifest.objects.get(ABOUT)
    return entry.value if entry is not None and isinstance(entry.value, dict) else {}


def _present(tracked: Mapping[str, Any], manifest: Manifest, *, partial: bool) -> Mapping[str, Any]:
    """What is to be restored: all, but for what whoever imported a part of it said is to begin fresh."""
    if not partial:
        return tracked
    held = set(manifest.objects)
    held |= {name.rpartition("/")[0] for name in held if "/" in name}
    fresh = sorted(name for name, thing in tracked.items() if _key(name, thing) not in held)
    if len(fresh) == len(tracked):
        raise Refused(
            ErrorCode.RESTORE_FAILED,
            f"the imported checkpoint {manifest.seq} has nothing of what is tracked: {', '.join(fresh)}",
            fix="import it again with --prefix or --map, so that names are those that the script tracks",
        )
    if fresh:
        log.warning("%s: not in the imported checkpoint, begins fresh", ", ".join(fresh))
    return {name: thing for name, thing in tracked.items() if name not in fresh}


def _key(name: str, thing: Any) -> str:
    return name.partition("/")[0] if plain.is_per_rank(thing) else name


def _prepare(name: str, thing: Any, filling: Filling) -> Callable[[], None]:
    manifest = filling.manifest
    if plain.is_per_rank(thing):
        return _prepare_parts(name.partition("/")[0], thing, filling)
    entry = manifest.objects.get(name)
    if entry is None:
        raise Refused(
            ErrorCode.RESTORE_FAILED,
            f"checkpoint {manifest.seq} has no state named {name}",
            fix="track the same names as when it was saved",
        )
    return destinations.prepare(name, thing, entry.value, filling)


def _prepare_parts(name: str, thing: Any, filling: Filling) -> Callable[[], None]:
    """Every rank's part: the object knows what to do with those of another number of ranks."""
    parts = {
        int(key.rpartition("/")[2]): destinations.prepare_plain(key, entry.value, filling)
        for key, entry in filling.manifest.objects.items()
        if key.startswith(f"{name}/")
    }
    if not parts:
        raise Refused(
            ErrorCode.RESTORE_FAILED,
            f"checkpoint {filling.manifest.seq} has no state of ranks named {name}",
            fix="track the same names as when it was saved",
        )
    return lambda: thing.load_parts({rank: value() for rank, value in parts.items()})


def _prepare_rng(filling: Filling, world: int, about: Mapping[str, Any]) -> Callable[[], None]:
    manifest, rank = filling.manifest, filling.rank
    if about and about.get("world") is None:
        # None came along: the generators stay as the script has seeded them.
        log.warning(
            "the imported checkpoint %d has no random states: they are as the script left them", manifest.seq
        )
        return lambda: None
    if about.get("world", manifest.world) != world:
        return lambda: rng.derive(rank, manifest.step, manifest.uid)
    own = {
        name: destinations.prepare_plain(name, entry.value, filling)
        for name, entry in manifest.objects.items()
        if name.startswith(rng.prefix(rank))
    }
    if not own:
        raise Refused(ErrorCode.RESTORE_FAILED, f"the checkpoint has no random state of rank {rank}")
    return lambda: rng.install(rank, {name: value() for name, value in own.items()})
