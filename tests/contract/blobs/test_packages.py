"""Packages in every store: found again by content, written once, verified when they come back."""

from pathlib import Path

import pytest
from tests.contract.blobs.conftest import Backend, put

from dtrain.protocol.errors import ErrorCode, Refused
from dtrain.protocol.ids import ClusterName
from dtrain.protocol.package import Package, package_folder, package_key
from dtrain.storage.packages import depot, packing
from dtrain.storage.packages.packing import Archive

CLUSTER = ClusterName("c1")


@pytest.fixture
def archive(tmp_path: Path) -> Archive:
    root = tmp_path / "work"
    root.mkdir()
    (root / "train.py").write_text("print('hello')\n" * 100)
    return packing.pack(packing.look(root), tmp_path / "p.tar.gz")


def named(backend: Backend, archive: Archive, nonce: str) -> Package:
    listing = archive.listing
    return Package(
        archive.digest, nonce, backend.store.uri, archive.size_bytes, len(listing.entries), listing.size_bytes
    )


def test_it_is_found_by_its_content_and_comes_back_whole(
    backend: Backend, archive: Archive, tmp_path: Path
) -> None:
    assert depot.find(backend.store, CLUSTER, archive) is None
    progress: list[tuple[int, int]] = []
    nonce = depot.put(backend.store, CLUSTER, archive, lambda done, total: progress.append((done, total)))
    assert progress[-1] == (archive.size_bytes, archive.size_bytes)
    assert depot.find(backend.store, CLUSTER, archive) == nonce
    assert depot.find(backend.store, ClusterName("c2"), archive) is None
    depot.fetch(backend.store, CLUSTER, named(backend, archive, nonce), tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == archive.path.read_bytes()


def test_two_that_store_it_at_once_do_not_meet(backend: Backend, archive: Archive) -> None:
    nonces = {depot.put(backend.store, CLUSTER, archive) for _ in range(2)}
    assert len(nonces) == 2
    assert depot.find(backend.store, CLUSTER, archive) in nonces


@pytest.mark.parametrize("spoil", ["byte", "length"])
def test_a_damaged_copy_is_neither_found_nor_taken(
    backend: Backend, archive: Archive, tmp_path: Path, spoil: str
) -> None:
    data = bytearray(archive.path.read_bytes())
    if spoil == "byte":
        data[len(data) // 2] ^= 1
    else:
        del data[-1]
    nonce = "0" * 16
    put(backend.store, package_key(CLUSTER, archive.digest, nonce), bytes(data))
    assert depot.find(backend.store, CLUSTER, archive) is None
    with pytest.raises(Refused) as told:
        depot.fetch(backend.store, CLUSTER, named(backend, archive, nonce), tmp_path / "back")
    assert told.value.code is ErrorCode.PACKAGE_DAMAGED
    good = depot.put(backend.store, CLUSTER, archive)
    assert depot.find(backend.store, CLUSTER, archive) == good


def test_one_that_is_gone_is_said_to_be(backend: Backend, archive: Archive, tmp_path: Path) -> None:
    nonce = depot.put(backend.store, CLUSTER, archive)
    backend.store.delete(package_key(CLUSTER, archive.digest, nonce))
    with pytest.raises(Refused, match="is not in") as told:
        depot.fetch(backend.store, CLUSTER, named(backend, archive, nonce), tmp_path / "back")
    assert told.value.code is ErrorCode.PACKAGE_DAMAGED
    assert not (tmp_path / "back").exists()


def test_what_somebody_else_put_there_is_passed_over(backend: Backend, archive: Archive) -> None:
    put(backend.store, f"{package_folder(CLUSTER, archive.digest)}notes.txt", b"x")
    assert depot.find(backend.store, CLUSTER, archive) is None
