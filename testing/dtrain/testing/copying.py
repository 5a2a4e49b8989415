"""A user's folder as an archive: what agents in containers get of it."""

import io
import tarfile
from pathlib import Path

from dtrain.protocol.errors import ErrorCode, Refused

BYTES_MAX = 64 * 1024 * 1024
LEFT_OUT = frozenset(
    {
        ".cache",
        ".git",
        ".hg",
        ".hypothesis",
        ".mypy_cache",
        ".nox",
        ".pytest_cache",
        ".ruff_cache",
        ".tox",
        ".venv",
        "__pycache__",
        "node_modules",
        "venv",
    }
)
"""Folders that no training script needs from the machine that runs the tests."""


def archive(folder: Path, prefix: str, owner: int) -> bytes:
    """Return ``folder`` as a tar archive of files below ``prefix`` that belong to user ``owner``.

    Raises:
        Refused: it is no folder, or holds more than 64 MiB.
    """
    if not folder.is_dir():
        raise Refused(
            ErrorCode.BAD_SETTING, f"{folder} is no folder", fix="give working_dir= the script's folder"
        )
    buffer = io.BytesIO()
    size = 0

    def chosen(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
        nonlocal size
        if Path(info.name).name in LEFT_OUT or not (info.isreg() or info.isdir() or info.issym()):
            return None
        size += info.size
        if size > BYTES_MAX:
            raise Refused(
                ErrorCode.BAD_SETTING,
                f"{folder} holds more than {BYTES_MAX >> 20} MiB, too much to copy into every agent",
                fix="put the script into a folder of its own, or give working_dir= a smaller one",
            )
        info.uid = info.gid = owner
        info.uname = info.gname = ""
        return info

    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for part in _parents(prefix):
            above = tarfile.TarInfo(part)
            above.type, above.mode, above.uid, above.gid = tarfile.DIRTYPE, 0o755, owner, owner
            tar.addfile(above)
        for entry in sorted(folder.iterdir()):
            tar.add(entry, arcname=f"{prefix}/{entry.name}", filter=chosen)
    return buffer.getvalue()


def _parents(prefix: str) -> list[str]:
    parts = Path(prefix).parts
    return ["/".join(parts[: count + 1]) for count in range(len(parts))]
