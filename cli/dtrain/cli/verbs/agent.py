"""``dtrain agent``: run the agent of this machine."""

import click

from dtrain.cli.options import examples


@click.command(
    short_help="Run the agent of this machine (a daemon).",
    context_settings={"ignore_unknown_options": True},
    epilog=examples(
        "dtrain agent --cluster prod --name gpu-01 --slots 8 --endpoints http://etcd:2379",
        "dtrain agent --help-settings",
    ),
)
@click.option("--help-settings", is_flag=True, help="Show every setting of the daemon.")
@click.argument("settings", nargs=-1, type=click.UNPROCESSED)
def command(help_settings: bool, settings: tuple[str, ...]) -> None:
    """Become the agent of this machine: all settings are passed on to it as they are.

    SIGTERM stops it cleanly.
    """
    import os
    import sys

    arguments = ["--help"] if help_settings else list(settings)
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "dtrain.agent", *arguments])  # noqa: S606
