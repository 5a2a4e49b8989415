"""Measures this machine: limits, disk, memory, kernel, ports, and what torch finds here."""

import contextlib
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from dtrain.cli.doctor import judging
from dtrain.cli.doctor.findings import Check, Verdict, passed, warn

TORCH_S = 90.0
"""Importing torch from a cold disk takes long."""

PORTS = {"coordinator": 7070, "dashboard": 7090}
_CALM = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
"""As the launcher imports: pools of numeric libraries are no obstacle to a fork there."""

_CGROUP = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def checks(data_dir: Path, preload: Sequence[str]) -> list[Check]:
    """What to look at; ``data_dir`` is where an agent would keep its files."""
    return [
        Check("machine", "python", lambda: [judging.python(sys.version_info[:2])]),
        Check("machine", "files", lambda: [judging.open_files(_soft(resource.RLIMIT_NOFILE))]),
        Check("machine", "memory", _memory),
        Check("machine", "disk", lambda: [_disk(data_dir)]),
        Check("machine", "kernel", lambda: [_kernel()]),
        Check("machine", "name", lambda: [_name()]),
        Check("machine", "ports", lambda: [_ports()]),
        Check("machine", "torch", lambda: [judging.torch_found(_environment(()))], TORCH_S),
        Check("machine", "fork", lambda: [judging.fork_safety(_environment(tuple(preload)))], TORCH_S),
    ]


@lru_cache
def _environment(preload: tuple[str, ...]) -> dict[str, object]:
    """What a process that imports torch finds: this one imports nothing of it."""
    done = subprocess.run(
        [sys.executable, "-m", "dtrain.trainer.environment", *preload],
        capture_output=True,
        text=True,
        check=False,
        timeout=TORCH_S,
        stdin=subprocess.DEVNULL,
        env=os.environ | _CALM,
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        said = done.stderr.strip().splitlines()
        return {"preload": list(preload), "error": said[-1] if said else f"exit code {done.returncode}"}
    found = json.loads(lines[-1])
    assert isinstance(found, dict)
    return found


def _soft(limit: int) -> int:
    return resource.getrlimit(limit)[0]


def _memory() -> Iterator[Verdict]:
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield judging.arena(float(physical), _cgroup_limit())
    soft = _soft(resource.RLIMIT_MEMLOCK)
    gpus = len(list(Path("/dev").glob("nvidia[0-9]*")))
    yield judging.locked_memory(float("inf") if soft == resource.RLIM_INFINITY else float(soft), gpus=gpus)


def _cgroup_limit() -> float:
    for path in _CGROUP:
        with contextlib.suppress(OSError, ValueError):
            return float(Path(path).read_text())
    return float("inf")


def _disk(data_dir: Path) -> Verdict:
    existing = next(path for path in (data_dir, *data_dir.parents) if path.exists())
    if not os.access(existing, os.W_OK):
        return judging.unwritable(str(existing))
    return judging.free_space(str(existing), float(shutil.disk_usage(existing).free))


def _kernel() -> Verdict:
    try:
        os.close(os.pidfd_open(os.getpid()))
        pidfd = True
    except (OSError, AttributeError):
        pidfd = False
    scope = None
    with contextlib.suppress(OSError, ValueError):
        scope = int(Path("/proc/sys/kernel/yama/ptrace_scope").read_text())
    return judging.kernel(pidfd, scope)


def _name() -> Verdict:
    """Ranks of other machines come by address, but libraries look the name up."""
    name = socket.gethostname()
    try:
        found = sorted({str(one[4][0]) for one in socket.getaddrinfo(name, None)})
    except OSError as error:
        return warn(
            f"this machine's name, {name}, cannot be resolved: {error}",
            "add it to DNS or /etc/hosts; gloo may need GLOO_SOCKET_IFNAME otherwise",
        )
    return passed(f"{name} is {', '.join(found)}")


def _ports() -> Verdict:
    taken = []
    for role, port in PORTS.items():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                taken.append(f"{port} ({role})")
    return judging.ports([f"{port} ({role})" for role, port in PORTS.items()], taken)
