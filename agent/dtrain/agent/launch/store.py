"""The child that serves an attempt's TCPStore until it is killed.

A process of its own, because the server is a thread and the launcher must have
one only; and because a new attempt gets a new store, so that no key of an older
attempt can be read by mistake.
"""

import contextlib
import importlib
import json
import os
import signal
import socket
import sys
import time
from typing import Any, NoReturn

from dtrain.agent.launch import kernel, processes


def serve(host: str, parent_pid: int, answer_fd: int) -> NoReturn:
    """Open the store on a free port of ``host``, write the outcome to ``answer_fd``, stay."""
    try:
        kernel.die_with_parent(parent_pid)
        os.setpgid(0, 0)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        processes.close_descriptors((answer_fd,))
        kernel.name_process("dtrain-store")
        try:
            # Held in a variable: a collected store would close its server.
            _held = _open(host)
            answer: dict[str, Any] = {"port": int(_held.port)}
        except BaseException as error:  # noqa: BLE001  whatever it is, the agent must hear of it
            answer = {"port": 0, "problem": f"{type(error).__name__}: {error}"[:500]}
        os.write(answer_fd, json.dumps(answer).encode())
        os.close(answer_fd)
        while answer["port"]:
            time.sleep(3600)
    finally:
        os._exit(1)


def _open(host: str) -> Any:
    tcp_store = importlib.import_module("torch.distributed").TCPStore
    options: dict[str, Any] = {"world_size": None, "is_master": True, "wait_for_workers": False}
    listener = _listen_on(host)
    if listener is not None:
        try:
            store = tcp_store(host, listener.getsockname()[1], master_listen_fd=listener.fileno(), **options)
        except TypeError:
            listener.close()  # an older torch, without master_listen_fd
        else:
            listener.detach()
            return store
    return tcp_store(host, 0, **options)


def _listen_on(host: str) -> socket.socket | None:
    """A listening socket on this address alone: torch itself would bind every interface.

    None where the address is not one of this machine's own (behind NAT).
    """
    with contextlib.suppress(OSError):
        family, kind, protocol, _name, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.bind(address)
            listener.listen(2048)
        except OSError:
            listener.close()
            raise
        return listener
    return None


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
