"""What goes into a package, what stays out, and that the same files make the same bytes."""

import os
import random
import shutil
import socket
import subprocess
import tarfile
from pathlib import Path

import pytest

from dtrain.storage.packages import packing
from dtrain.storage.packages.links import leads
from dtrain.storage.packages.packing import CannotPackError, Kind


def write(root: Path, **files: str) -> None:
    """Files by name, with their contents."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def names(root: Path) -> list[str]:
    return [entry.path for entry in packing.look(root).entries if entry.kind is not Kind.FOLDER]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


# The archive -------------------------------------------------------------------------


def test_the_same_files_make_the_same_bytes_wherever_and_whenever(tmp_path: Path) -> None:
    digests = set()
    for number, order in enumerate((["b.py", "a/x.py", "run.sh"], ["run.sh", "a/x.py", "b.py"])):
        folder = tmp_path / f"copy{number}"
        for name in order:
            write(folder, **{name: name * 1000})
        (folder / "run.sh").chmod(0o755 if number else 0o700)
        (folder / "b.py").chmod(0o644 if number else 0o664)
        os.utime(folder / "b.py", (number, number))
        digests.add(packing.pack(packing.look(folder), tmp_path / f"{number}.tar.gz").digest)
    assert len(digests) == 1


@pytest.mark.parametrize("change", ["contents", "name", "executable", "link", "folder"])
def test_whatever_a_script_could_notice_makes_another_package(
    root: Path, tmp_path: Path, change: str
) -> None:
    write(root, **{"a.py": "1", "b.py": "2"})
    (root / "link").symlink_to("a.py")
    before = packing.pack(packing.look(root), tmp_path / "before").digest
    if change == "contents":
        (root / "a.py").write_text("3")
    elif change == "name":
        (root / "a.py").rename(root / "c.py")
    elif change == "executable":
        (root / "a.py").chmod(0o755)
    elif change == "link":
        (root / "link").unlink()
        (root / "link").symlink_to("b.py")
    else:
        (root / "empty").mkdir()
    assert packing.pack(packing.look(root), tmp_path / "after").digest != before


def test_the_archive_says_nothing_of_who_packed_it_and_when(root: Path, tmp_path: Path) -> None:
    write(root, **{"a.py": "1"})
    packed = packing.pack(packing.look(root), tmp_path / "p.tar.gz")
    with tarfile.open(packed.path) as tar:
        (member,) = tar.getmembers()
    assert (member.uid, member.gid, member.uname, member.gname) == (0, 0, "", "")
    assert member.mtime == packing.MTIME
    assert packed.path.read_bytes()[4:8] == bytes(4), "gzip's own time stamp"
    assert packed.size_bytes == packed.path.stat().st_size


def test_a_file_that_changes_while_it_is_packed_is_said(root: Path, tmp_path: Path) -> None:
    write(root, **{"a.py": "1" * 100})
    listing = packing.look(root)
    (root / "a.py").write_text("1")
    with pytest.raises(CannotPackError, match=r"a\.py.*changed while it was packed"):
        packing.pack(listing, tmp_path / "p")


def test_a_file_that_becomes_a_link_meanwhile_is_not_followed(root: Path, tmp_path: Path) -> None:
    write(root, **{"a.py": "12345"})
    (tmp_path / "other").write_text("54321")
    listing = packing.look(root)
    (root / "a.py").unlink()
    (root / "a.py").symlink_to(tmp_path / "other")
    with pytest.raises(CannotPackError, match=r"a\.py"):
        packing.pack(listing, tmp_path / "p")


# Rules ---------------------------------------------------------------------------------


def test_gitignore_holds_nested_and_negated(root: Path) -> None:
    write(
        root,
        **{
            ".gitignore": "*.log\nbuild/\n!keep.log\n/top.txt\n",
            "a.log": "", "keep.log": "", "build/out": "", "top.txt": "", "sub/top.txt": "",
            "sub/.gitignore": "!a.log\n*.tmp\n", "sub/a.log": "", "sub/x.tmp": "", "x.tmp": "",
        },
    )  # fmt: skip
    assert names(root) == [
        ".gitignore", "keep.log", "sub/.gitignore", "sub/a.log", "sub/top.txt", "x.tmp"
    ]  # fmt: skip


def test_dtrainignore_wins_over_every_gitignore(root: Path) -> None:
    write(
        root,
        **{
            ".gitignore": "*.so\n",
            ".dtrainignore": "!native.so\ndocs/\n",
            "native.so": "", "other.so": "", "docs/a.md": "", "lib/.gitignore": "*.so\n", "lib/native.so": "",
        },
    )  # fmt: skip
    assert names(root) == [".dtrainignore", ".gitignore", "lib/.gitignore", "lib/native.so", "native.so"]


def test_git_never_goes_along_and_nor_does_what_python_writes(root: Path) -> None:
    write(root, **{".git/config": "secret", "a.py": "", "__pycache__/a.pyc": "", ".dtrainignore": "!.git/\n"})
    write(root, **{"module/.git": "gitdir: ../.git/modules/module", "module/b.py": ""})
    assert names(root) == [".dtrainignore", "a.py", "module/b.py"]


def test_a_rule_can_keep_what_python_writes(root: Path) -> None:
    write(root, **{"a.py": "", "__pycache__/a.pyc": "", ".dtrainignore": "!__pycache__/\n"})
    assert "__pycache__/a.pyc" in names(root)


def test_a_part_of_a_repository_has_the_rules_of_the_whole(tmp_path: Path) -> None:
    write(
        tmp_path,
        **{
            ".git/HEAD": "", ".gitignore": "*.ckpt\n/train/private/\n",
            "train/a.py": "", "train/old.ckpt": "", "train/private/x": "", "train/.gitignore": "!best.ckpt\n",
            "train/best.ckpt": "",
        },
    )  # fmt: skip
    assert names(tmp_path / "train") == [".gitignore", "a.py", "best.ckpt"]


def test_a_folder_that_the_repository_ignores_is_packed_when_it_is_named(tmp_path: Path) -> None:
    write(tmp_path, **{".git/HEAD": "", ".gitignore": "scratch/\n", "scratch/a.py": ""})
    assert names(tmp_path / "scratch") == ["a.py"]


PIECES = ("a", "b", "ab", "a.py", "b.txt", "build")
PATTERNS = (
    "*", "!*/", "*.py", "!*.py", "a", "a/", "/a", "/a/", "b/*", "!b/a.py", "**/ab", "a/**", "build",
    "!build/",
    "a/b", "?b", "[ab]", "!a", r"\!a", "# a", "", "*.txt ", "**/a/*.py", "ab/**/b.txt", "!ab/", "/*", "!/a",
)  # fmt: skip


@pytest.mark.parametrize("seed", range(40))
def test_what_is_left_out_is_what_git_leaves_out(root: Path, seed: int) -> None:
    """Random trees and rules, and git itself as the judge."""
    if shutil.which("git") is None:
        pytest.skip("no git here")
    choose = random.Random(seed)
    for _ in range(25):
        path = root.joinpath(*(choose.choice(PIECES) for _ in range(choose.randint(1, 4))))
        if not any(part.is_file() for part in path.parents) and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("")
    folders = [root, *(path for path in root.rglob("*") if path.is_dir())]
    for folder in choose.sample(folders, min(3, len(folders))):
        lines = choose.choices(PATTERNS, k=choose.randint(1, 5))
        (folder / ".gitignore").write_text("\n".join(lines) + "\n")
    env = {"PATH": os.environ["PATH"], "HOME": str(root), "GIT_CONFIG_NOSYSTEM": "1"}
    subprocess.run(["git", "init", "-q"], cwd=root, check=True, env=env)
    listed = ["git", "ls-files", "-z", "--others", "--exclude-standard"]
    found = subprocess.run(listed, cwd=root, check=True, env=env, capture_output=True, text=True).stdout
    wanted = sorted(path for path in found.split("\0") if path)
    rules = {str(path.relative_to(root)): path.read_text() for path in root.rglob(".gitignore")}
    assert sorted(names(root)) == wanted, rules


# What cannot be packed -----------------------------------------------------------------


def test_all_that_would_not_be_the_same_elsewhere_is_told_at_once(root: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (root / "out").symlink_to("../data")
    (root / "etc").symlink_to("/etc")
    os.mkfifo(root / "pipe")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(os.path.relpath(root / "socket"))
        with pytest.raises(CannotPackError) as told:
            packing.look(root)
    text = "\n".join(told.value.details)
    for name in ("out", "etc", "pipe", "socket"):
        assert name in text
    assert ".dtrainignore" in told.value.fix


def test_what_is_left_out_may_be_anything(root: Path) -> None:
    write(root, **{".dtrainignore": "data\n", "a.py": ""})
    (root / "data").symlink_to("/mnt/data")
    assert names(root) == [".dtrainignore", "a.py"]


def test_links_within_stay_links_also_absolute_ones(root: Path, tmp_path: Path) -> None:
    write(root, **{"a/b/c.py": "x"})
    (root / "a" / "up").symlink_to("../a/b")
    (root / "a" / "whole").symlink_to(root / "a" / "b" / "c.py")
    found = {e.path: e.target for e in packing.look(root).entries if e.kind is Kind.LINK}
    assert found == {"a/up": "../a/b", "a/whole": "../a/b/c.py"}


@pytest.mark.parametrize(
    ("links", "path", "wanted"),
    [
        ({"l": "a"}, "l", "a"),
        ({"l": "a/../../b"}, "l", None),
        ({"d/l": "../x"}, "d/l", "x"),
        ({"d/l": "../../x"}, "d/l", None),
        # By the names alone it stays inside; through the other link it does not.
        ({"here": ".", "l": "here/../x"}, "l", None),
        ({"deep/here": "..", "l": "deep/here/../x"}, "l", None),
        ({"a": "b", "b": "a"}, "a", None),
        ({"l": "/etc"}, "l", None),
        ({"l": "."}, "l", ""),
    ],
)
def test_where_a_link_leads(links: dict[str, str], path: str, wanted: str | None) -> None:
    assert leads(links, path) == wanted


def test_a_link_and_a_folder_that_differ_in_case_alone_are_refused(root: Path) -> None:
    write(root, **{"Data/a": "", "b": ""})
    (root / "data").symlink_to("b")
    with pytest.raises(CannotPackError) as told:
        packing.look(root)
    assert "upper and lower case" in "\n".join(told.value.details)


def test_one_that_is_too_large_is_told_with_its_biggest_files(root: Path) -> None:
    write(root, **{"a.py": "x", "runs/1/model.bin": "m" * 5000, "runs/2/model.bin": "m" * 4000, "b": "y"})
    with pytest.raises(CannotPackError) as told:
        packing.look(root, bytes_max=5000)
    assert "runs/1/model.bin" in told.value.details[0]
    assert any(line.endswith("runs/ (4 entries)") for line in told.value.details)
    with pytest.raises(CannotPackError, match="at most 3"):
        packing.look(root, files_max=3)


def test_a_name_that_is_not_text_is_refused(root: Path) -> None:
    with (root / os.fsdecode(b"bad\xff")).open("w"):
        pass
    with pytest.raises(CannotPackError) as told:
        packing.look(root)
    assert "not UTF-8" in "\n".join(told.value.details)
