"""``dtrain coordinator``: run one coordinator replica."""

import click

from dtrain.cli.options import examples


@click.command(
    short_help="Run one coordinator replica (a daemon).",
    context_settings={"ignore_unknown_options": True},
    epilog=examples(
        "dtrain coordinator --cluster prod --id c1 --listen 0.0.0.0:7070 --endpoints http://etcd:2379",
        "dtrain coordinator --help-settings",
    ),
)
@click.option("--help-settings", is_flag=True, help="Show every setting of the daemon.")
@click.argument("settings", nargs=-1, type=click.UNPROCESSED)
def command(help_settings: bool, settings: tuple[str, ...]) -> None:
    """Become one coordinator replica: all settings are passed on to it as they are.

    SIGTERM stops it cleanly.
    """
    import os
    import sys

    arguments = ["--help"] if help_settings else list(settings)
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "dtrain.coordinator", *arguments])  # noqa: S606
