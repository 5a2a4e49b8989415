"""The file that names webhooks. Standard library only: the guardian reads it too.

URLs and secrets stay in here: a Slack URL is a password. They are in no record, log line or ``repr``.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dtrain.protocol.errors import DtrainError, ErrorCode, Refused
from dtrain.protocol.events import EventReason
from dtrain.protocol.ids import parse_name
from dtrain.runtime.config import Setting

WEBHOOKS = (
    Setting(
        "webhook-file",
        "JSON file with the webhooks that the leader calls (docs/webhooks.md); read at start",
        "",
    ),
)
HOOKS_MAX = 8
FILE_BYTES_MAX = 64 * 1024
_FIELDS = frozenset({"name", "url", "secret", "reasons", "jobs"})


@dataclass(frozen=True, slots=True)
class Webhook:
    """One receiver. ``secret`` "": unsigned."""

    name: str
    url: str = field(repr=False)
    secret: str = field(default="", repr=False)
    reasons: frozenset[EventReason] = frozenset()
    """What it is told; empty: every warning."""
    jobs: frozenset[str] = frozenset()
    """Of which jobs; empty: of all."""


def load_webhooks(path: str) -> tuple[Webhook, ...]:
    """Read the webhooks in ``path``; "" has none.

    Raises:
        Refused: BAD_SETTING; the message never holds what the file does.
    """
    if not path:
        return ()
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise _bad(path, f"cannot be read: {error.strerror}") from None
    try:
        document = json.loads(data) if len(data) <= FILE_BYTES_MAX else None
    except ValueError:
        document = None
    found = document.get("webhooks") if isinstance(document, dict) else None
    if not isinstance(found, list) or len(found) > HOOKS_MAX:
        raise _bad(path, f'is not {{"webhooks": [...]}} with at most {HOOKS_MAX} of them')
    hooks = tuple(_hook(path, number, one) for number, one in enumerate(found, 1))
    if len({hook.name for hook in hooks}) != len(hooks):
        raise _bad(path, "names one webhook twice")
    return hooks


def _hook(path: str, number: int, one: Any) -> Webhook:
    where = f"webhook {number}"
    if not isinstance(one, dict) or not _FIELDS.issuperset(one):
        raise _bad(path, f"{where} may have {', '.join(sorted(_FIELDS))}")
    try:
        name = parse_name(_text(one, "name"), "webhook")
        parts = urlsplit(_text(one, "url"))
        port_is_right = parts.port is None or parts.port > 0
    except (ValueError, DtrainError):
        raise _bad(path, f"{where} needs a name ([a-z0-9-]) and a url") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or not port_is_right:
        raise _bad(path, f"the url of webhook {name} is not http:// or https://")
    if not parts.geturl().isascii() or any(c.isspace() for c in parts.geturl()):
        raise _bad(path, f"the url of webhook {name} has characters that no URL has")
    reasons = _texts(path, one, "reasons", where)
    unknown = sorted(reasons - {reason.value for reason in EventReason})
    if unknown:
        raise _bad(path, f"webhook {name} wants {unknown[0]!r}, which is no reason of an event")
    return Webhook(
        name,
        parts.geturl(),
        _text(one, "secret", ""),
        frozenset(EventReason(reason) for reason in reasons),
        frozenset(_texts(path, one, "jobs", where)),
    )


def _text(one: Mapping[str, Any], name: str, default: str | None = None) -> str:
    value = one.get(name, default)
    if not isinstance(value, str):
        raise ValueError(name)
    return value


def _texts(path: str, one: Mapping[str, Any], name: str, where: str) -> set[str]:
    value = one.get(name, [])
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise _bad(path, f"{name} of {where} is no list of texts")
    return set(value)


def _bad(path: str, what: str) -> Refused:
    return Refused(ErrorCode.BAD_SETTING, f"--webhook-file {path}: {what}", fix="see docs/webhooks.md")
