"""What the doctor says: each judgement with what makes it fail, the runner, and the report."""

import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from dtrain.cli import context
from dtrain.cli.context import known_here
from dtrain.cli.doctor import etcd, job, judging, machine, reporting, running, store
from dtrain.cli.doctor.findings import Check, Finding, Level, Verdict, passed
from dtrain.cli.globals import Settings
from dtrain.cli.main import run
from dtrain.protocol.errors import ErrorCode, Unavailable
from dtrain.protocol.ids import ClusterName
from dtrain.runtime.config import EtcdOptions
from dtrain.storage.blobs import digest
from dtrain.storage.blobs.flow import Flow
from dtrain.storage.blobs.memory import MemoryBlobs
from dtrain.storage.blobs.port import BlobInfo
from dtrain.storage.etcd.open import open_etcd
from dtrain.storage.etcd.port import Etcd

GB = 1e9

CASES: list[tuple[str, Callable[[], Verdict], str]] = [
    ("a good etcd", lambda: judging.etcd_version("3.5.33", for_test=False, users=True), "pass"),
    ("one that loses data", lambda: judging.etcd_version("3.5.12", for_test=False, users=False), "fail"),
    ("the same for a test", lambda: judging.etcd_version("3.5.1", for_test=True, users=False), "warn"),
    ("permissions that leak", lambda: judging.etcd_version("3.5.16", for_test=False, users=True), "warn"),
    ("no permissions to leak", lambda: judging.etcd_version("3.5.16", for_test=False, users=False), "pass"),
    ("a release nobody knows", lambda: judging.etcd_version("", for_test=False, users=False), "skipped"),
    ("all members", lambda: judging.etcd_quorum(3, 3, ()), "pass"),
    ("one member away", lambda: judging.etcd_quorum(3, 2, ("b",)), "warn"),
    ("no majority", lambda: judging.etcd_quorum(3, 1, ("a", "b")), "fail"),
    ("the only member away", lambda: judging.etcd_quorum(1, 0, ("a",)), "fail"),
    ("fast writes", lambda: judging.commit_latency([0.004] * 20, 10.0), "pass"),
    ("one slow write", lambda: judging.commit_latency([0.004] * 19 + [0.6], 10.0), "warn"),
    ("writes beyond a tenth of a lease", lambda: judging.commit_latency([1.2], 10.0), "fail"),
    ("short leases want more", lambda: judging.commit_latency([0.6], 5.0), "fail"),
    ("a quick disk", lambda: judging.fsync(0.008), "pass"),
    ("a slow disk", lambda: judging.fsync(0.256), "warn"),
    ("a small database", lambda: judging.database(0.1 * GB, 2 * GB), "pass"),
    ("half full", lambda: judging.database(1.1 * GB, 2 * GB), "warn"),
    ("nearly full", lambda: judging.database(1.7 * GB, 2 * GB), "fail"),
    ("no alarm", lambda: judging.alarms(()), "pass"),
    ("full", lambda: judging.alarms(("NOSPACE",)), "fail"),
    ("corrupt", lambda: judging.alarms(("CORRUPT",)), "fail"),
    ("compacted", lambda: judging.compaction(2e6, 1.5e6), "pass"),
    ("never compacted", lambda: judging.compaction(2e6, -1.0), "warn"),
    ("clocks agree", lambda: judging.clock(-0.7, "it"), "pass"),
    ("clocks differ", lambda: judging.clock(-3600.0, "it"), "warn"),
    ("etcd here", lambda: judging.etcd_access(user="", tls=False, local=True), "pass"),
    ("etcd open to all", lambda: judging.etcd_access(user="", tls=True, local=False), "warn"),
    ("etcd with users", lambda: judging.etcd_access(user="ops", tls=True, local=False), "pass"),
    ("a good certificate", lambda: judging.expiry("c.pem", 90 * 86400.0), "pass"),
    ("one that ends soon", lambda: judging.expiry("c.pem", 86400.0), "warn"),
    ("one that has ended", lambda: judging.expiry("c.pem", -1.0), "fail"),
    ("a leader", lambda: judging.leadership(["a", "b", "c"], [("a", 7)], ()), "pass"),
    ("a replica away", lambda: judging.leadership(["a", "b"], [("a", 7)], ("c",)), "warn"),
    ("one replica only", lambda: judging.leadership(["a"], [("a", 7)], ()), "warn"),
    ("two that believe to lead", lambda: judging.leadership(["a", "b"], [("a", 7), ("b", 9)], ()), "warn"),
    ("no leader", lambda: judging.leadership(["a", "b"], (), ()), "fail"),
    ("no replica", lambda: judging.leadership((), (), ("a",)), "fail"),
    ("a fresh copy", lambda: judging.mirror("a", 0.4), "pass"),
    ("a stale copy", lambda: judging.mirror("a", 40.0), "fail"),
    ("no copy yet", lambda: judging.mirror("a", float("inf")), "fail"),
    ("one release", lambda: judging.versions({"0.2.0": ["a", "b"]}), "pass"),
    ("an upgrade", lambda: judging.versions({"0.2.0": ["a"], "0.1.0": ["b"]}), "warn"),
    ("releases too far apart", lambda: judging.versions({"0.3.0": ["a"], "0.1.0": ["b"]}), "fail"),
    ("free agents", lambda: judging.agents(2, {}, (), 4, 4), "pass"),
    ("no agent", lambda: judging.agents(0, {}, (), 0, 0), "fail"),
    ("a blocked agent", lambda: judging.agents(2, {"a1": "rank 2 cannot be killed"}, (), 2, 4), "fail"),
    ("all cordoned", lambda: judging.agents(2, {}, ("a1", "a2"), 0, 4), "warn"),
    ("addresses answer", lambda: judging.links(2, ()), "pass"),
    ("an address does not", lambda: judging.links(2, ("a1 at 10.0.0.1:7071",)), "warn"),
    ("an old Python", lambda: judging.python((3, 10)), "fail"),
    ("few files", lambda: judging.open_files(1024), "warn"),
    ("many files", lambda: judging.open_files(65536), "pass"),
    ("GPUs and no locked memory", lambda: judging.locked_memory(65536.0, gpus=8), "warn"),
    ("no GPU needs none", lambda: judging.locked_memory(65536.0, gpus=0), "pass"),
    ("room", lambda: judging.free_space("/x", 50 * GB), "pass"),
    ("little room", lambda: judging.free_space("/x", 5 * GB), "warn"),
    ("no room", lambda: judging.free_space("/x", 0.1 * GB), "fail"),
    ("a folder of somebody else's", lambda: judging.unwritable("/x"), "fail"),
    ("memory", lambda: judging.arena(64 * GB, float("inf")), "pass"),
    ("a tight control group", lambda: judging.arena(64 * GB, 1 * GB), "warn"),
    ("no torch", lambda: judging.torch_found({"error": "No module named 'torch'"}), "warn"),
    ("torch on a CPU", lambda: judging.torch_found({"torch": "2.13.0", "gloo": True}), "pass"),
    ("torch without gloo", lambda: judging.torch_found({"torch": "2.13.0", "gloo": False}), "fail"),
    (
        "GPUs that torch does not see",
        lambda: judging.torch_found({"torch": "2.13.0+cpu", "gloo": True, "devices_seen": 8, "gpus": 0}),
        "fail",
    ),
    (
        "GPUs without NCCL",
        lambda: judging.torch_found({"torch": "2.13.0", "gloo": True, "gpus": 8, "nccl": ""}),
        "fail",
    ),
    ("a calm import", lambda: judging.fork_safety({"threads": 1}), "pass"),
    ("an import that starts threads", lambda: judging.fork_safety({"threads": 3}), "warn"),
    (
        "an import that takes the GPU",
        lambda: judging.fork_safety({"threads": 1, "cuda_initialized": True}),
        "warn",
    ),
    ("an import that fails", lambda: judging.fork_safety({"error": "ModuleNotFoundError: x"}), "fail"),
    ("an old kernel", lambda: judging.kernel(False, 0), "fail"),
    ("no ptrace", lambda: judging.kernel(True, 2), "warn"),
    ("ports taken", lambda: judging.ports(["7070 (coordinator)"], ["7070 (coordinator)"]), "warn"),
    ("a fast store", lambda: judging.store_speed("wrote", 64e6, 0.5), "pass"),
    ("a slow store", lambda: judging.store_speed("wrote", 64e6, 30.0), "warn"),
    ("a job that fits", lambda: judging.fits(2, 4, [4, 4], [8, 8]), "pass"),
    ("a job that waits", lambda: judging.fits(2, 4, [4, 0], [8, 8]), "warn"),
    ("a job too large", lambda: judging.fits(2, 16, [8, 8], [8, 8]), "fail"),
]


@pytest.mark.parametrize(
    ("judged", "level"), [(case[1], case[2]) for case in CASES], ids=[c[0] for c in CASES]
)
def test_each_measurement_has_its_verdict_and_what_to_do(judged: Callable[[], Verdict], level: str) -> None:
    verdict = judged()
    assert verdict.level == level, verdict.measured
    assert verdict.measured
    assert bool(verdict.fix) == (level in ("warn", "fail"))


# Running --------------------------------------------------------------------------------


def test_a_check_that_hangs_is_a_failure_in_time_and_hides_no_other() -> None:
    never = threading.Event()
    said: list[Finding] = []
    try:
        found = running.run(
            [
                Check("etcd", "hangs", lambda: [passed(str(never.wait()))], limit_s=0.05),
                Check("etcd", "works", lambda: [passed("well")]),
            ],
            said.extend,
        )
    finally:
        never.set()
    assert [(one.check, one.level) for one in found] == [("hangs", Level.FAIL), ("works", Level.PASS)]
    assert "0.05 s" in found[0].measured
    assert said == found


def test_what_a_check_raises_is_its_finding_with_the_errors_own_fix() -> None:
    def unreachable() -> Sequence[Verdict]:
        raise Unavailable(ErrorCode.ETCD_UNAVAILABLE, "etcd is away", cause="refused", fix="start it")

    def broken() -> Sequence[Verdict]:
        raise ZeroDivisionError("a bug")

    found = running.run([Check("etcd", "a", unreachable), Check("etcd", "b", broken)], lambda _: None)
    assert (found[0].measured, found[0].fix) == ("etcd is away: refused", "start it")
    assert "ZeroDivisionError" in found[1].measured
    assert {one.level for one in found} == {Level.FAIL}


# The store --------------------------------------------------------------------------------


class Careless(MemoryBlobs):
    """Overwrites what is there, and looks at no checksum."""

    def put(self, key: str, parts: Any, *, chunk_crcs: Any, flow: Flow | None = None) -> BlobInfo:
        self.delete(key)
        return super().put(key, parts, chunk_crcs=[digest.crc32c(part) for part in parts], flow=flow)


def looked(blobs: MemoryBlobs, monkeypatch: pytest.MonkeyPatch) -> dict[str, Finding]:
    monkeypatch.setattr(store, "open_here", lambda _uri: blobs)
    found = running.run(store.checks(blobs.uri), lambda _: None)
    return {one.check: one for one in found}


def test_a_sound_store_passes_and_is_left_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    blobs = MemoryBlobs("sound")
    found = looked(blobs, monkeypatch)
    assert {one.level for one in found.values()} == {Level.PASS, Level.SKIPPED}, found
    assert list(blobs.list("")) == []


def test_a_store_that_overwrites_and_checks_nothing_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    found = looked(Careless("careless"), monkeypatch)
    assert found["write-once"].level is Level.FAIL
    assert "412" in found["write-once"].fix
    assert found["checksums"].level is Level.WARN
    assert found["race"].level is Level.WARN


def test_a_store_that_cannot_be_used_is_told_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(operation: str, _key: str) -> None:
        if operation == "list":
            raise Unavailable(ErrorCode.STORE_UNAVAILABLE, "the store is away", fix="start it")

    found = looked(MemoryBlobs("away", fault=refuse), monkeypatch)
    assert found.pop("access").fix == "start it"
    assert {one.level for one in found.values()} == {Level.SKIPPED}


# This machine, and a job ------------------------------------------------------------------


def test_this_machine_can_be_looked_at_without_a_cluster(tmp_path: Path) -> None:
    found = running.run(machine.checks(tmp_path / "not" / "there" / "yet", ["json"]), lambda _: None)
    by_name = {one.check: one for one in found}
    assert by_name["torch"].level is Level.PASS, by_name["torch"].measured
    assert by_name["fork"].level is Level.PASS, by_name["fork"].measured
    assert by_name["kernel"].level is Level.PASS
    assert str(tmp_path) in by_name["disk"].measured


def test_a_module_that_cannot_be_preloaded_is_named(tmp_path: Path) -> None:
    [check] = [one for one in machine.checks(tmp_path, ["not_a_module"]) if one.name == "fork"]
    [found] = running.run([check], lambda _: None)
    assert found.level is Level.FAIL
    assert "not_a_module" in found.measured


def test_a_job_file_is_looked_at_with_its_script(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("print('x'")
    path = tmp_path / "job.yaml"
    path.write_text("name: digits\nscript: train.py\nnnodes: 2\nnproc_per_node: 4\n")
    checks, spec = job.checks(path, lambda: ([4, 0], [4, 4]))
    assert spec is not None
    found = {one.check: one for one in running.run(checks, lambda _: None)}
    assert found["file"].level is Level.PASS
    assert "was never closed" in found["program"].measured
    assert found["fits"].level is Level.WARN
    path.write_text("name: Digits\nscript: train.py\nrestarts: {maximum: 1}\n")
    checks, spec = job.checks(path, None)
    assert spec is None
    assert len(running.run(checks, lambda _: None)) == 2


# The verb -----------------------------------------------------------------------------------


def test_without_a_cluster_it_says_what_it_could_not_look_at_and_where_to_begin(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["doctor", "--skip", "machine", "-o", "json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["kind"], told["healthy"]) == ("Diagnosis", True)
    assert {one["level"] for one in told["findings"]} == {"skipped"}
    assert any("dtrain up" in one["fix"] for one in told["findings"])


def test_a_failed_check_is_exit_code_8(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--only", "etcd", "--endpoints", "http://127.0.0.1:9"]) == 8
    told = capsys.readouterr().out
    assert "fail    etcd/members" in told
    assert "fix:" in told


def test_the_source_of_each_setting_is_told_and_no_secret(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    context.remember(known_here("here", ("127.0.0.1:1",), (), tmp_path))
    monkeypatch.setenv("ETCDCTL_USER", "ops:hunter2")
    told = reporting.configuration(Settings(coordinators="10.0.0.1:7070"))["settings"]
    assert told["coordinators"] == {"value": "10.0.0.1:7070", "source": "flag"}
    assert told["cluster"]["value"] == "here"
    assert told["user"] == {"value": "ops", "source": "ETCDCTL_USER"}
    assert told["key"]["source"] == "default"
    assert "hunter2" not in json.dumps(told)


def test_one_client_of_etcd_serves_all_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[EtcdOptions] = []

    def opening(options: EtcdOptions) -> Etcd:
        opened.append(options)
        return open_etcd(options)

    monkeypatch.setattr(etcd, "open_etcd", opening)
    options = EtcdOptions(endpoints=("http://127.0.0.1:9",))
    found = running.run(etcd.checks(ClusterName("local"), options, 10.0), lambda _: None)
    assert {one.check for one in found if one.level is Level.FAIL} >= {"version", "latency", "database"}
    assert opened == [options]
