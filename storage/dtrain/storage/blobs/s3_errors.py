"""What an answer of S3 means for the caller: one table, read by ``s3.py`` only.

boto3's exceptions are told apart by their class name and code, so that this
module needs no boto3 to be imported.
"""

import re
import ssl
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any

from dtrain.protocol.errors import DtrainError, ErrorCode, OutcomeUnknown, Refused, Unavailable
from dtrain.storage.blobs import outcomes
from dtrain.storage.blobs.flow import Stopped
from dtrain.storage.blobs.s3_wire import NotConnected


class Corrupted(Refused):
    """The store's checksum of what it received is not the one that was sent."""


class Taken(Refused):
    """The key exists already."""


class PastEnd(Refused):
    """The range begins behind the last byte."""


class Unsupported(Refused):
    """The store does not know an option of the request."""


class Stale(Refused):
    """The credentials are no longer good; newer ones may lie where these came from."""


class Busy(Unavailable):
    """The store asks for fewer requests; ``hint_s`` is the pause it wants, 0 if it did not say."""

    hint_s: float = 0.0


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
_BUSY |= {"BandwidthLimitExceeded", "RequestThrottled", "RequestThrottledException"}
"""The store asks for patience; refused before anything was done, also for a write."""
_AGAIN = {"ConditionalRequestConflict", "OperationAborted", "409"}
"""Another request was in the way."""
_SKEWED = {"RequestTimeTooSkewed", "RequestInTheFuture", "RequestExpired"}
_STALE = {"ExpiredToken", "InvalidToken", "TokenRefreshRequired", "ExpiredTokenException"}
_UNKNOWN_KEY = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidSecurity", "NotSignedUp"}
_DENIED = {"AccessDenied", "AllAccessDisabled", "AccountProblem", "403", "Forbidden"}
_ELSEWHERE = {
    "PermanentRedirect",
    "AuthorizationHeaderMalformed",
    "IllegalLocationConstraintException",
    "301",
    "307",
    "TemporaryRedirect",
}
_FULL = {"QuotaExceeded", "InsufficientStorage", "507", "XMinioStorageFull", "StorageFull"}

_CREDENTIALS = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or a profile) where coordinators and agents run"
)
_CREDENTIAL_FIXES = {
    "InvalidAccessKeyId": _CREDENTIALS + ": the store does not know this access key",
    "SignatureDoesNotMatch": _CREDENTIALS + ": the secret does not belong to this access key",
}
_EXPIRED = "renew the temporary credentials, or use a role or profile that renews itself"

ACTIONS = {
    "PutObject": "s3:PutObject",
    "CreateMultipartUpload": "s3:PutObject",
    "UploadPart": "s3:PutObject",
    "CompleteMultipartUpload": "s3:PutObject",
    "GetObject": "s3:GetObject",
    "HeadObject": "s3:GetObject",
    "DeleteObject": "s3:DeleteObject",
    "AbortMultipartUpload": "s3:AbortMultipartUpload",
    "ListObjectsV2": "s3:ListBucket",
    "ListMultipartUploads": "s3:ListBucketMultipartUploads",
}
"""The permission behind each request that is made."""
_ACTION = re.compile(r"perform: *([a-z0-9-]+:[A-Za-z]+)")

_NEVER_SENT = {"EndpointConnectionError", "ConnectTimeoutError", "ProxyConnectionError", "SSLError"}
_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"}
_NO_CREDENTIALS |= {"CredentialRetrievalError", "TokenRetrievalError", "UnauthorizedSSOTokenError"}
_NO_CREDENTIALS |= {"InvalidConfigError", "SSOTokenLoadError", "RefreshWithMFAUnsupportedError"}
_WRONG_SETTING = {"InvalidRegionError", "ConfigParseError", "ConfigNotFound", "ParamValidationError"}


class Translated:
    """A ``with`` block in which boto3's exceptions become ours, or one of the signals above.

    Args:
        doing: completes "cannot ... in <uri>".
        writing: a lost answer may hide a change.
    """

    def __init__(
        self,
        uri: str,
        bucket: str,
        doing: str,
        *,
        writing: bool,
        key: str,
    ) -> None:
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
        if (
            error is None
            or isinstance(error, DtrainError | Stopped | ImportError)
            or not _is_from_boto(error)
        ):
            return
        response: Any = getattr(error, "response", None)
        if isinstance(response, dict) and "Error" in response:
            about = response.get("ResponseMetadata", {})
            headers = {str(k).lower(): str(v) for k, v in about.get("HTTPHeaders", {}).items()}
            status = int(about.get("HTTPStatusCode", 0))
            code = response["Error"].get("Code") or str(status)
            operation = str(getattr(error, "operation_name", ""))
            raise self._answered(code, status, str(error), operation, headers) from error
        raise self._unanswered(error) from error

    def _answered(
        self, code: str, status: int, text: str, operation: str, headers: Mapping[str, str]
    ) -> DtrainError:
        if code in _SIGNALS:
            kind, ours = _SIGNALS[code]
            fix = "use a store that knows If-None-Match and CRC32C checksums" if kind is Unsupported else ""
            return kind(ours, f"{self._what}: {text}", fix=fix)
        if code == "NoSuchBucket":
            return Refused(
                ErrorCode.STORE_NO_BUCKET,
                f"{self._what}: bucket {self._bucket} does not exist",
                fix="create the bucket, or correct its name in the store's URI",
            )
        if code in _MISSING:
            return outcomes.missing(self._key, self._uri) if self._key else self._refused(text, "")
        if code in _BUSY or (status == 503 and code not in _FULL):
            return self._busy(code, headers)
        if code in _AGAIN:
            return Unavailable(ErrorCode.STORE_UNAVAILABLE, f"{self._what}: it is busy ({code})")
        if code in _FULL:
            return Refused(
                ErrorCode.STORE_FULL,
                f"{self._what}: no space or quota left ({code})",
                fix="free space there, keep fewer checkpoints (keep_last), or raise the quota",
            )
        if status >= 500 or code in ("RequestTimeout", "InternalError"):
            return self._lost(f"it answered {code}")
        if code in _SKEWED:
            return self._skewed(headers)
        if code in _STALE:
            return Stale(
                ErrorCode.STORE_CREDENTIALS, f"{self._what}: the credentials have expired", fix=_EXPIRED
            )
        if code == "400" and operation.startswith("Head"):
            return Stale(
                ErrorCode.STORE_CREDENTIALS,
                f"{self._what}: 400, without a reason, as answers to HEAD have none",
                fix=_EXPIRED + "; check the region in the store's URI too",
            )
        if code in _UNKNOWN_KEY:
            return Stale(
                ErrorCode.STORE_CREDENTIALS,
                f"{self._what}: {code}",
                fix=_CREDENTIAL_FIXES.get(code, _CREDENTIALS),
            )
        if code in _DENIED:
            return self._denied(code, text, operation)
        if code in _ELSEWHERE:
            return self._elsewhere(headers)
        return self._refused(text, "")

    def _busy(self, code: str, headers: Mapping[str, str]) -> Busy:
        busy = Busy(
            ErrorCode.STORE_BUSY,
            f"{self._what}: the store asks for fewer requests ({code})",
            fix="nothing if it passes: requests are slowed down. If it stays, take checkpoints less often, "
            "lower lanes in the store's URI, or ask whoever runs the store for more",
        )
        busy.hint_s = _seconds(headers.get("retry-after", ""), time.time())
        return busy

    def _skewed(self, headers: Mapping[str, str]) -> Refused:
        how = "the clocks of this machine and of the store differ too much"
        try:
            ahead_s = time.time() - parsedate_to_datetime(headers["date"]).timestamp()
        except (KeyError, ValueError, TypeError):
            pass
        else:
            side = "ahead of" if ahead_s > 0 else "behind"
            how = f"this machine's clock is {_span(abs(ahead_s))} {side} the store's"
        return Refused(
            ErrorCode.STORE_CLOCK,
            f"{self._what}: {how}",
            fix="set this machine's clock and keep it set (chrony, systemd-timesyncd): "
            "S3 refuses requests whose time is more than 15 minutes off",
        )

    def _denied(self, code: str, text: str, operation: str) -> Refused:
        said = _ACTION.search(text)
        action = said.group(1) if said else ACTIONS.get(operation, "")
        missing = f"{action} is not allowed" if action else "it is not allowed"
        fix = (
            f"allow {action or 'what docs/stores.md lists'} to the identity that coordinators and agents "
            "use; docs/stores.md has a policy with all that is needed"
        )
        if not said and operation in ("HeadObject", "GetObject"):
            # Without this right S3 does not tell a missing key from a forbidden one.
            fix += "; s3:ListBucket too, without which S3 says the same of a key that is not there"
        if code in ("403", "Forbidden"):
            # An answer to HEAD has no body: the keys may as well be wrong.
            fix += f"; or {_CREDENTIALS}"
        kind = Stale if operation.startswith("Head") and code in ("403", "Forbidden") else Refused
        return kind(ErrorCode.STORE_DENIED, f"{self._what}: {missing} ({code})", fix=fix)

    def _elsewhere(self, headers: Mapping[str, str]) -> Refused:
        region = headers.get("x-amz-bucket-region", "")
        where = f"region {region}" if region else "another region"
        return self._refused(
            f"bucket {self._bucket} is in {where}", f"add region={region or '...'} to the store's URI"
        )

    def _unanswered(self, error: BaseException) -> DtrainError:
        names = {kind.__name__ for kind in type(error).__mro__}
        if names & _NO_CREDENTIALS:
            return Refused(
                ErrorCode.STORE_CREDENTIALS,
                f"{self._what}: no usable credentials were found",
                cause=str(error),
                fix=_CREDENTIALS,
            )
        if names & _WRONG_SETTING:
            return self._refused(str(error), "correct the store's URI, or boto3's configuration files")
        if isinstance(error, ssl.SSLCertVerificationError) or "CERTIFICATE_VERIFY_FAILED" in str(error):
            return self._refused(
                f"its certificate is not trusted ({error})",
                "add ca_bundle=/path/of/the/authority.pem to the store's URI, or set AWS_CA_BUNDLE",
            )
        if names & _NEVER_SENT or isinstance(error, NotConnected):
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


def _seconds(text: str, wall: float) -> float:
    """Read a Retry-After header: seconds, or a date."""
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - wall)
    except (ValueError, TypeError):
        return 0.0


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def _is_from_boto(error: BaseException) -> bool:
    """Return whether botocore raised this, or urllib3, http and the sockets below them."""
    modules = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return bool(modules & {"botocore", "boto3", "urllib3", "http"}) or isinstance(error, OSError)
