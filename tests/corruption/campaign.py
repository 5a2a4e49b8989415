"""Applies one damage after the other and judges what came of it.

Three moments. *At rest*: a committed checkpoint is damaged, then fetched. *Reported*: the store changes
between a rank's report and the leader's look. *Arena*: the frozen snapshot changes in memory after its
digest was taken and before the store has its bytes. What changes before that is committed as it is then:
``before_digest`` measures it, and nothing is claimed.
"""

import contextlib
import os
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from dtrain.agent.transfer_fetch import Fetcher
from dtrain.agent.transferring import Fetched, FetchFailed, TransferReport
from dtrain.protocol import checksum
from dtrain.protocol.errors import DtrainError
from dtrain.protocol.ids import Rank, Seq, Step
from dtrain.protocol.ranklink import Begin
from dtrain.storage.blobs import digest
from dtrain.storage.blobs.port import BlobInfo, BlobStore
from tests.corruption import damage as damages
from tests.corruption import making, ranks
from tests.corruption.damage import Damage, Kind, Scene
from tests.corruption.making import MIB, Committed, Shelf, Uploads

BIG_BYTES = 72 * MIB
"""Of one tensor over two ranks: blobs of three chunks."""

WAYS = ("rank", "agent", "rank", "whole")
"""Who verifies: each rank what it has read (as in every job), the agent for a rank that cannot, or the
agent before anybody reads (as for ``dcp_reader``)."""


@dataclass(slots=True)
class Tally:
    """What came of the cases, by kind."""

    caught: Counter[str] = field(default_factory=Counter)
    harmless: Counter[str] = field(default_factory=Counter)
    """What was restored is bit for bit what was saved: the damage lay where nobody reads."""
    wrong: list[str] = field(default_factory=list)
    """A rank would have trained with something else, or the evidence was wrong."""

    @property
    def cases(self) -> int:
        return self.caught.total() + self.harmless.total() + len(self.wrong)


class Campaign:
    """Checkpoints of one store, and the cases played on them."""

    def __init__(self, shelf: Shelf, *, big: bool, worlds: Sequence[int] = (3, 1)) -> None:
        self.shelf = shelf
        self.tally = Tally()
        self._pristine: dict[str, bytes] = {}
        scenes = []
        for number, world in enumerate(worlds):
            scenes.append(self._scene(10 * number, world, 0))
        self.small = scenes
        self.big = self._scene(100, 2, BIG_BYTES) if big else None

    def _scene(self, base: int, world: int, big_bytes: int) -> Scene:
        """Steps 10 and 20 of one attempt, step 20 again in the next, and 30 after it."""
        plan = ((1, 10, 1), (2, 20, 1), (3, 20, 2), (4, 30, 2))
        made = [
            making.commit_one(self.shelf.store, base + seq, step, attempt, world, big_bytes=big_bytes)
            for seq, step, attempt in (plan if not big_bytes else plan[1:3])
        ]
        for one in made:
            for key in (one.order.manifest, *(blob.key for blob in one.manifest.blobs)):
                self._pristine[key] = self.shelf.read(key)
        target = made[-2] if not big_bytes else made[-1]
        others = tuple(one for one in made if one is not target)
        return Scene(target, others, self._pristine)

    # At rest.

    def at_rest(
        self,
        cases: int,
        rng: random.Random,
        *,
        big_share: float = 0.0,
        kinds: Sequence[Kind] = damages.AT_REST,
    ) -> None:
        """Play so many cases, each kind as often as the next."""
        for number in range(cases):
            kind = kinds[number % len(kinds)]
            big = self.big is not None and rng.random() < big_share
            scene = self.big if big and self.big is not None else rng.choice(self.small)
            self.play(scene, kind, rng)

    def play(self, scene: Scene, kind: Kind, rng: random.Random) -> None:
        """One case at rest."""
        if len(scene.target.manifest.blobs) < 2 and kind is damages.swap_ranks:
            scene = self.small[0]
        damage = damages.draw(kind, scene, rng)
        with self._damaged(damage):
            problem = self._judge(scene, damage)
        if problem:
            self.tally.wrong.append(f"{damage.kind} ({damage.said}): {problem}")

    def _judge(self, scene: Scene, damage: Damage) -> str:
        target, where = scene.target, damages.touched(scene, damage)
        found = self._restored(target)
        if isinstance(found, FetchFailed):
            problem = evidence_problem(target, found, where)
            if not problem:
                self.tally.caught[damage.kind] += 1
            return problem
        if where:
            return f"{sorted(where)[:3]} changed, and the restore succeeded"
        if found:
            return f"ranks {found} restored something else"
        self.tally.harmless[damage.kind] += 1
        return ""

    def _restored(self, target: Committed) -> FetchFailed | Sequence[int]:
        """Restore all ranks, each time in the next of the ways there are."""
        store, way = self.shelf.store, WAYS[self.tally.cases % len(WAYS)]
        if way == "whole":
            with making.fetched(store, target.order) as report:
                if isinstance(report, FetchFailed):
                    return report
                return making.wrong_ranks(report.plan, target.uploads)
        reports: list[TransferReport] = []
        fetcher = Fetcher(lambda _uri: store, reports.append, deadline_s=5.0)
        world = target.uploads.world
        everyone = tuple(Rank(rank) for rank in range(world))
        order = replace(target.order, on_demand=True, ranks=everyone, world=world)
        with _verifying(digest.crc32c if way == "rank" else None):
            return ranks.restored(fetcher, reports, order, target.uploads)

    @contextmanager
    def _damaged(self, damage: Damage) -> Iterator[None]:
        with _replaced(self.shelf, damage.files, self._pristine):
            yield

    # Reported.

    def reported(self, cases: int, rng: random.Random) -> None:
        """Damage before the leader has looked: not committed, or found at restore."""
        uploads = making.save(self.shelf.store, 200, 70, 3, 3)
        former = making.save(self.shelf.store, 199, 60, 3, 3)
        held: dict[str, bytes] = {}
        for part in (*uploads.work.parts, *former.work.parts):
            for info in self.shelf.store.list(part.manifest.rpartition("/")[0] + "/"):
                held[info.key] = self.shelf.read(info.key)
        prefix = uploads.work.parts[0].manifest.rpartition("/")[0]
        own = sorted(key for key in held if key.startswith(prefix))
        theirs = sorted(key for key in held if not key.startswith(prefix))
        for number in range(cases):
            ending = (".json.gz", ".st")[number % 2]
            mine = [key for key in own if key.endswith(ending)]
            damage = _before_commit(rng, held, mine, [key for key in theirs if key.endswith(ending)])
            with _replaced(self.shelf, damage.files, held):
                problem = self._commits(uploads, damage)
            if problem:
                self.tally.wrong.append(f"{damage.kind} ({damage.said}): {problem}")

    def _commits(self, uploads: Uploads, damage: Damage) -> str:
        store = self.shelf.store
        verdict = making.verify(store, uploads)
        if not verdict.ok:
            if verdict.retry:
                return f"it would be tried again: {verdict.problem}"
            names = [key for key in damage.files if key in verdict.problem]
            ranks = [f"rank {int(key.rpartition('/')[2][:5])}" for key in damage.files]
            if not names and not any(rank in verdict.problem for rank in ranks):
                return f"the leader does not say what is damaged: {verdict.problem}"
            self.tally.caught[damage.kind] += 1
            return ""
        if any(key.endswith(".json.gz") for key in damage.files):
            return "the leader committed what a rank did not report"
        committed = making.commit(store, uploads, verdict)
        try:
            with making.fetched(store, committed.order) as report:
                if isinstance(report, Fetched):
                    return "it was committed and fetched"
                where = {(key, 0) for key in damage.files}
                problem = evidence_problem(committed, report, where)
        finally:
            store.delete(verdict.manifest)
        if not problem:
            self.tally.caught[damage.kind] += 1
        return problem

    # Arena.

    def arena(self, cases: int, rng: random.Random) -> None:
        """A bit of the frozen snapshot flips while its upload runs, after the digest was taken."""
        state = making.tracked(5, 0, 1)
        for number in range(cases):
            begin = Begin(Seq(300 + number), f"{number:016x}", Step(80))
            sealed = making.seal(state, 0, 1, begin)
            fd = int(sealed.path.rsplit("/", 1)[1])
            at, bit = rng.randrange(sealed.size_bytes), rng.randrange(8)
            store = FlipsArena(self.shelf.store, fd, at, bit)
            kind, said = "arena after digest", f"bit {bit} of byte {at} of the arena"
            try:
                part = making.upload(store, making.upload_order(sealed, 0, 1, 4, store.uri))
            except DtrainError:
                left = list(store.list(f"{making.CLUSTER}/{making.JOB}/{making.UID}/blobs/{begin.seq:020d}/"))
                if left:
                    self.tally.wrong.append(f"{kind} ({said}): {left[0].key} was left behind")
                else:
                    self.tally.caught[kind] += 1
            else:
                self.tally.wrong.append(f"{kind} ({said}): {part.manifest} was reported durable")
            finally:
                os.close(fd)


def before_digest(store: BlobStore, seq: int, rng: random.Random, *, index: bool) -> str:
    """Flip a bit of the frozen snapshot before anything was hashed: ``caught``, ``right`` or ``unseen``.

    ``index``: in the JSON behind the blob. What was wrong in memory when it was hashed is committed as it
    was; this is here so that nobody believes otherwise.
    """
    seed = 1000 * 5 + seq
    state = making.tracked(seed, 0, 1)
    making.stir(seed)
    held = (making.fingerprint(state), making.generators())
    begin = Begin(Seq(seq), f"{seq:016x}", Step(90))
    sealed = making.seal(state, 0, 1, begin)
    fd = int(sealed.path.rsplit("/", 1)[1])
    first, length = (sealed.index_offset, sealed.index_bytes) if index else (0, sealed.size_bytes)
    _flip_at(fd, first + rng.randrange(length), rng.randrange(8))
    try:
        part = making.upload(store, making.upload_order(sealed, 0, 1, 5, store.uri))
    except DtrainError:
        return "caught"
    finally:
        os.close(fd)
    uploads = Uploads(making.opened((part,), 1), (held,), seed, 0)
    verdict = making.verify(store, uploads)
    if not verdict.ok:
        return "caught"
    committed = making.commit(store, uploads, verdict)
    with making.fetched(store, committed.order) as report:
        if not isinstance(report, Fetched):
            return "caught"
        try:
            return "unseen" if making.wrong_ranks(report.plan, uploads) else "right"
        except DtrainError:
            return "caught"


@contextmanager
def _verifying(crc32c: checksum.Crc32c | None) -> Iterator[None]:
    before, checksum._provided = checksum._provided, crc32c
    try:
        yield
    finally:
        checksum._provided = before


def evidence_problem(target: Committed, report: FetchFailed, where: set[tuple[str, int]]) -> str:
    """Why the evidence does not name what is damaged; "" if it does."""
    bad = report.bad
    if bad is None:
        return f"it failed without evidence: {report.message}"
    if (bad.blob, bad.chunk) not in where:
        return f"chunk {bad.chunk} of {bad.blob} is blamed, {sorted(where)[:3]} changed"
    if bad.seq != target.order.seq or bad.found == bad.expected:
        return f"the evidence contradicts itself: {bad}"
    if bad.blob == target.order.manifest:
        return "" if bad.expected == target.order.digest else f"{bad.expected} was not committed"
    blob = next(blob for blob in target.manifest.blobs if blob.key == bad.blob)
    if bad.rank != blob.rank or bad.expected != blob.chunks[bad.chunk]:
        return f"the evidence names another rank or digest: {bad}"
    return ""


class FlipsArena:
    """A store before whose first write one bit of the arena flips."""

    def __init__(self, inner: BlobStore, fd: int, at: int, bit: int) -> None:
        self._inner = inner
        self._flip: tuple[int, int, int] | None = (fd, at, bit)

    @property
    def uri(self) -> str:
        return self._inner.uri

    def put(
        self, key: str, parts: Sequence[bytes | memoryview], *, chunk_crcs: Sequence[int], **more: Any
    ) -> BlobInfo:
        if self._flip is not None:
            tuple(chunk_crcs)  # computed when first looked at: now
            flip, self._flip = self._flip, None
            _flip_at(*flip)
        return self._inner.put(key, parts, chunk_crcs=chunk_crcs, **more)

    def get_into(self, key: str, offset: int, buffer: Any) -> None:
        self._inner.get_into(key, offset, buffer)

    def get(self, key: str, *, offset: int = 0, length: int | None = None) -> bytes:
        return self._inner.get(key, offset=offset, length=length)

    def head(self, key: str) -> BlobInfo:
        return self._inner.head(key)

    def list(self, prefix: str) -> Iterator[BlobInfo]:
        return self._inner.list(prefix)

    def list_unfinished(self, prefix: str) -> Iterator[str]:
        return self._inner.list_unfinished(prefix)

    def discard_unfinished(self, token: str) -> None:
        self._inner.discard_unfinished(token)

    def delete(self, key: str) -> None:
        self._inner.delete(key)

    def close(self) -> None:
        self._inner.close()


def _flip_at(fd: int, at: int, bit: int) -> None:
    (byte,) = os.pread(fd, 1, at)
    os.pwrite(fd, bytes([byte ^ 1 << bit]), at)


def _before_commit(
    rng: random.Random, held: Mapping[str, bytes], mine: Sequence[str], theirs: Sequence[str]
) -> Damage:
    key = rng.choice(mine)
    data = held[key]
    what = "manifest" if key.endswith(".json.gz") else "blob"
    kinds: dict[str, dict[str, bytes | None]] = {
        "flip": {key: damages._flip(data, rng.randrange(len(data)), rng.randrange(8))},
        "truncate": {key: data[: rng.randrange(len(data))]},
        "extend": {key: data + b"\0"},
        "delete": {key: None},
        "zombie": {key: held[rng.choice(theirs)]},
    }
    one, two = rng.sample(list(mine), 2)
    kinds["swap"] = {one: held[two], two: held[one]}
    name = rng.choice(sorted(kinds))
    return Damage(f"{name} {what} before commit", key, kinds[name])


@contextmanager
def _replaced(
    shelf: Shelf, files: Mapping[str, bytes | None], pristine: Mapping[str, bytes]
) -> Iterator[None]:
    """The store holds ``files`` for a while."""
    try:
        for key, data in files.items():
            shelf.remove(key) if data is None else shelf.write(key, data)
        yield
    finally:
        for key in files:
            if key in pristine:
                shelf.write(key, pristine[key])
            else:
                with contextlib.suppress(FileNotFoundError):
                    shelf.remove(key)
