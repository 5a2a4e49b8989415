from pathlib import Path

import pytest

from dtrain.protocol.errors import ErrorCode, Refused
from dtrain.storage.blobs.local import LocalBlobs
from dtrain.storage.blobs.open import open_store
from dtrain.storage.blobs.s3 import S3Blobs


@pytest.mark.parametrize(
    ("uri", "again"),
    [
        ("s3://bucket", "s3://bucket/"),
        ("s3://bucket/a/b/", "s3://bucket/a/b"),
        (
            "s3://bucket/p?endpoint=http://127.0.0.1:1234&region=eu-1",
            "s3://bucket/p?endpoint=http://127.0.0.1:1234&region=eu-1",
        ),
        ("s3://bucket/a%20b?region=eu-1", "s3://bucket/a%20b?region=eu-1"),
    ],
)
def test_a_bucket_is_opened_and_names_itself(uri: str, again: str) -> None:
    store = open_store(uri)
    assert isinstance(store, S3Blobs)
    assert store.uri == again
    assert open_store(again).uri == again


def test_a_folder_is_opened_by_path_or_uri(tmp_path: Path) -> None:
    for uri in (str(tmp_path), tmp_path.as_uri(), f"file://localhost{tmp_path}"):
        store = open_store(uri)
        assert isinstance(store, LocalBlobs)
        assert store.uri == tmp_path.as_uri()


def test_a_missing_folder_is_made_only_on_request(tmp_path: Path) -> None:
    root = tmp_path / "a" / "b"
    with pytest.raises(Refused, match="does not exist") as refusal:
        open_store(str(root))
    assert f"mkdir -p {root}" in refusal.value.fix
    open_store(str(root), create=True)
    assert root.is_dir()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(Refused, match="cannot be created") as refusal:
            open_store(str(path), create=True)
        assert refusal.value.code == ErrorCode.STORE_REFUSED


def test_the_same_name_in_memory_is_the_same_store() -> None:
    assert open_store("memory://same-name") is open_store("memory://same-name")
    assert open_store("memory://same-name") is not open_store("memory://other-name")


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "relative/path",
        "/up/../down",
        "file://host/path",
        "file:///path?x=1",
        "http://bucket/x",
        "gs://bucket/x",
        "memory://",
        "memory://a/b",
        "s3://",
        "s3://Bad_Bucket",
        "s3://ab",
        "s3://bucket/a//b",
        "s3://bucket/../b",
        "s3://bucket/a?colour=blue",
        "s3://bucket/a?endpoint=127.0.0.1:80",
        "s3://bucket/a?endpoint=http://host:port",
        "s3://bucket/a#x",
        "s3://[broken",
    ],
)
def test_anything_else_is_refused_with_what_is_accepted(uri: str) -> None:
    with pytest.raises(Refused) as refusal:
        open_store(uri)
    assert refusal.value.code == ErrorCode.BAD_SETTING
    assert "s3://bucket/prefix" in refusal.value.fix
    assert "file:///" in refusal.value.fix


@pytest.mark.parametrize(
    "uri",
    [
        "s3://AKIA:hunter2@bucket/x",
        "s3://hunter2@bucket/x",
        "s3://bucket/x?aws_secret_access_key=hunter2",
        "s3://bucket/x?access_key=hunter2",
        "s3://bucket/x?endpoint=http://me:hunter2@host:80",
    ],
)
def test_credentials_in_a_uri_are_refused_and_not_repeated(uri: str) -> None:
    with pytest.raises(Refused, match="credentials do not belong") as refusal:
        open_store(uri)
    assert "hunter2" not in f"{refusal.value.message} {refusal.value.fix} {refusal.value.cause}"
    assert "AWS_ACCESS_KEY_ID" in refusal.value.fix
