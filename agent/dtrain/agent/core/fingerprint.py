"""Knowing the same error again: a traceback without what differs between processes and machines."""

import hashlib
import json
import re
from typing import Any

FINGERPRINT_DIGITS = 16
FRAMES_MAX = 40
STARTUP_S = 120.0
"""A script that does not tell its steps counts as being at its beginning for so long."""

_FRAME = re.compile(r'^\s*File "([^"]*)", line (\d+), in (.*)$')
_LAST = re.compile(r"^[A-Za-z_][\w.]*(?:: .*)?$")
_HEX = re.compile(r"0x[0-9a-fA-F]+")
_NUMBER = re.compile(r"\d+")
_TRACEBACK = "Traceback (most recent call last):"

_PASSING = (
    "connection",
    "timeout",
    "timed out",
    "unavailable",
    "unreachable",
    "temporar",
    "network",
    "http",
    "throttl",
    "too many requests",
    "broken pipe",
    "input/output error",
    "no space left",
    "stale file handle",
    "device or resource busy",
    "cannot allocate memory",
    "cuda error",
    "cudnn",
    "cublas",
    "nccl",
    "gloo",
    "uncorrectable",
)
"""In lower case. Whose last line has one of these may go well the next time, or on another machine, whatever
its traceback: a service that is away fails all ranks at the same line."""


def fingerprint(error: str, log_tail: str) -> str:
    """Return the fingerprint of the error in ``error.json``, or at the end of a log; "" if it has none.

    The same error of the same program has the same one, wherever and whenever it comes.
    """
    text = _stack(error) or _last_traceback(log_tail)
    lines = [line for line in text.splitlines() if line.strip()]
    frames = [found for line in lines if (found := _FRAME.match(line))]
    last = next((line for line in reversed(lines) if _LAST.match(line)), "")
    if not last or any(sign in last.lower() for sign in _PASSING):
        return ""
    # Paths differ between machines, and where a checkout lies says nothing.
    told = [f"{found[1].rpartition('/')[2]}:{found[2]}:{found[3]}" for found in frames[-FRAMES_MAX:]]
    told.append(_NUMBER.sub("#", _HEX.sub("#", last)))
    return hashlib.sha256("\n".join(told).encode(errors="replace")).hexdigest()[:FINGERPRINT_DIGITS]


def _stack(error: str) -> str:
    """The traceback in an error.json, or at least its sentence."""
    try:
        document: Any = json.loads(error) if error else None
    except (ValueError, RecursionError):
        return ""
    message = document.get("message") if isinstance(document, dict) else None
    if isinstance(message, str):
        return message
    if not isinstance(message, dict):
        return ""
    extra = message.get("extraInfo")
    stack = extra.get("py_callstack") if isinstance(extra, dict) else None
    sentence = message.get("message")
    for text in (stack, sentence):
        if isinstance(text, str) and text.strip():
            return text
    return ""


def _last_traceback(log_tail: str) -> str:
    _, found, rest = log_tail.rpartition(_TRACEBACK)
    return rest if found else ""
