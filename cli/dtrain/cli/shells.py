"""How shells ask what could come next, where click's own ways fall short.

Bash cuts words at ``:`` and ``=`` before a completion sees them, so that
``--coordinators host:7070`` and ``--output=json`` reach click in pieces: ours reads
the line itself. And zsh and fish replace all of ``--output=js``, not what is behind the ``=``.
"""

import os
from typing import Any

from click.shell_completion import (
    BashComplete,
    CompletionItem,
    FishComplete,
    ShellComplete,
    ZshComplete,
    add_completion_class,
    split_arg_string,
)

VARIABLE = "_DTRAIN_COMPLETE"

_BASH = """\
%(complete_func)s() {
    local IFS=$'\\n'
    local line="${COMP_LINE:0:COMP_POINT}" response completion type value

    response=$(env COMP_LINE="$line" COMP_WORDS="${COMP_WORDS[*]}" COMP_CWORD=$COMP_CWORD \\
        %(complete_var)s=bash_complete $1)

    COMPREPLY=()
    for completion in $response; do
        IFS=',' read -r type value <<< "$completion"
        case $type in
            dir) compopt -o dirnames ;;
            file) compopt -o default ;;
            plain) COMPREPLY+=("$value") ;;
        esac
    done
    return 0
}

complete -o nosort -F %(complete_func)s %(prog_name)s
"""


class Bash(BashComplete):
    """Reads the line up to the cursor."""

    source_template = _BASH

    def get_completion_args(self) -> tuple[list[str], str]:
        line = os.environ.get("COMP_LINE")
        if not line:
            # A script of an earlier release, in a shell that has not been started again.
            return super().get_completion_args()
        # With a mark at its end the last word is the one that is typed, also where nothing of it is there.
        words = split_arg_string(line + "x")
        return words[1:-1], words[-1][:-1]


class _Whole(ShellComplete):
    """Offers words as they will stand on the line."""

    def get_completions(self, args: list[str], incomplete: str) -> "list[CompletionItem[Any]]":
        found = super().get_completions(args, incomplete)
        flag, equals, _ = incomplete.partition("=")
        if not (equals and flag.startswith("--")):
            return found
        return [
            CompletionItem(f"{flag}={item.value}", item.type, item.help) if item.type == "plain" else item
            for item in found
        ]


class Zsh(_Whole, ZshComplete):
    """Replaces words as a whole."""


class Fish(_Whole, FishComplete):
    """Replaces words as a whole."""


def use() -> None:
    """Let click find them."""
    for kind in (Bash, Zsh, Fish):
        add_completion_class(kind)
