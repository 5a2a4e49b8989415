"""Keeps a checkpoint while this command reads it: a pin that is renewed, and gone soon after a kill."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from dtrain.cli.answers import Pinned
from dtrain.cli.client import Client
from dtrain.cli.identity import new_id, whoami
from dtrain.protocol.errors import DtrainError, NotFound

TTL_S = 60
RENEW_S = 15.0


@dataclass(slots=True)
class Hold:
    """A checkpoint that stays. ``lost``: why it may be deleted after all; what is read is verified anyway."""

    pinned: Pinned
    lost: str = ""


@contextmanager
def held(client: Client, job: str, seq: int, why: str) -> Iterator[Hold]:
    """Pin a checkpoint (0: the newest that is not damaged) for the block.

    Raises:
        NotFound: there is none.
        Unavailable: no replica, or etcd, answers.
    """
    holder = f"{why}-{new_id()}"
    by = whoami()
    pinned = client.pin_checkpoint(job, seq, holder=holder, ttl_s=TTL_S, why=why, by=by)
    hold = Hold(pinned)
    over = threading.Event()

    def renew() -> None:
        while not over.wait(RENEW_S):
            try:
                hold.pinned = client.pin_checkpoint(
                    job, pinned.seq, holder=holder, ttl_s=TTL_S, why=why, by=by, lease=hold.pinned.lease
                )
                hold.lost = ""
            except NotFound as error:
                hold.lost = error.message
                return
            except DtrainError as error:
                # Tried again: nothing is deleted while etcd is away.
                hold.lost = error.message

    thread = threading.Thread(target=renew, name="pin", daemon=True)
    thread.start()
    try:
        yield hold
    finally:
        over.set()
        thread.join(5.0)
        try:
            client.unpin_checkpoint(job, pinned.seq, holder=holder, lease=hold.pinned.lease)
        except DtrainError:
            return  # it ends by itself
