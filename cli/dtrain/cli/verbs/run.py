"""``dtrain run``: torchrun's command line, on a cluster or on one of its own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from dtrain.cli.options import SECONDS, F, connected, examples

# Long names of torchrun's flags that are accepted and explained (see torchflags.EXPLAINED).
_EXPLAINED = (
    ("--rdzv-backend",),
    ("--rdzv-endpoint",),
    ("--rdzv-conf",),
    ("--monitor-interval",),
    ("--start-method",),
    ("--role",),
    ("--local-addr",),
    ("--node-rank",),
    ("--master-addr",),
    ("--master-port",),
    ("--signals-to-handle",),
    ("--event-log-handler",),
    ("-r", "--redirects"),
    # Refused, with what to use instead (see torchflags.REFUSED).
    ("--logs-specs",),
    ("--duplicate-stdout-filters",),
    ("--duplicate-stderr-filters",),
    ("--numa-binding",),
)
_SWITCHES = ("--run-path", "--virtual-local-rank")
"""The same, of flags that take no value."""


def _normal(word: str) -> str:
    return word.replace("_", "-")


def _explained(function: F) -> F:
    for names in _EXPLAINED:
        option = click.option(*names, hidden=True, metavar="VALUE", envvar=_pet(names[-1]))
        function = option(function)
    for name in _SWITCHES:
        switch = click.option(name, is_flag=True, default=None, hidden=True, envvar=_pet(name))
        function = switch(function)
    return function


def _pet(flag: str) -> str:
    return "PET_" + flag.removeprefix("--").replace("-", "_").upper()


def _flag(*names: str, **how: Any) -> Callable[[F], F]:
    long = next(name for name in names if name.startswith("--"))
    return click.option(*names, envvar=_pet(long), **how)


@click.command(
    short_help="Run a script like torchrun does, or a job file, and follow it.",
    context_settings={"allow_interspersed_args": False, "token_normalize_func": _normal},
    epilog=examples(
        "dtrain run --nnodes 2 --nproc-per-node 4 train.py --lr 0.1",
        "dtrain run -m mypackage.train --epochs 3",
        "dtrain run --folder ./run --nproc-per-node 2 train.py",
        "dtrain run job.yaml",
    ),
)
@_flag("--nnodes", default="1", show_default=True, metavar="N|MIN:MAX", help="Machines.")
@_flag("--nproc-per-node", default="1", show_default=True, metavar="N|auto|cpu|gpu", help="Ranks on each.")
@_flag("--max-restarts", type=click.IntRange(0), help="Restarts after failures (default: 10 an hour).")
@_flag("--rdzv-id", metavar="ID", help="Name of the job (also --name).")
@_flag("-m", "--module", is_flag=True, help="The program is a Python module.")
@_flag("--no-python", is_flag=True, help="The program is a command, not a Python script.")
@_flag("--log-dir", metavar="DIR", help="Copy the ranks' logs there at the end (embedded cluster).")
@_flag("-t", "--tee", default="", metavar="0..3", help="Show the output of all ranks, not only rank 0's.")
@_flag("--local-ranks-filter", default="", metavar="N,...", help="Show only these local ranks.")
@_flag("--shutdown-timeout", type=SECONDS, help="Time between SIGTERM and SIGKILL (default: 30 s).")
@_flag("--standalone", is_flag=True, help="Use a cluster of its own even if one is configured.")
@click.option(
    "--working-dir",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    metavar="DIR",
    help="Pack this folder and start the ranks in it, on each machine (default: run in this one's path).",
)
@click.option("--name", help="Name of the job (default: from the program).")
@click.option(
    "--folder",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Keep the embedded cluster there: the same command goes on with an unfinished job.",
)
@click.option("--set", "changes", multiple=True, metavar="A.B=C", help="Change one setting of the job.")
@_explained
@connected
@click.argument("program")
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
def command(**given: Any) -> int:
    """Run PROGRAM (a script, a module with -m, or a job file) and show what it prints.

    With a cluster configured it is submitted there and Ctrl-C detaches. Without
    one, a cluster of its own runs as long as the job. Ctrl-C ends both, after a
    checkpoint where that is kept (--folder, or a store in the job file), a second
    one ends them at once. The exit code is that of the rank that failed first.
    """
    from dtrain.cli import running

    context = click.get_current_context()
    chosen = {
        name for name in given if context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT
    }
    return running.run(given, chosen)
