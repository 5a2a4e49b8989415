"""``dtrain``: finds the verb, runs it, and turns any error into a sentence and an exit code."""

import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click

from dtrain.cli import terminal
from dtrain.cli.globals import Settings
from dtrain.cli.options import connected, formatted

_VERBS = Path(__file__).parent / "verbs"

MEANT = {
    "list": "get",
    "ls": "get",
    "ps": "get jobs",
    "jobs": "get jobs",
    "nodes": "get agents",
    "agents": "get agents",
    "workers": "get agents",
    "events": "get events",
    "coordinators": "get coordinators",
    "leader": "get coordinators",
    "status": "describe",
    "show": "describe",
    "inspect": "describe",
    "stop": "cancel",
    "kill": "cancel",
    "rm": "cancel",
    "delete": "cancel",
    "launch": "run",
    "apply": "submit",
    "create": "submit",
    "start": "up",
    "save": "checkpoint",
    "resize": "scale",
    "verify": "checkpoints verify",
    "export": "checkpoints export",
    "pin": "checkpoints pin",
    "gc": "checkpoints gc",
    "htop": "top",
    "monitor": "top",
    "tail": "logs -f",
    "log": "logs",
}
"""Words of other tools, and the verb they mean here."""


class Verbs(click.Group):
    """The verbs of the folder ``verbs``; a file is imported only when its verb is needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return sorted(path.stem for path in _VERBS.glob("[a-z]*.py"))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        import importlib

        command = importlib.import_module(f"dtrain.cli.verbs.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        command = self.get_command(ctx, name)
        if command is not None:
            return name, command, args[1:]
        if name.startswith("-"):
            return super().resolve_command(ctx, args)
        raise click.UsageError(f"there is no verb {name!r}; {self._suggestion(ctx, name)}", ctx)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            # click would leave with 1, which stands for a bug here.
            return 0

    def _suggestion(self, ctx: click.Context, name: str) -> str:
        import difflib

        verbs = self.list_commands(ctx)
        near = difflib.get_close_matches(name, [*verbs, *MEANT], n=1, cutoff=0.6)
        meant = MEANT.get(name) or (MEANT.get(near[0], near[0]) if near else "")
        return f"did you mean 'dtrain {meant}'?" if meant else f"the verbs are {', '.join(verbs)}"


def _print_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    del param
    if value and not ctx.resilient_parsing:
        from importlib.metadata import version

        click.echo(f"dtrain {version('dtrain')}")
        ctx.exit()


@click.group(
    cls=Verbs,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="\b\nExamples:\n  dtrain up\n  dtrain run --nnodes 2 --nproc-per-node 2 train.py --lr 0.1",
)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Show it."
)
@formatted()
@partial(connected, etcd=True)
def cli() -> None:
    """Fault-tolerant distributed PyTorch training, with its state in etcd."""


def run(argv: Sequence[str]) -> int:
    """Run one command line and return its exit code; every error is written to stderr."""
    settings = Settings()
    completing = "_DTRAIN_COMPLETE" in os.environ
    if completing:
        from dtrain.cli import shells

        shells.use()
    try:
        result: Any = cli.main(
            args=list(argv),
            prog_name="dtrain",
            standalone_mode=False,
            obj=settings,
            # click takes colours out of what goes into a pipe.
            color=True if terminal.colours_forced() else None,
        )
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else 1
    except BaseException as error:  # noqa: BLE001 - the last place that can say what happened
        if completing:
            # Somebody is typing: what is wrong with the line is said once it is sent off.
            return 0
        return _explain(error, settings)
    return result if isinstance(result, int) else 0


def _explain(error: BaseException, settings: Settings) -> int:
    if type(error).__name__ == "NoArgsIsHelpError":  # newer releases of click have it
        click.echo(str(error), err=True)
        return 2
    from dtrain.cli import complaint

    if settings.debug and not isinstance(error, click.Abort):
        import traceback

        traceback.print_exception(error, file=sys.stderr)
    told = complaint.of(error)
    try:
        if told.silent:
            pass
        elif settings.output == "json":
            click.echo(told.as_json(), err=True)
        else:
            click.echo(told.as_text(), err=True)
    except OSError:
        # Nobody listens to stderr any more; the exit code still says it.
        return told.exit_code
    return told.exit_code


def main() -> None:
    """Entry point of the ``dtrain`` command."""
    if sys.argv[1:2] not in (["agent"], ["coordinator"], ["up"]):
        # Our error says it in words; in the log of a daemon grpc's own lines are all there is.
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    code = run(sys.argv[1:])
    try:
        sys.stdout.flush()
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            code = _explain(error, Settings())
        # `dtrain get jobs | head` closed the pipe: no reason to complain, now or at the interpreter's end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if "_DTRAIN_COMPLETE" in os.environ:
        # A look-up that has been given up may still hang in a thread that the interpreter would wait for.
        os._exit(code)
    sys.exit(code)
