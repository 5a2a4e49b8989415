"""What must not be shown: secrets in URLs and in environments. Standard library only."""

import re
from collections.abc import Mapping

HIDDEN = "***"

_USERINFO = re.compile(r"//[^/@\s]*@")
_SECRET = re.compile(
    r"SECRET|TOKEN|PASSW|PASSPHRASE|CREDENTIAL|AUTHORIZATION|COOKIE"
    r"|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|ENCRYPTION_?KEY|(^|_)(KEY|PWD|DSN|AUTH)$",
    re.I,
)
_A_FILE = re.compile(r"_(FILE|PATH|DIR)$", re.I)


def url(text: str) -> str:
    """A URL without the user and password in it, whatever else is wrong with it."""
    return _USERINFO.sub(f"//{HIDDEN}@", text)


def is_secret(name: str) -> bool:
    """Tell whether a variable of this name usually holds a secret; the path of one is none."""
    return _SECRET.search(name) is not None and _A_FILE.search(name) is None


def environment(values: Mapping[str, str]) -> dict[str, str]:
    """An environment as it may be shown: names, and the values of those that are no secrets."""
    return {name: HIDDEN if value and is_secret(name) else value for name, value in values.items()}
