"""What the options of the program itself say, for whoever connects on their behalf."""

from dataclasses import dataclass


@dataclass
class Settings:
    """Options that may stand before the verb or after it; the last one wins."""

    cluster: str = ""
    coordinators: str = ""
    endpoints: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    tls_cacert: str = ""
    output: str = "table"
    debug: bool = False
    timeout_s: float = 5.0
