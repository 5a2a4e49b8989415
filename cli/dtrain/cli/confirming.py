"""Asks before what cannot be undone, or stops other people's work."""

import sys

import click


def confirm(question: str, *, yes: bool) -> None:
    """Return if ``yes`` or a person at the terminal says so.

    Raises:
        UsageError: there is no terminal to ask at.
        Abort: the answer is no.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        what = question.partition("?")[0]
        raise click.UsageError(f"to {what[0].lower()}{what[1:]}, confirm it with --yes: nobody can be asked")
    click.confirm(question, abort=True, err=True)


def option(function: "click.decorators.FC") -> "click.decorators.FC":
    """Add ``--yes``."""
    return click.option("-y", "--yes", is_flag=True, help="Do not ask; needed where there is no terminal.")(
        function
    )
