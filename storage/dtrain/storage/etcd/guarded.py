"""The guardian's half of a daemon's ``__main__``. Standard library only, like the guardian."""

import sys
from collections.abc import Callable
from dataclasses import dataclass

from dtrain.protocol.errors import DtrainError
from dtrain.runtime import serving
from dtrain.runtime.config import EtcdOptions
from dtrain.storage.etcd import guardian


@dataclass(frozen=True, slots=True)
class Guarded:
    """What the guardian needs to know of a daemon's settings; ``name`` is for its log. Times in seconds."""

    name: str
    etcd: EtcdOptions
    ttl_s: int
    allow_short_ttl: bool
    grace_s: float
    health_listen: str = ""
    drain_s: float = 0.0


def run(daemon: str, policy: guardian.Policy, load: Callable[[], Guarded]) -> int:
    """Guard ``python -m dtrain.<daemon>`` with this process's arguments; return the exit code.

    Settings that cannot be used end it with 78 and one sentence on stderr.
    """
    try:
        guarded = load()
        supervised = guardian.GuardianConfig(
            # -P: a folder named dtrain in the working directory is not this program.
            argv=(sys.executable, "-P", "-m", f"dtrain.{daemon}", *sys.argv[1:]),
            endpoints=guarded.etcd.endpoints,
            policy=policy,
            component=f"{daemon}/{guarded.name}",
            ttl_s=guarded.ttl_s,
            grace_s=guarded.grace_s,
            drain_s=guarded.drain_s,
            tls_ca=guarded.etcd.cacert,
            tls_cert=guarded.etcd.cert,
            tls_key=guarded.etcd.key,
            user=guarded.etcd.user,
            password=guarded.etcd.password,
            password_file=guarded.etcd.password_file,
            endpoints_file=guarded.etcd.endpoints_file,
            allow_short_ttl=guarded.allow_short_ttl,
        )
        health = serving.bind(guarded.health_listen) if guarded.health_listen else None
    except DtrainError as error:
        cause = f": {error.cause}" if error.cause else ""
        fix = f"\n  fix: {error.fix}" if error.fix else ""
        sys.stderr.write(f"dtrain {daemon}: {error.message}{cause} ({error.code.value}){fix}\n")
        return guardian.EX_CONFIG
    except ValueError as error:
        sys.stderr.write(f"dtrain {daemon}: {error}\n")
        return guardian.EX_CONFIG
    return guardian.run(supervised, health)
