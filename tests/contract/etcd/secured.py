"""Certificates and users for tests, made by the scripts that operators use."""

import os
import subprocess
from pathlib import Path

from tests.contract.etcd.support import REPOSITORY

from dtrain.local.etcd import EtcdCluster, EtcdTls
from dtrain.protocol.ids import ClusterName
from dtrain.protocol.keys import Keys
from dtrain.storage.etcd.endpoints import Tls
from dtrain.storage.etcd.transport import GatewayEtcd

CLUSTER = "prod"
KEYS = Keys(ClusterName(CLUSTER))
SCRIPTS = REPOSITORY / "deploy" / "etcd"
HOSTS = "127.0.0.1,localhost"


def run(script: str, *arguments: str, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [str(SCRIPTS / script), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | (env or {}),
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def make_certs(folder: Path, *arguments: str) -> str:
    return run("make-certs.sh", str(folder), *arguments)


def holder(pki: Path, role: str, name: str) -> Tls:
    """The certificate of one holder towards etcd."""
    where = pki / role / name
    return Tls(*(str(where / name) for name in ("etcd-ca.crt", "etcd.crt", "etcd.key")))


def server_tls(pki: Path, size: int = 1) -> EtcdTls:
    """Certificates of a cluster of that size, and of the coordinator c1 and the agents a1 and a2."""
    members = [f"etcd:etcd-{index}={HOSTS}" for index in range(size)]
    make_certs(pki, "--cluster", CLUSTER, *members, "coordinator:c1", "agent:a1", "agent:a2", "reader:bob")
    return EtcdTls(pki, holder(pki, "coordinator", "c1"))


class Users:
    """Users of a cluster, by ``setup-auth.sh``; authentication is on."""

    def __init__(self, cluster: EtcdCluster, folder: Path, tls: Tls | None = None) -> None:
        self.cluster = cluster
        self.folder = folder
        self.tls = tls
        self.setup("init", "a1", "a2")

    def setup(self, *arguments: str) -> str:
        words = ("--passwords", str(self.folder), "--cluster", CLUSTER, *arguments)
        return run("setup-auth.sh", *words, env=self._env())

    def as_root(self, *arguments: str) -> str:
        env = self._env() | {"ETCDCTL_USER": "root", "ETCDCTL_PASSWORD": self.password("root")}
        control = self.cluster.binary.etcdctl or "etcdctl"
        done = subprocess.run(
            [control, *arguments], capture_output=True, text=True, env=os.environ | env, check=True
        )
        return done.stdout

    def etcdctl(self, user: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
        env = self._env() | {"ETCDCTL_USER": user, "ETCDCTL_PASSWORD": self.password(user)}
        control = self.cluster.binary.etcdctl or "etcdctl"
        return subprocess.run(
            [control, *arguments], capture_output=True, text=True, env=os.environ | env, check=False
        )

    def password(self, user: str) -> str:
        return (self.folder / user).read_text()

    def password_file(self, user: str) -> str:
        return str(self.folder / user)

    def client(self, user: str, endpoints: list[str] | None = None) -> GatewayEtcd:
        return GatewayEtcd(
            endpoints or self.cluster.endpoints,
            tls=self.tls,
            user=user,
            password_file=self.password_file(user),
        )

    def _env(self) -> dict[str, str]:
        env = {
            "ETCDCTL_API": "3",
            "ETCDCTL": self.cluster.binary.etcdctl or "etcdctl",
            "ETCDCTL_ENDPOINTS": ",".join(self.cluster.endpoints),
        }
        if self.tls is not None:
            env |= {
                "ETCDCTL_CACERT": self.tls.ca or "",
                "ETCDCTL_CERT": self.tls.cert or "",
                "ETCDCTL_KEY": self.tls.key or "",
            }
        return env
