"""What the query of a store's URI may say."""

import dataclasses
import re
from pathlib import Path

import pytest

from dtrain.protocol.errors import ErrorCode, Refused
from dtrain.storage.blobs.open import open_store
from dtrain.storage.blobs.s3 import S3Blobs
from dtrain.storage.blobs.s3_client import _is_aws
from dtrain.storage.blobs.s3_errors import ACTIONS
from dtrain.storage.blobs.s3_settings import ACCEPTED, S3Settings


@pytest.mark.parametrize(
    "query",
    [
        "endpoint=http://127.0.0.1:1234&region=eu-1",
        "addressing=virtual",
        "profile=train",
        "sse=AES256",
        "sse=aws:kms&sse_kms_key_id=arn:aws:kms:eu-1:1:key/a-b",
        "ca_bundle=/etc/ca.pem",
        "connect_timeout_s=2.5&timeout_s=10&lanes=8",
    ],
)
def test_every_setting_survives_in_the_uri(query: str) -> None:
    store = open_store(f"s3://bucket/p?{query}")
    assert store.uri == f"s3://bucket/p?{query}"
    assert open_store(store.uri).uri == store.uri


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("endpiont=http://h:1", "did you mean endpoint?"),
        ("lane=4", "did you mean lanes?"),
        ("connect-timeout=4", "did you mean connect_timeout_s?"),
        ("verify=false", "unknown option 'verify'"),
        ("addressing=paht", "did you mean path?"),
        ("sse=aws-kms", "did you mean aws:kms?"),
        ("sse_kms_key_id=k", "needs sse=aws:kms"),
        ("sse=AES256&sse_kms_key_id=k", "needs sse=aws:kms"),
        ("sse_c_key=hunter2", "SSE-C"),
        ("sse-customer-key=hunter2", "SSE-C"),
        ("ca_bundle=ca.pem", "absolute"),
        ("insecure_skip_tls_verify=true", "unknown option"),
        ("lanes=0", "from 1 to"),
        ("lanes=many", "is a number"),
        ("timeout_s=0", "above 0"),
        ("timeout_s=nan", "above 0"),
        ("timeout_s=inf", "above 0"),
        ("region=a&region=b", "said twice"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(query: str, words: str) -> None:
    with pytest.raises(Refused) as refusal:
        open_store(f"s3://bucket/p?{query}")
    assert refusal.value.code == ErrorCode.BAD_SETTING
    assert words in refusal.value.message
    assert "hunter2" not in f"{refusal.value.message} {refusal.value.fix}"
    assert "docs/stores.md" in refusal.value.fix


def url(query: str) -> str:
    store = open_store(f"s3://bucket/p?region=eu-west-1&{query}")
    assert isinstance(store, S3Blobs)
    client = store._access._connect().client
    made: str = client.generate_presigned_url("get_object", Params={"Bucket": "bucket", "Key": "k"})
    return made.partition("?")[0]


@pytest.fixture(autouse=True)
def _keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")


def test_buckets_are_addressed_as_asked_and_else_as_the_server_can() -> None:
    assert re.fullmatch(r"https://bucket\.s3[.a-z0-9-]*\.amazonaws\.com/k", url(""))
    assert re.fullmatch(r"https://s3[.a-z0-9-]*\.amazonaws\.com/bucket/k", url("addressing=path"))
    assert url("endpoint=http://store:9000") == "http://store:9000/bucket/k"
    assert url("endpoint=http://store:9000&addressing=virtual") == "http://bucket.store:9000/k"


def test_an_endpoint_from_the_environment_is_addressed_by_path_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://store:9000")
    assert url("") == "http://store:9000/bucket/k"


def test_only_aws_is_aws() -> None:
    assert _is_aws("https://s3.eu-west-1.amazonaws.com")
    assert _is_aws("https://s3.cn-north-1.amazonaws.com.cn")
    assert not _is_aws("https://amazonaws.com.example.org")


def test_the_docs_know_every_setting_and_every_permission() -> None:
    text = (Path(__file__).parents[3] / "docs" / "stores.md").read_text()
    for field in dataclasses.fields(S3Settings):
        assert f"`{field.name}`" in text
        assert field.name in ACCEPTED
    for action in ACTIONS.values():
        assert f'"{action}"' in text
