"""What torch loads, by the entry point ``torchrun.handlers``, in every program that imports its rendezvous.

So it imports nothing before a rendezvous of ours is asked for.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters


def get_handler() -> "Callable[[RendezvousParameters], RendezvousHandler]":
    """Return what makes a handler of a run's parameters."""
    return create_handler


def create_handler(params: "RendezvousParameters") -> "RendezvousHandler":
    """Reach etcd and return the handler of this node.

    Raises:
        RendezvousConnectionError: etcd does not answer.
        ValueError: a setting of ``--rdzv-conf`` is wrong.
    """
    from dtrain.integrations.rendezvous.handler import open_handler

    return open_handler(params)
