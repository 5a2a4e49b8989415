"""What is held back while coordinators of two releases run one cluster."""

import pytest

from dtrain.coordinator.core.releases import withheld
from dtrain.protocol.ids import ReplicaId


@pytest.mark.parametrize(
    ("versions", "found"),
    [
        ({}, ""),
        ({"c1": "0.2.0", "c2": "0.3.1", "c3": "1.0.0"}, ""),
        ({"c1": "0.2.0", "c2": "0.1.0"}, "coordinator c2 runs dtrain 0.1.0"),
        ({"c1": "", "c2": "a build of my own"}, ""),
    ],
)
def test_a_coordinator_of_an_older_release_is_named(versions: dict[str, str], found: str) -> None:
    assert withheld({ReplicaId(name): version for name, version in versions.items()}) == found
