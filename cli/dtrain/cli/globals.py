"""What the options of the program itself say, for whoever connects on their behalf."""

from dataclasses import dataclass


@dataclass
class Settings:
    """Options that may stand before the verb or after it; the last one wins."""

    cluster: str = ""
    coordinators: str = ""
    endpoints: str = ""
    cacert: str = ""
    cert: str = ""
    key: str = ""
    user: str = ""
    password_file: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    tls_cacert: str = ""
    output: str = "table"
    debug: bool = False
    timeout_s: float = 5.0

    def etcd_flags(self) -> list[str]:
        """What was said of etcd itself, as the flags that ``runtime.config.ETCD`` reads."""
        given = {
            "--cacert": self.cacert,
            "--cert": self.cert,
            "--key": self.key,
            "--user": self.user,
            "--password-file": self.password_file,
        }
        return [word for flag, value in given.items() if value for word in (flag, value)]
