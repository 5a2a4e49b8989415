"""Every change of the cluster, from whichever replica answers, for ever."""

import time
from collections.abc import Callable, Iterator

from dtrain.cli.client import Client
from dtrain.cli.records import Cluster
from dtrain.protocol.errors import DtrainError, OutcomeUnknown, Unavailable

POLL_S = 1.0
"""Jobs wake the wait; the progress in agents' snapshots is looked at this often."""


def changes(client: Client, read: Callable[..., Cluster], say: Callable[[str], None]) -> Iterator[Cluster]:
    """Yield what ``read(after_revision=..., wait_s=...)`` returns, now and after each change.

    A lost cluster is said once, and tried again for ever. Revisions never go back.
    """
    revision, wait_s, lost = 0, 0.0, False
    while True:
        try:
            cluster = read(after_revision=revision, wait_s=wait_s)
        except (Unavailable, OutcomeUnknown) as error:
            if wait_s == 0:
                raise
            lost = _say_once(lost, error, say)
            time.sleep(0.5)
            continue
        if lost:
            lost = False
            say(f"connected again, one of {', '.join(client.addresses)}")
        revision, wait_s = cluster.revision, POLL_S
        yield cluster


def _say_once(lost: bool, error: DtrainError, say: Callable[[str], None]) -> bool:
    if not lost:
        say(f"{error.message}; trying again")
    return True
