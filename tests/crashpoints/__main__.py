"""Die at every boundary of saves, commits and collections: ``python -m tests.crashpoints --all``.

Without ``--all``: only at calls that change something, as the suite does.
"""

# ruff: noqa: T201 - its purpose is to print

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.crashpoints import files, ports
from tests.crashpoints.playing import fast_folder, play_story


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.crashpoints", description=__doc__)
    parser.add_argument("--all", action="store_true", help="every call of every process, reads included")
    options = parser.parse_args()
    wrong: list[str] = []
    total = 0
    with tempfile.TemporaryDirectory(dir=fast_folder()) as temporary:
        for story in ports.STORIES:
            began = time.monotonic()
            chosen = ports.points if options.all else ports.changing
            tally = play_story(Path(temporary), story, chosen)
            total += tally.deaths
            wrong += tally.problems
            survived = tally.deaths - len(tally.problems)
            print(f"ports, {story}: {survived} of {tally.deaths} deaths survived", end="")
            print(f" ({time.monotonic() - began:.0f} s)", flush=True)
        for name, piece in files.PIECES.items():
            began = time.monotonic()
            played = files.play(piece, Path(temporary), every=1 if options.all else 3)
            total += played.deaths
            wrong += played.problems
            print(f"files, {name}: {played.deaths} deaths at {len(played.calls)} system calls", end="")
            print(f" ({time.monotonic() - began:.0f} s)", flush=True)
    print(f"{total} deaths, {len(wrong)} with something lost, unreadable or left over")
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
