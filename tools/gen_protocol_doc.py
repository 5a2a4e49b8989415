"""Write the record tables of docs/protocol.md from the dataclasses; --check proves them fresh.

A field's text is the string literal behind it in the source, if there is one.
"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROTOCOL = ROOT / "common/dtrain/protocol"
DOC = ROOT / "docs/protocol.md"
MARK = "<!-- Below this line: generated from common/dtrain/protocol by tools/gen_protocol_doc.py. -->"
PLAN: dict[str, tuple[str, list[str]]] = {
    "Cluster": (
        "cluster.py",
        ["LeaderRecord", "ReplicaRecord", "WebhookCursor", "Cordon", "Suspicion", "Blame", "TestMark"],
    ),
    "Agents": (
        "snapshot.py",
        [
            "NodeRecord",
            "Draining",
            "WorkerSnapshot",
            "RankState",
            "Failure",
            "DurablePart",
            "SaveProblem",
            "StuckProcess",
            "Timing",
            "Stall",
            "Stack",
            "Transfer",
            "BadBlob",
            "CommandOutcome",
        ],
    ),
    "Jobs": (
        "job.py",
        [
            "JobSpec",
            "Entry",
            "CheckpointPolicy",
            "RestartPolicy",
            "HangPolicy",
            "NonFinitePolicy",
            "FailureRule",
            "Intent",
            "JobStatus",
            "Tally",
            "Member",
            "FailureMark",
            "Former",
            "RestorePoint",
            "Condition",
        ],
    ),
    "Packages": ("package.py", ["Package", "PackageCollection"]),
    "Time": ("ledger.py", ["Ledger", "Mark"]),
    "Checkpoints": (
        "checkpoint.py",
        [
            "OpenRecord",
            "CommitRecord",
            "Latest",
            "Garbage",
            "Quarantine",
            "Verification",
            "Pin",
            "Order",
            "RankManifest",
            "Manifest",
            "BlobEntry",
            "TensorEntry",
            "ChunkEntry",
            "ObjectEntry",
        ],
    ),
    "Events": ("events.py", ["EventRecord"]),
}


# What a field means wherever it occurs; ``Record.field`` where it means something else.
MEANINGS = {
    "agent": "name of the machine's agent",
    "at": "when (UTC)",
    "attempt": "number of the (re)start it belongs to",
    "blob": "store key of the damaged blob",
    "blobs": "the blobs, indexed by position",
    "by": "who asked",
    "chunk": "number of the damaged 16 MiB chunk",
    "cluster": "name of the cluster",
    "digest": "SHA-256 of the manifest as stored, hex",
    "exit_code": "how the process ended; negative: by that signal",
    "expected": "digest according to the manifest",
    "final": "taken at the end of training",
    "found": "digest of what was read",
    "incarnation": "one life of the agent",
    "job": "name of the job",
    "manifest": "store key of the manifest",
    "message": "one sentence",
    "metrics": "newest numbers the script reported",
    "nonce": "random; ties parts, blobs and record to one intent",
    "objects": "JSON values by name",
    "phase": "see the values below",
    "pid": "process id",
    "rank": "global rank",
    "ranks": "the ranks on this machine",
    "reason": "one sentence",
    "replica": "id of the coordinator replica",
    "seq": "number of the checkpoint; never used twice",
    "since": "when it began (UTC)",
    "step": "steps completed",
    "tensors": "tensors by name",
    "term": "term of the leader that wrote it",
    "uid": "one submission of the job",
    "until": "when it ends (UTC); empty: when it is lifted",
    "v": "version of the format",
    "version": "version of dtrain",
    "world": "ranks of the attempt",
    "world_size": "ranks of the attempt",
    "Cordon.drain": "what runs there goes on elsewhere, from a checkpoint taken now",
    "Blame.kind": "kind of the failure",
    "Suspicion.blames": "attempts that ended because of it, oldest first",
    "Timing.step_s": "median time per step, seconds; 0: not known",
    "JobStatus.tally": "how often what has happened",
    "Tally.commits": "committed checkpoints, deleted ones included",
    "Tally.committed_bytes": "their bytes",
    "Timing.data_s": "of it waiting for data",
    "Timing.own_s": "of it not waiting for other ranks",
    "Stall.deadline_s": "its deadline, seconds",
    "Stack.kind": "what the rank is doing",
    "Stack.dump": "id of the command that asked for it",
    "Transfer.kind": "to the store, or from it",
    "Stack.moving": "between two looks it went on and used the CPU, or it read or wrote files",
    "WorkerSnapshot.stalls": "ranks that have completed no step for longer than their deadline",
    "WorkerSnapshot.dumps": "how often stacks of the local ranks were collected in this attempt",
    "WorkerSnapshot.dumped_at": "when that was last, epoch seconds",
    "WorkerSnapshot.stacks": "what the local ranks were doing when the leader asked last",
    "RankState.timing": "what its steps took lately",
    "WorkerSnapshot.warning": "what its launcher warns of: modules it cannot import, or that forbid the fork",
    "RankState.sealed": "the newest checkpoint that lies complete in its arena; sure once it has ended",
    "HangPolicy.enabled": "whether ranks are taken for hung at all",
    "HangPolicy.timeout_s": "seconds without a step; 0: follows the job's own step times",
    "HangPolicy.startup_s": "seconds from START to the first step",
    "NonFinitePolicy.action": "warn, rollback or fail",
    "NonFinitePolicy.metrics": "reported numbers that must stay finite",
    "NonFinitePolicy.back": "checkpoints to go back",
    "FailureRule.action": "what follows",
    "FailureRule.reasons": "what it is about; empty: any",
    "FailureRule.exit_codes": "of the rank; empty: any",
    "FailureRule.signals": "that ended the rank; empty: any",
    "FailureRule.message": "regular expression, searched in the message and the last lines of the log",
    "FailureMark.agent": "machine it was on",
    "FailureMark.fingerprint": "of its traceback",
    "JobSpec.spares": "idle machines that are kept ready to take a lost one's place",
    "JobSpec.grow_cooldown_s": "least seconds between two times that the job grows",
    "JobSpec.priority": "higher is placed first",
    "JobSpec.hang": "when ranks are taken for hung",
    "JobSpec.nonfinite": "what follows from numbers that are not finite",
    "JobSpec.failure_rules": "what follows from which failure; the first that fits",
    "Intent.nnodes_min": "replaces the job file's; 0: it does not",
    "Intent.paused": "its ranks are to be held at a step",
    "Intent.nnodes_max": "replaces the job file's; 0: it does not",
    "WebhookCursor.name": "of the webhook",
    "WebhookCursor.revision": "revision of etcd",
    "Mark.ms": "productive milliseconds until then",
    "BadBlob.message": "what went wrong, in one sentence",
    "BlobEntry.bytes": "size",
    "BlobEntry.chunks": "CRC32C of each 16 MiB, hex",
    "BlobEntry.crc": "CRC32C of the whole blob, hex",
    "BlobEntry.key": "store key",
    "CheckpointPolicy.every_seconds": "interval in seconds; 0: not by time",
    "CheckpointPolicy.every_steps": "interval in steps; 0: not by steps",
    "CheckpointPolicy.keep_every_steps": "beyond them, the first at or after each multiple; 0: no others",
    "CheckpointPolicy.await_import": "the first attempt waits until a checkpoint has been imported",
    "CheckpointPolicy.keep_last": "committed checkpoints that retention keeps",
    "CheckpointPolicy.store": "URI; empty: the cluster's default store",
    "CheckpointPolicy.bandwidth_mb_s": "MB (10^6) a second that an agent sends for the job; 0: no cap",
    "CheckpointPolicy.timeout_s": "seconds from intent to commit, then it is aborted",
    "ChunkEntry.b": "index of the blob",
    "ChunkEntry.len": "bytes",
    "ChunkEntry.o": "offset in the tensor, per dimension",
    "ChunkEntry.off": "byte offset in the blob",
    "ChunkEntry.s": "size in elements, per dimension",
    "CommandOutcome.id": "id of the command",
    "CommandOutcome.kind": "its name",
    "CommandOutcome.ok": "it was done or is being done",
    "CommandOutcome.term": "term of the leader that ordered it",
    "CommitRecord.bytes": "bytes of all blobs",
    "CommitRecord.committed_at": "when (UTC)",
    "CommitRecord.manifest_bytes": "size of the manifest as stored",
    "CommitRecord.parent": "newest good checkpoint before it",
    "Condition.last_transition": "when `status` changed (UTC)",
    "Condition.reason": "CamelCase, for programs",
    "Condition.type": "Accepted, Placed, RanksReady, Progressing, Checkpointed, Degraded, NonFinite, "
    "Straggling or Finished",
    "DurablePart.size_bytes": "bytes of the rank's blobs",
    "Entry.args": "its arguments",
    "Entry.kind": "script, module or command",
    "Entry.target": "path, module name or executable",
    "EventRecord.count": "how often, for repeated events",
    "EventRecord.first": "when it first happened (UTC)",
    "EventRecord.last": "when it last happened (UTC)",
    "EventRecord.object": "what it is about: `rank/3`, `agent/gpu-02`, `checkpoint/7`",
    "EventRecord.reason": "CamelCase, stable; see the values below",
    "EventRecord.seq": "number of the event",
    "EventRecord.type": "Normal or Warning",
    "Failure.kind": "see the values below",
    "Failure.signal": "signal that ended it",
    "Garbage.reason": "why it was retired",
    "Intent.checkpoint_token": "a new one asks for one checkpoint now",
    "Intent.wanted": "run or cancel",
    "JobSpec.checkpoint": "see `CheckpointPolicy`",
    "JobSpec.entry": "see `Entry`",
    "JobSpec.env": "environment of the ranks",
    "JobSpec.isolation_grace_s": "seconds that ranks go on, while they complete steps, "
    "on a machine without etcd; 0: 600 or two checkpoint intervals",
    "JobSpec.name": "name of the job",
    "JobSpec.nnodes_max": "machines it uses at most",
    "JobSpec.nnodes_min": "machines it needs at least",
    "JobSpec.nproc_per_node": "ranks on each machine",
    "JobSpec.preload": "modules the launcher imports once",
    "JobSpec.reschedule_grace_s": "seconds that an agent may be gone before it is called lost; "
    "0: its expired lease is the grace",
    "JobSpec.restarts": "see `RestartPolicy`",
    "JobSpec.shutdown_grace_s": "seconds from SIGTERM to SIGKILL when ranks are ended in order",
    "JobSpec.submitted_at": "when (UTC)",
    "JobSpec.working_dir": "folder the ranks start in, on every machine; with `package`: what was packed",
    "Package.digest": "SHA-256 of the archive, hex",
    "Package.nonce": "random; the rest of its name",
    "Package.store": "URI of the store that it is in",
    "Package.files": "files, links and folders in it",
    "Package.source": "folder it was packed from, for people",
    "PackageCollection.keys": "store key to the store's URI",
    "JobStatus.attempt": "newest attempt; 0: none yet",
    "JobStatus.charge": "the attempt to come is charged to the restart budget",
    "JobStatus.conditions": "see `Condition`",
    "JobStatus.event_last": "number of the newest event",
    "JobStatus.finished_at": "when it became terminal (UTC)",
    "JobStatus.members": "machines of the attempt, see `Member`",
    "JobStatus.restarts": "wall times of restarts within the window",
    "JobStatus.restore": "what the attempt starts from, see `RestorePoint`",
    "JobStatus.seq_last": "last checkpoint number given out",
    "JobStatus.token_done": "last checkpoint token answered",
    "JobStatus.joining_since": "since when `joining` is not empty (UTC)",
    "JobStatus.unknown_from": "first number that a restored etcd had forgotten, see `unknown_to`; 0: none",
    "LeaderRecord.address": "host:port of its API",
    "LeaderRecord.nonce": "random; tells its own timed-out write from another's",
    "Manifest.bytes": "bytes of all blobs",
    "Manifest.chunk_bytes": "bytes under one digest",
    "Manifest.crc": "algorithm of the blobs' digests",
    "Manifest.created": "when (UTC)",
    "Manifest.layout": "hash of names, dtypes, shapes and owners",
    "Manifest.parent": "newest good checkpoint before it",
    "Manifest.user": "reserved for annotations",
    "Member.first_rank": "its ranks are this one and those that follow",
    "Member.nproc": "how many ranks",
    "Member.node_rank": "position of the machine in the attempt",
    "Member.version": "release that starts its ranks; they keep it when the agent is replaced beside them",
    "NodeRecord.boot_id": "the kernel's id of this boot",
    "NodeRecord.gpus": "GPUs found",
    "NodeRecord.labels": "labels of the machine",
    "Draining.reason": "what asked for it: SIGTERM",
    "Draining.since": "since when (UTC)",
    "ObjectEntry.value": "the value, inline",
    "OpenRecord.opened_at": "when (UTC)",
    "OpenRecord.reports": "durable parts of agents whose snapshot has gone",
    "OpenRecord.timeout_s": "seconds allowed, counted from when a leader first saw it",
    "Order.chunk": "of `inspect`: number of the chunk",
    "Order.kind": "delete, inspect, collect or import",
    "Order.part": "of `import`: what was written, once it is durable",
    "Order.step": "of `import`: the step that training goes on after",
    "Order.timeout_s": "of `import`: seconds from its open record to its commit",
    "Pin.why": "for people: why it is needed",
    "Quarantine.agent": "who found it",
    "RankState.last_step": "announced end of training; waits for the final checkpoint",
    "ObjectEntry.crc": "CRC32 of its canonical JSON, hex",
    "RankManifest.layout": "hash over the whole state: equal on all ranks",
    "RankManifest.same": "CRC32 by tensor (`name#n`: part n of a sharded one) of what other ranks hold too; "
    "equal on all that have it",
    "JobStatus.stragglers": "ranks of the attempt that are persistently slower than the others",
    "JobStatus.fruitless": "attempts in a row that ended without progress",
    "JobStatus.late_saves": "checkpoints in a row that came too late; each doubles the slack",
    "JobStatus.failed_saves": "checkpoints in a row that failed; spaces the next tries",
    "JobStatus.swept": "orphans were swept after the end",
    "Former.uid": "of that submission",
    "Former.store": "where its checkpoints were",
    "ReplicaRecord.address": "host:port of its API",
    "ReplicaRecord.host": "host name",
    "TestMark.by": "who marked it",
    "TestMark.host": "host name of the machine it was marked on",
    "TestMark.since": "since when (UTC)",
    "RestartPolicy.max_restarts": "restarts allowed within the window",
    "RestartPolicy.window_s": "seconds",
    "SaveProblem.late": "the rank had passed the step already",
    "TensorEntry.chunks": "rectangles that tile it, see `ChunkEntry`",
    "TensorEntry.dtype": "safetensors name",
    "TensorEntry.shape": "global shape",
    "WorkerSnapshot.bad": "evidence of a damaged checkpoint, see `BadBlob`",
    "WorkerSnapshot.command": "newest command taken on, see `CommandOutcome`",
    "WorkerSnapshot.durable": "parts the store has confirmed, see `DurablePart`",
    "WorkerSnapshot.failure": "first failure here, see `Failure`",
    "WorkerSnapshot.problems": "why a rank has no part, see `SaveProblem`",
}


def main() -> None:
    head, _, _ = DOC.read_text().partition(MARK)
    wanted = head + MARK + "\n" + "".join(section(title, *spec) for title, spec in PLAN.items()) + enums()
    if "--check" in sys.argv:
        if DOC.read_text() != wanted:
            sys.exit("docs/protocol.md is stale: run python tools/gen_protocol_doc.py and commit the result")
        return
    DOC.write_text(wanted)


def section(title: str, file: str, names: list[str]) -> str:
    classes = {
        n.name: n for n in ast.parse((PROTOCOL / file).read_text()).body if isinstance(n, ast.ClassDef)
    }
    return f"\n## {title}\n" + "".join(table(classes[name]) for name in names)


def table(node: ast.ClassDef) -> str:
    about = prose(ast.get_docstring(node) or "")
    text = f"\n### `{node.name}`\n\n{about}\n\n| field | type | |\n|---|---|---|\n"
    body = node.body
    for i, item in enumerate(body):
        if isinstance(item, ast.AnnAssign):
            after = body[i + 1] if i + 1 < len(body) else None
            note = ""
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                note = " ".join(str(after.value.value).split())
            name = ast.unparse(item.target)
            note = note or MEANINGS.get(f"{node.name}.{name}") or MEANINGS[name]
            kind = ast.unparse(item.annotation).replace("|", "\\|")
            text += f"| `{name}` | {kind} | {prose(note)} |\n"
    return text


def enums() -> str:
    text = "\n## Values\n"
    for file, name in (
        ("phases.py", "JobPhase"),
        ("snapshot.py", "WorkerPhase"),
        ("snapshot.py", "FailureKind"),
        ("events.py", "EventReason"),
    ):
        tree = ast.parse((PROTOCOL / file).read_text())
        (node,) = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name]
        values = [
            f"`{i.value.value}`"
            for i in node.body
            if isinstance(i, ast.Assign) and isinstance(i.value, ast.Constant)
        ]
        text += f"\n**{name}**: {', '.join(values)}.\n"
    return text


def prose(text: str) -> str:
    return text.replace("``", "`")


if __name__ == "__main__":
    main()
