"""Reads the cluster in threads of its own, for ever, from whichever replica answers.

Three of them, as each may wait for something else: rows and whoever leads, every second;
events, as they happen; and what replicas say of themselves. A call that hangs keeps no key waiting.
"""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from dtrain.cli import listing, reading, records, watching
from dtrain.cli.answers import Changed, Item, ReplicaInfo
from dtrain.cli.client import Client
from dtrain.cli.records import Agent, Cluster, Job
from dtrain.cli.render import lists
from dtrain.cli.top.seen import Seen, moved
from dtrain.cli.top.view import Page
from dtrain.protocol import codec
from dtrain.protocol.errors import DtrainError, NotFound, OutcomeUnknown, Unavailable
from dtrain.protocol.events import EventRecord

READ_S = 1.0
"""Rows are read this often, and the page that is open."""

ASK_S = 5.0
"""Replicas are asked this often how they are."""

EVENTS_KEPT = 500


class _StoppedError(Exception):
    """Nobody looks any more."""


class Feed:
    """``seen`` is replaced as a whole with everything new; ``tell`` is called after each time."""

    def __init__(
        self, client: Client, each: Callable[[Sequence[str]], Client], tell: Callable[[], None]
    ) -> None:
        """``each`` makes a client of these replicas."""
        self._client, self._each, self._tell = client, each, tell
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._looked = threading.Event()
        self._page: Page | None = None
        self.seen = Seen()
        self.problem: BaseException | None = None
        """What ended a thread: it is no use going on."""

    def first(self, *, whole: bool = False) -> Seen:
        """Read rows now; ``whole``: all that the threads will read, too.

        Raises:
            DtrainError: it cannot be read.
        """
        self._read_rows()
        if whole:
            self._keep_events(self._client.read("jobs/").items)
            self._ask()
        return self.seen

    def start(self) -> None:
        """Go on reading."""
        for run in (self._rows, self._events, self._replicas):
            threading.Thread(target=self._until_stopped, args=(run,), name=run.__name__, daemon=True).start()

    def stop(self) -> None:
        """Read nothing more."""
        self._stopped.set()
        self._looked.set()

    def look(self, page: Page | None) -> None:
        """Say which page is open: it is read, too."""
        if page == self._page:
            return
        self._page = page
        self._change(opened=None, gone=False)
        self._looked.set()

    def clock(self) -> float:
        """What ``Seen`` is timed by."""
        return time.monotonic()

    # Threads ------------------------------------------------------------------------

    def _until_stopped(self, run: Callable[[], None]) -> None:
        try:
            run()
        except _StoppedError:
            pass
        except BaseException as error:  # noqa: BLE001 - the main thread raises it
            if not self._stopped.is_set():
                self.problem = error
                self._tell()

    def _rows(self) -> None:
        while not self._stopped.is_set():
            try:
                self._read_rows()
                self._read_page()
            except (Unavailable, OutcomeUnknown) as error:
                self._change(trouble=error.message)
            # A page that has just been opened is not waited for.
            self._looked.wait(READ_S)
            self._looked.clear()

    def _events(self) -> None:
        def say(_: str) -> None:
            if self._stopped.is_set():
                raise _StoppedError

        # What is lost is said of the rows.
        while not self._stopped.is_set():
            try:
                for moment in watching.moments(self._client, ["jobs/"], say):
                    if moment.listed:
                        self._keep_events(list(moment.items.values()))
                    else:
                        self._keep_events(moment.changes)
                    say("")
            except (Unavailable, OutcomeUnknown):
                self._stopped.wait(READ_S)

    def _replicas(self) -> None:
        while not self._stopped.is_set():
            self._ask()
            self._stopped.wait(ASK_S)

    # Reading ------------------------------------------------------------------------

    def _read_rows(self) -> None:
        jobs = listing.jobs(self._client)
        agents = listing.agents(self._client)
        coordinators = reading.coordinators(self._client)
        at = self.clock()
        self._change(
            jobs=jobs.rows,
            agents=agents.rows,
            coordinators=coordinators,
            moved=moved(self.seen, jobs.rows, at),
            read_at=at,
            age_s=max(jobs.age_s, agents.age_s, coordinators.age_s),
            trouble="",
        )

    def _read_page(self) -> None:
        page = self._page
        if page is None:
            return
        opened: Job | Agent | None = None
        with contextlib.suppress(NotFound):
            opened = (
                reading.one(self._client, page.name)[0] if page.kind == "job" else self._read_agent(page.name)
            )
        if page == self._page:
            self._change(opened=opened, gone=opened is None)

    def _read_agent(self, name: str) -> Agent | None:
        # Its own records, not those of all machines.
        cluster = records.group(
            self._client.read(f"agents/{name}/"),
            self._client.read(f"cordons/{name}"),
            self._client.read(f"suspicions/{name}"),
        )
        return cluster.agents.get(name)

    def _ask(self) -> None:
        """What replicas say of themselves; none of them has to answer."""
        known: Cluster = self.seen.coordinators
        addresses = [one.record.address for one in known.replicas.values() if one.record]
        if not addresses:
            return
        each = self._each(addresses)
        try:
            answers = each.info_each()
        finally:
            each.close()
        ages_s: dict[str, float | None] = {}
        problems: dict[str, tuple[str, ...]] = {}
        name = self.seen.name
        for address, answer in answers.items():
            replica = lists.replica_of(known, address)
            if replica is None:
                continue
            told = answer if isinstance(answer, ReplicaInfo) else None
            ages_s[replica.name] = told.mirror_age_s if told else None
            problems[replica.name] = told.problems if told else ()
            name = told.cluster if told else name
        self._change(mirror_ages_s=ages_s, problems=problems, name=name)

    def _keep_events(self, found: Sequence[Item | Changed]) -> None:
        """Take in those of some records that are events; the newest stay."""
        told = [one for one in found if "/events/" in one.key and one.value is not None]
        if not told:
            return
        # Only what will be kept is decoded: a cluster has tens of thousands.
        told.sort(key=lambda one: one.mod_revision if isinstance(one, Item) else one.revision)
        kept = {(job, event.seq): (job, event) for job, event in reversed(self.seen.events)}
        for one in deque(told, EVENTS_KEPT):
            assert one.value is not None
            with contextlib.suppress(DtrainError):
                event = codec.decode(EventRecord, one.value)
                job = one.key.split("/")[1]
                kept[job, event.seq] = (job, event)
        newest = sorted(
            kept.values(), key=lambda one: (one[1].last or one[1].first, one[1].seq), reverse=True
        )
        self._change(events=tuple(newest[:EVENTS_KEPT]))

    def _change(self, **values: Any) -> None:
        with self._lock:
            self.seen = replace(self.seen, **values)
        self._tell()
