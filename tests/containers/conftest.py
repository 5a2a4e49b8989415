"""Where no container engine answers these tests are skipped, with the reason: the one skip there is.

``DTRAIN_REQUIRE_ENGINE=1`` makes that a failure, for whoever asked for just these tests.
"""

import os
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ours = [item for item in items if FOLDER in item.path.parents]
    if not ours:
        return
    reason = _why_none()
    if reason and os.environ.get("DTRAIN_REQUIRE_ENGINE") == "1":
        raise pytest.UsageError(reason)
    if reason:
        for item in ours:
            item.add_marker(pytest.mark.skip(reason=reason))


def _why_none() -> str:
    try:
        from dtrain.testing import engine
    except ImportError as error:
        return f"{error.name} is not installed"
    return engine.why_none()
