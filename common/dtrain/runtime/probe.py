"""``python -m dtrain.runtime.probe URL``: ask a status page, for images without curl.

Exit code 0 for 200, else 1 with the reason on stderr. Standard library only,
and little of that: it runs every few seconds beside everything else.
"""

import json
import socket
import sys
import time

TIMEOUT_S = 3.0
ANSWER_BYTES_MAX = 64 * 1024

USAGE = "usage: python -m dtrain.runtime.probe http://HOST:PORT/PATH [--timeout SECONDS]"


def ask(url: str, timeout_s: float) -> tuple[int, str]:
    """Return status and body of ``url``, http only, within ``timeout_s`` in all.

    Raises:
        OSError, ValueError: no answer, or none of HTTP.
    """
    scheme, _, rest = url.partition("://")
    authority, _, path = rest.partition("/")
    host, colon, port = authority.rpartition(":")
    if scheme != "http" or not host or not colon or not port.isdecimal():
        raise ValueError(f"{url!r} is not http://HOST:PORT/PATH")
    end = time.monotonic() + timeout_s
    with socket.create_connection((host.strip("[]"), int(port)), timeout_s) as connection:
        request = f"GET /{path} HTTP/1.1\r\nHost: {authority}\r\nConnection: close\r\n\r\n"
        connection.sendall(request.encode())
        answer = b""
        while len(answer) < ANSWER_BYTES_MAX:
            left_s = end - time.monotonic()
            if left_s <= 0:
                raise TimeoutError("no complete answer in time")
            connection.settimeout(left_s)
            received = connection.recv(8192)
            if not received:
                break
            answer += received
    head, _, body = answer.partition(b"\r\n\r\n")
    words = head.split(b" ", 2)
    if len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not words[1].isdigit():
        raise ValueError("what answers there does not speak HTTP")
    return int(words[1]), body.decode(errors="replace")


def main(argv: list[str]) -> int:
    """Ask and return the exit code."""
    timeout_s, words = TIMEOUT_S, list(argv)
    try:
        if "--timeout" in words:
            at = words.index("--timeout")
            timeout_s = float(words[at + 1])
            del words[at : at + 2]
        if len(words) != 1 or words[0].startswith("-") or timeout_s <= 0:
            raise ValueError("one URL is needed")
    except (ValueError, IndexError):
        sys.stderr.write(USAGE + "\n")
        return 1
    try:
        status, body = ask(words[0], timeout_s)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"{words[0]}: {str(error) or type(error).__name__}\n")
        return 1
    if status == 200:
        return 0
    sys.stderr.write(f"{words[0]}: {status}: {_reason(body)}\n")
    return 1


def _reason(body: str) -> str:
    try:
        reasons = json.loads(body)["reasons"]
        return "; ".join(str(reason) for reason in reasons)
    except (ValueError, KeyError, TypeError):
        return body.strip()[:500]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
