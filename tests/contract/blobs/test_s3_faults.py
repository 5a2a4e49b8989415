"""Every way in which S3 says no, or says nothing: by class, with its code, its sentence and its fix.

A proxy that fails on cue stands before a real SeaweedFS.
"""

import datetime
import email.utils
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import botocore.auth
import pytest
import trustme
from tests.contract.blobs.conftest import client_of, put, s3_store
from tests.support import faulty_s3
from tests.support.faulty_s3 import FaultyS3, answer

from dtrain.local.weed import WeedServer
from dtrain.protocol.errors import DtrainError, ErrorCode, OutcomeUnknown, Refused, Unavailable
from dtrain.storage.blobs import digest, s3_client
from dtrain.storage.blobs.flow import Flow, Stopped
from dtrain.storage.blobs.open import open_store
from dtrain.storage.blobs.port import PART_BYTES, BlobStore
from dtrain.storage.blobs.probe import probe
from dtrain.storage.blobs.s3 import S3Blobs


@pytest.fixture
def faulty(weed: WeedServer) -> Iterator[FaultyS3]:
    server = FaultyS3(weed.endpoint)
    yield server
    server.close()


@pytest.fixture
def store(weed: WeedServer, faulty: FaultyS3) -> Iterator[S3Blobs]:
    made = s3_store(weed, endpoint=faulty.endpoint)
    yield made
    made.close()


def assert_whole(store: BlobStore, key: str, data: bytes) -> None:
    """One blob, all there, and nothing beside it."""
    assert [info.key for info in store.list("")] == [key]
    assert store.head(key).crc32c == digest.to_hex(digest.crc32c(data))
    assert list(store.list_unfinished("")) == []


def refusal(call: Callable[[], object]) -> DtrainError:
    with pytest.raises(DtrainError) as error:
        call()
    return error.value


# Busy ---------------------------------------------------------------------------------


def test_slow_down_slows_every_lane_and_the_blob_arrives(
    store: S3Blobs, faulty: FaultyS3, big: bytes
) -> None:
    faulty.fail("UploadPart", answer(503, "SlowDown", headers={"Retry-After": "1"}), times=2)
    put(store, "big", big)
    assert_whole(store, "big", big)
    refused = [one.at for one in faulty.seen if one.operation == "UploadPart"][1]
    later = [one.at for one in faulty.seen if one.at > refused]
    # The third lane's part left before the second refusal was heard; whatever followed kept the pause.
    assert sum(at - refused < 0.8 for at in later) <= 1
    assert faulty.count("UploadPart") == 5


@pytest.mark.parametrize(("status", "code"), [(503, "SlowDown"), (429, "TooManyRequests"), (503, "")])
def test_a_store_that_stays_busy_is_unavailable(
    store: S3Blobs, faulty: FaultyS3, status: int, code: str
) -> None:
    faulty.fail("PutObject", answer(status, code), times=1)
    error = refusal(lambda: put(store, "a", b"x"))
    assert (type(error).__name__, error.code) == ("Busy", ErrorCode.STORE_BUSY)
    assert isinstance(error, Unavailable)
    assert "less often" in error.fix


def test_a_pause_that_the_server_asks_for_holds_for_other_requests_too(
    store: S3Blobs, faulty: FaultyS3
) -> None:
    put(store, "a", b"x")
    in_one = email.utils.formatdate(time.time() + 2.0, usegmt=True)
    faulty.fail("PutObject", answer(503, "SlowDown", headers={"Retry-After": in_one}))
    refusal(lambda: put(store, "b", b"x"))
    refused = faulty.seen[-1].at
    store.head("a")
    assert faulty.seen[-1].at - refused > 0.5


def test_internal_errors_of_parts_are_retried(store: S3Blobs, faulty: FaultyS3, big: bytes) -> None:
    faulty.fail("UploadPart", answer(500, "InternalError"), times=4)
    put(store, "big", big)
    assert_whole(store, "big", big)


# Refused ------------------------------------------------------------------------------


def test_a_clock_that_is_off_is_told_by_how_much(store: S3Blobs, faulty: FaultyS3) -> None:
    ahead = {"Date": email.utils.formatdate(time.time() + 20 * 60, usegmt=True)}
    faulty.fail("PutObject", answer(403, "RequestTimeTooSkewed", headers=ahead))
    error = refusal(lambda: put(store, "a", b"x"))
    assert isinstance(error, Refused)
    assert error.code == ErrorCode.STORE_CLOCK
    assert "this machine's clock is 20 minutes behind the store's" in error.message
    assert "clock" in error.fix


@pytest.mark.parametrize(("minutes", "side"), [(40, "ahead of"), (-40, "behind")])
def test_a_real_server_refuses_a_clock_that_is_off(
    weed: WeedServer, monkeypatch: pytest.MonkeyPatch, minutes: int, side: str
) -> None:
    store = s3_store(weed)
    client_of(store)
    signed_at, told_at = botocore.auth.get_current_datetime, time.time
    off = datetime.timedelta(minutes=minutes)
    monkeypatch.setattr(botocore.auth, "get_current_datetime", lambda *args: signed_at(*args) + off)
    monkeypatch.setattr(time, "time", lambda: told_at() + off.total_seconds())
    error = refusal(lambda: put(store, "a", b"x"))
    assert error.code == ErrorCode.STORE_CLOCK
    assert f"this machine's clock is 40 minutes {side} the store's" in error.message


@pytest.mark.parametrize("code", ["InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"])
def test_credentials_that_are_not_good_are_refused(store: S3Blobs, faulty: FaultyS3, code: str) -> None:
    faulty.fail("PutObject", answer(403, code))
    error = refusal(lambda: put(store, "a", b"x"))
    assert isinstance(error, Refused)
    assert error.code == ErrorCode.STORE_CREDENTIALS
    assert error.fix
    assert faulty.count("PutObject") == 1


@pytest.mark.parametrize(
    ("operation", "action", "call"),
    [
        ("PutObject", "s3:PutObject", lambda store: put(store, "a", b"x")),
        ("CreateMultipartUpload", "s3:PutObject", lambda store: put(store, "a", bytes(PART_BYTES + 1))),
        ("GetObject", "s3:GetObject", lambda store: store.get("a")),
        ("HeadObject", "s3:GetObject", lambda store: store.head("a")),
        ("DeleteObject", "s3:DeleteObject", lambda store: store.delete("a")),
        ("ListObjectsV2", "s3:ListBucket", lambda store: list(store.list(""))),
        ("ListMultipartUploads", "s3:ListBucketMultipartUploads", lambda s: list(s.list_unfinished(""))),
        ("AbortMultipartUpload", "s3:AbortMultipartUpload", lambda s: s.discard_unfinished("a?uploadId=x")),
    ],
)
def test_a_missing_permission_is_named(
    store: S3Blobs, faulty: FaultyS3, operation: str, action: str, call: Callable[[S3Blobs], object]
) -> None:
    faulty.fail(operation, answer(403, "AccessDenied"))
    error = refusal(lambda: call(store))
    assert isinstance(error, Refused)
    assert error.code == ErrorCode.STORE_DENIED
    assert f"{action} is not allowed" in error.message
    assert f"allow {action}" in error.fix


def test_the_permission_that_the_store_names_is_the_one_that_is_told(
    store: S3Blobs, faulty: FaultyS3
) -> None:
    text = "User: arn:aws:iam::1:user/x is not authorized to perform: kms:GenerateDataKey on resource: k"
    faulty.fail("PutObject", answer(403, "AccessDenied", text))
    assert "kms:GenerateDataKey is not allowed" in refusal(lambda: put(store, "a", b"x")).message


def test_a_refusal_before_the_body_was_sent_is_heard(store: S3Blobs, faulty: FaultyS3) -> None:
    faulty.fail("PutObject", faulty_s3.early(403, "AccessDenied"))
    error = refusal(lambda: put(store, "a", bytes(PART_BYTES)))
    # A server that hangs up at once may take its reason with it: then it is not known, never wrong.
    assert error.code == ErrorCode.STORE_DENIED or isinstance(error, OutcomeUnknown)


def test_a_full_store_is_refused(store: S3Blobs, faulty: FaultyS3) -> None:
    faulty.fail("PutObject", answer(507, "InsufficientStorage"))
    error = refusal(lambda: put(store, "a", b"x"))
    assert isinstance(error, Refused)
    assert error.code == ErrorCode.STORE_FULL
    assert "keep_last" in error.fix


def test_a_bucket_of_another_region_is_refused_with_its_region(store: S3Blobs, faulty: FaultyS3) -> None:
    elsewhere = answer(301, "PermanentRedirect", headers={"x-amz-bucket-region": "eu-central-1"})
    faulty.fail("ListObjectsV2", elsewhere, times=2)
    error = refusal(lambda: probe(store))
    assert isinstance(error, Refused)
    assert "region eu-central-1" in error.message
    assert "region=eu-central-1" in error.fix
    # boto3 had tried that region by itself.
    assert "/eu-central-1/s3/" in faulty.seen[-1].headers["authorization"]


# Lines that break ---------------------------------------------------------------------


def test_a_part_whose_connection_is_reset_is_sent_again(store: S3Blobs, faulty: FaultyS3, big: bytes) -> None:
    faulty.fail("UploadPart", faulty_s3.reset_midway, times=2)
    faulty.fail("UploadPart", faulty_s3.lose_answer)
    put(store, "big", big)
    assert_whole(store, "big", big)


def test_an_answer_that_is_cut_short_is_not_taken_for_the_blob(
    store: S3Blobs, faulty: FaultyS3, big: bytes
) -> None:
    put(store, "big", big)
    for call in (
        lambda: store.get("big", offset=0, length=PART_BYTES),
        lambda: store.get_into("big", 0, bytearray(PART_BYTES)),
        lambda: store.get("big"),
        lambda: store.get("big", offset=5),
    ):
        faulty.fail("GetObject", faulty_s3.truncate(1_000_000))
        assert isinstance(refusal(call), Unavailable)
    assert store.get("big") == big


@pytest.mark.parametrize(
    "fault",
    [
        answer(200, "InternalError"),
        faulty_s3.deny_what_was_done("InternalError"),
        faulty_s3.lose_answer,
        answer(500, "InternalError"),
        answer(503, "SlowDown"),
    ],
    ids=["error in a 200", "done, error in a 200", "done, not said", "500", "busy"],
)
def test_a_completion_that_may_have_failed_is_found_out_without_sending_parts_again(
    store: S3Blobs, faulty: FaultyS3, big: bytes, fault: faulty_s3.Fault
) -> None:
    faulty.fail("CompleteMultipartUpload", fault)
    put(store, "big", big)
    assert_whole(store, "big", big)
    assert faulty.count("UploadPart") == 3


def test_a_write_ends_at_once_when_it_is_stopped(store: S3Blobs, faulty: FaultyS3, big: bytes) -> None:
    faulty.fail("UploadPart", faulty_s3.stall, times=3)
    flow = Flow()
    ended: list[BaseException] = []

    def write() -> None:
        parts = [memoryview(big)[at : at + PART_BYTES] for at in range(0, len(big), PART_BYTES)]
        try:
            store.put("big", parts, chunk_crcs=digest.ChunkCrcs(parts), flow=flow)
        except BaseException as error:  # noqa: BLE001 - looked at below
            ended.append(error)

    writer = threading.Thread(target=write)
    writer.start()
    faulty.await_request("UploadPart", 3)
    began = time.monotonic()
    flow.stop()
    writer.join(10.0)
    assert time.monotonic() - began < 2.0
    assert [type(error) for error in ended] == [Stopped]
    faulty.released.set()
    (token,) = store.list_unfinished("")
    store.discard_unfinished(token)


@pytest.mark.parametrize("operation", ["HeadObject", "CreateMultipartUpload", "CompleteMultipartUpload"])
def test_a_write_ends_at_once_in_every_request_of_it(
    store: S3Blobs, faulty: FaultyS3, big: bytes, operation: str
) -> None:
    faulty.fail(operation, faulty_s3.stall)
    flow = Flow()
    parts = [memoryview(big)[at : at + PART_BYTES] for at in range(0, len(big), PART_BYTES)]
    alarm = threading.Thread(target=lambda: (faulty.await_request(operation), flow.stop()))
    alarm.start()
    began = time.monotonic()
    with pytest.raises(Stopped):
        store.put("big", parts, chunk_crcs=digest.ChunkCrcs(parts), flow=flow)
    alarm.join()
    assert time.monotonic() - began < 15.0
    faulty.released.set()


def test_what_the_store_has_confirmed_is_counted(store: S3Blobs, big: bytes) -> None:
    flow = Flow()
    parts = [memoryview(big)[at : at + PART_BYTES] for at in range(0, len(big), PART_BYTES)]
    store.put("big", parts, chunk_crcs=digest.ChunkCrcs(parts), flow=flow)
    assert flow.durable_bytes == len(big)


# Credentials --------------------------------------------------------------------------


@pytest.fixture
def own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """boto3 with nothing but the files of this test."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    return tmp_path


def write_keys(folder: Path, profile: str, key: str, secret: str) -> None:
    text = f"[{profile}]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n"
    (folder / "credentials").write_text(text)


def test_keys_that_were_replaced_in_their_file_are_found(
    weed: WeedServer, faulty: FaultyS3, own_files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_client, "RENEW_S", 0.0)
    write_keys(own_files, "train", "old-key", "old-secret")
    store = open_store(f"s3://dtrain/renewed?endpoint={faulty.endpoint}&region=us-east-1&profile=train")
    faulty.fail("PutObject", answer(403, "ExpiredToken"))
    client_of(store)  # type: ignore[arg-type]
    write_keys(own_files, "train", *weed.env.values())
    put(store, "a", b"x")
    assert [one.access_key for one in faulty.seen] == ["old-key", weed.env["AWS_ACCESS_KEY_ID"]]
    store.delete("a")


@pytest.mark.parametrize("status", [400, 403])
def test_keys_that_ended_are_renewed_even_if_a_head_cannot_say_so(
    weed: WeedServer, faulty: FaultyS3, own_files: Path, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setattr(s3_client, "RENEW_S", 0.0)
    write_keys(own_files, "default", *weed.env.values())
    store = open_store(f"s3://dtrain/renewed?endpoint={faulty.endpoint}&region=us-east-1")
    put(store, "a", b"x")
    faulty.fail("HeadObject", answer(status))
    assert store.head("a").size_bytes == 1
    monkeypatch.setattr(s3_client, "RENEW_S", 60.0)
    faulty.fail("HeadObject", answer(status))
    assert refusal(lambda: store.head("a")).code in (ErrorCode.STORE_CREDENTIALS, ErrorCode.STORE_DENIED)
    store.delete("a")


def test_a_profile_that_is_not_there_is_refused(weed: WeedServer, own_files: Path) -> None:
    store = open_store(weed.store_uri("x") + "&profile=nobody")
    error = refusal(lambda: probe(store))
    assert error.code == ErrorCode.STORE_CREDENTIALS
    assert "nobody" in error.cause


def test_a_role_by_web_identity_renews_itself(
    weed: WeedServer, faulty: FaultyS3, own_files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (own_files / "token").write_text("an identity")
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::1:role/train")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(own_files / "token"))
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", faulty.endpoint)
    key, secret = weed.env.values()
    faulty.tokens = {key: secret}
    store = open_store(f"s3://dtrain/role?endpoint={faulty.endpoint}&region=us-east-1")
    put(store, "a", b"x")
    first = faulty.count("AssumeRoleWithWebIdentity")
    assert first >= 1
    # What was handed out ends in two minutes, which is too soon to be used for long.
    store.delete("a")
    assert faulty.count("AssumeRoleWithWebIdentity") > first
    assert faulty.seen[0].form["WebIdentityToken"] == "an identity"


# Settings that the wire shows ---------------------------------------------------------


def test_encryption_is_asked_for_with_every_object(weed: WeedServer, faulty: FaultyS3, big: bytes) -> None:
    store = s3_store(weed, endpoint=faulty.endpoint, sse="aws:kms", sse_kms_key_id="key-1")
    for operation in ("PutObject", "CreateMultipartUpload"):
        faulty.fail(operation, answer(400, "KMS.NotFoundException"))
    for data in (b"x", big):
        error = refusal(lambda data=data: put(store, "a", data))  # type: ignore[misc]
        assert error.code == ErrorCode.STORE_REFUSED
    sent = [one.headers for one in faulty.seen if one.operation in ("PutObject", "CreateMultipartUpload")]
    for headers in sent:
        assert headers["x-amz-server-side-encryption"] == "aws:kms"
        assert headers["x-amz-server-side-encryption-aws-kms-key-id"] == "key-1"
    assert len(sent) == 2


@pytest.fixture
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def secure(weed: WeedServer, authority: trustme.CA) -> Iterator[FaultyS3]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    server = FaultyS3(weed.endpoint, context)
    yield server
    server.close()


def test_a_certificate_that_nobody_vouches_for_is_refused(weed: WeedServer, secure: FaultyS3) -> None:
    store = s3_store(weed, endpoint=secure.endpoint)
    for call in (
        lambda: put(store, "a", b"x"),
        lambda: store.head("a"),
        lambda: store.get_into("a", 0, bytearray(1)),
    ):
        error = refusal(call)
        assert isinstance(error, Refused), error
        assert error.code == ErrorCode.STORE_REFUSED
        assert "ca_bundle=" in error.fix
    assert secure.seen == []


def test_with_its_authority_the_same_store_is_used(
    weed: WeedServer, secure: FaultyS3, authority: trustme.CA, tmp_path: Path, big: bytes
) -> None:
    bundle = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(bundle))
    store = s3_store(weed, endpoint=secure.endpoint, ca_bundle=str(bundle))
    probe(store)
    put(store, "big", big)
    assert_whole(store, "big", big)
    target = bytearray(len(big))
    store.get_into("big", 0, target)
    assert target == big


def test_certificates_that_are_not_on_this_machine_are_refused(weed: WeedServer, secure: FaultyS3) -> None:
    store = s3_store(weed, endpoint=secure.endpoint, ca_bundle="/nonexistent/ca.pem")
    assert refusal(lambda: probe(store)).code == ErrorCode.BAD_SETTING


def test_what_a_proxy_must_carry_goes_through_boto3(
    store: S3Blobs, big: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    client_of(store)
    monkeypatch.setattr(store._access._connect().wire, "_proxied", lambda _url: True)
    put(store, "big", big)
    assert_whole(store, "big", big)
    target = bytearray(len(big))
    store.get_into("big", 0, target)
    assert target == big
