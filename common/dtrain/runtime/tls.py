"""Who is who on gRPC: settings of TLS, and the names that certificates carry. Standard library only.

TLS is mutual or off. A certificate says in one URI who its holder is,
``dtrain://<cluster>/<role>/<name>``; what each role may call is decided from
that alone (``grpc_tls.RULES``). Those that serve carry a DNS name too, made of
the same parts, which callers verify instead of an address: machines may move
without a new certificate, and none can answer in another's place.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from dtrain.protocol.errors import DtrainError, ErrorCode, Refused
from dtrain.protocol.ids import parse_name
from dtrain.runtime.config import Setting, must_be_readable

TLS = (
    Setting("tls-cert", "certificate chain for gRPC, PEM: TLS is on, and everyone must show one", ""),
    Setting("tls-key", "key of that certificate, PEM", ""),
    Setting("tls-cacert", "CA bundle that signs the certificates of all others, PEM", ""),
)
"""Settings of everything that speaks gRPC: all three, or none for plain text."""

SCHEME = "dtrain://"
DOMAIN = "dtrain"


class Role(StrEnum):
    """What the holder of a certificate is."""

    COORDINATOR = "coordinator"
    AGENT = "agent"
    OPERATOR = "operator"
    READER = "reader"


@dataclass(frozen=True, slots=True)
class Peer:
    """The holder of a certificate."""

    cluster: str
    role: Role
    name: str

    def __str__(self) -> str:
        return f"{self.role.value} {self.name}"

    @property
    def uri(self) -> str:
        """The URI in its certificate."""
        return f"{SCHEME}{self.cluster}/{self.role.value}/{self.name}"


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """The three PEM files. They may be replaced at any time."""

    cert: str
    key: str
    cacert: str


_PERSON = re.compile(r"[A-Za-z0-9](?:[-A-Za-z0-9._@]{0,62}[A-Za-z0-9])?")


def parse_peer(uri: str) -> Peer:
    """Read the URI of a certificate.

    Raises:
        Refused: BAD_NAME; it is not ``dtrain://<cluster>/<role>/<name>``.
    """
    parts = uri.removeprefix(SCHEME).split("/")
    try:
        if not uri.startswith(SCHEME) or len(parts) != 3:
            raise ValueError
        role = Role(parts[1])
        parse_name(parts[0], "cluster")
        if role in (Role.COORDINATOR, Role.AGENT):
            parse_name(parts[2], role.value)
        elif not _PERSON.fullmatch(parts[2]):
            raise ValueError
    except (ValueError, DtrainError) as error:
        raise Refused(
            ErrorCode.BAD_NAME,
            f"the URI {uri[:200]!r} of a certificate names nobody",
            fix="issue one with dtrain://<cluster>/<coordinator|agent|operator|reader>/<name>",
        ) from error
    return Peer(parts[0], role, parts[2])


def agent_server_name(cluster: str, agent: str) -> str:
    """DNS name in an agent's certificate, verified by coordinators whatever its address is."""
    return f"{agent}.agent.{cluster}.{DOMAIN}"


def coordinator_server_name(cluster: str) -> str:
    """DNS name in the certificate of every coordinator of a cluster: any of them will do."""
    return f"coordinator.{cluster}.{DOMAIN}"


def tls_files(values: Mapping[str, Any]) -> TlsFiles | None:
    """Pick the TLS settings out of parsed values; None if TLS is off.

    Raises:
        Refused: BAD_SETTING; some are missing, or a file cannot be read.
    """
    given = {setting.name: str(values.get(setting.name) or "") for setting in TLS}
    missing = [name for name, path in given.items() if not path]
    if len(missing) == len(given):
        return None
    if missing:
        raise Refused(
            ErrorCode.BAD_SETTING,
            f"TLS needs --{' and --'.join(missing)} too",
            fix="give --tls-cert, --tls-key and --tls-cacert, or none of them for plain text",
        )
    for name, path in given.items():
        must_be_readable(f"--{name}", path, fix="docs/security.md says how certificates are made")
    return TlsFiles(given["tls-cert"], given["tls-key"], given["tls-cacert"])
