"""The client for a process's settings."""

from dtrain.runtime.clock import Clock
from dtrain.runtime.config import EtcdOptions
from dtrain.storage.etcd.endpoints import Tls
from dtrain.storage.etcd.transport import GatewayEtcd


def open_etcd(options: EtcdOptions, clock: Clock | None = None) -> GatewayEtcd:
    """Return the client; it connects when first used, and follows its files when they change.

    Raises:
        Refused: BAD_SETTING; an endpoint is no URL.
    """
    return GatewayEtcd(
        options.endpoints,
        tls=Tls(options.cacert or None, options.cert or None, options.key or None),
        user=options.user,
        password=options.password,
        password_file=options.password_file,
        endpoints_file=options.endpoints_file,
        clock=clock,
    )
