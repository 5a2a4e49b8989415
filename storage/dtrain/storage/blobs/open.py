"""Which backend a store's URI means: one row per backend."""

import re
import threading
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

from dtrain.protocol.errors import ErrorCode, Refused
from dtrain.storage.blobs import s3_settings
from dtrain.storage.blobs.local import LocalBlobs, missing_root
from dtrain.storage.blobs.memory import MemoryBlobs
from dtrain.storage.blobs.port import BlobStore, check_key

ACCEPTED = (
    "file:///absolute/path, /absolute/path, "
    "s3://bucket/prefix, s3://bucket/prefix?endpoint=http://host:port&region=name "
    "(docs/stores.md lists all options), "
    "or memory://name (one process only)"
)

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_in_memory: dict[str, MemoryBlobs] = {}
_in_memory_lock = threading.Lock()


def open_store(uri: str, *, create: bool = False) -> BlobStore:
    """Return the store that ``uri`` names, without calling it yet (``probe`` does).

    Credentials come from boto3's usual chain (environment, profile, role), never
    from the URI, which is stored and shown.

    Args:
        uri: one of ``ACCEPTED``.
        create: make the folder of a file store if it is missing. Buckets are
            never created.

    Raises:
        Refused: ``BAD_SETTING``, not a URI of a store; ``STORE_REFUSED``, the
            folder does not exist or cannot be made.
    """
    if "://" not in uri:
        return _open_folder(uri, uri, create)
    try:
        found = urlsplit(uri)
    except ValueError as error:
        raise _bad("the store's URI cannot be parsed") from error
    if found.username is not None or found.password is not None or "@" in found.netloc:
        raise s3_settings.secret()
    if found.scheme == "s3":
        return _open_s3(found.netloc, unquote(found.path).strip("/"), found.query, found.fragment)
    if found.query or found.fragment:
        raise _bad(f"{uri!r} has options that its kind of store does not know")
    if found.scheme == "file":
        if found.netloc not in ("", "localhost"):
            raise _bad(f"{uri!r} names a host: a folder's URI has three slashes")
        return _open_folder(unquote(found.path), uri, create)
    if found.scheme == "memory" and found.netloc and found.path in ("", "/"):
        with _in_memory_lock:
            return _in_memory.setdefault(found.netloc, MemoryBlobs(found.netloc))
    raise _bad(f"{uri!r} is not a store")


def _open_folder(path: str, uri: str, create: bool) -> BlobStore:
    if not path.startswith("/") or "\0" in path or ".." in path.split("/"):
        raise _bad(f"{uri!r} is not an absolute path, and agents on other machines must find it too")
    root = Path(path)
    if create:
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Refused(
                ErrorCode.STORE_REFUSED,
                f"the store's folder {root} cannot be created: {error.strerror}",
                fix="choose a folder that this user may create, or create it first",
            ) from error
    if not root.is_dir():
        raise missing_root(root)
    return LocalBlobs(root)


def _open_s3(bucket: str, prefix: str, query: str, fragment: str) -> BlobStore:
    settings = s3_settings.parse(parse_qsl(query, keep_blank_values=True))
    if fragment:
        raise _bad(f"unknown option {fragment!r} in the store's URI")
    if not _BUCKET.fullmatch(bucket):
        raise _bad(f"{bucket!r} is not a bucket name: 3 to 63 of a-z, 0-9, dot and dash")
    try:
        if prefix:
            check_key(prefix)
    except ValueError as error:
        raise _bad(f"{prefix!r} cannot be a prefix of blobs") from error
    from dtrain.storage.blobs.s3 import S3Blobs

    return S3Blobs(bucket, prefix, settings)


def _bad(what: str) -> Refused:
    return Refused(ErrorCode.BAD_SETTING, what, fix=f"use one of: {ACCEPTED}")
