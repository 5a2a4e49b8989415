"""What is wrong now with this replica and with what it depends on, in sentences for people.

``Health`` collects problems: each has a name, begins, may be reworded, and ends.
Beginning and end are one log line each, however often the same is found; what
stands now is in ``InfoReply.problems``, and so in ``dtrain get coordinators``.
Whoever finds out about something tells it here: a problem without a place would
be noticed by the job that it stops.

``EtcdHealth`` is the thread that looks at etcd. A problem decides nothing: that
etcd cannot be reached ends leadership through the lease, and a stale mirror
stops rescheduling through the brake, whether or not anybody reads these lines.
"""

import re
import threading
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from dtrain.coordinator.core.decisions import Directed
from dtrain.coordinator.core.restored import UNKNOWN
from dtrain.protocol.errors import DtrainError, Unavailable
from dtrain.storage.etcd.port import Etcd, Status

LOOK_S = 5.0
LOOK_AGAIN_S = 1.0
"""While something is wrong: its end is seen sooner than its beginning."""

STATUS_DEADLINE_S = 3.0
MIRROR_STALE_S = 15.0
"""The age at which the brake stops rescheduling, too."""

UNREAD_LOOKS_MAX = 3
"""A replica that has just started has read nothing yet, and that is no problem."""

NO_SPACE = "etcd-no-space"
CORRUPT = "etcd-corrupt"
UNREACHABLE = "etcd-unreachable"
MIRROR_STALE = "mirror-stale"
TERM_WENT_BACK = "term-went-back"

_TERM_OVER = re.compile(r"term (\d+) is over; term (\d+) has been confirmed")


@dataclass(frozen=True, slots=True)
class Problem:
    """``sentence``: what is wrong and what still works; ``fix``: what a person can do, or ""."""

    sentence: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.sentence}; {self.fix}" if self.fix else self.sentence


class Health:
    """The problems of one process. Thread-safe. ``log`` writes one line: event, then fields."""

    def __init__(self, log: Callable[..., Any]) -> None:
        self._log = log
        self._lock = threading.Lock()
        self._problems: dict[str, Problem] = {}

    def begin(self, name: str, sentence: str, fix: str = "") -> None:
        """Say that this is wrong now. Again with the same ``name``: only its words change."""
        with self._lock:
            known = name in self._problems
            self._problems[name] = Problem(sentence, fix)
        if not known:
            self._log("problem", name=name, problem=sentence, fix=fix)

    def end(self, name: str) -> None:
        """Say that this is right, again or still."""
        with self._lock:
            was = self._problems.pop(name, None)
        if was is not None:
            self._log("problem over", name=name, problem=was.sentence)

    def has(self, name: str) -> bool:
        """Whether this is wrong now."""
        with self._lock:
            return name in self._problems

    def sentences(self) -> list[str]:
        """What is wrong now, the longest-lasting first."""
        with self._lock:
            return [str(problem) for problem in self._problems.values()]


def judge_rejection(health: Health, agent: str, problem: str) -> None:
    """Tell of an agent that refuses a leader which holds the newest term in etcd.

    It has obeyed a later one, so etcd has forgotten that: terms are revisions,
    and only a restored etcd gives them out again.
    """
    found = _TERM_OVER.search(problem)
    if found is None or int(found[1]) >= int(found[2]):
        return
    health.begin(
        TERM_WENT_BACK,
        f"agent {agent} has obeyed term {found[2]} and refuses term {found[1]}: etcd was restored from an "
        "older state; ranks train on, nothing is commanded or committed",
        "restore it with raised revisions (deploy/etcd/restore.sh: etcdutl snapshot restore --bump-revision "
        "1000000000 --mark-compacted); or stop the coordinators, start every agent again with --keep-ranks "
        "true --accept-restored-etcd true, then the coordinators: docs/operations.md, etcd lost its data",
    )


def judge_unknown(health: Health, directed: Directed) -> None:
    """Tell of ranks that are ended because etcd knows nothing of their job."""
    header = directed.command.header
    if header.id.startswith(UNKNOWN):
        health.begin(
            f"unknown-{header.job}-{header.uid}",
            f"etcd knows no job {header.job} ({header.uid}), whose ranks run on {directed.agent}: it was"
            " submitted after the backup that etcd was restored from; its ranks are ended",
            "submit it again; its checkpoints are in its store, below the uid",
        )


class EtcdHealth:
    """Looks at etcd every few seconds until ``stop``. ``run`` is a thread's body.

    ``remarks`` returns, for the version of etcd, sentences that stand until a person acts.
    """

    def __init__(
        self,
        etcd: Etcd,
        health: Health,
        *,
        mirror_age_s: Callable[[], float],
        remarks: Callable[[str], Iterable[str]] = lambda _version: (),
    ) -> None:
        self._etcd = etcd
        self._health = health
        self._mirror_age_s = mirror_age_s
        self._remarks = remarks
        self._remarked: set[str] = set()
        self._stop = threading.Event()
        self._woken = threading.Event()
        self._version = ""
        self._db_bytes = (0, 0)
        self._unread = 0

    @property
    def version(self) -> str:
        """The version of the member that answered last; "" before the first answer."""
        return self._version

    @property
    def db_bytes(self) -> tuple[int, int]:
        """Size and quota of the database of the member that answered last; 0: not told."""
        return self._db_bytes

    def run(self) -> None:
        """Look until ``stop``."""
        while not self._stop.is_set():
            self.look()
            passing = len(self._health.sentences()) > len(self._remarked)
            self._woken.wait(LOOK_AGAIN_S if passing else LOOK_S)
            self._woken.clear()

    def stop(self) -> None:
        """End ``run`` soon."""
        self._stop.set()
        self._woken.set()

    def refused_for_space(self) -> None:
        """A write was refused because etcd has no space: known before the next look."""
        if not self._health.has(NO_SPACE):
            self._no_space("<revision>")
            self._woken.set()

    def look(self) -> None:
        """Look once, seconds at most."""
        try:
            status = self._etcd.status(deadline_s=STATUS_DEADLINE_S)
        except DtrainError as error:
            what = "cannot be reached" if isinstance(error, Unavailable) else "does not answer as it should"
            self._health.begin(
                UNREACHABLE,
                f"etcd {what}: {error.message}; training goes on, nothing is committed until it is back",
                error.fix or "see that a majority of its members runs and can be reached from here",
            )
        else:
            self._health.end(UNREACHABLE)
            self._version = status.version
            self._db_bytes = (status.db_size_bytes, status.db_quota_bytes)
            self._judge(status)
        remarks = set(self._remarks(self._version))
        for remark in self._remarked - remarks:
            self._health.end(_name(remark))
        for remark in sorted(remarks):
            self._health.begin(_name(remark), remark)
        self._remarked = remarks
        age_s = self._mirror_age_s()
        self._unread = self._unread + 1 if age_s == float("inf") else 0
        if age_s > MIRROR_STALE_S and self._unread not in range(1, UNREAD_LOOKS_MAX):
            since = "has not been read yet" if age_s == float("inf") else f"is {age_s:.0f} s old"
            self._health.begin(MIRROR_STALE, f"this replica's copy of etcd {since}; nothing is rescheduled")
        else:
            self._health.end(MIRROR_STALE)

    def _judge(self, status: Status) -> None:
        if "NOSPACE" in status.alarms:
            self._no_space(str(status.revision))
        else:
            self._health.end(NO_SPACE)
        if "CORRUPT" in status.alarms:
            self._health.begin(
                CORRUPT,
                "etcd has raised its CORRUPT alarm: its members do not hold the same data",
                "find the bad member with etcdctl alarm list and replace it",
            )
        else:
            self._health.end(CORRUPT)

    def _no_space(self, revision: str) -> None:
        self._health.begin(
            NO_SPACE,
            "etcd has no space: training and renewals go on, no checkpoint is committed, no job is accepted",
            f"etcdctl compact {revision}, then etcdctl defrag --cluster, then etcdctl alarm disarm",
        )


def _name(remark: str) -> str:
    return f"etcd-{zlib.crc32(remark.encode()):08x}"
