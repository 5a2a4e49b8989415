"""Which file system a file is on, as the kernel tells it."""

import os
from pathlib import Path

MOUNTS = Path("/proc/self/mountinfo")


def file_system(device: int, mounts: Path = MOUNTS) -> str:
    """Return the type of the file system with this device number, such as "ext4"; "" if it is not known."""
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = mounts.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    for line in lines:
        fields = line.split()
        if len(fields) > 2 and fields[2] == number and "-" in fields[:-1]:
            return fields[fields.index("-") + 1]
    return ""
