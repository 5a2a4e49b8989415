"""What a webhook is sent: JSON with a ``text`` for Slack and its likes, and the event beside it. Pure."""

import hashlib
import hmac

from dtrain.protocol import codec
from dtrain.protocol.events import EventRecord, EventType
from dtrain.protocol.ids import ClusterName, JobName

TEXT_CHARS_MAX = 1000


def event_id(cluster: ClusterName, job: JobName, event: EventRecord) -> str:
    """Return what tells an event from all others: the same each time that it is sent."""
    return f"{cluster}/{job}/{event.seq}"


def body(cluster: ClusterName, job: JobName, event: EventRecord) -> bytes:
    """Return the request's body."""
    mark = ":warning: " if event.type is EventType.WARNING else ""
    about = f" ({event.object})" if event.object else ""
    text = f"{mark}*{job}* {event.reason}{about}: {event.message}"
    return codec.dumps(
        {
            "text": _plain(text)[:TEXT_CHARS_MAX],
            "id": event_id(cluster, job, event),
            "cluster": cluster,
            "job": job,
            "event": {"v": codec.VERSION, **codec.to_json(event)},
        }
    )


def signature(secret: str, timestamp: str, data: bytes) -> str:
    """Return the value of the signature's header: HMAC-SHA256 over ``timestamp.body``."""
    signed = hmac.new(secret.encode(), timestamp.encode() + b"." + data, hashlib.sha256)
    return f"sha256={signed.hexdigest()}"


def _plain(text: str) -> str:
    # Slack's three control characters: a log line must not mention everybody in a channel.
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
