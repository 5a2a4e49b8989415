"""``python -m dtrain.agent``: the guardian, and in a process of its own the agent.

The guardian's half imports the standard library only: it must start in
milliseconds and have nothing that could stop its renewals.
"""

import os
import sys

from dtrain.agent import config
from dtrain.protocol.errors import DtrainError
from dtrain.storage.etcd import guardian
from dtrain.storage.etcd.session_memory import FD_VARIABLE

STOP_SLACK_S = 15.0
"""Beyond the ranks' grace: for killing them, the last snapshots, and the end of the process."""


def main() -> int:
    """Run the half that this process is; return its exit code."""
    if FD_VARIABLE in os.environ:
        # After a fork without exec grpc would not work, and here nobody does that.
        os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
        from dtrain.agent.main import run

        return run(sys.argv[1:])
    try:
        settings = config.load(sys.argv[1:], os.environ)
        supervised = guardian.GuardianConfig(
            # -P: a folder named dtrain in the working directory is not this program.
            argv=(sys.executable, "-P", "-m", "dtrain.agent", *sys.argv[1:]),
            endpoints=settings.etcd.endpoints,
            policy=guardian.Policy.AGENT,
            component=f"agent/{settings.name}",
            ttl_s=settings.ttl_s,
            grace_s=settings.stop_grace_s + STOP_SLACK_S,
            tls_ca=settings.etcd.cacert,
            tls_cert=settings.etcd.cert,
            tls_key=settings.etcd.key,
            user=settings.etcd.user,
            password=settings.etcd.password,
            allow_short_ttl=settings.allow_short_ttl,
        )
    except DtrainError as error:
        fix = f"\n  fix: {error.fix}" if error.fix else ""
        sys.stderr.write(f"dtrain agent: {error.message} ({error.code.value}){fix}\n")
        return guardian.EX_CONFIG
    except ValueError as error:
        sys.stderr.write(f"dtrain agent: {error}\n")
        return guardian.EX_CONFIG
    return guardian.run(supervised)


if __name__ == "__main__":
    sys.exit(main())
