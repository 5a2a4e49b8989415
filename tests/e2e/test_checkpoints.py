"""The life of a checkpoint through ``dtrain checkpoints``: verified, exported, pinned, deleted, collected."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.test_store import ask_for_checkpoint, damage
from tests.support.harness import Harness

from dtrain.protocol import codec
from dtrain.protocol.checkpoint import CommitRecord, Manifest, Verification
from dtrain.protocol.events import EventReason
from dtrain.protocol.ids import JobName, Seq
from dtrain.protocol.job import JobPhase
from dtrain.storage.blobs.open import open_store
from dtrain.storage.blobs.s3 import S3Blobs

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

COMMAND = (sys.executable, "-m", "dtrain.cli")
LIMIT_S = 150.0
FOREVER = "--steps 1000000 --pause-ms 10"


def dtrain(harness: Harness, *args: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run ``dtrain checkpoints`` against the harness's cluster."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("DTRAIN_", "PET_"))}
    env |= {"DTRAIN_COORDINATORS": ",".join(harness.cluster.addresses)}
    env |= {"XDG_CONFIG_HOME": str(harness.folder / "config")}
    command = [*COMMAND, "checkpoints", *args]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == code, f"{args}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def as_json(harness: Harness, *args: str, code: int = 0) -> Any:
    return json.loads(dtrain(harness, *args, "-o", "json", code=code).stdout)


def begin(harness: Harness, name: str, **settings: Any) -> JobName:
    """A job that saves only when it is asked, until its stop file is there."""
    return harness.start(name, f"{FOREVER} --stop-file {harness.stop_file(name)}", every_steps=0, **settings)


def finish(harness: Harness, job: JobName) -> None:
    harness.stop_file(job).touch()
    harness.await_end(job)


def seqs(harness: Harness, job: JobName) -> list[int]:
    return [int(record.seq) for record in harness.commits(job)]


def raw_tensors(harness: Harness, record: CommitRecord) -> dict[str, bytes]:
    """Every tensor put together straight from the blobs."""
    manifest: Manifest = harness.manifest(record)
    store = open_store(harness.cluster.store_uri)
    try:
        blobs = [store.get(blob.key) for blob in manifest.blobs]
    finally:
        store.close()
    return {
        name: b"".join(blobs[c.b][c.off : c.off + c.len] for c in sorted(entry.chunks, key=lambda c: c.o))
        for name, entry in manifest.tensors.items()
        if not name.startswith("rng/")
    }


def content(tensor: Any) -> bytes:
    """The bytes of a tensor, 0-d ones included."""
    import torch

    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def test_a_flipped_byte_is_named_quarantined_and_all_ranks_fall_back(harness: Harness) -> None:
    job = begin(harness, "rotten", keep_last=5)
    first = ask_for_checkpoint(harness, job, "one")
    second = ask_for_checkpoint(harness, job, "two")
    assert as_json(harness, "verify", job)["ok"] is True
    key = damage(harness, second)
    chunk = harness.manifest(second).tensors["model.0.weight"].chunks[0]
    rank = harness.manifest(second).blobs[chunk.b].rank
    told = as_json(harness, "verify", job, str(second.seq), code=8)
    (found,) = told["damages"]
    assert (found["blob"], found["rank"], found["chunk"]) == (key, rank, 0)
    assert "model.0.weight" in found["tensors"]
    assert found["found"] != found["expected"]
    # The leader has read the chunk again and saw it, too.
    assert told["quarantine"] == "quarantined"
    (bad,) = harness.bad(job)
    assert (bad.seq, bad.blob, bad.found) == (second.seq, key, found["found"])
    assert "model.0.weight" in harness.await_event(job, EventReason.CHECKPOINT_QUARANTINED).message
    listed = {item["seq"]: item["state"] for item in as_json(harness, "list", job)["items"]}
    assert listed == {first.seq: "Committed", second.seq: "Bad"}
    # Nobody was disturbed; whoever restarts goes back to the one before, all ranks of it.
    attempt = harness.status(job).attempt
    harness.cluster.kill_rank(1, job=job)
    status = harness.await_training(job, after_attempt=attempt)
    assert status.restore is not None
    assert (status.restore.seq, status.attempt) == (first.seq, attempt + 1)
    finish(harness, job)


def test_a_report_that_the_leader_cannot_confirm_quarantines_nothing(harness: Harness) -> None:
    job = begin(harness, "slandered")
    record = ask_for_checkpoint(harness, job, "one")
    blob = harness.manifest(record).blobs[0].key
    harness.client.report_damage(job, record.seq, blob, 0, request_id="r1", by="a bad machine")
    harness.await_event(job, EventReason.USER_REQUESTED, "reads right")
    assert not harness.bad(job)
    assert not harness.cluster.read(f"jobs/{job}/orders/")
    finish(harness, job)


def test_an_export_holds_exactly_the_tensors_of_the_checkpoint(harness: Harness, tmp_path: Path) -> None:
    import torch
    import torch.distributed.checkpoint as dcp
    from safetensors.torch import load_file

    job = begin(harness, "exported")
    record = ask_for_checkpoint(harness, job, "one")
    wanted = raw_tensors(harness, record)
    assert "model.0.weight" in wanted

    def same(found: dict[str, torch.Tensor]) -> None:
        assert {name: content(value) for name, value in found.items()} == wanted

    done = as_json(harness, "export", job, "--to", str(tmp_path / "all.safetensors"))
    assert (done["seq"], done["tensors"]) == (record.seq, len(wanted))
    same(load_file(tmp_path / "all.safetensors"))

    dtrain(harness, "export", job, str(record.seq), "--to", str(tmp_path / "folder"), "--shard-gb", "0.001")
    parts = sorted((tmp_path / "folder").glob("*.safetensors"))
    same({name: value for part in parts for name, value in load_file(part).items()})
    values = json.loads((tmp_path / "folder" / "checkpoint.json").read_text())
    assert (values["step"], sorted(values["objects"])) == (record.step, ["data", "model", "optimizer"])

    dtrain(harness, "export", job, "--to", str(tmp_path / "state.pt"))
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["dtrain"]["step"] == record.step
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Dropout(0.2))
    model.load_state_dict(state["model"])
    same_model = {f"model.{name}": value for name, value in model.state_dict().items()}
    assert {n: v.numpy().tobytes() for n, v in same_model.items()} == {n: wanted[n] for n in same_model}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    optimizer.load_state_dict(state["optimizer"])

    dtrain(harness, "export", job, "--format", "dcp", "--to", str(tmp_path / "dcp"))
    fresh = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Dropout(0.2))
    loaded = {"model": fresh.state_dict()}
    dcp.load(loaded, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert all(torch.equal(loaded["model"][name], state["model"][name]) for name in state["model"])

    # What is there already stays as it is, and a damaged checkpoint leaves nothing behind.
    dtrain(harness, "export", job, "--to", str(tmp_path / "state.pt"), code=5)
    damage(harness, record)
    dtrain(harness, "export", job, str(record.seq), "--to", str(tmp_path / "bad.safetensors"), code=8)
    assert not [path.name for path in tmp_path.iterdir() if "bad" in path.name]
    assert not harness.cluster.read(f"jobs/{job}/pins/")
    finish(harness, job)


def test_pins_hold_what_the_policy_would_delete_and_an_operator_cannot(harness: Harness) -> None:
    job = begin(harness, "pinned", keep_last=1)
    first = ask_for_checkpoint(harness, job, "one")
    dtrain(harness, "pin", job, str(first.seq), "--holder", "paper", "--why", "table 2")
    second = ask_for_checkpoint(harness, job, "two")
    third = ask_for_checkpoint(harness, job, "three")
    harness.until("the second is retired", lambda: seqs(harness, job) == [first.seq, third.seq])
    assert second.seq not in seqs(harness, job)
    assert "pinned" in dtrain(harness, "delete", job, str(first.seq), "--yes", code=5).stderr
    assert "the newest" in dtrain(harness, "delete", job, str(third.seq), "--yes", code=5).stderr
    dtrain(harness, "delete", job, "77", "--yes", code=4)
    dtrain(harness, "delete", job, str(first.seq), code=2)
    shown = as_json(harness, "gc", job, "--dry-run")["items"]
    assert {item["seq"]: (item["deleted"], item["why"]) for item in shown if item["seq"]} == {
        first.seq: (False, "pinned by paper"),
        third.seq: (False, "the newest"),
    }
    dtrain(harness, "unpin", job, str(first.seq), "--holder", "paper")
    harness.until("the first is retired", lambda: seqs(harness, job) == [third.seq])
    finish(harness, job)


def test_an_operator_deletes_one_and_retention_keeps_one_of_every_n_steps(harness: Harness) -> None:
    job = begin(harness, "kept", keep_last=1, keep_every_steps=40)
    taken = [ask_for_checkpoint(harness, job, f"t{number}") for number in range(5)]
    first = {record.step // 40: record for record in reversed(taken) if record.step >= 40}
    kept = sorted({int(record.seq) for record in (*first.values(), taken[-1])})
    assert len(kept) > 1
    harness.until("retention has ended", lambda: seqs(harness, job) == kept)
    victim = kept[0]
    assert as_json(harness, "delete", job, str(victim), "--yes")["done"] is True
    assert seqs(harness, job) == kept[1:]
    assert harness.await_event(job, EventReason.CHECKPOINT_DELETED).object == f"checkpoint/{victim}"
    finish(harness, job)
    harness.assert_succeeded(job, int(harness.commits(job)[-1].step))


def test_the_scrubber_finds_rot_that_nobody_reads(tmp_path_factory: pytest.TempPathFactory) -> None:
    flags = ("--scrub-interval", "1")
    with Harness(tmp_path_factory.mktemp("scrub"), agents=2, coordinator_flags=flags) as harness:
        harness.await_ready()
        job = begin(harness, "scrubbed", keep_last=5)
        first = ask_for_checkpoint(harness, job, "one")
        second = ask_for_checkpoint(harness, job, "two")

        def verified() -> bool:
            found = [codec.decode(Verification, kv.value) for kv in read(harness, job, "verified").values()]
            return {first.seq, second.seq} == {record.seq for record in found}

        harness.until("both have been read whole", verified)
        pids = harness.pids(job)
        key = damage(harness, second)
        harness.until("it is found", lambda: harness.bad(job))
        (bad,) = harness.bad(job)
        assert (bad.seq, bad.blob, bad.agent) == (second.seq, key, "")
        third = ask_for_checkpoint(harness, job, "three")
        assert (harness.pids(job), harness.status(job).attempt) == (pids, 1)
        finish(harness, job)
        assert third.seq in seqs(harness, job)
        harness.assert_clean()


def read(harness: Harness, job: JobName, folder: str) -> Any:
    return harness.cluster.read(f"jobs/{job}/{folder}/")


def test_abandoned_multipart_uploads_are_discarded_beside_committed_blobs_too(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    with Harness(tmp_path_factory.mktemp("s3"), store="s3", agents=2) as harness:
        harness.await_ready()
        job = begin(harness, "uploads")
        record = ask_for_checkpoint(harness, job, "one")
        status = harness.status(job)
        store = open_store(status.store)
        assert isinstance(store, S3Blobs)
        root = f"{harness.cluster.name}/{job}/{status.uid}"
        lost = f"{root}/blobs/{record.seq:020d}/000001-deadbeef/00000-00-aa.st"
        beside = f"{root}/blobs/{record.seq:020d}/{record.attempt:06d}-{record.nonce}/00009-00-aa.st"
        for key in (lost, beside):
            upload = store._begin(key)
            store._access._connect().client.upload_part(
                Bucket=store._bucket, Key=store._full(key), UploadId=upload, PartNumber=1, Body=b"half"
            )
        shown = as_json(harness, "gc", job, "--dry-run")["items"]
        uploads = {item["name"].partition("?")[0] for item in shown if item["what"] == "upload"}
        assert uploads == {lost, beside}
        # Never more than these; fewer if the leader has looked by itself since.
        told = as_json(harness, "gc", job, "--yes")["message"]
        assert re.search(r"\b[0-2] orphaned objects were deleted", told), told
        assert not list(store.list_unfinished(f"{root}/"))
        assert as_json(harness, "verify", job)["ok"] is True
        store.close()
        finish(harness, job)
        assert harness.status(job).phase is JobPhase.SUCCEEDED
        assert Seq(record.seq) in seqs(harness, job)
        harness.assert_clean()
