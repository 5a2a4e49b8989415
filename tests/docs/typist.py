"""Types a page's commands into a shell, as its reader would."""

import contextlib
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

COMMAND_S_MAX = 90.0
"""A command that takes longer does not return by itself; on a page it has to be skipped, with the reason."""

OUTPUT_BYTES_MAX = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Printed:
    """What became of a command; ``exit_code`` None: it did not end."""

    exit_code: int | None
    output: str


class Typist:
    """One bash for one page: what a command sets holds for the next one."""

    def __init__(self, folder: Path, env: Mapping[str, str]) -> None:
        self._status_read, status_write = os.pipe()
        self._output_read, output_write = os.pipe()
        # Commands are read from a pipe of their own: they must not eat what is typed next.
        self._shell = subprocess.Popen(
            ["bash", "--noprofile", "--norc"],
            stdin=subprocess.PIPE,
            stdout=output_write,
            stderr=output_write,
            cwd=folder,
            env=dict(env),
            pass_fds=[status_write],
            start_new_session=True,
        )
        os.close(status_write)
        os.close(output_write)
        self._status_write = status_write

    def type(self, command: str) -> Printed:
        """Run a command and wait for its end."""
        assert self._shell.stdin is not None
        script = f"{{\n{command}\n}} </dev/null\necho $? >&{self._status_write}\n"
        if command.startswith("set -e\n"):
            # In a shell of its own: else the first failure would end the page's.
            script = f"(\n{command}\n) </dev/null\necho $? >&{self._status_write}\n"
        self._shell.stdin.write(script.encode())
        self._shell.stdin.flush()
        output, status = bytearray(), bytearray()
        end = time.monotonic() + COMMAND_S_MAX
        with selectors.DefaultSelector() as selector:
            selector.register(self._output_read, selectors.EVENT_READ, output)
            selector.register(self._status_read, selectors.EVENT_READ, status)
            while not status.endswith(b"\n") and (left_s := end - time.monotonic()) > 0:
                for key, _ in selector.select(left_s):
                    self._read(key.fd, key.data)
        # What it printed last may still be in the pipe.
        os.set_blocking(self._output_read, False)
        with contextlib.suppress(BlockingIOError):
            while self._read(self._output_read, output):
                pass
        os.set_blocking(self._output_read, True)
        text = output[-OUTPUT_BYTES_MAX:].decode(errors="replace")
        return Printed(int(status) if status.endswith(b"\n") else None, text)

    def _read(self, fd: int, into: bytearray) -> bool:
        data = os.read(fd, 65536)
        into += data
        if not data and not into.endswith(b"\n"):
            into += b"\n"
        return bool(data)

    def close(self) -> None:
        """End the shell and all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._shell.pid, signal.SIGKILL)
        self._shell.wait()
        if self._shell.stdin is not None:
            self._shell.stdin.close()
        os.close(self._status_read)
        os.close(self._output_read)
