"""Write docs/cli.md from the commands themselves; --check proves it fresh."""

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from dtrain.cli import exits, torchflags
from dtrain.cli.main import MEANT, cli

PAGE = Path(__file__).parent.parent / "docs" / "cli.md"

HEAD = """# The command line

Every verb, as `dtrain VERB --help` says it. Results go to stdout, talk to stderr. Names of jobs and
agents may be cut to what is unique, and jobs may be called `job/NAME`. Durations are seconds, or such
as `500ms`, `90s`, `10m`, `1h30m`. What cannot be undone asks first, and wants `--yes` where nobody can
be asked.

Colours appear on terminals only, and not with `NO_COLOR=1` or `TERM=dumb`; `FORCE_COLOR=1` keeps them in
pipes and files. Progress of long work is one line in place on a terminal, a plain line every few seconds
elsewhere. An error is one sentence with a code, its cause and what to do
([troubleshooting.md](troubleshooting.md)); with `-o json` it is one JSON object. `--debug` adds the
traceback, which is never shown without.
"""

CLUSTER = """## Which cluster

A flag beats the environment, which beats the cluster of the last `dtrain up`. Any replica answers; one
that does not is passed over for the next. Where only etcd is named, replicas are looked up there; its
flags and variables are etcdctl's.
"""

COMPLETION = """## Completion

Verbs, options, and the live names of jobs and agents; where the cluster does not answer within 300 ms
there are no names, and nothing is said.

| shell | once, into its start-up file |
|---|---|
| bash | `eval "$(dtrain completion bash)"` |
| zsh | `eval "$(dtrain completion zsh)"` |
| fish | `dtrain completion fish > ~/.config/fish/completions/dtrain.fish` |

"""


def main(argv: Sequence[str]) -> int:
    """Write the page, or with ``--check`` compare it; return the exit code."""
    text = "\n".join(part.rstrip() + "\n" for part in page())
    if "--check" in argv:
        if PAGE.exists() and PAGE.read_text() == text:
            return 0
        print(f"{PAGE} is stale: run 'python tools/gen_cli_doc.py' and commit the result", file=sys.stderr)
        return 1
    PAGE.write_text(text)
    return 0


def page() -> Iterator[str]:
    """The parts of the page, in order."""
    root = click.Context(cli, info_name="dtrain")
    found = dict(_commands(cli, root))
    yield HEAD
    shared = _options(cli, root)
    yield CLUSTER
    yield _table([row for flag, row in shared.items() if flag not in ("-o", "--output")])
    yield "## Exit codes\n"
    yield _exit_codes()
    yield "## Verbs\n"
    yield "\n".join(
        f"* [`{name}`](#{name.replace(' ', '-')}): {_short(command)}" for name, (command, _) in found.items()
    )
    for name, (command, context) in found.items():
        yield from _verb(name, command, context, shared)
    yield "## Flags of torchrun\n"
    yield _torchrun()
    yield COMPLETION
    yield "## Words of other tools\n"
    yield "What these words mean here is suggested where they are tried: " + ", ".join(
        f"`{word}` → `{meant}`" for word, meant in sorted(MEANT.items())
    )


def _commands(
    group: click.Group, context: click.Context, before: str = ""
) -> Iterator[tuple[str, tuple[click.Command, click.Context]]]:
    for word in group.list_commands(context):
        command = group.get_command(context, word)
        assert command is not None
        inner = click.Context(command, info_name=word, parent=context)
        name = f"{before}{word}"
        yield name, (command, inner)
        if isinstance(command, click.Group):
            yield from _commands(command, inner, f"{name} ")


def _verb(
    name: str, command: click.Command, context: click.Context, shared: dict[str, list[str]]
) -> Iterator[str]:
    yield f"### {name}\n"
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    yield f"`{usage}`\n"
    yield _prose(command.help or _short(command))
    own = [row for flag, row in _options(command, context).items() if shared.get(flag) != row]
    if own:
        yield _table(own)
    lines = [line.strip() for line in (command.epilog or "").splitlines() if line.startswith("  ")]
    if lines:
        yield "```text\n" + "\n".join(lines) + "\n```"


def _options(command: click.Command, context: click.Context) -> dict[str, list[str]]:
    """Rows by first name. ``--output`` differs from verb to verb, ``--help`` does not matter."""
    rows = {}
    for option in command.get_params(context):
        if not isinstance(option, click.Option) or option.hidden or {"--help", "--version"} & {*option.opts}:
            continue
        record = option.get_help_record(context)
        assert record is not None
        flags, text = record
        variables = [option.envvar] if isinstance(option.envvar, str) else list(option.envvar or ())
        rows[option.opts[0]] = [_code(flags), _cell(text), ", ".join(f"`{name}`" for name in variables)]
    return rows


def _table(rows: list[list[str]]) -> str:
    named = any(row[2] for row in rows)
    head = ["| option | | variable |", "|---|---|---|"] if named else ["| option | |", "|---|---|"]
    return "\n".join([*head, *("| " + " | ".join(row if named else row[:2]) + " |" for row in rows)]) + "\n"


def _exit_codes() -> str:
    rows = [f"| {code} | {meaning} |" for code, meaning in exits.MEANINGS.items()]
    return "\n".join(
        [
            "| code | meaning |",
            "|---|---|",
            *rows,
            "",
            "`run` passes on the code of the rank that failed first, 128 + n for signal n; the last line on"
            " stderr says which rank that was. A rank that exits with 93 must not be restarted.",
        ]
    )


def _torchrun() -> str:
    accepted = [
        f"| `--{flag}` | accepted, no effect: {_cell(why)} |" for flag, why in torchflags.EXPLAINED.items()
    ]
    refused = [
        f"| `--{flag}` | refused; instead: {_cell(instead)} |" for flag, instead in torchflags.REFUSED.items()
    ]
    return "\n".join(
        [
            "`dtrain run` takes torchrun's command line, with dashes or underscores, and its variables"
            " (`PET_NNODES`, ...). What is not in the table of [`run`](#run) is here. `--node-rank` other"
            " than 0 is refused: the command is given once, not on each machine.",
            "",
            "| flag | |",
            "|---|---|",
            *accepted,
            *refused,
        ]
    )


def _short(command: click.Command) -> str:
    return command.short_help or (command.help or "").partition("\n")[0]


def _prose(text: str) -> str:
    paragraphs = text.replace("\b", "").strip().split("\n\n")
    return "\n\n".join(" ".join(_cell(paragraph).split()) for paragraph in paragraphs) + "\n"


def _code(flags: str) -> str:
    return ", ".join(f"`{_cell(flag)}`" for flag in re.split(r", (?=-)", flags))


def _cell(text: str) -> str:
    return text.replace("|", "\\|").strip()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
