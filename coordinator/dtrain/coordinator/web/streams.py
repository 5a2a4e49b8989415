"""Pages as they change, sent to browsers as server-sent events.

A stream sends the whole page once, then the parts that changed, each with the
revision of etcd that it shows. Whoever comes back with the last revision it saw,
to this replica or another, is shown nothing older: a replica that lags waits.
"""

import asyncio
import contextlib
import json
import re
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dtrain.coordinator.web import pages
from dtrain.coordinator.web.pages import Query
from dtrain.coordinator.web.records import Cluster, Decoder, group
from dtrain.protocol import codec
from dtrain.protocol.cluster import ReplicaRecord
from dtrain.protocol.errors import DtrainError
from dtrain.protocol.keys import Keys
from dtrain.storage.etcd.mirror import Mirror

STREAMS_MAX = 256
"""Beyond it, browsers are told to ask another replica."""

PACE_S = 0.25
"""A stream sends no more often than this, and for 9/10 of the time nothing is computed for it."""

ALIVE_S = 5.0
"""How often a stream says that it lives although nothing has changed."""

CATCH_UP_S = 10.0
"""How long a page that has seen more than this replica is kept waiting."""

PAGES_KEPT = 64


class Feed:
    """The present state of the cluster for any number of streams. Its methods belong to the event loop."""

    def __init__(self, mirror: Mirror, keys: Keys) -> None:
        self._mirror = mirror
        self._keys = keys
        self._decoder = Decoder(keys)
        # One thread: it owns the decoder, and pages never compete with each other for the processor.
        self._thread = ThreadPoolExecutor(1, "pages")
        self._cluster: Cluster | None = None
        self._pages: dict[Query, dict[str, str]] = {}
        self._changed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.streams = 0

    def notify(self) -> None:
        """Say that the mirror has moved."""
        if not self._changed.done():
            self._changed.set_result(None)

    def age_s(self) -> float | None:
        """How old the copy is; None: etcd has not been read yet."""
        age_s = self._mirror.age_s()
        return None if age_s == float("inf") else age_s

    @property
    def revision(self) -> int:
        return self._mirror.revision

    def dashboards(self) -> list[str]:
        """URLs of all replicas' dashboards."""
        found = []
        for kv in self._mirror.prefix(f"{self._keys.root}coordinators/"):
            with contextlib.suppress(DtrainError):
                found.append(codec.decode(ReplicaRecord, kv.value).dashboard)
        return [url for url in found if is_url(url)]

    async def cluster(self) -> Cluster:
        """Return the records as they are now."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._look)

    async def page(self, query: Query) -> tuple[int, dict[str, str]]:
        """Return a revision and the parts of a page, each as JSON."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._page, query)

    async def follow(
        self, query: Query, seen: int, hello: Callable[[], dict[str, Any]]
    ) -> AsyncIterator[str]:
        """Yield events for as long as somebody reads them; ``seen``: the newest revision shown before."""
        self.streams += 1
        try:
            yield _event("hello", hello())
            async for event in self._follow(query, seen):
                yield event
        finally:
            self.streams -= 1

    async def _follow(self, query: Query, seen: int) -> AsyncIterator[str]:
        end = time.monotonic() + CATCH_UP_S
        while self.revision < max(seen, 1) and time.monotonic() < end:
            await self._wait(0.5)
        sent: dict[str, str] | None = None
        shown = -1
        spoke_at = time.monotonic()
        while True:
            changed = self._changed if not self._changed.done() else self._renew()
            cost_s = 0.0
            if self.revision != shown and self.revision > 0:
                began = time.monotonic()
                shown, found = await self.page(query)
                new, gone = pages.differences(sent or {}, found)
                cost_s = time.monotonic() - began
                if sent is None or new or gone:
                    yield _parts(shown, new, gone, reset=sent is None)
                    spoke_at = time.monotonic()
                sent = found
            if time.monotonic() - spoke_at >= ALIVE_S:
                yield _event("alive", {"age_s": self.age_s(), "revision": shown})
                spoke_at = time.monotonic()
            await asyncio.sleep(max(PACE_S, 9 * cost_s))
            await self._wait(ALIVE_S, changed)

    async def _wait(self, limit_s: float, changed: "asyncio.Future[None] | None" = None) -> None:
        future = changed if changed is not None else self._renew()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(future), limit_s)

    def _renew(self) -> "asyncio.Future[None]":
        if self._changed.done():
            self._changed = asyncio.get_running_loop().create_future()
        return self._changed

    # In the thread.

    def _look(self) -> Cluster:
        known = self._cluster
        if known is not None and known.revision == self._mirror.revision:
            return known
        revision, items = self._mirror.snapshot(self._keys.root)
        self._decoder.forget({kv.key: kv for kv in items})
        self._cluster = group(items, revision, self._decoder)
        self._pages = {}
        return self._cluster

    def _page(self, query: Query) -> tuple[int, dict[str, str]]:
        cluster = self._look()
        if query not in self._pages:
            if len(self._pages) >= PAGES_KEPT:
                self._pages.clear()
            found = pages.parts(cluster, query)
            self._pages[query] = {name: _json(value) for name, value in found.items()}
        return cluster.revision, self._pages[query]


def is_url(text: str) -> bool:
    """Tell whether this is an origin, and nothing that could mean more in a header."""
    return re.fullmatch(r"https?://[A-Za-z0-9.\-\[\]:]{1,255}", text) is not None


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def _event(name: str, value: Any) -> str:
    return f"event: {name}\ndata: {_json(value)}\n\n"


def _parts(revision: int, new: dict[str, str], gone: list[str], *, reset: bool) -> str:
    # The parts are JSON already: they are put together, not parsed and written again.
    found = ",".join(f"{_json(name)}:{text}" for name, text in new.items())
    head = f'"revision":{revision},"reset":{_json(reset)},"gone":{_json(gone)}'
    return f'id: {revision}\nevent: parts\ndata: {{{head},"set":{{{found}}}}}\n\n'
