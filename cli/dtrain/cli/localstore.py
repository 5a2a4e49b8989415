"""The store of a cluster of ``dtrain up``, for the verbs that read and write stores from here.

Its credentials are made at random when it starts, and nobody could type them.
``dtrain up`` writes them down in the cluster's folder, for its user alone.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from dtrain.cli import context
from dtrain.storage.blobs.open import open_store
from dtrain.storage.blobs.port import BlobStore

FILE = "store.json"


def write_down(folder: Path, uri: str, env: Mapping[str, str]) -> None:
    """Keep what a client of the store needs."""
    fd = os.open(folder / FILE, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(fd, "w") as file:
        json.dump({"v": 1, "uri": uri, "env": dict(env)}, file)


def open_here(uri: str) -> BlobStore:
    """Open a store; one of a local cluster with the credentials that were written down for it.

    Raises:
        Refused: it cannot be opened here.
    """
    endpoint = _endpoint(uri)
    if endpoint:
        for known in context.load()[1].values():
            found = _read(Path(known.folder)) if known.folder and known.alive else None
            if found is not None and _endpoint(found[0]) == endpoint:
                # Whatever credentials there are, they are not of this store.
                os.environ.update(found[1])
    return open_store(uri)


def _endpoint(uri: str) -> str:
    return (parse_qs(urlsplit(uri).query).get("endpoint") or [""])[0]


def _read(folder: Path) -> tuple[str, dict[str, str]] | None:
    try:
        document = json.loads((folder / FILE).read_text())
        return str(document["uri"]), {str(name): str(value) for name, value in document["env"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
