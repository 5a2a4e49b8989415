"""Packages: no job is accepted without its own, and none that a job names is ever deleted."""

import threading
from collections.abc import Callable
from dataclasses import replace

import pytest

from dtrain.coordinator.api.records import Operators
from dtrain.coordinator.packages import DELETED_AT_ONCE, EVERY_S, GRACE_S, PackageCollector
from dtrain.protocol import codec
from dtrain.protocol.cluster import ReplicaRecord
from dtrain.protocol.errors import Conflict, ErrorCode, Refused, Unavailable
from dtrain.protocol.ids import ClusterName, JobName, ReplicaId, Uid
from dtrain.protocol.job import Entry, EntryKind, JobPhase, JobSpec, JobStatus, Term
from dtrain.protocol.keys import Keys
from dtrain.protocol.package import Package, PackageCollection, package_key, packages_prefix
from dtrain.storage.blobs import digest
from dtrain.storage.blobs.memory import MemoryBlobs
from dtrain.storage.etcd.memory import MemoryEtcd
from dtrain.storage.etcd.port import Delete, Put, Txn, TxnResult

CLUSTER = ClusterName("c1")
KEYS = Keys(CLUSTER)
DATA = b"archive"


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return 1.7e9 + self.now


class Etcd(MemoryEtcd):
    """Lets something happen just before or after a transaction that writes the collector's record."""

    def __init__(self) -> None:
        super().__init__(lambda: 0.0)
        self.before: Callable[[], None] | None = None
        self.after: Callable[[], None] | None = None

    def txn(self, txn: Txn, *, deadline_s: float = 5.0) -> TxnResult:
        ours = any(isinstance(op, Put) and op.key == KEYS.packages for op in txn.success)
        if ours and (hook := self.before) is not None:
            self.before = None
            hook()
        result = super().txn(txn, deadline_s=deadline_s)
        if ours and (hook := self.after) is not None:
            self.after = None
            hook()
        return result


class Site:
    def __init__(self) -> None:
        self.etcd = Etcd()
        self.clock = Clock()
        self.store = MemoryBlobs("packages")
        self.operators = Operators(self.etcd, CLUSTER, self.clock, lambda _uri: self.store)  # type: ignore[arg-type]
        self.collector = self.collectors()

    def collectors(self) -> PackageCollector:
        return PackageCollector(self.etcd, self.clock)  # type: ignore[arg-type]

    def put(self, number: int) -> Package:
        package = Package(f"{number:064x}", f"{number:016x}", self.store.uri, len(DATA), 1, 10)
        self.store.put(self.key(package), [DATA], chunk_crcs=[digest.crc32c(DATA)])
        return package

    def key(self, package: Package) -> str:
        return package_key(CLUSTER, package.digest, package.nonce)

    def submit(self, package: Package | None, name: str = "train") -> None:
        spec = JobSpec(JobName(name), Uid(""), Entry(EntryKind.SCRIPT, "train.py"), package=package)
        self.operators.submit(self.operators.prepare(codec.encode(spec), ""))

    def over(self, name: str = "train") -> None:
        """The job has ended: its name may be used again."""
        spec = codec.decode(JobSpec, self.etcd.range(KEYS.spec(JobName(name))).items[0].value)
        status = JobStatus(Term(1), spec.uid, JobPhase.SUCCEEDED)
        self.etcd.txn(Txn(success=(Put(KEYS.status(spec.name), codec.encode(status)),)))

    def collect(self, later_s: float = EVERY_S) -> int:
        self.clock.now += later_s
        return self.collector.collect(CLUSTER, self.store)

    @property
    def stored(self) -> list[str]:
        return [info.key for info in self.store.list(packages_prefix(CLUSTER))]

    @property
    def record(self) -> dict[str, str]:
        items = self.etcd.range(KEYS.packages).items
        return dict(codec.decode(PackageCollection, items[0].value).keys) if items else {}


@pytest.fixture
def site() -> Site:
    return Site()


# Submitting ------------------------------------------------------------------------------


def test_a_job_is_accepted_with_a_package_that_is_there_and_without_one(site: Site) -> None:
    site.submit(site.put(1))
    site.submit(None, "other")
    spec = codec.decode(JobSpec, site.etcd.range(KEYS.spec(JobName("train"))).items[0].value)
    assert spec.package is not None
    assert site.record == {}


def test_a_package_that_is_not_in_the_store_is_refused(site: Site) -> None:
    package = site.put(1)
    with pytest.raises(Conflict, match="is not in"):
        site.submit(replace(package, nonce="f" * 16))
    with pytest.raises(Conflict, match="is not in"):
        site.submit(replace(package, size_bytes=1))
    assert not site.etcd.range(KEYS.spec(JobName("train"))).items


@pytest.mark.parametrize(
    "change",
    [
        {"digest": "../../../etc"}, {"digest": "A" * 64}, {"nonce": "../x"}, {"nonce": ""}, {"store": ""},
        {"store": "s3://user:password@host/x"}, {"store": "http://x"}, {"size_bytes": 0},
        {"files": -1}, {"files": 10**9}, {"files_bytes": 10**12}, {"source": "a\0b"},
    ],
)  # fmt: skip
def test_values_that_no_package_has_are_refused(site: Site, change: dict[str, object]) -> None:
    with pytest.raises(Refused) as told:
        site.submit(replace(site.put(1), **change))  # type: ignore[arg-type]
    assert told.value.code is ErrorCode.BAD_JOB_FILE
    assert "password" not in told.value.message


def test_one_that_is_being_deleted_is_refused_while_it_still_is_there(site: Site) -> None:
    package = site.put(1)
    record = PackageCollection({site.key(package): site.store.uri})
    site.etcd.txn(Txn(success=(Put(KEYS.packages, codec.encode(record)),)))
    with pytest.raises(Conflict, match="is not in"):
        site.submit(package)


def test_none_is_taken_on_while_a_coordinator_would_not_see_it(site: Site) -> None:
    old = ReplicaId("c9")
    record = ReplicaRecord(old, "c9:1", version="0.1.0")
    site.etcd.txn(Txn(success=(Put(KEYS.coordinator(old), codec.encode(record)),)))
    with pytest.raises(Conflict, match=r"coordinator c9 runs dtrain 0\.1\.0"):
        site.submit(site.put(1))


def test_a_store_that_is_away_is_told_as_such(site: Site) -> None:
    package = site.put(1)

    def fault(_op: str, _key: str) -> None:
        raise Unavailable(ErrorCode.STORE_UNAVAILABLE, "away")

    site.store.fault = fault
    with pytest.raises(Unavailable):
        site.submit(package)


# Collecting ------------------------------------------------------------------------------


def test_what_no_job_names_goes_after_its_grace_and_not_before(site: Site) -> None:
    wanted, surplus = site.put(1), site.put(2)
    site.submit(wanted)
    assert site.collect() == 0
    assert site.collect(GRACE_S - 1) == 0
    assert site.collect(EVERY_S) == 1
    assert site.stored == [site.key(wanted)]
    assert site.record == {}, "what is gone needs no entry"
    assert site.key(surplus) not in site.stored


def test_the_package_of_a_job_that_is_over_stays_until_its_name_is_used_again(site: Site) -> None:
    site.submit(site.put(1))
    site.over()
    assert site.collect() == 0
    assert site.collect(10 * GRACE_S) == 0
    second = site.put(2)
    site.submit(second)
    assert site.collect() == 0
    assert site.collect(GRACE_S) == 1
    assert site.stored == [site.key(second)]


def test_a_new_leader_waits_for_a_whole_grace_of_its_own(site: Site) -> None:
    site.put(1)
    site.collect(GRACE_S)
    site.collector = site.collectors()
    assert site.collect(GRACE_S) == 0
    assert site.collect(GRACE_S) == 1


def test_it_looks_at_a_store_now_and_then_alone(site: Site) -> None:
    site.put(1)
    site.collect()
    site.clock.now += GRACE_S
    assert site.collect() == 1
    site.put(2)
    listed = 0

    def count(op: str, _key: str) -> None:
        nonlocal listed
        listed += op == "list"

    site.store.fault = count
    site.collect(1.0)
    assert listed == 0


def test_a_job_submitted_just_before_the_record_keeps_its_package(site: Site) -> None:
    package = site.put(1)
    site.collect()
    site.etcd.before = lambda: site.submit(package)
    assert site.collect(GRACE_S) == 0
    assert site.stored == [site.key(package)]
    assert site.record == {}
    site.submit(package, "second")


def test_a_job_submitted_just_after_the_record_is_refused(site: Site) -> None:
    package = site.put(1)
    site.collect()
    told: list[Conflict] = []

    def submit() -> None:
        with pytest.raises(Conflict) as error:
            site.submit(package)
        told.append(error.value)

    site.etcd.after = submit
    assert site.collect(GRACE_S) == 1
    assert told
    assert site.stored == []


def test_a_submission_that_looked_before_the_record_is_refused_by_its_compare(site: Site) -> None:
    """It has found the blob; the whole collection happens before its transaction."""
    package = site.put(1)
    site.collect()
    head = site.store.head

    def collected(key: str) -> object:
        found = head(key)
        site.store.head = head  # type: ignore[method-assign]
        assert site.collect(GRACE_S) == 1
        return found

    site.store.head = collected  # type: ignore[method-assign,assignment]
    with pytest.raises(Conflict):
        site.submit(package)
    assert not site.etcd.range(KEYS.spec(JobName("train"))).items


def test_a_collector_that_died_in_between_is_followed_by_one_that_ends_it(site: Site) -> None:
    gone, kept = site.put(1), site.put(2)
    site.collect()
    died = False

    def fault(op: str, key: str) -> None:
        nonlocal died
        if op.startswith("delete") and not died:
            died = True
            raise Refused(ErrorCode.STORE_DENIED, "killed here")

    site.store.fault = fault
    with pytest.raises(Refused):
        site.collect(GRACE_S)
    assert set(site.record) == {site.key(gone), site.key(kept)}
    with pytest.raises(Conflict):
        site.submit(kept)
    site.collector = site.collectors()
    assert site.collect() == 2, "what is written down needs no new grace"
    assert site.record == {}
    assert site.stored == []


def test_two_collectors_at_once_hurt_nobody(site: Site) -> None:
    surplus, other = site.put(1), site.collectors()
    site.collect()
    other.collect(CLUSTER, site.store)
    site.clock.now += GRACE_S

    def second() -> None:
        other.collect(CLUSTER, site.store)

    site.etcd.after = second
    with pytest.raises(Conflict):
        site.collect(0.0)
    assert site.key(surplus) not in site.stored
    site.collect()
    assert site.record == {}


def test_a_store_that_hangs_does_not_hold_the_sweeps_of_others(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.put(1)
    other = MemoryBlobs("other")
    meanwhile: list[int] = []

    def hangs(prefix: str) -> list[str]:
        thread = threading.Thread(target=lambda: meanwhile.append(site.collector.collect(CLUSTER, other)))
        thread.start()
        thread.join(10)
        return []

    monkeypatch.setattr(site.store, "list_unfinished", hangs)
    site.collect()
    assert meanwhile == [0]


def test_a_record_that_cannot_be_read_stops_it(site: Site) -> None:
    site.put(1)
    site.collect()
    site.etcd.txn(Txn(success=(Put(KEYS.spec(JobName("newer")), b'{"v": 99}'),)))
    with pytest.raises(Refused):
        site.collect(GRACE_S)
    assert len(site.stored) == 1
    site.etcd.txn(Txn(success=(Delete(KEYS.spec(JobName("newer"))),)))
    assert site.collect() == 1


def test_it_takes_a_bounded_number_at_once_and_leaves_what_is_not_ours(site: Site) -> None:
    for number in range(DELETED_AT_ONCE + 3):
        site.put(number)
    key = f"{packages_prefix(CLUSTER)}notes.txt"
    site.store.put(key, [b"mine"], chunk_crcs=[digest.crc32c(b"mine")])
    site.collect()
    assert site.collect(GRACE_S) == DELETED_AT_ONCE
    assert site.collect() == 3
    assert site.stored == [key]


def test_jobs_with_many_records_are_read_each_once(site: Site) -> None:
    packages = [site.put(number) for number in range(5)]
    for number, package in enumerate(packages):
        name = f"job-{number}" if number % 2 else f"job-{number}-x"
        site.submit(package, name)
        for seq in range(1, 20):
            site.etcd.txn(Txn(success=(Put(KEYS.event(JobName(name), seq), b"{}"),)))
    site.collect()
    assert site.collect(GRACE_S) == 0
    assert len(site.stored) == 5
