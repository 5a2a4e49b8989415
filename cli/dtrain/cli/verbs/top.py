"""``dtrain top``: the cluster live."""

import click

from dtrain.cli.options import connected, examples, settings

_SORTS = ("active", "name", "phase", "step", "steps/s", "age")


@click.command(
    short_help="Show jobs, agents and events live.",
    epilog=examples("dtrain top", "dtrain top --sort steps/s --filter sweep-", "dtrain top --once"),
)
@click.option("--once", is_flag=True, help="Print one frame; so it does where there is no terminal.")
@click.option("--sort", type=click.Choice(_SORTS), default="active", help="Order of jobs (default: active).")
@click.option("--filter", "text", default="", metavar="TEXT", help="Only jobs with this in any column.")
@connected
def command(*, once: bool, sort: str, text: str) -> int:
    """Show live what runs: phase, step, steps per second, stalls; agents, events, replicas.

    Keys: 1 to 4 choose a list, arrows move, Enter opens a job or agent, / filters, s sorts, ? lists
    all keys, q leaves. Any replica answers; one that is lost is passed over. Programs are better
    served by 'dtrain get jobs -o json'.
    """
    import time
    from collections.abc import Sequence

    from dtrain.cli import context, output
    from dtrain.cli.client import Client, closing
    from dtrain.cli.top import frame, screen
    from dtrain.cli.top.feed import Feed
    from dtrain.cli.top.text import cut
    from dtrain.cli.top.view import Look, Sort

    chosen = settings()
    look = Look(sort=Sort(sort), filter=text)

    def each(addresses: Sequence[str]) -> Client:
        # Not by ``context.client``: its warnings would end up in the middle of the screen.
        return Client(addresses, tls=context.tls_of(chosen))

    with closing(context.connect(chosen)) as client:
        if once or not screen.usable():
            feed = Feed(client, each, lambda: None)
            lines = frame.plain(look, feed.first(whole=True), time.time())
            width = output.width()
            for line in output.coloured([cut(line, width) if width else line for line in lines]):
                click.echo(line)
            return 0
        from dtrain.cli.top import live

        shown = screen.Screen()
        feed = Feed(client, each, shown.wake)
        feed.first()
        try:
            with shown:
                feed.start()
                live.run(feed, shown, look)
        except KeyboardInterrupt:
            return 130
        finally:
            feed.stop()
    return 0
