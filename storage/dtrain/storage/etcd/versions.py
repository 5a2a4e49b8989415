"""What is known against versions of etcd that are still in use."""

import re
import time
from collections.abc import Callable
from typing import Any

from dtrain.protocol.errors import DtrainError
from dtrain.storage.etcd.port import Etcd

FLOOR = (3, 5, 13)
"""Older ones can lose what they have confirmed: good for trying things out."""

SAFE_WITH_USERS = {(3, 5): 33, (3, 6): 14, (3, 7): 1}
"""The first patch of each line without the known holes in users and roles."""

_ASK_AGAIN_S = 5.0


def version_warnings(version: str, auth: bool) -> tuple[str, ...]:
    """Return what a person should know before relying on etcd of that version; () for nothing.

    ``auth``: users are on. Without them the holes in roles are none, since
    whoever reaches etcd may do everything.
    """
    found = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    if found is None:
        return ()
    line, patch = (int(found[1]), int(found[2])), int(found[3])
    warnings = []
    if line < (3, 5):
        warnings.append(f"etcd {version} gets no fixes any more: its line has ended, use 3.5.33 or newer")
    if line == (3, 5) and patch < 3:
        warnings.append(
            f"etcd {version} may lose or mix up data when a member is killed, and forget to end leases:"
            " use 3.5.33 or newer"
        )
    safe_patch = SAFE_WITH_USERS.get(line)
    if auth and (line < (3, 5) or (safe_patch is not None and patch < safe_patch)):
        warnings.append(
            f"etcd {version} does not hold users to their roles (CVE-2026-33413: leases without a login,"
            " CVE-2026-33343: nested transactions, GHSA-xg4h-6gfc-h4m8: watches from a single key on):"
            " use 3.5.33, 3.6.14, 3.7.1 or newer"
        )
    return tuple(warnings)


def tell(etcd: Etcd, auth: bool, log: Callable[..., Any]) -> None:
    """Log the warnings once, as soon as etcd answers. The body of a thread that then ends."""
    while True:
        try:
            version = etcd.status().version
        except DtrainError:
            time.sleep(_ASK_AGAIN_S)
            continue
        for warning in version_warnings(version, auth):
            log("etcd version", warning=warning)
        return
