"""``python -m dtrain.coordinator``: the guardian, and in a process of its own the coordinator.

The guardian's half imports the standard library only: it must start in
milliseconds and have nothing that could stop its renewals.
"""

import os
import sys

from dtrain.coordinator import config
from dtrain.coordinator.web.keeper import DashboardKeeper
from dtrain.storage.etcd import guarded
from dtrain.storage.etcd.guardian import Policy
from dtrain.storage.etcd.session_memory import FD_VARIABLE

STOP_GRACE_S = 2.0
"""From SIGTERM to SIGKILL: a leader that resigns has nothing to wait for."""


def main() -> int:
    """Run the half that this process is; return its exit code."""
    if FD_VARIABLE in os.environ:
        # After a fork without exec grpc would not work, and here nobody does that.
        os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
        # Idle connections are closed every few minutes: no line each in a log of JSON lines.
        os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
        from dtrain.coordinator.main import run

        return run(sys.argv[1:])
    keepers: list[DashboardKeeper] = []
    try:
        return guarded.run("coordinator", Policy.COORDINATOR, lambda: _guarded(keepers))
    finally:
        for keeper in keepers:
            keeper.stop()


def _guarded(keepers: list[DashboardKeeper]) -> guarded.Guarded:
    settings = config.load(sys.argv[1:], os.environ)
    if settings.dashboard is not None:
        keepers.append(DashboardKeeper(sys.argv[1:], os.environ))
        keepers[-1].start()
    return guarded.Guarded(
        settings.replica,
        settings.etcd,
        settings.ttl_s,
        settings.allow_short_ttl,
        STOP_GRACE_S,
        settings.health_listen,
    )


if __name__ == "__main__":
    sys.exit(main())
