"""Which images the nodes of a ``DtrainCluster`` run.

Given by name where the cluster is made, else by ``DTRAIN_IMAGE_COORDINATOR``,
``DTRAIN_IMAGE_AGENT``, ``DTRAIN_IMAGE_ETCD``, ``DTRAIN_IMAGE_STORE`` and
``DTRAIN_IMAGE_TOOLS``, else these defaults. dtrain's own two are built, not
pulled: ``docs/deployment.md``.
"""

import os
from dataclasses import dataclass, fields
from importlib.metadata import PackageNotFoundError, version

ETCD = "quay.io/coreos/etcd:v3.5.18@sha256:d0a641d5fbcc89678c931a61b7de7b8a1cf097149f135c9c73bc81d076a1494b"
STORE = "chrislusf/seaweedfs:4.48@sha256:4e61d15fd35994cb1e43e1e553dff106794841fd9a99ade2fc8c8bfce4d7872d"
TOOLS = "nicolaka/netshoot:v0.13@sha256:a20c2531bf35436ed3766cd6cfe89d352b050ccc4d7005ce6400adf97503da1b"
"""Needs a shell, ``dd`` and iproute2's ``ip``."""


@dataclass(frozen=True, slots=True)
class Images:
    """One image name per kind of node; "" takes the variable's, or the default."""

    coordinator: str = ""
    agent: str = ""
    etcd: str = ""
    store: str = ""
    tools: str = ""

    def resolved(self) -> "Images":
        """Return them with every name filled in."""
        try:
            own = version("dtrain")
        except PackageNotFoundError:
            own = "local"
        defaults = Images(f"dtrain-coordinator:{own}", f"dtrain-agent:{own}", ETCD, STORE, TOOLS)
        return Images(
            *(
                getattr(self, field.name)
                or os.environ.get(f"DTRAIN_IMAGE_{field.name.upper()}")
                or getattr(defaults, field.name)
                for field in fields(self)
            )
        )


def is_built_here(image: str) -> bool:
    """Whether no registry has it: an image of dtrain's own, or one of a local build."""
    return "/" not in image and (image.startswith("dtrain-") or image.endswith(":local"))
