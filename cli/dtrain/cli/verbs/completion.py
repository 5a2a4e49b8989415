"""``dtrain completion``: the script that a shell loads."""

import click

from dtrain.cli.options import examples


@click.command(
    short_help="Print the completion script for a shell.",
    epilog=examples(
        'eval "$(dtrain completion bash)"', "dtrain completion fish > ~/.config/fish/completions/dtrain.fish"
    ),
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(shell: str) -> None:
    """Print what makes SHELL complete verbs, options and the names of jobs and agents."""
    from click.shell_completion import get_completion_class

    from dtrain.cli import shells

    shells.use()
    kind = get_completion_class(shell)
    assert kind is not None
    root = click.get_current_context().find_root().command
    click.echo(kind(root, {}, "dtrain", shells.VARIABLE).source())
