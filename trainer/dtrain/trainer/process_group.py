"""Brings up torch.distributed, and lets the ranks meet in the attempt's store."""

import os
import time
from collections.abc import Callable
from typing import Any

from dtrain.protocol import ranklink
from dtrain.protocol.errors import ErrorCode, Refused

_POLL_S_MAX = 0.25
_LAST_COLLECTIVE_S = 0.05


def world() -> tuple[int, int, int]:
    """Rank, world size and local rank, from torchrun's variables; (0, 1, 0) without."""
    try:
        return (
            int(os.environ.get("RANK", "0")),
            int(os.environ.get("WORLD_SIZE", "1")),
            int(os.environ.get("LOCAL_RANK", "0")),
        )
    except ValueError as error:
        raise Refused(ErrorCode.USAGE, f"RANK, WORLD_SIZE and LOCAL_RANK must be numbers: {error}") from error


def set_up(backend: str | None, world_size: int, local_rank: int) -> tuple[Any, bool]:
    """Return this rank's device and whether the default process group was initialised here."""
    import torch

    cuda = torch.cuda.is_available()
    device = torch.device("cpu")
    if cuda and backend != "gloo":
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    under_agent = ranklink.ENV_ATTEMPT in os.environ
    if world_size == 1 and not under_agent:
        return device, False
    import torch.distributed as dist

    if dist.is_initialized():
        return device, False
    chosen = backend or ("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    if world_size == 1:
        # A job that has shrunk to one rank runs the script that it ran on many: what wraps the
        # model in DDP there must not fail here.
        alone = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(chosen, store=alone, rank=0, world_size=1)
    elif under_agent:
        # The attempt's store is up already; by torch's default rank 0 would open another on its port.
        store = _attempt_store("group")
        rank = int(os.environ["RANK"])
        dist.init_process_group(chosen, store=store, rank=rank, world_size=world_size)
    else:
        dist.init_process_group(chosen)
    return device, True


def tear_down() -> None:
    """Destroy the default process group, if there is one."""
    import torch.distributed as dist

    if dist.is_initialized():
        # gloo's thread needs the GIL to let go of the last collective; destroying the
        # group joins that thread with the GIL held (torch 2.13), and both wait for ever.
        time.sleep(_LAST_COLLECTIVE_S)
        dist.destroy_process_group()


def meet(world_size: int, stopped: Callable[[], bool]) -> None:
    """Return once all ranks of the attempt have come here, or ``stopped()`` is true.

    No rank may train while another still finds its checkpoint damaged. The store
    belongs to the agent's side, so this needs no collective.
    """
    if world_size == 1 or ranklink.ENV_ATTEMPT not in os.environ:
        return
    store = _attempt_store("restored")
    if store.add("arrived", 1) == world_size:
        store.set("all", "1")
    began = time.monotonic()
    # Polled: a blocking wait would not see that the attempt is over, and torch warns of each that times out.
    while not store.check(["all"]) and not stopped():
        time.sleep(min(_POLL_S_MAX, 0.005 + (time.monotonic() - began) / 10))


def _attempt_store(part: str) -> Any:
    """A client of the store that the agents serve for this attempt."""
    import datetime

    import torch.distributed as dist

    server = dist.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=datetime.timedelta(seconds=60),
        wait_for_workers=False,
    )
    prefix = f"dtrain/{os.environ[ranklink.ENV_ATTEMPT]}/{part}"
    return dist.PrefixStore(prefix, server)  # type: ignore[attr-defined]
