"""The body of a streaming answer as lines, whatever pieces it arrives in.

One HTTP chunk is not one message: proxies split and join chunks, and a message
may share its chunk with the line feed of the previous one. So bytes are
collected, the chunked coding is undone and lines end at a line feed only. Pure:
the caller owns the socket.
"""

LINE_BYTES_MAX = 16 * 1024 * 1024
"""A longer line ends the stream: a watch message holds at most a few revisions."""

_HEAD_BYTES_MAX = 64 * 1024
_CHUNK_LINE_BYTES_MAX = 1024


class FramingError(Exception):
    """The bytes are not the HTTP/1.1 answer that was expected."""


class StreamParser:
    """Feed bytes, get lines. ``status`` is None until the head is complete."""

    def __init__(self, line_bytes_max: int = LINE_BYTES_MAX) -> None:
        self.status: int | None = None
        self.ended = False
        self._line_bytes_max = line_bytes_max
        self._raw = bytearray()
        self._line = bytearray()
        self._chunked = False
        self._length: int | None = None
        self._chunk_left = 0
        self._chunk_end = False

    def feed(self, data: bytes) -> list[bytes]:
        """Take the next bytes and return the lines they complete, without line feeds.

        Raises:
            FramingError: not HTTP, a bad chunk, or a line beyond the cap.
        """
        self._raw += data
        if self.status is None and not self._parse_head():
            return []
        lines: list[bytes] = []
        while not self.ended:
            piece = self._take_piece()
            if piece is None:
                break
            self._split(piece, lines)
        return lines

    def finish(self) -> bytes:
        """Return what stands behind the last line feed: an error body has none."""
        return bytes(self._line)

    def _parse_head(self) -> bool:
        end = self._raw.find(b"\r\n\r\n")
        if end < 0:
            if len(self._raw) > _HEAD_BYTES_MAX:
                raise FramingError("no end of the HTTP head in 64 KiB")
            return False
        head = self._raw[:end].decode("latin-1").split("\r\n")
        del self._raw[: end + 4]
        parts = head[0].split(" ", 2)
        if len(parts) < 2 or not parts[0].startswith("HTTP/1.") or not parts[1].isdigit():
            raise FramingError("not an HTTP answer")
        for line in head[1:]:
            name, _, value = line.partition(":")
            match name.strip().lower(), value.strip().lower():
                case "transfer-encoding", coding:
                    self._chunked = coding.endswith("chunked")
                case "content-length", digits if digits.isdigit():
                    self._length = int(digits)
        self.status = int(parts[1])
        return True

    def _take_piece(self) -> bytes | None:
        """Return the next bytes of the body, or None if more input is needed."""
        if not self._chunked:
            piece = bytes(self._raw)
            self._raw.clear()
            if self._length is not None:
                piece = piece[: self._length]
                self._length -= len(piece)
                self.ended = self._length == 0
            return piece or None
        if self._chunk_left == 0 and not self._next_chunk():
            return None
        piece = bytes(self._raw[: self._chunk_left])
        del self._raw[: len(piece)]
        self._chunk_left -= len(piece)
        self._chunk_end = self._chunk_left == 0
        return piece or None

    def _next_chunk(self) -> bool:
        if self._chunk_end:
            if len(self._raw) < 2:
                return False
            if self._raw[:2] != b"\r\n":
                raise FramingError("a chunk is longer than it says")
            del self._raw[:2]
            self._chunk_end = False
        end = self._raw.find(b"\r\n")
        if end < 0:
            if len(self._raw) > _CHUNK_LINE_BYTES_MAX:
                raise FramingError("no chunk size")
            return False
        size = bytes(self._raw[:end]).partition(b";")[0].strip()
        del self._raw[: end + 2]
        if not size or len(size) > 8 or size.strip(b"0123456789abcdefABCDEF"):
            raise FramingError("bad chunk size")
        self._chunk_left = int(size, 16)
        self.ended = self._chunk_left == 0
        return not self.ended

    def _split(self, piece: bytes, lines: list[bytes]) -> None:
        *complete, rest = piece.split(b"\n")
        for part in complete:
            self._line += part
            self._check_cap()
            if self._line.strip():
                lines.append(bytes(self._line))
            self._line.clear()
        self._line += rest
        self._check_cap()

    def _check_cap(self) -> None:
        if len(self._line) > self._line_bytes_max:
            raise FramingError(f"a line of more than {self._line_bytes_max} bytes")
