"""``dtrain top`` on a terminal: the loop between what is read, what is drawn and what is pressed."""

import time

from dtrain.cli.top import frame, view
from dtrain.cli.top.feed import Feed
from dtrain.cli.top.screen import Screen
from dtrain.cli.top.view import Look

REDRAW_S = 1.0
"""Ages change without anything being read."""


def run(feed: Feed, screen: Screen, look: Look) -> None:
    """Show the cluster until somebody leaves, or the terminal has gone.

    Raises:
        Whatever ended the feed.
    """
    while not look.over and not screen.closed:
        if feed.problem is not None:
            raise feed.problem
        size = screen.size()
        drawn = frame.frame(look, feed.seen, size, now=time.time(), at=feed.clock())
        look = drawn.look
        screen.show(drawn.lines, size)
        for key in screen.keys(REDRAW_S):
            look = view.press(look, key, drawn.targets, drawn.height)
            # What the next key moves in depends on this one.
            drawn = frame.frame(look, feed.seen, size, now=time.time(), at=feed.clock())
            look = drawn.look
        feed.look(look.page)
