"""Tagged dataclasses as JSON lines, for the agent's own child processes."""

from collections.abc import Mapping
from typing import Any

from dtrain.protocol import codec
from dtrain.protocol.errors import ErrorCode, Refused

LINE_BYTES_MAX = 4 * 1024 * 1024


def encode(message: Any) -> bytes:
    """One line, newline included."""
    return codec.dumps({"type": type(message).__name__, **codec.to_json(message)}) + b"\n"


def decode(types: Mapping[str, type], line: bytes) -> Any:
    """Parse one line into one of ``types``.

    Raises:
        Refused: BAD_RECORD.
    """
    document = codec.loads(line, bytes_max=LINE_BYTES_MAX)
    kind = types.get(document.get("type", "")) if isinstance(document, dict) else None
    if kind is None:
        raise Refused(ErrorCode.BAD_RECORD, "a line between agent processes has no known type")
    return codec.from_json(kind, document)
