import random

import pytest

from dtrain.storage.etcd.framing import FramingError, StreamParser

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
LINES = [b'{"result":{"created":true}}', b'{"result":{"events":["' + b"x" * 5000 + b'"]}}', b'{"last":1}']
BODY = b"\n".join(LINES) + b"\n"


def chunked(body: bytes, sizes: list[int]) -> bytes:
    out, at = b"", 0
    for size in sizes:
        piece = body[at : at + size]
        at += len(piece)
        if piece:
            out += b"%x;ext=1\r\n%s\r\n" % (len(piece), piece)
    rest = body[at:]
    return out + (b"%x\r\n%s\r\n" % (len(rest), rest) if rest else b"") + b"0\r\n\r\n"


def feed(parser: StreamParser, data: bytes, step: int) -> list[bytes]:
    return [line for at in range(0, len(data), step) for line in parser.feed(data[at : at + step])]


@pytest.mark.parametrize("step", [1, 2, 3, 7, 1000, 1_000_000])
def test_lines_survive_any_cutting_of_the_stream(step: int) -> None:
    parser = StreamParser()
    assert feed(parser, HEAD + chunked(BODY, [len(line) + 1 for line in LINES]), step) == LINES
    assert parser.ended
    assert parser.status == 200


def test_lines_survive_any_chunking() -> None:
    rng = random.Random(7)
    for _ in range(50):
        sizes = [rng.randrange(1, 700) for _ in range(40)]
        parser = StreamParser()
        assert feed(parser, HEAD + chunked(BODY, sizes), rng.randrange(1, 900)) == LINES


def test_a_chunk_per_byte_and_a_lone_line_feed_are_no_messages() -> None:
    assert feed(StreamParser(), HEAD + chunked(BODY, [1] * len(BODY)), 64) == LINES
    assert feed(StreamParser(), HEAD + chunked(b"\n\n" + LINES[0] + b"\n\n", [1, 1]), 64) == [LINES[0]]


def test_many_messages_in_one_chunk_come_apart() -> None:
    assert feed(StreamParser(), HEAD + chunked(BODY, [len(BODY)]), len(BODY) * 2) == LINES


def test_a_line_beyond_the_cap_ends_the_stream() -> None:
    parser = StreamParser(line_bytes_max=1000)
    with pytest.raises(FramingError, match="more than 1000"):
        feed(parser, HEAD + chunked(b"x" * 1001, [10] * 200), 50)


def test_a_body_without_chunks_is_read_by_its_length() -> None:
    parser = StreamParser()
    head = b"HTTP/1.1 503 Unavailable\r\ncontent-length: 11\r\n\r\n"
    assert feed(parser, head + b'{"error":1}garbage', 4) == []
    assert parser.ended
    assert parser.finish() == b'{"error":1}'
    assert parser.status == 503


@pytest.mark.parametrize(
    "garbage",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        HEAD + b"zz\r\n",
        HEAD + b"-5\r\n",
        HEAD + b"\r\n",
        HEAD + b"fffffffff\r\n",
        HEAD + b"2\r\n{}xx2\r\n",
        HEAD + b"1" * 2000,
        b"x" * 70_000,
    ],
)
def test_garbage_is_refused_and_never_waited_on(garbage: bytes) -> None:
    for step in (1, 64, len(garbage)):
        with pytest.raises(FramingError):
            feed(StreamParser(), garbage, step)
