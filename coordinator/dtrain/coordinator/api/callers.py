"""Who calls, by its certificate, and what of a record it may see."""

import grpc

from dtrain.protocol import codec
from dtrain.protocol.errors import DtrainError
from dtrain.runtime import grpc_tls, redact
from dtrain.runtime.tls import Role

_SEE_ALL = frozenset({Role.OPERATOR, Role.COORDINATOR})


def who(said: str, context: grpc.ServicerContext) -> str:
    """Who calls: what its certificate says, if it has one, proves more than what it says of itself."""
    peer = grpc_tls.caller(context)
    if peer is not None and peer.role is Role.COORDINATOR:
        # It speaks for somebody at its dashboard, and says so.
        return f"{peer.name}: {said}" if said else peer.name
    return said if peer is None else peer.name


def sees_all(context: grpc.ServicerContext) -> bool:
    """Whether the caller may see what records keep secret."""
    peer = grpc_tls.caller(context)
    return peer is None or peer.role in _SEE_ALL


def without_secrets(key: str, value: bytes) -> bytes:
    """A record as those may see it who only look: a job's environment often holds secrets."""
    if not key.endswith("/spec"):
        return value
    try:
        document = codec.loads(value)
        env = document.get("env", {})
        return codec.dumps({**document, "env": dict.fromkeys(env, redact.HIDDEN)}) if env else value
    except (DtrainError, AttributeError, TypeError):
        return b"{}"
