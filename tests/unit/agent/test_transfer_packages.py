"""Packages on a machine: verified, whole or not there, and never taken from under somebody's feet."""

import dataclasses
import io
import os
import queue
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dtrain.agent.transfer import Transfer
from dtrain.agent.transfer_packages import INCOMING, Packages, delete
from dtrain.agent.transferring import DropTree, TransferReport, Unpack, Unpacked, UnpackFailed
from dtrain.protocol.errors import ErrorCode, Refused
from dtrain.protocol.ids import ClusterName, JobName, Uid
from dtrain.protocol.package import Package, package_key
from dtrain.storage.blobs.local import LocalBlobs
from dtrain.storage.packages import depot, packing

CLUSTER = ClusterName("c1")
WAIT_S = 20.0


class Site:
    """A store with a package in it, and a machine's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "agent"
        self.root = folder / "work"
        (folder / "store").mkdir()
        self.store = LocalBlobs(folder / "store")
        self.reads = 0
        (self.root / "pkg").mkdir(parents=True)
        for name in ("train.py", "pkg/a.py", "pkg/b.py"):
            (self.root / name).write_text(f"# {name}\n")
        (self.root / "pkg" / "link").symlink_to("a.py")
        self.package = self.pack("p")

    def pack(self, name: str) -> Package:
        archive = packing.pack(packing.look(self.root), self.root.parent / name)
        nonce = depot.put(self.store, CLUSTER, archive)
        listing = archive.listing
        return Package(
            archive.digest, nonce, "x", archive.size_bytes, len(listing.entries), listing.size_bytes
        )

    def opened(self, _uri: str) -> LocalBlobs:
        self.reads += 1
        return self.store

    def life(
        self,
        emit: Callable[[TransferReport], None] = lambda _report: None,
        *,
        room: int = 10**9,
        boot: str = "b1",
    ) -> Packages:
        """One life of the transfer process."""
        return Packages(self.opened, emit, folder=self.folder, archives_bytes_max=room, boot_id=boot)

    def order(self, job: str = "j1", *, keep: tuple[str, ...] = (), package: Package | None = None) -> Unpack:
        return Unpack(CLUSTER, JobName(job), Uid("u1"), package or self.package, f"{job}-u1", keep)

    def tree(self, job: str = "j1") -> Path:
        return self.folder / "trees" / f"{job}-u1"

    def damage(self) -> None:
        path = self.root.parent / "store" / package_key(CLUSTER, self.package.digest, self.package.nonce)
        data = bytearray(path.read_bytes())
        data[-20] ^= 1
        path.chmod(0o600)
        path.write_bytes(data)

    def assert_whole(self, tree: Path) -> None:
        assert packing.look(tree).entries == packing.look(self.root).entries
        assert (tree / "pkg" / "b.py").read_text() == "# pkg/b.py\n"

    @property
    def archives(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "archives").iterdir())


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_two_jobs_of_one_content_have_a_tree_each_and_fetch_once(site: Site) -> None:
    packages = site.life()
    packages.unpack(site.order("j1"))
    packages.unpack(site.order("j2", keep=("j1-u1",)))
    assert site.reads == 1
    (site.tree("j1") / "train.py").write_text("changed by its ranks")
    site.assert_whole(site.tree("j2"))
    packages.unpack(site.order("j1"))
    assert (site.tree("j1") / "train.py").read_text() == "changed by its ranks", (
        "a restart finds its own files"
    )


def test_jobs_that_come_at_once_fetch_once_and_each_tree_is_whole(site: Site) -> None:
    reports: queue.Queue[Any] = queue.Queue()
    transfer = Transfer(reports.put, site.opened, packages=site.folder, packages_bytes=10**9)
    names = tuple(f"j{number}-u1" for number in range(8))
    for number in range(8):
        # Each was ordered when the agent knew of those before it alone.
        transfer.handle(site.order(f"j{number}", keep=names[:number]))
        transfer.handle(site.order(f"j{number}", keep=names[:number]))
    found = [reports.get(timeout=WAIT_S) for _ in range(16)]
    assert all(isinstance(report, Unpacked) for report in found), found
    assert site.reads == 1
    for number in range(8):
        site.assert_whole(site.tree(f"j{number}"))


def test_a_damaged_package_is_told_from_a_store_that_is_away(site: Site, tmp_path: Path) -> None:
    reports: queue.Queue[Any] = queue.Queue()
    transfer = Transfer(reports.put, site.opened, packages=site.folder, packages_bytes=10**9)
    site.damage()
    transfer.handle(site.order())
    failed = reports.get(timeout=WAIT_S)
    assert isinstance(failed, UnpackFailed)
    assert failed.hopeless
    assert "SHA-256" in failed.message
    assert "submit the job again" in failed.message
    assert not site.tree().exists()
    (site.folder / "archives").chmod(0o700)
    full = Transfer(reports.put, lambda _uri: LocalBlobs(tmp_path / "nowhere"), packages=site.folder)
    full.handle(site.order())
    failed = reports.get(timeout=WAIT_S)
    assert isinstance(failed, UnpackFailed)


def test_a_damaged_archive_of_the_cache_is_brought_again(site: Site) -> None:
    site.life().unpack(site.order("j1"))
    (path,) = (site.folder / "archives").iterdir()
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    packages = site.life()
    packages.unpack(site.order("j2", keep=("j1-u1",)))
    site.assert_whole(site.tree("j2"))
    assert site.reads == 2


def test_archives_go_the_unused_first_when_there_is_no_room(site: Site) -> None:
    packages = site.life()
    packages.unpack(site.order("j1"))
    (site.root / "more.py").write_text("x" * 5000)
    other = site.pack("q")
    old = site.folder / "archives" / site.archives[0]
    os.utime(old, (1, 1))
    room = max(site.package.size_bytes, other.size_bytes)
    site.life(room=room).unpack(site.order("j2", keep=("j1-u1",), package=other))
    assert site.archives == [f"{other.digest}.tar.gz"]
    assert site.tree("j1").is_dir(), "a tree is no cache: ranks are in it"
    site.life(room=0).unpack(site.order("j3", keep=("j1-u1", "j2-u1"), package=other))
    assert site.archives == []


def test_trees_that_nobody_has_any_more_go_and_others_stay(site: Site) -> None:
    reports: queue.Queue[Any] = queue.Queue()
    transfer = Transfer(reports.put, site.opened, packages=site.folder, packages_bytes=10**9)
    for job in ("j1", "j2", "j3"):
        transfer.handle(site.order(job, keep=("j1-u1", "j2-u1", "j3-u1")))
        reports.get(timeout=WAIT_S)
    transfer.handle(DropTree("j1-u1"))
    assert not site.tree("j1").exists(), "its name is gone before the next order is looked at"
    transfer.handle(site.order("j4", keep=("j3-u1",)))
    reports.get(timeout=WAIT_S)
    assert [site.tree(job).exists() for job in ("j2", "j3", "j4")] == [False, True, True]


def test_a_tree_dropped_while_it_is_wanted_again_is_made_anew(site: Site) -> None:
    reports: queue.Queue[Any] = queue.Queue()
    transfer = Transfer(reports.put, site.opened, packages=site.folder, packages_bytes=10**9)
    for _ in range(20):
        transfer.handle(site.order())
        transfer.handle(DropTree("j1-u1"))
        transfer.handle(site.order())
        assert [type(reports.get(timeout=WAIT_S)) for _ in range(2)] == [Unpacked, Unpacked]
        site.assert_whole(site.tree())


def test_after_a_start_of_the_machine_no_tree_is_trusted(site: Site) -> None:
    site.life(boot="b1").unpack(site.order())
    (site.tree() / "train.py").write_bytes(b"")  # as a power cut leaves a file that was not synced
    assert site.life(boot="b1") is not None
    assert site.tree().exists(), "a new life of the process: ranks may be in it"
    site.life(boot="b2").unpack(site.order())
    site.assert_whole(site.tree())


def test_a_disk_that_takes_no_mark_keeps_its_trees(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.life(boot="b1").unpack(site.order())

    def full(*_args: Any, **_options: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    site.life(boot="b2")
    assert site.tree().exists()


# Death at each change of the disk ------------------------------------------------------

_WATCHED = ("open", "mkdir", "rename", "replace", "symlink", "unlink", "utime", "fchmod", "rmdir")


def dies_at(number: int, how: str, work: Callable[[], None]) -> bool:
    """Run ``work`` in a process that is killed before or after its change ``number``; False: it has fewer."""
    pid = os.fork()
    if pid:
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, status
        return os.WIFSIGNALED(status)
    count = 0

    def watched(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == number and how == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            dies = count == number
            try:
                return real(*args, **options)
            finally:
                # Also where it failed: mkdir of what is there already.
                if dies:
                    os.kill(os.getpid(), signal.SIGKILL)

        return call

    try:
        for name in _WATCHED:
            setattr(os, name, watched(getattr(os, name)))
        io.open = watched(io.open)  # type: ignore[assignment]
        work()
    except BaseException:  # noqa: BLE001 - the parent wants a status, whatever it was
        os._exit(9)
    os._exit(0)


@pytest.mark.parametrize("how", ["before", "after"])
def test_killed_at_any_moment_it_leaves_nothing_that_is_taken_for_whole(tmp_path: Path, how: str) -> None:
    site = Site(tmp_path)
    points = 0

    def work() -> None:
        site.life(boot="b1").unpack(site.order())

    def unwork() -> None:
        for doomed in site.life(boot="b1").put_aside(DropTree("j1-u1")):
            delete(doomed)

    for story in (work, unwork):
        number = 0
        while True:
            number += 1
            if story is unwork:
                site.life(boot="b1").unpack(site.order())
            else:
                delete(site.folder)
            if not dies_at(number, how, story):
                break
            points += 1
            visible = [path for path in site.folder.glob("trees/*") if not path.name.startswith(".")]
            for tree in visible:
                site.assert_whole(tree)
            site.life(boot="b1").unpack(site.order())
            site.assert_whole(site.tree())
            assert not list(site.folder.glob(f"*/{INCOMING}*")), (story, number)
    assert points > 25, "the changes were not seen"


def test_two_processes_of_one_folder_do_not_share_a_half(site: Site) -> None:
    """The former life's threads may still write when the next one begins: under a name of their own."""
    first, second = site.life(), site.life()
    errors: list[BaseException] = []

    def run(packages: Packages) -> None:
        try:
            packages.unpack(site.order())
        except BaseException as error:  # noqa: BLE001 - looked at below
            errors.append(error)

    threads = [threading.Thread(target=run, args=(one,)) for one in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert all(isinstance(error, OSError | Refused) for error in errors)
    assert len(errors) <= 1
    site.assert_whole(site.tree())


def test_a_package_that_is_gone_is_not_asked_for_again_and_again(site: Site) -> None:
    gone = dataclasses.replace(site.package, nonce="f" * 16)
    with pytest.raises(Refused) as told:
        site.life().unpack(site.order(package=gone))
    assert told.value.code is ErrorCode.PACKAGE_DAMAGED
