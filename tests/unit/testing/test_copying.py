"""What agents in containers get of a user's folder."""

import io
import tarfile

import pytest

from dtrain.protocol.errors import Refused
from dtrain.testing import copying


def members(data: bytes) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return {info.name: info for info in tar}


def test_files_arrive_below_the_prefix_and_belong_to_the_agent(tmp_path):
    (tmp_path / "pkg").mkdir()
    (tmp_path / "train.py").write_text("pass")
    (tmp_path / "pkg" / "model.py").write_text("pass")
    found = members(copying.archive(tmp_path, "job-1", 10001))
    assert set(found) == {"job-1", "job-1/train.py", "job-1/pkg", "job-1/pkg/model.py"}
    assert {(info.uid, info.gid, info.uname) for info in found.values()} == {(10001, 10001, "")}


def test_caches_and_repositories_stay_at_home(tmp_path):
    for name in (".git", ".venv", "__pycache__", "node_modules"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "large").write_text("x")
    (tmp_path / "train.py").write_text("pass")
    assert set(members(copying.archive(tmp_path, "job", 1))) == {"job", "job/train.py"}


def test_a_folder_that_is_too_large_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(copying, "BYTES_MAX", 1000)
    (tmp_path / "weights").write_bytes(bytes(1001))
    with pytest.raises(Refused, match="too much to copy"):
        copying.archive(tmp_path, "job", 1)


def test_a_folder_that_is_none_is_refused(tmp_path):
    with pytest.raises(Refused, match="is no folder"):
        copying.archive(tmp_path / "nothing", "job", 1)
