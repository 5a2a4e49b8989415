"""A packed working directory: what a job's record says of it, and where it lies in the store.

A package is a gzipped tar archive that is a function of the packed files alone.
It is named by the SHA-256 of its bytes, and by a nonce on top: a name that was
deleted is never used again, so a deletion that arrives late takes nothing away
from anybody. ``docs/working-directory.md`` tells the rest.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from dtrain.protocol.ids import ClusterName

PACKAGE_FILES_MAX = 20_000
"""Files, links and folders together."""

PACKAGE_BYTES_MAX = 512 * 1024 * 1024
"""Of the files before packing; what is larger is data, and belongs on a disk or in a store."""

ENTRY_BYTES_MAX = 64 * 1024
"""What an entry may take in an archive beyond its file's bytes: headers, name, a link's target, padding."""

_DIGEST = re.compile(r"[0-9a-f]{64}")
_NONCE = re.compile(r"[0-9a-f]{8,32}")
_KEY = re.compile(r"/_packages/([0-9a-f]{64})/([0-9a-f]{8,32})\.tar\.gz$")


@dataclass(frozen=True, slots=True)
class Package:
    """A working directory in the store. ``source`` is the folder it was packed from, for people."""

    digest: str
    nonce: str
    store: str
    size_bytes: int
    """As stored."""
    files: int
    files_bytes: int
    """Of all files, unpacked."""
    source: str = ""

    def problem(self) -> str:
        """Why nobody should look for it, "" if its values can be those of a package."""
        if not _DIGEST.fullmatch(self.digest) or not _NONCE.fullmatch(self.nonce):
            return "is not named by a digest and a nonce"
        if not self.store:
            return "names no store"
        if not 0 < self.size_bytes <= PACKAGE_BYTES_MAX + PACKAGE_FILES_MAX * ENTRY_BYTES_MAX:
            return f"has {self.size_bytes} bytes"
        if not 0 <= self.files <= PACKAGE_FILES_MAX or not 0 <= self.files_bytes <= PACKAGE_BYTES_MAX:
            return f"has {self.files} files of {self.files_bytes} bytes"
        return ""


@dataclass(frozen=True, slots=True)
class PackageCollection:
    """Packages that are being deleted, by store key, each with its store: no job may be submitted with one.

    A name stays here until its blob has been seen to be gone. Written before anything is
    deleted, and compared by every submission that has a package; guarded by its own revision.
    """

    keys: Mapping[str, str] = field(default_factory=dict)


def packages_prefix(cluster: ClusterName) -> str:
    """Folder of a cluster's packages in a store; no job can have this name."""
    return f"{cluster}/_packages/"


def package_folder(cluster: ClusterName, digest: str) -> str:
    """Folder of all copies of one content: more than one only if several were stored at once."""
    return f"{packages_prefix(cluster)}{digest}/"


def package_key(cluster: ClusterName, digest: str, nonce: str) -> str:
    """Store key of one package."""
    return f"{package_folder(cluster, digest)}{nonce}.tar.gz"


def parse_package_key(key: str) -> tuple[str, str] | None:
    """Digest and nonce in a store key; None: it is not a package's."""
    found = _KEY.search(key)
    return None if found is None else (found[1], found[2])
