"""Verbs that read a store from here get the credentials of a local cluster's store, and of no other."""

import os
import stat
from pathlib import Path

import pytest

from dtrain.cli import context, localstore

OURS = "s3://dtrain/?endpoint=http://127.0.0.1:4711&region=us-east-1"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "local", "AWS_SECRET_ACCESS_KEY": "secret"}


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """With which key each store was opened."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "mine")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "mine")
    found: list[str] = []
    monkeypatch.setattr(localstore, "open_store", lambda uri: found.append(os.environ["AWS_ACCESS_KEY_ID"]))
    localstore.write_down(tmp_path, OURS, CREDENTIALS)
    context.remember(context.known_here("local", ("127.0.0.1:1",), (), tmp_path))
    return found


def test_the_local_store_is_opened_with_its_own_credentials(opened):
    localstore.open_here(OURS)
    assert opened == ["local"]


@pytest.mark.parametrize("uri", ["s3://bucket/x", "s3://dtrain/?endpoint=http://127.0.0.1:9", "file:///tmp"])
def test_another_store_is_opened_with_what_the_environment_says(opened, uri):
    localstore.open_here(uri)
    assert opened == ["mine"]


def test_credentials_of_a_cluster_that_has_gone_are_not_used(opened, tmp_path):
    context.remember(context.Known("local", (), (), str(tmp_path), pid=1, started=1))
    localstore.open_here(OURS)
    assert opened == ["mine"]


def test_what_is_written_down_is_its_users_alone(opened, tmp_path):
    assert stat.S_IMODE((tmp_path / localstore.FILE).stat().st_mode) == 0o600


def test_a_damaged_file_is_none(opened, tmp_path):
    (tmp_path / localstore.FILE).write_text("{")
    localstore.open_here(OURS)
    assert opened == ["mine"]
