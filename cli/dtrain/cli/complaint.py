"""An error as users see it: one sentence, its cause, one next action, an exit code."""

import errno
import hashlib
import json
import traceback
from dataclasses import dataclass

import click

from dtrain.cli import exits, terminal
from dtrain.protocol.errors import DtrainError, ErrorCode

_ROOM = "make room there, or have it written elsewhere"
_RIGHTS = "give yourself the right to it, or name another place"
_MACHINE = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EFBIG: _ROOM,
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.EROFS: _RIGHTS,
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path",
    errno.EISDIR: "check the path",
    errno.EIO: "look into the machine's log: dmesg",
    errno.EMFILE: "raise the limit of open files: ulimit -n",
    errno.ENFILE: "end what has too many files open",
}
"""What is wrong with this machine rather than with dtrain, and what helps."""


@dataclass(frozen=True, slots=True)
class Complaint:
    """What is written to stderr before leaving with ``exit_code``."""

    exit_code: int
    code: str
    message: str
    cause: str = ""
    fix: str = ""
    details: tuple[str, ...] = ()
    """Further lines, such as one per error in a job file."""
    silent: bool = False

    def as_text(self) -> str:
        """The lines for people."""
        lines = [f"error[{self.code}]: {self.message}", *(f"  {line}" for line in self.details)]
        lines += [f"  cause: {self.cause}"] if self.cause else []
        lines += [f"  fix:   {self.fix}"] if self.fix else []
        return "\n".join(terminal.text(line) for line in lines)

    def as_json(self) -> str:
        """The same as one JSON object."""
        return json.dumps(
            {
                "v": 1,
                "kind": "Error",
                "code": self.code,
                "message": self.message,
                "cause": self.cause,
                "fix": self.fix,
                "details": list(self.details),
                "exit_code": self.exit_code,
            }
        )


def of(error: BaseException) -> Complaint:
    """Turn whatever ended a command into its complaint."""
    if isinstance(error, DtrainError):
        details = getattr(error, "details", ())
        return Complaint(
            exits.of_error(error), error.code, error.message, error.cause, error.fix, tuple(details)
        )
    if isinstance(error, click.Abort | KeyboardInterrupt):
        return Complaint(exits.INTERRUPTED, ErrorCode.USAGE, "interrupted", silent=True)
    if isinstance(error, BrokenPipeError):
        return Complaint(exits.OK, ErrorCode.USAGE, "nobody reads the output any more", silent=True)
    if isinstance(error, click.UsageError):
        path = error.ctx.command_path if error.ctx else "dtrain"
        return Complaint(exits.USAGE, ErrorCode.USAGE, error.format_message(), fix=f"{path} --help")
    if isinstance(error, click.ClickException):
        return Complaint(exits.USAGE, ErrorCode.USAGE, error.format_message(), fix="dtrain --help")
    if isinstance(error, OSError) and error.errno in _MACHINE:
        what = error.filename or "the output"
        return Complaint(
            exits.USAGE,
            ErrorCode.LOCAL_IO,
            f"this machine cannot read or write {what}: {error.strerror}",
            fix=_MACHINE[error.errno],
        )
    # The same bug gets the same id, whoever meets it.
    frames = [f"{frame.name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
    identity = hashlib.sha256(f"{type(error).__name__} {frames}".encode()).hexdigest()[:8]
    return Complaint(
        exits.BUG,
        ErrorCode.BUG,
        f"a bug in dtrain, id {identity}: {type(error).__name__}: {error}",
        fix="repeat the command with --debug, and report what it shows together with the id",
    )
