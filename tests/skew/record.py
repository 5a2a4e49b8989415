"""Record what a release writes: every kind of record, from a real cluster of that release alone.

``python -m tests.skew.record`` runs the former release's cluster through a job with checkpoints, retention, a
killed rank, a damaged checkpoint and an operator's wishes, and keeps one record of each shape beside its
wheel. Run it once per release.
"""

import base64
import gzip
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2

from dtrain.protocol.keys import Keys
from tests.skew import old
from tests.support.harness import Harness

_DESCRIPTORS = """
import sys
from google.protobuf import descriptor_pb2
from dtrain.protocol.pb import agent_pb2, coordinator_pb2
files = descriptor_pb2.FileDescriptorSet()
for module in (agent_pb2, coordinator_pb2):
    module.DESCRIPTOR.CopyToProto(files.file.add())
sys.stdout.write(files.SerializeToString().hex())
"""


def descriptors(release: old.Release) -> descriptor_pb2.FileDescriptorSet:
    """The gRPC services and messages of a release."""
    return descriptor_pb2.FileDescriptorSet.FromString(bytes.fromhex(release.run("-c", _DESCRIPTORS)))


def shape(kind: str, document: Any) -> tuple[str, ...]:
    """What makes a record worth keeping: its kind, the fields it has, and its phases and reasons."""

    def walk(item: Any, at: str) -> Iterator[str]:
        if isinstance(item, dict):
            # Names that users give are no fields.
            named = at.endswith((".tensors", ".objects", ".metrics"))
            for name, part in item.items():
                yield from walk(part, f"{at}.{'*' if named else name}")
        elif isinstance(item, list):
            for part in item:
                yield from walk(part, f"{at}[]")
        elif at.endswith((".phase", ".reason", ".wanted", ".kind")) and " " not in str(item):
            yield f"{at}={item}"
        else:
            yield at

    return (kind, *sorted(set(walk(document, ""))))


def history(harness: Harness, keys: Keys) -> Iterator[tuple[str, Any]]:
    """Every value that was ever put, as kind and document."""
    endpoints = ",".join(harness.cluster.endpoints)
    command = [harness.cluster.etcdctl, "--endpoints", endpoints]
    watching = [*command, "watch", "--prefix", keys.root, "--rev", "1", "-w", "json"]
    with subprocess.Popen(watching, stdout=subprocess.PIPE, text=True) as process:
        harness.etcdctl("put", f"{keys.root}end", "{}")
        assert process.stdout is not None
        for line in process.stdout:
            for event in json.loads(line)["Events"]:
                key = base64.b64decode(event["kv"]["key"]).decode()
                if key == f"{keys.root}end":
                    process.kill()
                    return
                parsed = keys.parse(key)
                if parsed is not None and event.get("type") != 1 and "value" in event["kv"]:
                    yield parsed.kind, json.loads(base64.b64decode(event["kv"]["value"]))


def manifests(folder: Path) -> Iterator[tuple[str, Any]]:
    """Manifests in the store, of ranks and of whole checkpoints."""
    for path in sorted(folder.rglob("*.json.gz")):
        kind = "manifest" if path.parent.name == "manifests" else "rank-manifest"
        yield kind, json.loads(gzip.decompress(path.read_bytes()))


def live(harness: Harness) -> None:
    """Make the cluster write everything it can write."""
    stop = harness.stop_file("story")
    args = "--steps 1000000 --pause-ms 10 --size 8"
    job = harness.start("story", f"{args} --stop-file {stop}", every_steps=20, keep_last=2)
    for _ in range(4):
        harness.await_commit(job)
    harness.cluster.kill_rank(1, job=job)
    harness.await_training(job, after_attempt=1)
    harness.await_commit(job)
    stop.touch()
    harness.await_end(job)
    # A damaged checkpoint is only found when it is restored: none may be taken between.
    job = harness.start("damaged", args, every_steps=0, keep_last=5)
    for token in ("one", "two"):
        seq = int(harness.status(job).seq_last)
        harness.client.set_intent(job, checkpoint_token=token)
        commit = harness.await_commit(job, after=seq)
    for blob in harness.manifest(commit).blobs:
        for path in harness.cluster.folder.rglob(blob.key.rpartition("/")[2]):
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.chmod(0o600)
            path.write_bytes(data)
    harness.cluster.kill_rank(0, job=job)
    harness.await_training(job, after_attempt=2)
    harness.cluster.power_cut("a2")
    harness.until("the loss is seen", lambda: harness.status(job).phase != "RUNNING")
    harness.client.set_intent(job, wanted="cancel")
    harness.until("it is cancelled", lambda: harness.status(job).phase == "CANCELLED")
    bad = harness.submit("wrong", "--bad-rank 0 --bad-step 2 --bad exit=93", nnodes=1)
    harness.until("it has failed", lambda: harness.status(bad).phase == "FAILED")


def main() -> int:
    """Write ``<release>-records.jsonl`` and ``<release>.protos``."""
    with tempfile.TemporaryDirectory() as made:
        release = old.install(old.wheel_of(old.FORMER), Path(made) / "old")
        (old.RELEASES / f"{old.FORMER}.protos").write_bytes(descriptors(release).SerializeToString())
        kept: dict[tuple[str, ...], str] = {}
        settings = {"coordinators": 2, "agents": 2, "env": {"PYTHONPATH": ""}}
        with Harness(Path(made) / "h", python_of=lambda _name: release.python, **settings) as harness:
            harness.await_ready()
            live(harness)
            store = harness.cluster.folder / "store"
            for kind, document in (*history(harness, harness.keys), *manifests(store)):
                line = json.dumps({"kind": kind, "record": document}, ensure_ascii=False)
                for ours, plain in ((made, "/tmp/t"), (sys.prefix, "/usr"), (str(old.ROOT), "/srv")):
                    line = line.replace(ours, plain)
                kept.setdefault(shape(kind, document), line)
        lines = [kept[each] for each in sorted(kept)]
        (old.RELEASES / f"{old.FORMER}-records.jsonl").write_text("\n".join(lines) + "\n")
        sys.stdout.write(f"{len(lines)} records of {len({each[0] for each in kept})} kinds\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
