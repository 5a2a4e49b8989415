"""What a folder adds to the contract: durability, crashes, disks that refuse."""

import errno
import fcntl
import mmap
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.contract.blobs.conftest import put

from dtrain.protocol.errors import DtrainError, ErrorCode, OutcomeUnknown, Refused, Unavailable
from dtrain.storage.blobs import local as local_module
from dtrain.storage.blobs import outcomes
from dtrain.storage.blobs.flow import PIECE_BYTES
from dtrain.storage.blobs.local import BLOCK_BYTES, DIRECT_FROM_BYTES, LocalBlobs
from dtrain.storage.blobs.open import open_store
from dtrain.storage.blobs.port import PART_BYTES

_DIES_HALF_WAY = """
import sys, time
from pathlib import Path
from dtrain.storage.blobs import digest, outcomes
from dtrain.storage.blobs.flow import PIECE_BYTES
from dtrain.storage.blobs.local import LocalBlobs
from dtrain.storage.blobs.port import PART_BYTES

check = outcomes.check_chunk
def stop_at_the_second(key, index, chunk, expected):
    check(key, index, chunk, expected)
    if index == 1:
        print("half", flush=True)
        time.sleep(60)

outcomes.check_chunk = stop_at_the_second
parts = [bytes(PART_BYTES), b"rest"]
LocalBlobs(Path(sys.argv[1])).put("a/b", parts, chunk_crcs=[digest.crc32c(p) for p in parts])
"""


class Syncs:
    """The paths that were synced, in order."""

    def __init__(self, patch: pytest.MonkeyPatch, root: Path) -> None:
        self.paths: list[str] = []
        real = os.fsync

        def record(fd: int) -> None:
            real(fd)
            self.paths.append(str(Path(f"/proc/self/fd/{fd}").readlink().relative_to(root)))

        patch.setattr(os, "fsync", record)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


def test_file_and_folders_are_synced_before_put_returns(
    local: LocalBlobs, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    syncs = Syncs(monkeypatch, root)
    put(local, "a/b/c", b"x")
    file, *folders = syncs.paths
    assert file.startswith(".incoming/")
    assert folders == [".", "a", "a/b"]
    syncs.paths.clear()
    put(local, "a/b/d", b"x")
    assert syncs.paths[1:] == ["a/b"]


def test_folders_that_another_process_made_are_synced_too(
    local: LocalBlobs, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(local, "a/b/c", b"x")
    syncs = Syncs(monkeypatch, root)
    put(LocalBlobs(root), "a/b/d", b"x")
    assert syncs.paths[1:] == [".", "a", "a/b"]


def test_a_repeated_put_makes_durable_what_a_dead_writer_left(
    local: LocalBlobs, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(local, "a/b", b"x")
    syncs = Syncs(monkeypatch, root)
    put(local, "a/b", b"x")
    assert syncs.paths[-2:] == ["a/b", "a"]


def test_a_writer_killed_half_way_leaves_nothing_visible(local: LocalBlobs, root: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", _DIES_HALF_WAY, str(root)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    try:
        assert child.stdout.readline() == b"half\n"
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
    assert list(local.list("")) == []
    assert not (root / "a").exists()
    (token,) = local.list_unfinished("a/")
    local.discard_unfinished(token)
    assert list(local.list_unfinished("")) == []
    put(local, "a/b", b"whole")


def test_a_writer_whose_upload_is_discarded_is_told(
    local: LocalBlobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = outcomes.check_chunk

    def discard(*args: object) -> None:
        check(*args)  # type: ignore[arg-type]
        for token in local.list_unfinished(""):
            local.discard_unfinished(token)

    monkeypatch.setattr(outcomes, "check_chunk", discard)
    with pytest.raises(Refused, match="discarded while it ran"):
        put(local, "a/b", b"x")
    assert list(local.list("")) == []


def test_nothing_is_left_beside_the_blobs(local: LocalBlobs, root: Path) -> None:
    put(local, "a/b", b"x")
    put(local, "a/b", b"x")
    assert [p.name for p in root.rglob("*") if p.is_file()] == ["b"]
    local.delete("a/b")
    assert [p.name for p in root.rglob("*")] == [".incoming"]


def test_folders_without_a_file_are_told_and_taken(local: LocalBlobs, root: Path) -> None:
    put(local, "a/job/blobs/1/x", b"x")
    for left in (
        "a/job/blobs/2/b",
        f".incoming/{1:016x}/a/job/blobs/3",
        f".incoming/{2:016x}/a",
        f".incoming/{3:016x}",
        "a/other/blobs",
    ):
        (root / left).mkdir(parents=True)
    assert list(local.list_unfinished("a/job/blobs/1/x")) == [f"a/?empty={2:016x}", f"?empty={3:016x}"]
    tokens = list(local.list_unfinished("a/job/"))
    assert tokens == [
        f"a/job/blobs/3/?empty={1:016x}",
        f"a/?empty={2:016x}",
        f"?empty={3:016x}",
        "a/job/blobs/2/b/?empty",
    ]
    for token in [*tokens, *tokens]:
        local.discard_unfinished(token)
    assert list((root / ".incoming").iterdir()) == []
    assert sorted(path.name for path in (root / "a/job/blobs").iterdir()) == ["1"]
    assert list(local.list_unfinished("")) == ["a/other/blobs/?empty"]
    assert local.get("a/job/blobs/1/x") == b"x"


def test_a_token_never_takes_a_folder_that_is_in_use(local: LocalBlobs, root: Path) -> None:
    (root / "a/b").mkdir(parents=True)
    (root / f".incoming/{1:016x}/a").mkdir(parents=True)
    tokens = list(local.list_unfinished(""))
    assert len(tokens) == 2
    put(local, "a/b/c", b"x")
    (root / f".incoming/{1:016x}/a/file").write_bytes(b"half")
    for token in tokens:
        local.discard_unfinished(token)
    assert local.get("a/b/c") == b"x"
    assert list(local.list_unfinished("a/file")) == [f"a/file?upload={1:016x}"]
    for bad in ("../?empty", "a/../../b/?empty", "?upload=0", "x"):
        with pytest.raises(ValueError):
            local.discard_unfinished(bad)


@pytest.mark.parametrize("call", ["mkdir", "open", "link", "fsync"])
def test_a_writer_whose_folders_are_taken_makes_them_again(
    local: LocalBlobs, root: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    real, calls = getattr(os, call), []

    def take_everything(*args: object, **options: object) -> object:
        calls.append(args)
        # At each of the first calls a sweep passes, which takes what holds nothing.
        if len(calls) <= 4:
            for token in local.list_unfinished(""):
                if "?empty" in token:
                    local.discard_unfinished(token)
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, take_everything)
        put(local, "a/b/c", b"x")
    assert local.get("a/b/c") == b"x"
    assert list(local.list_unfinished("")) == []


def test_a_folder_that_was_taken_and_made_by_another_is_synced_again(
    local: LocalBlobs, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(local, "a/1/x", b"x")
    local.delete("a/1/x")
    # Another writer made it, and nobody knows whether it is durable.
    (root / "a/2").mkdir(parents=True)
    syncs = Syncs(monkeypatch, root)
    put(local, "a/2/x", b"x")
    assert syncs.paths[1:] == [".", "a", "a/2"]


def test_a_lost_mount_is_not_written_over(local: LocalBlobs, root: Path) -> None:
    root.rmdir()
    for call in (
        lambda: put(local, "a", b"x"),
        lambda: local.get("a"),
        lambda: list(local.list("")),
        lambda: list(local.list_unfinished("")),
        lambda: local.delete("a"),
    ):
        with pytest.raises(Refused, match="does not exist") as refusal:
            call()
        assert refusal.value.code == ErrorCode.STORE_REFUSED
        assert "mount" in refusal.value.fix
    assert not root.exists()


@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [
        (errno.ENOSPC, Refused, "free space"),
        (errno.EDQUOT, Refused, "free space"),
        (errno.EACCES, Refused, "read and write"),
        (errno.EROFS, Refused, "read and write"),
        (errno.EIO, Unavailable, "disk or mount"),
    ],
)
def test_a_disk_that_refuses_says_what_to_do(
    local: LocalBlobs, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Refused], words: str
) -> None:
    def refuse(fd: int, data: bytes) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", refuse)
        with pytest.raises(kind) as error:
            put(local, "a/b", b"x")
    assert words in error.value.fix
    assert "a/b" in error.value.message
    assert list(local.list("")) == list(local.list_unfinished("")) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_disk_that_fails_half_way_leaves_nothing_visible(
    local: LocalBlobs, root: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    real, calls = getattr(os, call), []

    def fail(fd: int, *data: bytes) -> int:
        calls.append(fd)
        regular = not Path(f"/proc/self/fd/{fd}").readlink().is_dir()
        # The first pieces are on the disk by then.
        if regular and (call == "fsync" or len(calls) == 3):
            raise OSError(number, os.strerror(number))
        return int(real(fd, *data) or 0)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(DtrainError) as error:
            put(local, "a/b", bytes(4 * PIECE_BYTES))
    full = number == errno.ENOSPC
    assert error.value.code == (ErrorCode.STORE_FULL if full else ErrorCode.STORE_UNAVAILABLE)
    assert isinstance(error.value, Refused if full else Unavailable)
    assert list(local.list("")) == list(local.list_unfinished("")) == []
    assert not [path for path in root.rglob("*") if path.is_file()]
    put(local, "a/b", b"x")


def test_a_name_that_may_not_be_durable_is_an_unknown_outcome(
    local: LocalBlobs, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(local, "a/first", b"x")
    real = os.fsync

    def fail_on_folder(fd: int) -> None:
        if Path(f"/proc/self/fd/{fd}").readlink().is_dir():
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail_on_folder)
        with pytest.raises(OutcomeUnknown):
            put(local, "a/b", b"x")
    put(local, "a/b", b"x")


def test_a_file_where_a_folder_should_be_is_refused(local: LocalBlobs) -> None:
    put(local, "a", b"x")
    with pytest.raises(Refused) as refusal:
        put(local, "a/b", b"x")
    assert refusal.value.code == ErrorCode.STORE_REFUSED


def test_its_uri_opens_it_again(tmp_path: Path) -> None:
    root = tmp_path / "with space"
    store = open_store(root.as_uri(), create=True)
    put(store, "a", b"x")
    assert open_store(store.uri).get("a") == open_store(str(root)).get("a") == b"x"


class Writes:
    """Length and kind of each write."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.direct: list[int] = []
        self.buffered: list[int] = []
        real = os.write

        def write(fd: int, data: memoryview) -> int:
            count = real(fd, data)
            direct = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT
            (self.direct if direct else self.buffered).append(count)
            return count

        patch.setattr(os, "write", write)


@pytest.fixture
def on_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> bool:
    """Whether this file system can be written past the page cache; the store takes it for one that can."""
    monkeypatch.setattr(local_module, "file_system", lambda _device: "ext4")
    fd = os.open(tmp_path / "probe", os.O_WRONLY | os.O_CREAT)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, os.O_DIRECT)
        with mmap.mmap(-1, BLOCK_BYTES) as page:
            os.write(fd, page)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


@pytest.mark.parametrize("over", [0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, PART_BYTES + 7])
def test_large_blobs_pass_the_page_cache_by_but_for_their_tail(
    local: LocalBlobs, monkeypatch: pytest.MonkeyPatch, on_disk: bool, over: int
) -> None:
    size = DIRECT_FROM_BYTES + over
    memory = mmap.mmap(-1, size)
    memory[:] = random.Random(over).randbytes(size)
    writes = Writes(monkeypatch)
    put(local, "a/b", memory)
    assert local.get("a/b") == memory[:]
    assert sum(writes.direct + writes.buffered) == size
    assert sum(writes.buffered) <= BLOCK_BYTES if on_disk else not writes.direct


def test_memory_that_suits_no_device_is_written_all_the_same(local: LocalBlobs, on_disk: bool) -> None:
    data = memoryview(random.Random(1).randbytes(DIRECT_FROM_BYTES + BLOCK_BYTES))[3:]
    put(local, "a/b", data)
    assert local.get("a/b") == data


def test_small_blobs_and_those_on_other_file_systems_go_through_the_page_cache(
    local: LocalBlobs, monkeypatch: pytest.MonkeyPatch, on_disk: bool
) -> None:
    writes = Writes(monkeypatch)
    put(local, "small", mmap.mmap(-1, DIRECT_FROM_BYTES - 1))
    monkeypatch.setattr(local_module, "file_system", lambda _device: "nfs4")
    put(local, "far", mmap.mmap(-1, DIRECT_FROM_BYTES))
    assert writes.direct == []
