"""Stacks as ``faulthandler`` and ``py-spy`` write them: taken apart, told apart, in short."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from dtrain.protocol.snapshot import StackKind

FRAMES_MAX = 200
WHERE_CHARS_MAX = 200
IDLE_SHARE = 0.2
"""Of one CPU: a rank that uses less of it waits for something."""

_THREAD = re.compile(r"^(?:Current thread|Thread) (?:0x)?[0-9a-fA-F]+")
_FAULTHANDLER = re.compile(r'^  File "(?P<file>.*)", line (?P<line>\d+|\?\?\?) in (?P<name>.*)$')
_PY_SPY = re.compile(r"^ {4}(?P<name>\S.*) \((?P<file>[^()]*?)(?::(?P<line>\d+))?\)$")

_COLLECTIVE = ("/torch/distributed/", "/torch/nn/parallel/distributed.py", "/dtrain/trainer/process_group.py")
_DATA = (
    "/torch/utils/data/",
    "/torchdata/",
    "/webdataset/",
    "/nvidia/dali/",
    "/dtrain/trainer/data.py",
)
_BACKWARD = "/torch/autograd/graph.py"
_LIBRARY = ("/site-packages/", "/dist-packages/", "/lib/python3", "/dtrain/", "<frozen ", "<string>")


@dataclass(frozen=True, slots=True)
class Frame:
    """One call."""

    name: str
    file: str
    line: int = 0

    @property
    def path(self) -> str:
        """The file, beginning with a slash: ``py-spy`` shortens names to ``torch/distributed/...``."""
        return self.file if self.file.startswith(("/", "<")) else f"/{self.file}"

    def __str__(self) -> str:
        return f"{self.name} ({self.file.rsplit('/', 1)[-1]}:{self.line})"


Frames = tuple[Frame, ...]
"""Innermost first."""


def main_thread(text: str) -> Frames:
    """Return the frames of the main thread in a dump of one process; () if there are none.

    It is the oldest thread, and ``faulthandler`` writes the newest first; ``py-spy`` names it.
    """
    threads: list[tuple[str, list[Frame]]] = []
    for line in text.splitlines():
        if _THREAD.match(line):
            threads.append((line, []))
        elif threads and len(threads[-1][1]) < FRAMES_MAX:
            found = _FAULTHANDLER.match(line) or _PY_SPY.match(line)
            if found is not None:
                number = found["line"] or ""
                frame = Frame(found["name"], found["file"], int(number) if number.isdigit() else 0)
                threads[-1][1].append(frame)
    named = [frames for line, frames in threads if '"MainThread"' in line]
    if not threads:
        return ()
    return tuple(named[0] if named else threads[-1][1])


def is_complete(text: str) -> bool:
    """Whether a dump of ``faulthandler`` has got to the main thread, which usually takes the signal."""
    return "Current thread " in text and text.rfind("Current thread ") > text.rfind("\nThread ")


def classify(frames: Frames, state: str, *, busy: bool) -> StackKind:
    """What a rank does that completes no step. ``state``: as in /proc/PID/stat, at two looks the same."""
    if state in ("T", "t"):
        return StackKind.STOPPED
    if state == "D":
        return StackKind.KERNEL
    if not frames:
        return StackKind.UNKNOWN
    inner = _telling(frames)
    if any(part in inner.path for part in _COLLECTIVE):
        return StackKind.COLLECTIVE
    if inner.path.endswith(_BACKWARD) and not busy:
        # The gradients' all-reduce is awaited in C++, below the call that computes them.
        return StackKind.COLLECTIVE
    if any(part in frame.path for frame in frames for part in _DATA):
        return StackKind.DATA
    return StackKind.CODE


def where(frames: Frames) -> str:
    """The innermost call that says something, and the script's own below which it is."""
    if not frames:
        return ""
    inner = _telling(frames)
    text = str(inner)
    own = next((frame for frame in frames[frames.index(inner) :] if not _is_library(frame)), None)
    if own is not None and own is not inner:
        text += f", called by {own}"
    return text[:WHERE_CHARS_MAX]


def is_same(one: Frames, other: Frames) -> bool:
    """Whether both are one place: the innermost call may have gone on by lines."""
    if not one or not other:
        return one == other
    names = [(frame.name, frame.file) for frame in one] == [(frame.name, frame.file) for frame in other]
    return names and [frame.line for frame in one[1:]] == [frame.line for frame in other[1:]]


def deepest_of_workers(workers: Sequence[Frames]) -> Frames:
    """Of the processes that a data loader has started, one that is in the script's own code, else ()."""
    return next(
        (frames for frames in workers if frames and not _is_library(_telling(frames))),
        (),
    )


_SILENT = ("/threading.py", "/queue.py", "/selectors.py", "/multiprocessing/", "c10d_logger.py", "<frozen ")


def _telling(frames: Frames) -> Frame:
    """The innermost frame that is no mere way to wait."""
    return next((frame for frame in frames if not any(part in frame.path for part in _SILENT)), frames[0])


def _is_library(frame: Frame) -> bool:
    return any(part in frame.path for part in _LIBRARY)
