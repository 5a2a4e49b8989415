"""What a dead rank left behind: its error file and the end of its log, bounded."""

import json
from pathlib import Path

ERROR_BYTES_MAX = 8 * 1024
TAIL_BYTES = 2 * 1024


def error_text(path: Path) -> str:
    """error.json as it is, its call stack shortened from the front if the whole is too long."""
    try:
        with path.open("rb") as file:
            text = file.read(1 << 20).decode(errors="replace")
    except OSError:
        return ""
    if len(text.encode()) <= ERROR_BYTES_MAX:
        return text
    try:
        document = json.loads(text)
        message = document["message"]
        message["message"] = str(message["message"])[: ERROR_BYTES_MAX // 8]
        stack = str(message.get("extraInfo", {}).get("py_callstack", ""))
        timestamp = str(message.get("extraInfo", {}).get("timestamp", ""))[:32]
        # JSON escapes at worst double what a traceback holds; its end names the error.
        message["extraInfo"] = {"py_callstack": stack[-ERROR_BYTES_MAX // 4 :], "timestamp": timestamp}
        shortened = json.dumps({"message": message})
    except (ValueError, KeyError, TypeError, AttributeError):
        return text[: ERROR_BYTES_MAX // 4]
    return shortened if len(shortened.encode()) <= ERROR_BYTES_MAX else text[: ERROR_BYTES_MAX // 4]


def tail(path: Path, size: int = TAIL_BYTES) -> str:
    """The last ``size`` bytes of a file, "" if there is none."""
    try:
        with path.open("rb") as file:
            end = file.seek(0, 2)
            file.seek(max(0, end - size))
            return file.read(size).decode(errors="replace")
    except OSError:
        return ""


def log_tail(log_dir: Path) -> str:
    """The end of stderr.log, or of stdout.log where nothing was written to stderr."""
    return tail(log_dir / "stderr.log") or tail(log_dir / "stdout.log")
