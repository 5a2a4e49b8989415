"""An S3 server that reads and throws away: ``python -m benchmarks.store.discard`` prints its port.

It answers what clients need in order to go on: an upload id, an ETag per part,
and the checksum that it was sent. Bodies may be plain, chunked, or announced with
``Expect``. It ends with its standard input.
"""

import contextlib
import re
import socket
import sys
import threading

BUFFER_BYTES = 1024 * 1024
_XML = b'<?xml version="1.0" encoding="UTF-8"?>'


class _Connection:
    """One client's requests, in order."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = bytearray(BUFFER_BYTES)
        self._held = b""

    def serve(self) -> None:
        with contextlib.suppress(ConnectionError, EOFError), self._sock:
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while True:
                method, target, headers = self._head()
                if "expect" in headers:
                    self._sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
                trailers = self._skip_body(headers)
                self._answer(method, target, headers | trailers)

    def _head(self) -> tuple[str, str, dict[str, str]]:
        lines = self._until(b"\r\n\r\n").decode("latin-1").split("\r\n")
        method, target, _ = lines[0].split(" ", 2)
        return method, target, _fields(lines[1:])

    def _skip_body(self, headers: dict[str, str]) -> dict[str, str]:
        if headers.get("transfer-encoding", "").lower() != "chunked":
            self._skip(int(headers.get("content-length", "0")))
            return {}
        while size := int(self._until(b"\r\n").split(b";")[0], 16):
            self._skip(size + 2)
        lines = []
        while line := self._until(b"\r\n"):
            lines.append(line.decode("latin-1"))
        return _fields(lines)

    def _answer(self, method: str, target: str, headers: dict[str, str]) -> None:
        path, _, query = target.partition("?")
        sums = {name: value for name, value in headers.items() if re.match("x-amz-checksum-(crc|sha)", name)}
        status, body = "200 OK", b""
        if method == "HEAD":
            status = "404 Not Found"
        elif method == "DELETE":
            status = "204 No Content"
        elif method == "POST" and "uploads" in query.split("&")[0]:
            body = _xml("InitiateMultipartUploadResult", Bucket="b", Key=path, UploadId="u")
        elif method == "POST":
            said = {_camel(name): value for name, value in sums.items()}
            body = _xml("CompleteMultipartUploadResult", Key=path, ETag='"e"', **said)
        lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", 'ETag: "e"']
        if method == "PUT":
            lines += [f"{name}: {value}" for name, value in sums.items()]
        self._sock.sendall("\r\n".join([*lines, "", ""]).encode() + body)

    def _until(self, mark: bytes) -> bytes:
        while (found := self._held.find(mark)) < 0:
            more = self._sock.recv(65536)
            if not more:
                raise EOFError
            self._held += more
        line, self._held = self._held[:found], self._held[found + len(mark) :]
        return line

    def _skip(self, size: int) -> None:
        taken = min(size, len(self._held))
        self._held = self._held[taken:]
        size -= taken
        while size:
            count = self._sock.recv_into(self._buffer, min(size, BUFFER_BYTES))
            if not count:
                raise EOFError
            size -= count


def _fields(lines: list[str]) -> dict[str, str]:
    pairs = (line.partition(":") for line in lines if line)
    return {name.strip().lower(): value.strip() for name, _, value in pairs}


def _camel(header: str) -> str:
    return "Checksum" + header.rpartition("-")[2].upper()


def _xml(_root: str, **children: str) -> bytes:
    inner = "".join(f"<{name}>{value}</{name}>" for name, value in children.items())
    return _XML + f"<{_root}>{inner}</{_root}>".encode()


def main() -> None:
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    print(listener.getsockname()[1], flush=True)

    def accept() -> None:
        while True:
            sock, _ = listener.accept()
            threading.Thread(target=_Connection(sock).serve, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    sys.stdin.read()


if __name__ == "__main__":
    main()
