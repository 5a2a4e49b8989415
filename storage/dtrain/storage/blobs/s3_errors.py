"""What an answer of S3 means for the caller: one table, read by ``s3.py`` only.

boto3's exceptions are told apart by their class name and code, so that this
module needs no boto3 to be imported.
"""

from types import TracebackType
from typing import Any

from dtrain.protocol.errors import DtrainError, ErrorCode, OutcomeUnknown, Refused, Unavailable
from dtrain.storage.blobs import outcomes


class Corrupted(Refused):
    """The store's checksum of what it received is not the one that was sent."""


class Taken(Refused):
    """The key exists already."""


class PastEnd(Refused):
    """The range begins behind the last byte."""


class Unsupported(Refused):
    """The store does not know an option of the request."""


_SIGNALS: dict[str, tuple[type[Refused], ErrorCode]] = {
    "BadDigest": (Corrupted, ErrorCode.BLOB_CORRUPT),
    "InvalidDigest": (Corrupted, ErrorCode.BLOB_CORRUPT),
    "XAmzContentChecksumMismatch": (Corrupted, ErrorCode.BLOB_CORRUPT),
    "PreconditionFailed": (Taken, ErrorCode.BLOB_EXISTS),
    "412": (Taken, ErrorCode.BLOB_EXISTS),
    "InvalidRange": (PastEnd, ErrorCode.BLOB_CORRUPT),
    "416": (PastEnd, ErrorCode.BLOB_CORRUPT),
    "NotImplemented": (Unsupported, ErrorCode.STORE_REFUSED),
    "InvalidArgument": (Unsupported, ErrorCode.STORE_REFUSED),
    "InvalidRequest": (Unsupported, ErrorCode.STORE_REFUSED),
}
"""Answers that ``s3.py`` acts on; where it does not, they are refusals like others."""

_MISSING = {"NoSuchKey", "NoSuchUpload", "404", "NotFound"}
_BUSY = {"SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "TooManyRequests", "429"}
"""Refused before anything was done, also for a write."""
_BUSY |= {"ConditionalRequestConflict", "OperationAborted", "409"}

_CREDENTIALS = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or a profile) where coordinators and agents run"
)
_FIXES = {
    "NoSuchBucket": "create the bucket, or correct its name in the store's URI",
    "InvalidAccessKeyId": _CREDENTIALS + ": the store does not know this access key",
    "SignatureDoesNotMatch": _CREDENTIALS + ": the secret does not belong to this access key",
    "ExpiredToken": "the temporary credentials have expired: renew them, or use a role that renews itself",
    "RequestTimeTooSkewed": "set this machine's clock: it differs too much from the store's",
    "AccessDenied": "allow s3:GetObject, PutObject, DeleteObject, ListBucket, ListBucketMultipartUploads "
    "and AbortMultipartUpload on the bucket and its keys",
    "PermanentRedirect": "the bucket is in another region: add ?region=... to the store's URI",
    "AuthorizationHeaderMalformed": "the bucket is in another region: add ?region=... to the store's URI",
}
_FIXES |= {
    "403": _CREDENTIALS + ", and allow them to use the bucket",
    "Forbidden": _CREDENTIALS + ", and allow them to use the bucket",
    "301": _FIXES["PermanentRedirect"],
    "InvalidToken": _FIXES["ExpiredToken"],
    "TokenRefreshRequired": _FIXES["ExpiredToken"],
    "AllAccessDisabled": _FIXES["AccessDenied"],
}
_NEVER_SENT = {
    "EndpointConnectionError",
    "ConnectTimeoutError",
    "ProxyConnectionError",
    "SSLError",
}
_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"}
_NO_CREDENTIALS |= {"CredentialRetrievalError", "TokenRetrievalError", "UnauthorizedSSOTokenError"}
_WRONG_SETTING = {"InvalidRegionError", "ConfigParseError", "ConfigNotFound", "ParamValidationError"}


class Translated:
    """A ``with`` block in which boto3's exceptions become ours, or one of the signals above.

    Args:
        doing: completes "cannot ... in <uri>".
        writing: a lost answer may hide a change.
    """

    def __init__(self, uri: str, bucket: str, doing: str, *, writing: bool, key: str) -> None:
        self._uri = uri
        self._bucket = bucket
        self._what = f"cannot {doing} in {uri}"
        self._writing = writing
        self._key = key

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, DtrainError | ImportError) or not _is_from_boto(error):
            return
        response: Any = getattr(error, "response", None)
        if isinstance(response, dict) and "Error" in response:
            status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
            raise self._answered(response["Error"].get("Code") or str(status), status, str(error)) from error
        raise self._unanswered(error) from error

    def _answered(self, code: str, status: int, text: str) -> DtrainError:
        if code in _SIGNALS:
            kind, ours = _SIGNALS[code]
            fix = "use a store that knows If-None-Match and CRC32C checksums" if kind is Unsupported else ""
            return kind(ours, f"{self._what}: {text}", fix=fix)
        if code == "NoSuchBucket":
            return self._refused(f"bucket {self._bucket} does not exist", _FIXES[code])
        if code in _MISSING:
            return outcomes.missing(self._key, self._uri) if self._key else self._refused(text, "")
        if code in _BUSY:
            return Unavailable(ErrorCode.STORE_UNAVAILABLE, f"{self._what}: it is busy ({code})")
        if status >= 500 or code in ("RequestTimeout", "InternalError"):
            return self._lost(f"it answered {code}")
        return self._refused(code if code in _FIXES else text, _FIXES.get(code, ""))

    def _unanswered(self, error: BaseException) -> DtrainError:
        names = {kind.__name__ for kind in type(error).__mro__}
        if names & _NO_CREDENTIALS:
            return self._refused("no usable credentials were found", _CREDENTIALS)
        if names & _WRONG_SETTING:
            return self._refused(str(error), "correct the store's URI, or boto3's configuration files")
        if names & _NEVER_SENT:
            return Unavailable(
                ErrorCode.STORE_UNAVAILABLE,
                f"{self._what}: the connection failed",
                cause=str(error),
                fix="check that the store runs and that its endpoint can be reached from this machine",
            )
        return self._lost(f"the connection broke ({type(error).__name__})", cause=str(error))

    def _lost(self, why: str, *, cause: str = "") -> DtrainError:
        if self._writing:
            return OutcomeUnknown(
                ErrorCode.STORE_UNAVAILABLE, f"{self._what}, or it did happen: {why}", cause=cause
            )
        return Unavailable(ErrorCode.STORE_UNAVAILABLE, f"{self._what}: {why}", cause=cause)

    def _refused(self, why: str, fix: str) -> Refused:
        return Refused(ErrorCode.STORE_REFUSED, f"{self._what}: {why}", fix=fix)


def _is_from_boto(error: BaseException) -> bool:
    """Return whether botocore raised this, or urllib3 and the sockets below it while a body is read."""
    modules = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return bool(modules & {"botocore", "boto3", "urllib3"}) or isinstance(error, OSError)
