"""Who asks, and ids that make repeated requests one."""

import getpass
import secrets
import socket


def whoami() -> str:
    """``user@machine`` for the record; it proves nothing."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = "unknown"
    return f"{user}@{socket.gethostname()}"


def new_id() -> str:
    """A random id: 16 hexadecimal digits."""
    return secrets.token_hex(8)
