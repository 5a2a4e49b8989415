"""The files that browsers run: read once, compressed once, named by what is in them.

All of them live under one path that holds their common digest, so that a
browser may keep them for ever, and never mixes those of two releases.
"""

import gzip
import hashlib
from dataclasses import dataclass
from importlib import resources

TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
INDEX = "index.html"


@dataclass(frozen=True, slots=True)
class Asset:
    """One file, as sent."""

    body: bytes
    packed: bytes
    content_type: str


@dataclass(frozen=True, slots=True)
class Assets:
    """``files`` by name, served below ``/static/<digest>/``; ``index`` is the page that loads them."""

    digest: str
    files: dict[str, Asset]
    index: Asset


def load() -> Assets:
    """Read the files beside this module."""
    found = {
        entry.name: entry.read_bytes()
        for entry in sorted(resources.files(__package__).joinpath("static").iterdir(), key=lambda e: e.name)
        if entry.name[entry.name.rfind(".") :] in TYPES
    }
    whole = hashlib.sha256()
    for name, body in found.items():
        whole.update(f"{name} {len(body)}\n".encode() + body)
    digest = whole.hexdigest()[:16]
    index = found.pop(INDEX).replace(b"{{static}}", f"/static/{digest}".encode())
    files = {name: _asset(name, body) for name, body in found.items()}
    return Assets(digest, files, _asset(INDEX, index))


def _asset(name: str, body: bytes) -> Asset:
    return Asset(body, gzip.compress(body, 9, mtime=0), TYPES[name[name.rfind(".") :]])
