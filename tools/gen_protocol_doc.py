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
    "Cluster": ("cluster.py", ["LeaderRecord", "ReplicaRecord", "Cordon"]),
    "Agents": (
        "snapshot.py",
        [
            "NodeRecord",
            "WorkerSnapshot",
            "RankState",
            "Failure",
            "DurablePart",
            "SaveProblem",
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
            "Intent",
            "JobStatus",
            "Member",
            "RestorePoint",
            "Condition",
        ],
    ),
    "Checkpoints": (
        "checkpoint.py",
        [
            "OpenRecord",
            "CommitRecord",
            "Latest",
            "Garbage",
            "Quarantine",
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
            kind = ast.unparse(item.annotation).replace("|", "\\|")
            text += f"| `{ast.unparse(item.target)}` | {kind} | {prose(note)} |\n"
    return text


def enums() -> str:
    text = "\n## Values\n"
    for file, name in (
        ("job.py", "JobPhase"),
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
