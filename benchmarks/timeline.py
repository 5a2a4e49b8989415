"""The way of a recovery, hop by hop, from the logs of all that takes part in it.

``read`` finds the newest attempt that began after a kill; each hop is told in seconds after it.
Where several say the same, the last one counts: an attempt is as fast as its slowest part.
"""

import datetime
import json
import re
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

_Line = tuple[float, dict[str, str]]
_Match = Callable[[dict[str, str]], bool]
_LAUNCHER = re.compile(r"^(\S+Z) (.*?)((?: \w+=.*)?)$")
_FIELD = re.compile(r"(\w+)=('[^']*'|\[[^]]*\]|\S+)")


def read(cluster: Path, marks: Path, killed_ns: int, until_ns: int) -> dict[str, float]:
    """Hops of a recovery, from a kill at ``killed_ns`` (monotonic) to ``until_ns``: those that were found."""
    # Logs have wall-clock times; both clocks are read here, in the same process.
    shift = time.time() - time.monotonic()
    begin, end = killed_ns / 1e9 + shift, until_ns / 1e9 + shift
    lines = [(at - begin, fields) for at, fields in _lines(cluster) if begin - 0.001 <= at <= end]
    hops: dict[str, float] = {}
    for name, match, newest in _HOPS:
        found = [at for at, fields in lines if match(fields)]
        if found:
            hops[name] = max(found) if newest else min(found)
    ways = list(_ways(marks, killed_ns, until_ns))
    for name in dict.fromkeys(name for name, _ in ways):
        hops[name] = max(at for other, at in ways if other == name)
    hops["first step"] = (until_ns - killed_ns) / 1e9
    return hops


def table(recoveries: Sequence[dict[str, float]]) -> str:
    """Medians over recoveries: when each hop was done, and what it took after the one before."""
    names = [name for name in ORDER if any(name in hops for hops in recoveries)]
    rows, before = [], 0.0
    for name in names:
        at = statistics.median(hops[name] for hops in recoveries if name in hops)
        rows.append(f"  {name:<34} {at * 1000:8.1f} ms   + {max(0.0, at - before) * 1000:7.1f}")
        before = max(at, before)
    return "\n".join(rows)


def _is(**wanted: str) -> _Match:
    return lambda fields: all(wanted[name] in fields.get(name, "") for name in wanted)


_HOPS: tuple[tuple[str, _Match, bool], ...] = (
    ("launcher reaped the rank", _is(event="rank ended"), False),
    ("agent: ERROR", _is(event="phase", phase="ERROR"), False),
    ("session gone", _is(event="agent gone"), False),
    ("leader decided", _is(event="job", reason="starting attempt"), False),
    ("status written", _is(event="job", reason="agents ready"), False),
    ("PREPARE taken", _is(event="command taken", kind="Prepare"), True),
    ("survivors gone", _is(event="rank ended"), True),
    ("READY", _is(event="phase", phase="READY"), True),
    ("leader saw READY", _is(event="job", reason="restoring: ranks of 0"), False),
    ("START taken", _is(event="command taken", kind="Start"), True),
    ("forked", _is(event="forked"), True),
)
ORDER = (
    *(name for name, _, _ in _HOPS),
    "imported",
    "group up",
    "data loaded",
    "model wrapped",
    "restored",
    "first step",
)


def _lines(cluster: Path) -> Iterable[_Line]:
    for path in (cluster / "logs").glob("*.log"):
        for text in path.read_text(errors="replace").splitlines():
            if not text.startswith("{"):
                continue
            try:
                fields = json.loads(text)
                yield _seconds(fields["timestamp"]), {name: str(value) for name, value in fields.items()}
            except (ValueError, KeyError):
                continue
    for path in cluster.rglob("launcher.log"):
        for text in path.read_text(errors="replace").splitlines():
            found = _LAUNCHER.match(text)
            if found is not None:
                fields = dict(_FIELD.findall(found[3]))
                yield _seconds(found[1]), {**fields, "event": found[2]}


def _ways(marks: Path, begin_ns: int, end_ns: int) -> Iterable[tuple[str, float]]:
    for path in marks.glob("way-*"):
        for text in path.read_text().splitlines():
            at, _pid, name = text.split(" ", 2)
            if begin_ns <= int(at) <= end_ns:
                yield name, (int(at) - begin_ns) / 1e9


def _seconds(stamp: str) -> float:
    return datetime.datetime.fromisoformat(stamp).timestamp()
