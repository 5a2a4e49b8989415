"""``submit`` and ``run`` with a folder that is packed: what is, when it is not, and what is told."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.unit.cli.fakes import FakeReplica

from dtrain.cli import jobfile
from dtrain.cli.jobfile import Pack
from dtrain.cli.main import run
from dtrain.protocol.errors import Conflict, ErrorCode, NotFound
from dtrain.protocol.package import packages_prefix
from dtrain.storage.blobs.local import LocalBlobs

Out = pytest.CaptureFixture[str]


class Place:
    """A job file with a script beside it, and a store."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "job"
        self.folder.mkdir()
        (self.folder / "train.py").write_text("print('hello')\n")
        (self.folder / "notes.txt").write_text("not for others")
        (self.folder / ".gitignore").write_text("notes.txt\n")
        (folder / "store").mkdir()
        self.store = LocalBlobs(folder / "store")
        self.file = self.folder / "job.yaml"
        self.write("working_dir: .\n")

    def write(self, *lines: str) -> None:
        self.file.write_text("name: digits\nscript: train.py\n" + "".join(lines))

    @property
    def stored(self) -> list[str]:
        return [info.key for info in self.store.list(packages_prefix("local"))]  # type: ignore[arg-type]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.mark.parametrize(
    ("lines", "pack"),
    [
        ("", Pack.NEVER),
        ("working_dir: .\n", Pack.IF_POSSIBLE),
        ("working_dir: ../job\n", Pack.IF_POSSIBLE),
        ("working_dir: {abs}\n", Pack.NEVER),
        ("working_dir: {abs}\npack: true\n", Pack.ALWAYS),
        ("pack: true\n", Pack.ALWAYS),
        ("working_dir: .\npack: false\n", Pack.NEVER),
    ],
)
def test_which_folders_are_packed(place: Place, lines: str, pack: Pack) -> None:
    place.write(lines.format(abs=place.folder))
    job = jobfile.read(place.file)
    assert job.pack is pack
    assert job.spec.working_dir == str(place.folder)
    assert job.spec.package is None


def test_a_flag_packs_whatever_the_file_says(place: Place, tmp_path: Path) -> None:
    other = tmp_path / 'an "odd": name'
    other.mkdir()
    (other / "train.py").touch()
    place.write("working_dir: /nowhere\npack: false\n")
    job = jobfile.read(place.file, jobfile.packing(other))
    assert (job.pack, job.spec.working_dir) == (Pack.ALWAYS, str(other))


def test_a_folder_that_is_to_be_packed_must_be_here(place: Place) -> None:
    place.write("working_dir: /nowhere/at/all\npack: true\n")
    with pytest.raises(NotFound, match="/nowhere/at/all"):
        jobfile.read(place.file)


def test_a_dry_run_lists_what_would_be_packed_with_and_without_a_cluster(
    place: Place, replica: FakeReplica, address: str, capsys: Out
) -> None:
    assert run(["submit", str(place.file), "--dry-run"]) == 0
    alone = capsys.readouterr().out
    assert "train.py" in alone
    assert "notes.txt" not in alone
    assert run(["submit", str(place.file), "--dry-run", "--coordinators", address]) == 0
    assert capsys.readouterr().out == alone
    assert run(["submit", str(place.file), "--dry-run", "-o", "json"]) == 0
    listed = json.loads(capsys.readouterr().out)["would_pack"]
    assert [entry["path"] for entry in listed["entries"]] == [".gitignore", "job.yaml", "train.py"]
    assert place.stored == []
    assert replica.submitted == {}


def submitted(replica: FakeReplica, request_id: str = "r1") -> Any:
    return json.loads(replica.submitted[request_id])


def test_it_is_stored_once_and_named_in_the_job(
    place: Place, replica: FakeReplica, address: str, capsys: Out
) -> None:
    replica.store = place.store.uri
    words = ["submit", str(place.file), "--coordinators", address, "--request-id"]
    assert run([*words, "r1"]) == 0
    assert "3 entries" in capsys.readouterr().err
    package = submitted(replica)["package"]
    assert (package["store"], package["files"], package["source"]) == (place.store.uri, 3, str(place.folder))
    (key,) = place.stored
    assert f"{package['digest']}/{package['nonce']}" in key
    (place.folder / "notes.txt").write_text("something else")
    assert run([*words, "r2"]) == 0
    assert "stored before" in capsys.readouterr().err
    assert submitted(replica, "r2")["package"] == package
    assert len(place.stored) == 1


def test_without_a_store_a_relative_folder_is_a_path_and_a_packed_one_refused(
    place: Place, replica: FakeReplica, address: str, capsys: Out
) -> None:
    words = ["submit", str(place.file), "--coordinators", address, "--request-id", "r1"]
    assert run(words) == 0
    assert "must exist on every machine" in capsys.readouterr().err
    assert "package" not in submitted(replica)
    assert run([*words, "--set", "pack=true"]) == 2
    told = capsys.readouterr().err
    assert "DT-1007" in told
    assert "--default-store" in told


def test_a_job_s_own_store_comes_first(place: Place, replica: FakeReplica, address: str) -> None:
    replica.store = "s3://not-this-one"
    words = ["submit", str(place.file), "--coordinators", address, "--request-id", "r1"]
    assert run([*words, "--set", f"checkpoint.store={place.store.uri}"]) == 0
    assert submitted(replica)["package"]["store"] == place.store.uri
    assert len(place.stored) == 1


def test_one_that_is_being_deleted_is_stored_under_another_name(
    place: Place, replica: FakeReplica, address: str
) -> None:
    replica.store = place.store.uri
    words = ["submit", str(place.file), "--coordinators", address, "--request-id"]
    assert run([*words, "r1"]) == 0
    times = 0

    def refuse() -> Conflict | None:
        nonlocal times
        if replica.calls[-1] != "Submit":
            return None
        times += 1
        return Conflict(ErrorCode.CONFLICT, "it is not in the store any more") if times == 1 else None

    replica.refuse = refuse  # type: ignore[assignment]
    assert run([*words, "r2"]) == 0
    assert len(place.stored) == 2
    assert submitted(replica, "r2")["package"]["nonce"] != submitted(replica)["package"]["nonce"]


def test_a_coordinator_that_knows_no_packages_gets_the_path(
    place: Place, replica: FakeReplica, address: str, capsys: Out
) -> None:
    replica.store = place.store.uri

    def refuse() -> Conflict | None:
        first = replica.calls[-1] == "Submit" and replica.calls.count("Submit") == 1
        return Conflict(ErrorCode.OLDER_RELEASE, "coordinator c9 is too old") if first else None

    replica.refuse = refuse  # type: ignore[assignment]
    assert run(["submit", str(place.file), "--coordinators", address, "--request-id", "r1"]) == 0
    assert "coordinator c9 is too old" in capsys.readouterr().err
    assert "package" not in submitted(replica)


def test_a_script_that_the_rules_leave_out_is_missed_before_anything_is_stored(
    place: Place, replica: FakeReplica, address: str, capsys: Out
) -> None:
    replica.store = place.store.uri
    (place.folder / ".dtrainignore").write_text("train.py\n")
    assert run(["submit", str(place.file), "--coordinators", address]) == 2
    told = capsys.readouterr().err
    assert "train.py is not among what is packed" in told
    assert ".dtrainignore" in told
    assert place.stored == []


def test_what_cannot_be_packed_is_listed(
    place: Place, replica: FakeReplica, address: str, capsys: Out
) -> None:
    replica.store = place.store.uri
    (place.folder / "data").symlink_to("/mnt/data")
    assert run(["submit", str(place.file), "--coordinators", address]) == 2
    told = capsys.readouterr().err
    assert "error[DT-1007]" in told
    assert "data is a link to '/mnt/data'" in told
    assert place.stored == []


def test_run_packs_the_folder_it_is_given(
    place: Place, replica: FakeReplica, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.unit.cli.test_verbs import ended

    from dtrain.protocol.job import JobPhase

    replica.store = place.store.uri
    replica.items = ended(JobPhase.SUCCEEDED)  # type: ignore[assignment]
    monkeypatch.chdir(tmp_path)
    words = [
        "run",
        "--coordinators",
        address,
        "--name",
        "digits",
        "--working-dir",
        "job",
        "job/train.py",
        "--x",
    ]
    assert run(words) == 0
    ((_, document),) = replica.submitted.items()
    spec = json.loads(document)
    assert (spec["entry"]["target"], spec["entry"]["args"]) == ("train.py", ["--x"])
    assert spec["package"]["source"] == str(place.folder)
