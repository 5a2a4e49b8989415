"""Settings of the dashboard. Standard library only: the guardian reads them too."""

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtrain.protocol.errors import ErrorCode, Refused
from dtrain.runtime.addresses import is_wildcard
from dtrain.runtime.config import Setting, must_be_readable, words

TOKEN_CHARACTERS_MIN, TOKEN_CHARACTERS_MAX = 16, 1024

DASHBOARD = (
    Setting("dashboard-listen", "address of the dashboard: host:port; empty: none", "127.0.0.1:7090"),
    Setting(
        "dashboard-token-file",
        "file with the token that a browser must give to change anything (default: nobody can); "
        "read again when it changes",
        "",
    ),
    Setting(
        "dashboard-hosts", "more names that browsers may call the dashboard by, comma-separated", (), words
    ),
    Setting("dashboard-cert", "certificate chain that browsers are shown, PEM: the dashboard uses HTTPS", ""),
    Setting("dashboard-key", "key of that certificate, PEM", ""),
)


@dataclass(frozen=True, slots=True)
class DashboardSettings:
    """``secured``: the cluster's gRPC uses TLS, so that who only reaches an address may not look either."""

    listen: str
    token_file: str = ""
    hosts: tuple[str, ...] = ()
    cert: str = ""
    key: str = ""
    secured: bool = False

    def __post_init__(self) -> None:
        host, _, port = self.listen.rpartition(":")
        if not (host and port.isdecimal() and int(port) < 65536):
            raise Refused(
                ErrorCode.BAD_SETTING,
                f"--dashboard-listen cannot be {self.listen!r}",
                fix="use host:port, or nothing",
            )
        if bool(self.cert) != bool(self.key):
            raise Refused(
                ErrorCode.BAD_SETTING,
                "--dashboard-cert and --dashboard-key belong together",
                fix="give both for HTTPS, or none for plain HTTP",
            )
        for setting, path in (("cert", self.cert), ("key", self.key), ("token-file", self.token_file)):
            if path:
                must_be_readable(f"--dashboard-{setting}", path)
        if self.token_file:
            read_token(self.token_file)
        if self.reading_needs_token and not self.token_file:
            raise Refused(
                ErrorCode.BAD_SETTING,
                f"the dashboard would show all who reach {self.listen} what this cluster's TLS protects",
                fix="give --dashboard-token-file, listen on 127.0.0.1, or set --dashboard-listen to nothing",
            )

    @property
    def host(self) -> str:
        """The host that is listened on, without brackets."""
        return self.listen.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """The port; 0 picks a free one."""
        return int(self.listen.rpartition(":")[2])

    @property
    def is_loopback(self) -> bool:
        """Only this machine reaches it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def reading_needs_token(self) -> bool:
        """Whether pages are shown only to those who have the token."""
        return self.secured and not self.is_loopback

    def url(self, advertised_host: str) -> str:
        """Return where browsers find it; ``advertised_host`` stands for every address. "": not known."""
        if not self.port:
            return ""
        host = advertised_host if is_wildcard(self.listen) else self.host
        shown = f"[{host}]" if ":" in host else host
        return f"{'https' if self.cert else 'http'}://{shown}:{self.port}" if host else ""


def dashboard_settings(values: Mapping[str, Any], *, secured: bool) -> DashboardSettings | None:
    """Pick the dashboard's settings out of parsed values; None: there is to be none.

    Raises:
        Refused: BAD_SETTING.
    """
    if not values["dashboard-listen"]:
        return None
    return DashboardSettings(
        values["dashboard-listen"],
        values["dashboard-token-file"],
        tuple(values["dashboard-hosts"]),
        values["dashboard-cert"],
        values["dashboard-key"],
        secured,
    )


def read_token(path: str) -> str:
    """Return the token in a file.

    Raises:
        Refused: BAD_SETTING; there is none in it, or one that could be guessed.
    """
    try:
        token = Path(path).read_text(encoding="ascii").strip()
    except (OSError, ValueError) as error:
        raise Refused(
            ErrorCode.BAD_SETTING,
            f"--dashboard-token-file {path} cannot be read: {error}",
            fix="name a file that this user can read, with a token of ASCII characters in it",
        ) from error
    if not TOKEN_CHARACTERS_MIN <= len(token) <= TOKEN_CHARACTERS_MAX:
        raise Refused(
            ErrorCode.BAD_SETTING,
            f"the token in {path} has {len(token)} characters",
            fix=f"use {TOKEN_CHARACTERS_MIN} to {TOKEN_CHARACTERS_MAX}, such as from: openssl rand -hex 32",
        )
    return token
