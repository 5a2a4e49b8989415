"""What the documentation tells people to type works, and prints what it says."""

from pathlib import Path

import pytest
from tests.docs.conftest import Place
from tests.docs.pages import PAGES, ROOT, Block, Command, matches, read, substituted
from tests.docs.typist import Typist

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

LEAVE_BEHIND = (
    "for job in $(dtrain get jobs -o name | cut -d/ -f2); do dtrain cancel $job --yes; done",
    "for job in $(dtrain get jobs -o name | cut -d/ -f2); do dtrain wait $job --timeout 60s; done",
    "for agent in $(dtrain get agents -o name | cut -d/ -f2); do dtrain uncordon $agent; done",
)
"""A page begins with machines that are free."""


def typed(page: Path) -> list[Block]:
    return [
        each for each in read(page) if each.is_command and each.declared and each.declared.needs != "skip"
    ]


RUN = [page for page in PAGES if typed(page)]


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_of_a_page_do_what_it_says(page: Path, request: pytest.FixtureRequest) -> None:
    blocks = typed(page)
    needs = sorted({block.declared.needs for block in blocks if block.declared})
    places: dict[str, Place] = {need: request.getfixturevalue(need) for need in needs}
    some = next(iter(places.values()))
    typist = Typist(some.folder, some.env)
    try:
        for block in blocks:
            assert block.declared
            here = places[block.declared.needs].names
            for first in block.declared.first:
                run(typist, block, Command(first), here)
            names = dict(block.declared.substitutes) | here
            for command in block.commands():
                run(typist, block, command, names)
    finally:
        if "cluster" in needs:
            for command in LEAVE_BEHIND:
                typist.type(command)
        typist.close()


def run(typist: Typist, block: Block, command: Command, names: dict[str, str]) -> None:
    text = substituted(command.text, names)
    printed = typist.type(text)
    told = f"{block.where}\n$ {text}\n{printed.output}"
    assert printed.exit_code is not None, f"it does not return: {told}"
    assert printed.exit_code == command.exit_code, f"exit code {printed.exit_code}: {told}"
    expected = command.expected and tuple(substituted(line, names) for line in command.expected)
    assert matches(expected, printed.output), f"the page shows {command.expected}: {told}"
