"""The same kinds of damage for other formats: torch.save, safetensors and torch.distributed.checkpoint.

One file per rank (two of them) for the first two; DCP's own layout with two files. A trial is *caught* if
loading raises, *right* if what is loaded is bit for bit what was saved, *WRONG* if it is something else,
without a word.
"""

import contextlib
import io
import logging
import random
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from tests.corruption import damage as damages
from tests.corruption.campaign import Campaign
from tests.corruption.making import Folder, fingerprint

PAGE_BYTES = 4096
State = dict[str, torch.Tensor]


class Rival(Protocol):
    """One format, in a folder."""

    name: str

    def save(self, state: State, folder: Path) -> None: ...

    def load(self, state: State, folder: Path) -> State: ...


class TorchSave:
    name = "torch.save"

    def save(self, state: State, folder: Path) -> None:
        for rank, part in enumerate(_halves(state)):
            torch.save(part, folder / f"rank{rank}.pt")

    def load(self, state: State, folder: Path) -> State:
        loaded: State = {}
        for rank in range(2):
            loaded |= torch.load(folder / f"rank{rank}.pt", weights_only=True)
        return _whole(state, loaded)


class Safetensors:
    name = "safetensors"

    def save(self, state: State, folder: Path) -> None:
        from safetensors.torch import save_file

        for rank, part in enumerate(_halves(state)):
            save_file(part, folder / f"rank{rank}.safetensors")

    def load(self, state: State, folder: Path) -> State:
        from safetensors.torch import load_file

        loaded: State = {}
        for rank in range(2):
            loaded |= load_file(folder / f"rank{rank}.safetensors")
        return _whole(state, loaded)


class Dcp:
    name = "torch.distributed.checkpoint"

    def save(self, state: State, folder: Path) -> None:
        dcp_save(dict(state), storage_writer=FileSystemWriter(folder, thread_count=2), no_dist=True)

    def load(self, state: State, folder: Path) -> State:
        found = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        dcp_load(found, storage_reader=FileSystemReader(folder), no_dist=True)
        return found


RIVALS: tuple[Rival, ...] = (TorchSave(), Safetensors(), Dcp())


def _halves(state: State) -> tuple[State, State]:
    names = sorted(state)
    return {n: state[n] for n in names[::2]}, {n: state[n] for n in names[1::2]}


def _whole(state: State, loaded: State) -> State:
    if loaded.keys() != state.keys():
        raise KeyError("names are missing")
    for name, tensor in state.items():
        # What ``load_state_dict`` does: copies, and refuses another shape.
        torch.empty_like(tensor).copy_(loaded[name]) if tensor.shape == loaded[name].shape else _raise(name)
    return loaded


def _raise(name: str) -> None:
    raise ValueError(f"{name} has another shape")


def new_state(seed: int) -> State:
    """About 1 MiB in tensors of several dtypes."""
    generator = torch.Generator().manual_seed(seed)
    state = {f"layer{i}.weight": torch.randn(128, 64 + 64 * i, generator=generator) for i in range(6)}
    state["half"] = torch.randn(64, 64, generator=generator).to(torch.bfloat16)
    state["count"] = torch.tensor(seed)
    return state


# Damage to a folder ---------------------------------------------------------------

Files = dict[str, bytes]
Change = Callable[[Files, Files, random.Random], "dict[str, bytes | None]"]
"""Of these files, and those of another step."""


def _data(files: Files, rng: random.Random) -> str:
    """A file with tensors in it, not the little one that describes them."""
    return rng.choice(sorted(name for name in files if name != ".metadata"))


def flip(files: Files, _other: Files, rng: random.Random) -> dict[str, bytes | None]:
    name = rng.choice(sorted(files)) if rng.random() < 0.2 else _data(files, rng)
    return {name: damages._flip(files[name], rng.randrange(len(files[name])), rng.randrange(8))}


def zero_page(files: Files, _other: Files, rng: random.Random) -> dict[str, bytes | None]:
    name = _data(files, rng)
    data = bytearray(files[name])
    at = rng.randrange(len(data) // PAGE_BYTES) * PAGE_BYTES
    data[at : at + PAGE_BYTES] = bytes(PAGE_BYTES)
    return {name: bytes(data)}


def swap_pages(files: Files, _other: Files, rng: random.Random) -> dict[str, bytes | None]:
    name = _data(files, rng)
    data = bytearray(files[name])
    one, two = (PAGE_BYTES * number for number in rng.sample(range(len(data) // PAGE_BYTES), 2))
    data[one : one + PAGE_BYTES], data[two : two + PAGE_BYTES] = (
        data[two : two + PAGE_BYTES],
        data[one : one + PAGE_BYTES],
    )
    return {name: bytes(data)}


def swap_ranks(files: Files, _other: Files, _rng: random.Random) -> dict[str, bytes | None]:
    one, two = sorted(name for name in files if name != ".metadata")[:2]
    return {one: files[two], two: files[one]}


def zombie(files: Files, other: Files, rng: random.Random) -> dict[str, bytes | None]:
    name = _data(files, rng)
    return {name: other[name]}


def truncate(files: Files, _other: Files, rng: random.Random) -> dict[str, bytes | None]:
    name = rng.choice(sorted(files)) if rng.random() < 0.2 else _data(files, rng)
    return {name: files[name][: rng.randrange(len(files[name]))]}


def insert(files: Files, _other: Files, rng: random.Random) -> dict[str, bytes | None]:
    name = _data(files, rng)
    data, at = files[name], rng.randrange(len(files[name]))
    return {name: data[: at + 64] + data[at:]}


def extend(files: Files, _other: Files, rng: random.Random) -> dict[str, bytes | None]:
    name = _data(files, rng)
    return {name: files[name] + rng.randbytes(64)}


def delete(files: Files, _other: Files, rng: random.Random) -> dict[str, bytes | None]:
    return {rng.choice(sorted(files)): None}


CHANGES: dict[str, tuple[Change, damages.Kind]] = {
    "flip one bit": (flip, damages.flip_data),
    "zero a page": (zero_page, damages.zero_page),
    "swap two pages": (swap_pages, damages.swap_chunks),
    "swap the files of two ranks": (swap_ranks, damages.swap_ranks),
    "same-named file of another step": (zombie, damages.zombie),
    "truncate": (truncate, damages.truncate),
    "duplicate a stretch inside": (insert, damages.insert),
    "append bytes": (extend, damages.extend),
    "delete a file": (delete, damages.delete),
}


def outcome(rival: Rival, state: State, folder: Path) -> str:
    """caught, right or WRONG."""
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            found = rival.load(state, folder)
    except Exception:  # noqa: BLE001 - whatever it raises, it has noticed
        return "caught"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        return "caught"  # pyo3's PanicException and DCP's CheckpointException are none of Exception
    return "right" if fingerprint(found) == fingerprint(state) else "WRONG"


def trials(rival: Rival, kind: str, count: int, seed: int) -> Counter[str]:
    """Damage one saved checkpoint so many times."""
    change, _ = CHANGES[kind]
    rng, found = random.Random(f"{seed}/{kind}"), Counter[str]()
    with tempfile.TemporaryDirectory() as temporary:
        state = new_state(1)
        sets = []
        for number in (1, 2):
            folder = Path(temporary) / str(number)
            folder.mkdir()
            rival.save(new_state(number), folder)
            sets.append({path.name: path.read_bytes() for path in folder.iterdir()})
        mine, theirs = sets
        target = Path(temporary) / "1"
        while found.total() < count:
            files = change(mine, theirs, rng)
            if all(mine[name] == data for name, data in files.items()):
                continue
            for name, data in files.items():
                (target / name).unlink() if data is None else (target / name).write_bytes(data)
            found[outcome(rival, state, target)] += 1
            for name in files:
                (target / name).write_bytes(mine[name])
    return found


def ours(kind: str, count: int, seed: int) -> Counter[str]:
    """The same kind on a checkpoint of ours."""
    _, draw = CHANGES[kind]
    rng = random.Random(f"{seed}/{kind}")
    with tempfile.TemporaryDirectory() as temporary:
        campaign = Campaign(Folder(Path(temporary) / "store"), big=False, worlds=(2,))
        for _ in range(count):
            campaign.play(campaign.small[0], draw, rng)
        tally = campaign.tally
    return Counter(caught=tally.caught.total(), right=tally.harmless.total(), WRONG=len(tally.wrong))


def table(count: int, seed: int) -> str:
    """A Markdown table: of each kind, how many were caught, and how many were loaded wrong without a word."""
    logging.disable(logging.CRITICAL)
    lines = [
        f"| damage ({count} trials each) | " + " | ".join(rival.name for rival in RIVALS) + " | dtrain |",
        "|---|" + "---|" * (len(RIVALS) + 1),
    ]
    for kind in CHANGES:
        cells = [trials(rival, kind, count, seed) for rival in RIVALS] + [ours(kind, count, seed)]
        lines.append(f"| {kind} | " + " | ".join(_cell(cell) for cell in cells) + " |")
    return "\n".join(lines)


def _cell(found: Counter[str]) -> str:
    parts = [f"{found[word]} {word}" for word in ("caught", "right", "WRONG") if found[word]]
    return ", ".join(parts)
