"""How stock etcdctl reaches a cluster's etcd: the program, and the variables that it reads."""

import shutil
from collections.abc import Mapping, Sequence

from dtrain.cli.globals import Settings
from dtrain.protocol.errors import ErrorCode, NotFound, Unavailable


def local(endpoints: Sequence[str], beside: str, environ: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """Of a cluster that ``dtrain up`` runs; ``beside`` is the program beside its etcd.

    Raises:
        NotFound: neither that is there, nor one installed.
    """
    # Of the same release as the server, where there is one.
    return _program(beside or "etcdctl", environ), _variables(endpoints)


def remote(settings: Settings, environ: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """Of the etcd that options and environment name.

    Raises:
        Refused: BAD_SETTING; a file that they name cannot be used.
        Unavailable: they name none.
        NotFound: no etcdctl is installed.
    """
    from dtrain.runtime.config import ETCD, etcd_options, parse

    flags = [*settings.etcd_flags(), *(("--endpoints", settings.endpoints) if settings.endpoints else ())]
    options = etcd_options(parse("dtrain", "", ETCD, flags, environ))
    if not (settings.endpoints or options.endpoints_file):
        raise Unavailable(
            ErrorCode.ETCD_UNAVAILABLE,
            "it is not known here where the cluster's etcd is",
            cause="no local cluster runs, and neither --endpoints nor ETCDCTL_ENDPOINTS is set",
            fix="dtrain --endpoints URL,... etcdctl ...; with --cacert, --cert and --key if etcd wants them",
        )
    access = {
        "ETCDCTL_CACERT": options.cacert,
        "ETCDCTL_CERT": options.cert,
        "ETCDCTL_KEY": options.key,
        # In one variable, as etcdctl 3.4 knows no other for the password.
        "ETCDCTL_USER": f"{options.user}:{options.password}" if options.password else options.user,
    }
    given = {name: value for name, value in access.items() if value}
    return _program("etcdctl", environ), {**_variables(options.endpoints), **given}


def _variables(endpoints: Sequence[str]) -> dict[str, str]:
    return {"ETCDCTL_API": "3", "ETCDCTL_ENDPOINTS": ",".join(endpoints)}


def _program(name: str, environ: Mapping[str, str]) -> str:
    path = environ.get("PATH", "")
    found = shutil.which(name, path=path) or shutil.which("etcdctl", path=path)
    if found is None:
        raise NotFound(
            ErrorCode.NOT_FOUND,
            "no etcdctl is installed here",
            cause="it is not on PATH",
            fix="install it: apt-get install etcd-client, or from etcd's releases",
        )
    return found
