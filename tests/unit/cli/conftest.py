"""Replicas over real gRPC for the command line's tests."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.unit.cli.fakes import FakeReplica, serving


@pytest.fixture(autouse=True)
def nothing_configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    for name in list(os.environ):
        if name.startswith(("DTRAIN_", "ETCDCTL_", "PET_")):
            monkeypatch.delenv(name)


@pytest.fixture
def replica() -> FakeReplica:
    return FakeReplica()


@pytest.fixture
def address(replica: FakeReplica) -> Iterator[str]:
    with serving(replica) as address:
        yield address
