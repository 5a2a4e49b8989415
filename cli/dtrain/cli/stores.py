"""Stores as the command line opens them: that of a cluster of ``dtrain up`` with the keys that it made.

Such a server's credentials are random and of no use elsewhere, so they lie in the cluster's folder; nobody
should have to copy them. Every other store has boto3's own chain.
"""

import os
from pathlib import Path
from urllib.parse import urlsplit

from dtrain.cli import context
from dtrain.local import store_file
from dtrain.storage.blobs.open import open_store
from dtrain.storage.blobs.port import BlobStore


def open_here(uri: str) -> BlobStore:
    """Open a store by its URI.

    Raises:
        Refused: as ``open_store``.
    """
    if urlsplit(uri).scheme == "s3":
        os.environ.update(_lent(uri))
    return open_store(uri)


def _lent(uri: str) -> dict[str, str]:
    """What a running local cluster keeps for clients of the server of ``uri``; {} for any other store."""
    for cluster in context.load()[1].values():
        if not cluster.folder or not cluster.alive:
            continue
        own, env = store_file.read(Path(cluster.folder))
        if own and _server(own) == _server(uri):
            return env
    return {}


def _server(uri: str) -> tuple[str, str]:
    parts = urlsplit(uri)
    return parts.netloc, parts.query
