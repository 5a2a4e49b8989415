"""Writes results: data to stdout, talk to stderr, colour only on a terminal."""

import json
import re
import shutil
import sys
from collections.abc import Sequence
from typing import Any

import click

from dtrain.cli import terminal
from dtrain.cli.render import lists
from dtrain.cli.render.table import Table
from dtrain.protocol import wording
from dtrain.protocol.phases import JobPhase

_PHASE = re.compile(rf"(?<= )(?:{'|'.join(lists.PHASE_COLOURS)})(?= |$)")
"""The first of a line is its phase: what a reason says of other jobs comes after it."""


def width() -> int:
    """Columns of the terminal; 0 when stdout is none, and nothing is cut."""
    return shutil.get_terminal_size((0, 0)).columns if sys.stdout.isatty() else 0


def say(line: str) -> None:
    """One line for people, on stderr."""
    click.echo(terminal.text(line), err=True)


def document(value: dict[str, Any], output: str) -> None:
    """Write one object as JSON or YAML."""
    if output == "yaml":
        import yaml

        click.echo(yaml.safe_dump(value, sort_keys=False, allow_unicode=True), nl=False)
    else:
        click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def listing(
    kind: str,
    items: Sequence[dict[str, Any]],
    table: Table,
    names: Sequence[str],
    *,
    output: str,
    revision: int,
    single: bool = False,
    nothing: str = "",
) -> None:
    """Write a list in the format asked for; ``single``: one was named, so it is no list.

    ``nothing``: what is said of an empty one.
    """
    if output in ("json", "yaml"):
        if single and len(items) == 1:
            document({**items[0], "revision": revision}, output)
        else:
            document({"v": 1, "kind": f"{kind}List", "revision": revision, "items": list(items)}, output)
    elif output == "name":
        for line in lists.names(kind.lower(), names):
            click.echo(line)
    elif not table.rows:
        say(nothing or f"no {kind.lower()}s")
    else:
        for line in coloured(table.lines(width() if output == "table" else 0)):
            click.echo(line)


def coloured(lines: Sequence[str]) -> list[str]:
    """Lines as they may be printed, with phases coloured where stdout wants that."""
    lines = [terminal.text(line) for line in lines]
    if not terminal.colours(sys.stdout):
        return lines
    return [_PHASE.sub(_paint, line, count=1) for line in lines]


def _paint(found: re.Match[str]) -> str:
    return click.style(found[0], fg=lists.PHASE_COLOURS[JobPhase(found[0])])


def log(line: bytes, *, err: bool = False) -> None:
    """A piece of a rank's log: as it is into a file or pipe, harmless on a terminal."""
    target = sys.stderr if err else sys.stdout
    target.buffer.write(terminal.log(line) if target.isatty() else line)
    target.buffer.flush()


def unreadable(count: int, what: str) -> None:
    """Say on stderr when something is left out of a list."""
    if count:
        say(f"{wording.count(count, what)} cannot be shown by this release: upgrade dtrain here")


def freshness(age_s: float) -> None:
    """Say on stderr when what was read is old."""
    line = lists.stale_line(age_s)
    if line:
        say(line)
