"""``python -m dtrain.agent``: the guardian, and in a process of its own the agent.

The guardian's half imports the standard library only: it must start in
milliseconds and have nothing that could stop its renewals.
"""

import os
import sys

from dtrain.agent import config
from dtrain.storage.etcd import guarded
from dtrain.storage.etcd.guardian import Policy
from dtrain.storage.etcd.session_memory import FD_VARIABLE

STOP_SLACK_S = 15.0
"""Beyond the ranks' grace: for killing them, the last snapshots, and the end of the process."""


def main() -> int:
    """Run the half that this process is; return its exit code."""
    if FD_VARIABLE in os.environ:
        # After a fork without exec grpc would not work, and here nobody does that.
        os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
        # Idle connections are closed every few minutes: no line each in a log of JSON lines.
        os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
        from dtrain.agent.main import run

        return run(sys.argv[1:])
    return guarded.run("agent", Policy.AGENT, _guarded)


def _guarded() -> guarded.Guarded:
    settings = config.load(sys.argv[1:], os.environ)
    return guarded.Guarded(
        settings.name,
        settings.etcd,
        settings.ttl_s,
        settings.allow_short_ttl,
        settings.stop_grace_s + STOP_SLACK_S,
        settings.health_listen,
        settings.drain_grace_s,
    )


if __name__ == "__main__":
    sys.exit(main())
