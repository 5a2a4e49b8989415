"""What etcd's members say about themselves, asked one by one and without a library."""

import contextlib
import json
import urllib.error
import urllib.request
from typing import Any

TRY_S = 2.0


def status(endpoint: str, timeout_s: float = TRY_S) -> dict[str, Any] | None:
    """Return a member's status; None if it does not answer."""
    with contextlib.suppress(OSError, ValueError, urllib.error.URLError):
        found = call(endpoint, "/v3/maintenance/status", {}, timeout_s)
        return found if "header" in found else None
    return None


def leads(endpoint: str) -> bool:
    """Whether the member at ``endpoint`` says that it leads."""
    found = status(endpoint)
    return found is not None and found.get("leader", "0") == found["header"].get("member_id", "")


def call(endpoint: str, path: str, body: dict[str, Any], timeout_s: float = TRY_S) -> dict[str, Any]:
    """POST ``body`` to a member and return its answer.

    Raises:
        OSError: it does not answer, or not with success.
        ValueError: what it answers is no JSON.
    """
    request = urllib.request.Request(  # noqa: S310 - the URL is an endpoint of ours
        endpoint + path, data=json.dumps(body).encode(), method="POST"
    )
    # Not through a web proxy: these are addresses of this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=timeout_s) as answer:
        found = json.loads(answer.read())
    if not isinstance(found, dict):
        raise ValueError("not an object")
    return found
