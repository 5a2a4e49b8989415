"""What ranks reported over time, as agents keep it in the archive: lines, the last of which has all of it.

A line is written when an attempt ends, and now and then before, so that a lost
machine takes no more with it than came since. An agent that was restarted goes
on from the last line that it finds.
"""

from dataclasses import dataclass

from dtrain.protocol import codec
from dtrain.protocol.errors import DtrainError, ErrorCode, Refused
from dtrain.protocol.ids import Attempt, Rank

ARCHIVED_NAME = "series"
"""Of the file of rank 0's machine, below ``kept/`` in the archive of an attempt."""

LINE_BYTES_MAX = 512 * 1024


@dataclass(frozen=True, slots=True)
class Curve:
    """One number of one attempt: (epoch seconds, step, value), in order of time."""

    name: str
    attempt: Attempt
    rank: Rank
    points: tuple[tuple[float, int, float], ...]


def encode(curves: list[Curve]) -> bytes:
    """One line, its end included."""
    document = {
        "v": 1,
        "curves": [
            {
                "name": curve.name,
                "attempt": curve.attempt,
                "rank": curve.rank,
                "at": [round(at, 3) for at, _, _ in curve.points],
                "step": [step for _, step, _ in curve.points],
                "value": [float(f"{value:.6g}") for _, _, value in curve.points],
            }
            for curve in curves
        ],
    }
    return codec.dumps(document) + b"\n"


def decode(line: bytes) -> list[Curve]:
    """Parse one line.

    Raises:
        Refused: BAD_RECORD.
    """
    document = codec.loads(line, bytes_max=LINE_BYTES_MAX)
    try:
        if document["v"] != 1:
            raise Refused(ErrorCode.BAD_RECORD, "a line of series is of an unknown version")
        return [
            Curve(
                str(one["name"]),
                Attempt(int(one["attempt"])),
                Rank(int(one["rank"])),
                tuple(
                    zip(map(float, one["at"]), map(int, one["step"]), map(float, one["value"]), strict=True)
                ),
            )
            for one in document["curves"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise Refused(ErrorCode.BAD_RECORD, f"a line of series cannot be read: {error}") from None


def newest(data: bytes) -> list[Curve]:
    """Return what the last whole line says; [] if there is none."""
    for line in reversed(data.rpartition(b"\n")[0].split(b"\n")):
        try:
            return decode(line)
        except DtrainError:
            continue  # the first may be cut, one after a crash half written
    return []
