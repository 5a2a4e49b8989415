"""Checks commands that cannot be run here: verbs and options, scripts, charts and the files they name."""

import os
import re
import shlex
import shutil
import subprocess
import tempfile

import click
from tests.docs.pages import ROOT

from dtrain.agent import config as agent_config
from dtrain.cli.globals import Settings
from dtrain.cli.main import cli
from dtrain.coordinator import config as coordinator_config
from dtrain.protocol.errors import DtrainError
from dtrain.runtime import config

DAEMONS = {"agent": agent_config.SETTINGS, "coordinator": coordinator_config.SETTINGS}
_ENDS = frozenset({"&&", "||", ";", "|", "&"})
_ASSIGNMENT = re.compile(r"^[A-Za-z_]\w*=")


def problems(script: str) -> list[str]:
    """Return what is wrong with the commands of a script."""
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
    if done.returncode:
        return [done.stderr.strip()]
    found: list[str] = []
    for line in script.replace("\\\n", " ").split("\n"):
        for words in _commands(line):
            found += [f"`{shlex.join(words)}`: {problem}" for problem in _problems(words)]
    return found


def _commands(line: str) -> list[list[str]]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
    lexer.whitespace_split = True
    commands: list[list[str]] = [[]]
    for word in lexer:
        if word in _ENDS:
            commands.append([])
        elif commands[-1] or not _ASSIGNMENT.match(word):
            commands[-1].append(word)
    return [command for command in commands if command]


def _problems(words: list[str]) -> list[str]:
    program, rest = words[0], words[1:]
    if program == "dtrain":
        return dtrain(rest)
    if program == "helm" and rest[:1] == ["install"]:
        return _helm(rest[1:])
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
        return [f"make has no {word}" for word in rest if "=" not in word and word not in targets]
    named = [program, *rest] if program in ("sbatch", "bash", "sh", "python") else [program]
    files = [word for word in named if word.startswith(("deploy/", "tools/", "examples/"))]
    return [f"there is no {word}" for word in files if not (ROOT / word).exists()]


def dtrain(words: list[str]) -> list[str]:
    """Return what is wrong with the words behind ``dtrain``; nothing is run."""
    command: click.Command = cli
    parent: click.Context | None = None
    name = "dtrain"
    rest = list(words)
    try:
        while True:
            context = command.make_context(name, rest, parent, obj=Settings())
            if not isinstance(command, click.Group):
                break
            found, inner, rest = command.resolve_command(context, [*context._protected_args, *context.args])
            assert inner is not None
            command, parent, name = inner, context, found or ""
        if name in DAEMONS and parent is not None and parent.parent is None:
            given = [word for word in context.params.get("settings", ()) if word != "..."]
            config.parse(name, "", DAEMONS[name], given, {})
    except click.exceptions.Exit:
        return []
    except click.BadParameter as error:
        # The words have been told apart by then; the reader's files are not here.
        is_file = error.param is not None and isinstance(error.param.type, click.Path)
        return [] if is_file else [error.format_message()]
    except click.ClickException as error:
        return [error.format_message()]
    except DtrainError as error:
        return [str(error)]
    except SystemExit:
        return ["the daemon does not know one of these settings"]
    return []


def _helm(words: list[str]) -> list[str]:
    cached = ROOT / ".cache" / "kube" / "helm"
    tool = str(cached) if cached.exists() else shutil.which("helm")
    if tool is None:
        return []
    with tempfile.TemporaryDirectory() as home:
        done = subprocess.run(
            [tool, "template", *words],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"HOME": home},
        )
    return [done.stderr.strip()] if done.returncode else []
