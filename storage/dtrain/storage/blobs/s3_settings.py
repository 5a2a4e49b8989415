"""What the query of an ``s3://`` URI may say: the settings of a bucket's client, and what each is for.

A URI is stored with the job and shown, so no secret belongs in it; credentials
come from boto3's own chain, which ``profile`` only points at.
"""

import dataclasses
import difflib
from dataclasses import dataclass
from urllib.parse import urlencode, urlsplit

from dtrain.protocol.errors import ErrorCode, Refused

LANES_MAX = 64
TIMEOUT_S_MAX = 3600.0

ADDRESSING = ("auto", "path", "virtual")
SSE = ("AES256", "aws:kms", "aws:kms:dsse")

ACCEPTED = (
    "endpoint, region, addressing (auto, path, virtual), profile, sse (AES256, aws:kms, aws:kms:dsse), "
    "sse_kms_key_id, ca_bundle, connect_timeout_s, timeout_s, lanes"
)


@dataclass(frozen=True, slots=True)
class S3Settings:
    """Defaults are what leaves boto3's own configuration in charge."""

    endpoint: str = ""
    """URL of a store other than AWS. "": ``AWS_ENDPOINT_URL_S3``, boto3's configuration, or AWS itself."""
    region: str = ""
    """"" : boto3's, else us-east-1."""
    addressing: str = "auto"
    """``path``: http://host/bucket/key; ``virtual``: http://bucket.host/key; ``auto``: path, not at AWS."""
    profile: str = ""
    """A section of boto3's configuration files, the same on every machine: keys, a role to assume, SSO."""
    sse: str = ""
    """Encryption by the store that uploads ask for; "": what the bucket does by default."""
    sse_kms_key_id: str = ""
    """The KMS key; "": the account's own key for S3."""
    ca_bundle: str = ""
    """File with the certificates to trust, instead of boto3's; the same path on every machine."""
    connect_timeout_s: float = 5.0
    timeout_s: float = 60.0
    """For one piece to leave or to arrive, and for an answer."""
    lanes: int = 4
    """Parts of one blob on their way at once."""

    def __post_init__(self) -> None:
        if self.endpoint:
            _check_endpoint(self.endpoint)
        _one_of("addressing", self.addressing, ADDRESSING)
        if self.sse:
            _one_of("sse", self.sse, SSE)
        if self.sse_kms_key_id and not self.sse.startswith("aws:kms"):
            raise _bad("sse_kms_key_id needs sse=aws:kms, or aws:kms:dsse, beside it")
        if self.ca_bundle and not self.ca_bundle.startswith("/"):
            raise _bad(f"ca_bundle {self.ca_bundle!r} is not an absolute path")
        for name in ("connect_timeout_s", "timeout_s"):
            if not 0 < getattr(self, name) <= TIMEOUT_S_MAX:
                raise _bad(f"{name} is a number of seconds above 0, up to {TIMEOUT_S_MAX:g}")
        if not 1 <= self.lanes <= LANES_MAX:
            raise _bad(f"lanes is a number from 1 to {LANES_MAX}")

    def query(self) -> str:
        """Return what ``parse`` reads back: the settings that differ from their defaults."""
        said = {
            field.name: _text(getattr(self, field.name))
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        }
        return urlencode(said, safe=":/")


def parse(options: list[tuple[str, str]]) -> S3Settings:
    """Read the options of a URI, in any order.

    Raises:
        Refused: ``BAD_SETTING``; no message repeats a value that could be a secret.
    """
    kinds = {field.name: type(field.default) for field in dataclasses.fields(S3Settings)}
    values: dict[str, object] = {}
    for name, text in options:
        if name not in kinds:
            raise _unknown(name, list(kinds))
        if name in values:
            raise _bad(f"{name} is said twice")
        values[name] = _value(name, kinds[name], text)
    return S3Settings(**values)  # type: ignore[arg-type]  # checked against the fields just now


def secret() -> Refused:
    """Return the refusal of credentials in a URI, without repeating them: they would end up in logs."""
    return Refused(
        ErrorCode.BAD_SETTING,
        "credentials do not belong in a store's URI, which is stored and shown",
        fix="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile, for coordinators and agents",
    )


def _value(name: str, kind: type, text: str) -> object:
    try:
        return kind(text)
    except ValueError:
        raise _bad(f"{name} is a number, not {text!r}") from None


def _unknown(name: str, known: list[str]) -> Refused:
    plain = name.lower().replace("-", "_")
    if plain.startswith(("sse_c", "sse_customer")):
        return _bad(
            f"{name}: keys that a client sends with each request (SSE-C) are not supported: "
            "whoever reads a checkpoint would need them. sse=aws:kms keeps the key with KMS"
        )
    if any(word in plain for word in ("key", "secret", "token", "password", "credential")):
        return secret()
    near = difflib.get_close_matches(plain, known, n=1)
    meant = f": did you mean {near[0]}?" if near else ""
    return _bad(f"unknown option {name!r} in the store's URI{meant}")


def _check_endpoint(endpoint: str) -> None:
    try:
        found = urlsplit(endpoint)
        usable = found.scheme in ("http", "https") and bool(found.hostname) and (found.port or 1) > 0
    except ValueError:
        usable = False
    else:
        if "@" in found.netloc:
            raise secret()
    if not usable:
        raise _bad(f"endpoint {endpoint!r} is not an http or https URL")


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value in known:
        return
    near = difflib.get_close_matches(value, known, n=1, cutoff=0.5)
    meant = f": did you mean {near[0]}?" if near else ""
    raise _bad(f"{name} is one of {', '.join(known)}, not {value!r}{meant}")


def _text(value: object) -> str:
    return (
        str(value).lower()
        if isinstance(value, bool)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


def _bad(what: str) -> Refused:
    return Refused(
        ErrorCode.BAD_SETTING,
        what,
        fix=f"use file:///absolute/path, or s3://bucket/prefix?option=value&... with these options: "
        f"{ACCEPTED}; docs/stores.md explains them",
    )
