"""Faults over a Unix socket: who runs a cluster serves them, ``dtrain chaos`` asks for them.

JSON lines, one answer to each request::

    {"v":1,"id":1,"do":"strike","fault":{"kind":"cut","part":"agent","name":"a1","way":"both"}}
    {"v":1,"id":1,"ok":true}
    {"v":1,"id":2,"do":"heal","fault":{...}}
    {"v":1,"id":2,"ok":false,"kind":"NotFound","code":"DT-4002","message":"there is no a9 in this cluster"}

``do`` is strike, heal or cannot (with ``kind`` and ``part``). A connection owns what
was broken over it: when it ends, however it ends, that is healed. The socket is
for its owner alone.
"""

import contextlib
import json
import os
import socket
import socketserver
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dtrain.local.faults import Breaker, Fault, Kind, Part
from dtrain.protocol import codec, errors
from dtrain.protocol.errors import DtrainError, ErrorCode, Refused, Unavailable

LINE_BYTES_MAX = 16 * 1024
ANSWER_S = 120.0
"""Longest time that one fault takes: filling an etcd."""

HEAL_S_MAX = 10.0
_PATH_MAX = 100
"""The kernel's limit for a socket's path, with room."""


class FaultServer:
    """Serves faults at ``path``; ``connect`` makes a breaker for each connection. ``close`` it."""

    def __init__(self, folder: Path, connect: Callable[[], Breaker]) -> None:
        self._made: Path | None = None
        path = folder / "faults.sock"
        if len(os.fsencode(path)) > _PATH_MAX:
            self._made = Path(tempfile.mkdtemp(prefix="dtrain-faults-"))
            path = self._made / "s"
        self.path = path
        path.unlink(missing_ok=True)
        before = os.umask(0o177)
        try:
            self._server = _Server(str(path), _handler(connect))
        finally:
            os.umask(before)
        self._thread = threading.Thread(target=self._server.serve_forever, name="faults", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End all connections, heal what was broken over them, and return when that is done."""
        self._server.shutdown()
        self._server.server_close()
        for connection, thread in list(self._server.live.items()):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            thread.join(HEAL_S_MAX)
        self.path.unlink(missing_ok=True)
        if self._made is not None:
            self._made.rmdir()


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, path: str, handler: type[socketserver.StreamRequestHandler]) -> None:
        self.live: dict[socket.socket, threading.Thread] = {}
        super().__init__(path, handler)


def _handler(connect: Callable[[], Breaker]) -> type[socketserver.StreamRequestHandler]:
    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            breaker = connect()
            live: dict[socket.socket, threading.Thread] = self.server.live  # type: ignore[attr-defined]
            live[self.connection] = threading.current_thread()
            try:
                while line := self.rfile.readline(LINE_BYTES_MAX):
                    self.wfile.write(codec.dumps(_answer(breaker, line)) + b"\n")
            except OSError:
                # The client has gone: nothing else is left to do for it.
                pass
            finally:
                with contextlib.suppress(DtrainError):
                    breaker.close()
                live.pop(self.connection, None)

    return Handler


def _answer(breaker: Breaker, line: bytes) -> dict[str, Any]:
    head: dict[str, Any] = {"v": 1, "id": 0}
    try:
        request = codec.loads(line, bytes_max=LINE_BYTES_MAX)
        match request:
            case {"id": int(number)}:
                head["id"] = number
        match request:
            case {"do": "strike", "fault": dict(given)}:
                breaker.strike(codec.from_json(Fault, given))
                return {**head, "ok": True}
            case {"do": "heal", "fault": dict(given)}:
                breaker.heal(codec.from_json(Fault, given))
                return {**head, "ok": True}
            case {"do": "cannot", "kind": str(kind), "part": str(part)}:
                return {**head, "ok": True, "why": breaker.cannot(Kind(kind), Part(part))}
            case _:
                raise Refused(ErrorCode.BAD_RECORD, "this is no request for a fault")
    except DtrainError as error:
        return {
            **head,
            "ok": False,
            "kind": type(error).__name__,
            "code": error.code.value,
            "message": error.message,
            "fix": error.fix,
        }
    except (ValueError, OSError) as error:
        return {
            **head,
            "ok": False,
            "kind": "Refused",
            "code": ErrorCode.BAD_RECORD.value,
            "message": str(error),
        }


class RemoteBreaker:
    """Asks the process that runs a cluster, through its socket at ``path``.

    Raises:
        Unavailable: nobody serves there.
    """

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(ANSWER_S)
        try:
            self._socket.connect(path)
        except OSError as error:
            self._socket.close()
            raise Unavailable(
                ErrorCode.COORDINATOR_UNAVAILABLE,
                f"the cluster's fault port {path} does not answer",
                cause=str(error),
                fix="run dtrain chaos on the machine, and as the user, of 'dtrain up --test'",
            ) from error
        self._file = self._socket.makefile("rb")
        self._possible: dict[tuple[Kind, Part], str] = {}
        self._asked = 0

    def cannot(self, kind: Kind, part: Part) -> str:
        if (kind, part) not in self._possible:
            self._possible[kind, part] = str(self._ask({"do": "cannot", "kind": kind, "part": part})["why"])
        return self._possible[kind, part]

    def strike(self, fault: Fault) -> None:
        self._ask({"do": "strike", "fault": codec.to_json(fault)})

    def heal(self, fault: Fault) -> None:
        self._ask({"do": "heal", "fault": codec.to_json(fault)})

    def close(self) -> None:
        """Leave: the other side heals what was not healed."""
        self._file.close()
        self._socket.close()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        self._asked += 1
        try:
            self._socket.sendall(codec.dumps({"v": 1, "id": self._asked, **request}) + b"\n")
            # A signal may have interrupted us before an earlier answer was read.
            while (answer := json.loads(self._file.readline()))["id"] != self._asked:
                pass
        except (OSError, ValueError) as error:
            raise Unavailable(
                ErrorCode.COORDINATOR_UNAVAILABLE,
                "the process that runs the cluster has gone",
                cause=str(error),
            ) from error
        if answer["ok"]:
            return dict(answer)
        kind = getattr(errors, str(answer["kind"]), DtrainError)
        raise kind(ErrorCode(answer["code"]), str(answer["message"]), fix=str(answer.get("fix", "")))
