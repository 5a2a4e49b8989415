"""Reads the command blocks of the documentation.

A page says in a comment what its blocks need, one directly above a block what that block needs:

    <!-- docs-test: cluster -->              a cluster, as `dtrain up --test` starts it
    <!-- docs-test: etcd -->                 an etcd where the page says 127.0.0.1:2379
    <!-- docs-test: none -->                 nothing but the checkout
    <!-- docs-test: skip: REASON -->         what no test machine has; it is checked without being run

and, behind a semicolon each, what a reader has and a test must make:

    <!-- docs-test: cluster; first: dtrain submit examples/digits/job.yaml --set name=base -->
    <!-- docs-test: cluster; with: gpu-07=agent-1 -->

``console`` blocks hold commands behind `$ ` and what they print: `...` stands for anything, alone on a
line for any lines, and `[exit 21]` behind it for another end than success. Without any output, any is right.
``bash`` blocks are scripts, each of whose commands has to succeed.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

NEEDS = ("none", "etcd", "cluster", "skip")
_FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})\s*(\S*)")
_COMMENT = re.compile(r"^<!-- docs-test: (.+?) -->$")
_EXIT = re.compile(r"^\[exit (\d+)\]$")


class BadPage(Exception):
    """The page is not written as it has to be; the text says where and what to write."""


@dataclass(frozen=True, slots=True)
class Declaration:
    """What a block needs."""

    needs: str
    reason: str = ""
    first: tuple[str, ...] = ()
    """Commands run before, which the reader does not see."""
    substitutes: tuple[tuple[str, str], ...] = ()
    """What the page calls things, and what they are called where it is tested."""


@dataclass(frozen=True, slots=True)
class Command:
    """One command and what it must do; ``expected`` None: whatever it prints."""

    text: str
    expected: tuple[str, ...] | None = None
    exit_code: int = 0


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block. ``line`` is the fence's, counted from 1."""

    page: Path
    line: int
    language: str
    text: str
    declared: Declaration | None

    @property
    def where(self) -> str:
        page = self.page.relative_to(ROOT) if ROOT in self.page.parents else self.page
        return f"{page.as_posix()}:{self.line}"

    @property
    def is_command(self) -> bool:
        return self.language in ("console", "bash")

    def commands(self) -> list[Command]:
        """Return what a reader types; a bash block is one script."""
        if self.language == "bash":
            return [Command(f"set -e\n{self.text}")]
        return list(_console(self))


def read(page: Path) -> list[Block]:
    """Return all fenced blocks of a page.

    Raises:
        BadPage: a declaration is wrong.
    """
    blocks: list[Block] = []
    of_page: Declaration | None = None
    lines = page.read_text().split("\n")
    number = 0
    while number < len(lines):
        line = lines[number]
        number += 1
        if comment := _COMMENT.match(line):
            declared = _declaration(comment[1], f"{page.name}:{number}")
            if number == len(lines) or not _FENCE.match(lines[number]):
                if of_page is not None:
                    raise BadPage(f"{page.name}:{number}: a second declaration stands directly above a block")
                of_page = declared
        elif fence := _FENCE.match(line):
            above = _COMMENT.match(lines[number - 2]) if number > 1 else None
            declared_here = _declaration(above[1], f"{page.name}:{number}") if above else of_page
            closing = re.compile(rf"^ {{0,3}}{fence[1][0]}{{{len(fence[1])},}}\s*$")
            began, inside = number, []
            while number < len(lines) and not closing.match(lines[number]):
                inside.append(lines[number])
                number += 1
            number += 1
            blocks.append(Block(page, began, fence[2], "\n".join(inside), declared_here))
    return blocks


def _declaration(text: str, where: str) -> Declaration:
    words = [part.strip() for part in re.split(r";\s+(?=first:|with:)", text)]
    needs, _, reason = words[0].partition(":")
    if needs not in NEEDS or (needs == "skip") != bool(reason.strip()):
        raise BadPage(f"{where}: write one of {', '.join(NEEDS)}, and behind 'skip:' why")
    first: list[str] = []
    pairs: list[tuple[str, str]] = []
    for word in words[1:]:
        kind, _, value = word.partition(":")
        if kind == "first":
            first.append(value.strip())
        else:
            for pair in value.split():
                name, _, stands_for = pair.partition("=")
                pairs.append((name, stands_for))
    return Declaration(needs, reason.strip(), tuple(first), tuple(pairs))


def _console(block: Block) -> Iterator[Command]:
    text, expected = "", None
    for line in [*block.text.split("\n"), "$ "]:
        if line.startswith("$ "):
            if text:
                yield _finished(text, expected)
            text, expected = line[2:], None
        elif text.endswith("\\") and expected is None:
            text += "\n" + line.removeprefix("> ")
        elif not text:
            if line.strip():
                raise BadPage(
                    f"{block.where}: a console block begins with `$ ` and a command, not with {line!r}"
                )
        else:
            expected = (*(expected or ()), line)


def _finished(text: str, expected: tuple[str, ...] | None) -> Command:
    exit_code = 0
    lines = [line for line in expected or () if line.strip()]
    if lines and (told := _EXIT.match(lines[-1])):
        exit_code = int(told[1])
        lines.pop()
    return Command(text, tuple(lines) or None, exit_code)


def matches(expected: tuple[str, ...] | None, printed: str) -> bool:
    """Tell whether ``printed`` is what the page shows; how many blanks there are does not matter."""
    if expected is None:
        return True
    pattern = ""
    for line in expected:
        if line.strip() == "...":
            pattern += r"(?:[^\n]*\n)*?"
        else:
            pieces = (re.escape(" ".join(piece.split())) for piece in line.split("..."))
            pattern += r" ?[^\n]*? ?".join(pieces) + r" ?\n"
    squeezed = "".join(f"{' '.join(line.split())}\n" for line in printed.splitlines() if line.strip())
    return re.fullmatch(pattern, squeezed) is not None


def substituted(text: str, pairs: Mapping[str, str]) -> str:
    """Return the text with names as they are in the test, as whole words."""
    for name, stands_for in pairs.items():
        text = re.sub(rf"(?<![\w.-]){re.escape(name)}(?![\w-])", stands_for, text)
    return text
