"""What a local cluster tells the command line of its store: the URI, and the keys that were made for it."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

NAME = "store.json"


def write(folder: Path, uri: str, env: Mapping[str, str]) -> None:
    """Keep the store's URI and the environment of its clients in the cluster's ``folder``."""
    path = folder / NAME
    # Others may look into the folder: the file is nobody else's before anything stands in it.
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump({"v": 1, "uri": uri, "env": dict(env)}, file)


def read(folder: Path) -> tuple[str, dict[str, str]]:
    """Return URI and environment; ("", {}) where there are none."""
    try:
        kept = json.loads((folder / NAME).read_text())
        return str(kept["uri"]), {str(name): str(value) for name, value in kept["env"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "", {}
