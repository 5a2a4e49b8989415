"""A package that an enemy wrote: nothing of it lands outside of its folder, and nothing runs away."""

import gzip
import io
import os
import stat
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from dtrain.protocol.errors import ErrorCode, Refused
from dtrain.protocol.package import Package
from dtrain.storage.packages import packing, unpacking

Member = tuple[tarfile.TarInfo, bytes]


def package(files: int, size: int) -> Package:
    return Package("0" * 64, "0" * 16, "memory://x", 1, files, size)


def archive(*members: Member) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", format=tarfile.PAX_FORMAT) as tar:
        for info, data in members:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def file(name: str, data: bytes = b"x", mode: int = 0o644) -> Member:
    info = tarfile.TarInfo(name)
    info.mode = mode
    return info, data


def special(name: str, kind: bytes, target: str = "") -> Member:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info, b""


def folder(name: str) -> Member:
    return special(name, tarfile.DIRTYPE)


def link(name: str, target: str) -> Member:
    return special(name, tarfile.SYMTYPE, target)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "trees" / "job"
    path.mkdir(parents=True)
    return path


def unpack(target: Path, *members: Member, files: int | None = None, size: int | None = None) -> None:
    count = len(members) if files is None else files
    total = sum(len(data) for _, data in members) if size is None else size
    unpacking.unpack(io.BytesIO(archive(*members)), target, package(count, total))


def test_what_was_packed_comes_out_again(tmp_path: Path, target: Path) -> None:
    root = tmp_path / "work"
    (root / "pkg" / "empty").mkdir(parents=True)
    (root / "pkg" / "tool").write_bytes(b"#!/bin/sh\n")
    (root / "pkg" / "tool").chmod(0o4777)
    (root / "naïve name.py").write_bytes(os.urandom(3_000_000))
    (root / "l").symlink_to("pkg/tool")
    packed = packing.pack(packing.look(root), tmp_path / "p")
    entries = packed.listing.entries
    about = package(len(entries), packed.listing.size_bytes)
    old = os.umask(0o077)
    try:
        with packed.path.open("rb") as data:
            unpacking.unpack(data, target, about)
    finally:
        os.umask(old)
    assert packing.look(target).entries == entries
    assert (target / "naïve name.py").read_bytes() == (root / "naïve name.py").read_bytes()
    assert stat.S_IMODE((target / "pkg" / "tool").stat().st_mode) == 0o755, "no setuid, not for all to write"
    assert stat.S_IMODE((target / "naïve name.py").stat().st_mode) == 0o644
    assert (target / "l").readlink() == Path("pkg/tool")
    again = packing.pack(packing.look(target), tmp_path / "again")
    assert again.digest == packed.digest


@pytest.mark.parametrize(
    "members",
    [
        [file("../out")],
        [file("/out")],
        [folder("a"), file("a/../../out")],
        [file("./out")],
        [file("a//b")],
        [file("nowhere/out")],
        [link("l", ".."), file("l/out")],
        [link("l", "../..")],
        [link("l", "/etc")],
        [folder("d"), link("d/l", "../../out")],
        [link("here", "."), link("l", "here/../out")],
        [link("a", "b"), link("b", "a")],
        [file("twice"), file("twice", b"y")],
        [file("name"), folder("name")],
        [link("l", "x"), link("L2", "x"), file("x"), file("x")],
        [special("pipe", tarfile.FIFOTYPE)],
        [special("disk", tarfile.BLKTYPE)],
        [special("tty", tarfile.CHRTYPE)],
        [file("a"), special("hard", tarfile.LNKTYPE, "a")],
        [file("a"), special("hard", tarfile.LNKTYPE, "../../outside")],
    ],
    ids=lambda members: " ".join(info.name for info, _ in members),
)
def test_nothing_leaves_the_folder(tmp_path: Path, target: Path, members: list[Member]) -> None:
    (tmp_path / "outside").write_text("mine")
    with pytest.raises(Refused) as told:
        unpack(target, *members)
    assert told.value.code is ErrorCode.PACKAGE_DAMAGED
    assert sorted(path.name for path in tmp_path.iterdir()) == ["outside", "trees"]
    assert [path.name for path in (tmp_path / "trees").iterdir()] == ["job"]
    assert (tmp_path / "outside").read_text() == "mine"
    assert (tmp_path / "outside").stat().st_nlink == 1


@pytest.mark.parametrize(("files", "size"), [(1, 100), (2, 3), (3, 4), (2, 5), (1, 4)])
def test_it_holds_exactly_what_its_record_says(target: Path, files: int, size: int) -> None:
    members = [file("a", b"12"), file("b", b"34")]
    with pytest.raises(Refused, match=r"holds (more|less) than its record says"):
        unpack(target, *members, files=files, size=size)


def test_a_bomb_is_ended_early(target: Path) -> None:
    zeros = gzip.compress(bytes(64 * 1024 * 1024))
    with pytest.raises(Refused):
        unpacking.unpack(io.BytesIO(zeros), target, package(1, 10))
    name = "n" * 8_000_000
    with pytest.raises(Refused):
        unpack(target, file(name), size=1)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda d: d[: len(d) // 2],
        lambda d: b"",
        lambda d: b"not gzip",
        lambda d: d[:99] + bytes(8) + d[107:],
    ],
    ids=["half", "empty", "other", "zeros"],
)
def test_what_is_no_archive_is_said_to_be_none(target: Path, spoil: Callable[[bytes], bytes]) -> None:
    whole = archive(file("a", os.urandom(4000)), file("b", os.urandom(4000)))
    with pytest.raises(Refused) as told:
        unpacking.unpack(io.BytesIO(spoil(whole)), target, package(2, 8000))
    assert told.value.code is ErrorCode.PACKAGE_DAMAGED
