"""Settings of the daemons: flag, then environment, then default.

Standard library only: the guardian parses its settings with it. A misspelt
``DTRAIN_*`` variable is refused with a suggestion, never silently ignored.
Secrets come from files or the environment, never from flags.
"""

import argparse
import difflib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from dtrain.protocol.errors import ErrorCode, Refused
from dtrain.runtime.watched import read_endpoints, read_password

T = TypeVar("T")

# Set for child processes by dtrain itself, or read by other components.
FOREIGN = (
    "DTRAIN_CLUSTER",
    "DTRAIN_SESSION_FD",
    "DTRAIN_PARENT_PID",
    "DTRAIN_ETCD_BIN",
    "DTRAIN_ETCDCTL_BIN",
    "DTRAIN_WEED_BIN",
    "DTRAIN_TLS_CERT",
    "DTRAIN_TLS_KEY",
    "DTRAIN_TLS_CACERT",
    "DTRAIN_DASHBOARD_PARENT",
)


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting: ``--name`` and ``DTRAIN_NAME`` (dashes become underscores)."""

    name: str
    help: str
    default: Any = None
    parse: Callable[[str], Any] = str
    fallback_env: str = ""
    """A variable of another tool that is honoured too (``ETCDCTL_ENDPOINTS``)."""
    flag: bool = True
    """False for secrets: environment only."""
    repeat: bool = False
    """The flag may be given several times, which is the same as once with commas."""

    @property
    def env(self) -> str:
        """Name of the environment variable."""
        return "DTRAIN_" + self.name.upper().replace("-", "_")


def words(text: str) -> tuple[str, ...]:
    """Parse a comma-separated list."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def size(text: str) -> int:
    """Parse a number of bytes: ``1500``, ``200GB`` or ``1.5TiB``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]I?B)?", text.strip().upper())
    if match is None:
        raise ValueError("use a number of bytes such as 1500, 200GB or 1.5TiB")
    return int(float(match[1]) * _UNITS[match[2] or ""])


def switch(text: str) -> bool:
    """Parse a yes-or-no setting."""
    known = {
        "1": True,
        "true": True,
        "yes": True,
        "on": True,
        "0": False,
        "false": False,
        "no": False,
        "off": False,
    }
    if text.lower() not in known:
        raise ValueError("use true or false")
    return known[text.lower()]


ETCD = (
    Setting(
        "endpoints",
        "etcd client URLs, comma-separated",
        ("http://127.0.0.1:2379",),
        words,
        fallback_env="ETCDCTL_ENDPOINTS",
    ),
    Setting("endpoints-file", "file with etcd client URLs instead; read again when it changes", ""),
    Setting("cacert", "CA bundle that signs etcd's certificates", "", fallback_env="ETCDCTL_CACERT"),
    Setting("cert", "client certificate for etcd", "", fallback_env="ETCDCTL_CERT"),
    Setting("key", "key of the client certificate", "", fallback_env="ETCDCTL_KEY"),
    Setting("user", "etcd user name", "", fallback_env="ETCDCTL_USER"),
    Setting("password-file", "file that holds the etcd user's password; read again when it changes", ""),
    Setting("password", "the etcd user's password", "", fallback_env="ETCDCTL_PASSWORD", flag=False),
)
"""Settings of everything that talks to etcd, named as etcdctl's."""


READ_TRIES_S = 2.0
"""How long a file that is just being replaced has to be there again."""


@dataclass(frozen=True, slots=True)
class EtcdOptions:
    """How to reach etcd, as the files said at the start. ``repr`` hides the password."""

    endpoints: tuple[str, ...]
    cacert: str = ""
    cert: str = ""
    key: str = ""
    user: str = ""
    password: str = ""
    password_file: str = ""
    endpoints_file: str = ""

    def __repr__(self) -> str:
        return f"EtcdOptions(endpoints={self.endpoints}, user={self.user!r})"


def etcd_options(values: Mapping[str, Any]) -> EtcdOptions:
    """Pick the etcd settings out of parsed values and read the files they name.

    Raises:
        Refused: BAD_SETTING; a file cannot be used.
    """
    user, _, inline = values["user"].partition(":")
    password, endpoints = values["password"] or inline, values["endpoints"]
    if values["password-file"]:
        password = _patiently("password-file", values["password-file"], read_password)
    if values["endpoints-file"]:
        endpoints = _patiently("endpoints-file", values["endpoints-file"], read_endpoints)
    return EtcdOptions(
        endpoints,
        values["cacert"],
        values["cert"],
        values["key"],
        user,
        password,
        values["password-file"],
        values["endpoints-file"],
    )


def _patiently(setting: str, path: str, read: Callable[[str], T]) -> T:
    """Read a file that somebody may be replacing at this very moment."""
    end = time.monotonic() + READ_TRIES_S
    while True:
        try:
            return read(path)
        except (OSError, ValueError) as error:
            if time.monotonic() > end:
                raise Refused(
                    ErrorCode.BAD_SETTING,
                    f"--{setting} cannot be used: {error}",
                    fix="name a file that this user can read",
                ) from error
        time.sleep(0.1)


def must_be_readable(flag: str, path: str, *, fix: str = "name a file that this user can read") -> None:
    """Refuse a file that a daemon could not open later on.

    Raises:
        Refused: BAD_SETTING.
    """
    try:
        with Path(path).open("rb") as file:
            file.read(1)
    except OSError as error:
        raise Refused(
            ErrorCode.BAD_SETTING, f"{flag} {path} cannot be read: {error.strerror}", fix=fix
        ) from error


def parse(
    program: str,
    description: str,
    settings: Sequence[Setting],
    argv: Sequence[str],
    environ: Mapping[str, str],
) -> dict[str, Any]:
    """Return the value of every setting by name.

    Raises:
        Refused: BAD_SETTING; a value cannot be parsed, or a ``DTRAIN_*``
            variable is not a setting.
        SystemExit: ``--help``, or an unknown flag.
    """
    parser = argparse.ArgumentParser(program, description=description, allow_abbrev=False)
    for setting in settings:
        if setting.flag:
            shown = "" if setting.default in (None, "") else f" (default: {setting.default})"
            parser.add_argument(
                f"--{setting.name}",
                dest=setting.name,
                action="append" if setting.repeat else "store",
                help=f"{setting.help}{shown} [{setting.env}]",
            )
    flags = vars(parser.parse_args(list(argv)))
    _refuse_unknown(settings, environ)
    values: dict[str, Any] = {}
    for setting in settings:
        source, text = f"--{setting.name}", flags.get(setting.name)
        if isinstance(text, list):
            text = ",".join(text)
        if text is None:
            source, text = setting.env, environ.get(setting.env)
        if text is None and setting.fallback_env:
            source, text = setting.fallback_env, environ.get(setting.fallback_env)
        if text is None:
            values[setting.name] = setting.default
            continue
        if setting.name == "user" and source.startswith("--") and ":" in text:
            raise Refused(
                ErrorCode.BAD_SETTING,
                "--user holds a password, which every process of this machine can read there",
                fix="use --password-file, or DTRAIN_USER in the environment",
            )
        try:
            values[setting.name] = setting.parse(text)
        except (ValueError, Refused) as error:
            raise Refused(
                ErrorCode.BAD_SETTING,
                f"{source} cannot be {text!r}: {error}",
                fix=f"{setting.help}; see --help",
            ) from error
    return values


def _refuse_unknown(settings: Sequence[Setting], environ: Mapping[str, str]) -> None:
    known = {setting.env for setting in settings} | set(FOREIGN)
    for name in environ:
        # A shell may hold settings of other components: only a near miss is an error.
        if name.startswith("DTRAIN_") and name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
            if near:
                raise Refused(
                    ErrorCode.BAD_SETTING, f"{name} is not a setting", fix=f"did you mean {near[0]}?"
                )
