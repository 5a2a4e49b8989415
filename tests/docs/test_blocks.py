"""Each command in the documentation is declared and can be checked; how pages are read."""

from pathlib import Path

import pytest
from tests.docs.pages import PAGES, ROOT, BadPage, Block, Command, Declaration, matches, read, substituted
from tests.docs.parsing import problems

BLOCKS = [block for page in PAGES for block in read(page)]
COMMANDS = [block for block in BLOCKS if block.is_command]
SKIPPED = [block for block in COMMANDS if block.declared and block.declared.needs == "skip"]
SHELLS = ("", "sh", "shell", "zsh", "shell-session")


def name(block: Block) -> str:
    return block.where


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_fence_has_a_language(page: Path) -> None:
    for block in read(page):
        assert block.language not in SHELLS, (
            f"{block.where}: write ```console with `$ ` before each command, ```bash for a script, "
            "```text for the rest"
        )


@pytest.mark.parametrize("block", COMMANDS, ids=name)
def test_every_command_block_says_what_it_needs(block: Block) -> None:
    assert block.declared, (
        f"{block.where}: say what it needs, below the page's title or on the line above the block: "
        "<!-- docs-test: cluster -->, etcd, none, or skip: and why no machine of ours can run it"
    )
    assert block.commands(), f"{block.where}: there is no command in it"


@pytest.mark.parametrize("block", SKIPPED, ids=name)
def test_commands_that_cannot_be_run_are_right_as_far_as_one_can_tell(block: Block) -> None:
    script = "\n".join(command.text.removeprefix("set -e\n") for command in block.commands())
    assert not problems(script), block.where


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("dtrain get jbos", "jbos"),
        ("dtrain frobnicate", "there is no verb"),
        ("dtrain wait digits --until never", "--until"),
        ("FOO=1 dtrain get jobs | dtrain nothing", "there is no verb"),
        ("dtrain agent --slotz 3", "does not know"),
        ("dtrain agent --slots many", "slots"),
        ("bash deploy/none.sh", "deploy/none.sh"),
        ("make no-such-target", "no-such-target"),
        ("if true; then", "syntax error"),
    ],
)
def test_a_wrong_command_is_found_without_running_it(script: str, says: str) -> None:
    assert says in " ".join(problems(script))


@pytest.mark.parametrize(
    "script",
    [
        "dtrain get jobs -o json --watch   # a comment",
        "dtrain --coordinators c1:7070 submit job.yaml --set nnodes=4 && dtrain wait digits --for running",
        "dtrain agent --name gpu-1 --slots 8 ...",
        "dtrain coordinator --help-settings",
        "dtrain --help",
        "make test ONLY=x",
    ],
)
def test_a_right_command_is_left_alone(script: str) -> None:
    assert problems(script) == []


def page(tmp_path: Path, text: str) -> list[Block]:
    path = tmp_path / "page.md"
    path.write_text(text)
    return read(path)


def test_a_page_declares_for_its_blocks_and_a_block_for_itself(tmp_path: Path) -> None:
    text = (
        "# T\n<!-- docs-test: cluster -->\n\n```console\n$ a\n```\n"
        "<!-- docs-test: skip: why -->\n```bash\nb\n```\n```bash\nc\n```\n"
    )
    found = [block.declared for block in page(tmp_path, text)]
    assert found == [Declaration("cluster"), Declaration("skip", "why"), Declaration("cluster")]


def test_what_the_reader_has_is_made_first(tmp_path: Path) -> None:
    text = "<!-- docs-test: cluster; first: dtrain a; b; first: c; with: x=y p=q -->\n```console\n$ a\n```\n"
    assert page(tmp_path, text)[0].declared == Declaration(
        "cluster", "", ("dtrain a; b", "c"), (("x", "y"), ("p", "q"))
    )


def test_commands_and_what_they_print(tmp_path: Path) -> None:
    text = "```console\n$ a \\\n    b\n$ c\none\n...\n$ d\n...\n[exit 21]\n```\n"
    assert page(tmp_path, text)[0].commands() == [
        Command("a \\\n    b"),
        Command("c", ("one", "...")),
        Command("d", ("...",), 21),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "<!-- docs-test: skip -->\n```bash\na\n```\n",
        "<!-- docs-test: sometimes -->\n```bash\na\n```\n",
        "<!-- docs-test: none -->\nText.\n<!-- docs-test: none -->\n\n```bash\na\n```\n",
    ],
)
def test_a_wrong_declaration_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(BadPage):
        page(tmp_path, text)


def test_a_console_block_begins_with_a_command(tmp_path: Path) -> None:
    with pytest.raises(BadPage, match="begins with"):
        page(tmp_path, "```console\nls\n```\n")[0].commands()


@pytest.mark.parametrize(
    ("expected", "printed", "is_right"),
    [
        (None, "whatever", True),
        (("...",), "", True),
        (("a", "..."), "a\nb\nc\n", True),
        (("...", "c"), "a\nb\nc\n", True),
        (("a  b ... d",), "a b   c d\n", True),
        (("a",), "a\nb\n", False),
        (("...", "b"), "a\nb\nc\n", False),
        (("x ...",), "y\n", False),
        (("1.2",), "132\n", False),
    ],
)
def test_what_is_shown_is_compared_with_what_is_printed(expected, printed, is_right) -> None:
    assert matches(expected, printed) is is_right


def test_names_are_substituted_as_words() -> None:
    assert substituted("drain gpu-07 gpu-071 xgpu-07", {"gpu-07": "a1"}) == "drain a1 gpu-071 xgpu-07"
    assert substituted("cat /tmp/x ./tmp", {"/tmp": "/d"}) == "cat /d/x ./tmp"
