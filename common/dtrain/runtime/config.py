"""Settings of the daemons: flag, then environment, then default.

Standard library only: the guardian parses its settings with it. A misspelt
``DTRAIN_*`` variable is refused with a suggestion, never silently ignored.
Secrets come from files or the environment, never from flags.
"""

import argparse
import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtrain.protocol.errors import ErrorCode, Refused

# Set for child processes by dtrain itself, or read by other components.
FOREIGN = (
    "DTRAIN_SESSION_FD",
    "DTRAIN_PARENT_PID",
    "DTRAIN_ETCD_BIN",
    "DTRAIN_ETCDCTL_BIN",
    "DTRAIN_WEED_BIN",
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

    @property
    def env(self) -> str:
        """Name of the environment variable."""
        return "DTRAIN_" + self.name.upper().replace("-", "_")


def words(text: str) -> tuple[str, ...]:
    """Parse a comma-separated list."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


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
    Setting("cacert", "CA bundle that signs etcd's certificates", "", fallback_env="ETCDCTL_CACERT"),
    Setting("cert", "client certificate for etcd", "", fallback_env="ETCDCTL_CERT"),
    Setting("key", "key of the client certificate", "", fallback_env="ETCDCTL_KEY"),
    Setting("user", "etcd user name", "", fallback_env="ETCDCTL_USER"),
    Setting("password-file", "file that holds the etcd user's password", ""),
    Setting("password", "the etcd user's password", "", fallback_env="ETCDCTL_PASSWORD", flag=False),
)
"""Settings of everything that talks to etcd, named as etcdctl's."""


@dataclass(frozen=True, slots=True)
class EtcdOptions:
    """How to reach etcd. ``repr`` hides the password."""

    endpoints: tuple[str, ...]
    cacert: str = ""
    cert: str = ""
    key: str = ""
    user: str = ""
    password: str = ""

    def __repr__(self) -> str:
        return f"EtcdOptions(endpoints={self.endpoints}, user={self.user!r})"


def etcd_options(values: Mapping[str, Any]) -> EtcdOptions:
    """Pick the etcd settings out of parsed values and read the password file."""
    user, _, inline = values["user"].partition(":")
    password = values["password"] or inline
    if values["password-file"]:
        try:
            password = Path(values["password-file"]).read_text().strip()
        except OSError as error:
            raise Refused(ErrorCode.BAD_SETTING, f"cannot read the password file: {error}") from error
    return EtcdOptions(values["endpoints"], values["cacert"], values["cert"], values["key"], user, password)


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
                f"--{setting.name}", dest=setting.name, help=f"{setting.help}{shown} [{setting.env}]"
            )
    flags = vars(parser.parse_args(list(argv)))
    _refuse_unknown(settings, environ)
    values: dict[str, Any] = {}
    for setting in settings:
        source, text = f"--{setting.name}", flags.get(setting.name)
        if text is None:
            source, text = setting.env, environ.get(setting.env)
        if text is None and setting.fallback_env:
            source, text = setting.fallback_env, environ.get(setting.fallback_env)
        if text is None:
            values[setting.name] = setting.default
            continue
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
