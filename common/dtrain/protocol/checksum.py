"""CRC32C for ranks, which load no library of their own for it.

The digests of checkpoints are CRC32C, and the standard library has none. Whoever
starts a rank has a fast one and provides it here; where nobody did, as in a
program that a rank has exec'd, the agent verifies on the rank's behalf.
"""

from collections.abc import Callable

Crc32c = Callable[[memoryview, int], int]
"""Digest of some bytes, continuing from the digest of what comes before them (0: nothing)."""

_KNOWN = (b"123456789", 0xE3069283)

_provided: Crc32c | None = None


def provide(crc32c: Crc32c) -> None:
    """Have ``crc32c`` used in this process and in those forked from it.

    Raises:
        ValueError: it computes something else.
    """
    global _provided  # noqa: PLW0603 - one per process, as the code it stands for
    data, expected = _KNOWN
    view = memoryview(data)
    if crc32c(view[4:], crc32c(view[:4], 0)) != expected:
        raise ValueError("this is not CRC32C")
    _provided = crc32c


def provided() -> Crc32c | None:
    """What was provided; None: nothing."""
    return _provided
