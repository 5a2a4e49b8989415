"""Notices that this machine is about to be taken away: spot instances, maintenance, a scheduler's hint.

Where they come from is a setting, and code of one's own can be plugged in. Each
source is looked at by a thread of its own, so that one that hangs, fails or is
slow costs nothing but its own notice: training, leases and the other sources
never wait for it. What a notice leads to is a drain, as by SIGTERM.
"""

import importlib.metadata
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from dtrain.agent import notice_http
from dtrain.agent.notice_file import FileSource
from dtrain.agent.notice_value import Notice
from dtrain.protocol.errors import ErrorCode, Refused
from dtrain.runtime.clock import Clock

ENTRY_POINTS = "dtrain.preemption_notices"
"""Group of the entry points that ``--preemption-notice NAME[:ARGUMENT]`` looks through."""

SLACK_S = 5.0
"""Before the announced end everything has to be over: the last bytes, the ranks' end, clocks that differ."""

SLACK_SHARE_MAX = 1 / 4
"""Of a notice that comes late the checkpoint gets the larger part."""

GRACE_S_LEAST = 1.0
"""Announced ends are not kept to the second, and a small job is saved in less."""

FAILURE_LOG_S = 600.0
"""A source that goes on failing is a line so often, whatever it says."""

FIRST_LOOK_S_MAX = 2.0
"""How long a starting agent waits to hear whether it is to leave again."""


class Source(Protocol):
    """One place to look at. It may raise whatever it likes: it is asked again."""

    def look(self, wall: float) -> Notice | None:
        """Return the notice that stands at ``wall`` (epoch seconds), None if there is none."""
        ...


def grace_s(notice: Notice, otherwise_s: float) -> float:
    """How long the jobs may take to move: what the notice leaves, less a reserve, else ``otherwise_s``."""
    if notice.left_s is None:
        return otherwise_s
    slack_s = min(SLACK_S, SLACK_SHARE_MAX * notice.left_s)
    return max(GRACE_S_LEAST, notice.left_s - slack_s)


def parse(text: str) -> Source:
    """Return the source that one word of ``--preemption-notice`` names.

    Raises:
        Refused: BAD_SETTING; there is none of that name, or it cannot be used.
    """
    if text.startswith(("/", "file:")):
        return FileSource.of(text)
    if text.startswith(("http://", "https://")):
        return notice_http.generic(text)
    name, _, argument = text.partition(":")
    if name in notice_http.PRESETS:
        return notice_http.preset(name, argument)
    return _plugged_in(name, argument)


@dataclass(frozen=True, slots=True)
class _Plugin:
    look_once: Callable[[], Notice | None]

    def look(self, wall: float) -> Notice | None:
        del wall  # it has clocks of its own
        found = self.look_once()
        if found is not None and not isinstance(found, Notice):
            raise TypeError(f"it returned {type(found).__name__}, not a Notice")
        return found


def _plugged_in(name: str, argument: str) -> Source:
    found = {point.name: point for point in importlib.metadata.entry_points(group=ENTRY_POINTS)}
    if name not in found:
        known = ", ".join([*notice_http.PRESETS, *sorted(found)])
        raise Refused(
            ErrorCode.BAD_SETTING,
            f"--preemption-notice cannot be {name!r}: nothing of that name is installed",
            fix=f"use a path, an http:// URL, {known}, or an entry point of the group {ENTRY_POINTS}",
        )
    try:
        return _Plugin(found[name].load()(argument))
    except Exception as error:
        raise Refused(
            ErrorCode.BAD_SETTING,
            f"--preemption-notice {name} cannot be used: {type(error).__name__}: {error}",
            fix=f"the entry point takes {argument!r} and returns a function without arguments",
        ) from error


@dataclass(slots=True)
class _Looking:
    """One source and what was last seen there; of its own thread alone, but for ``standing``."""

    name: str
    source: Source
    looked: threading.Event = field(default_factory=threading.Event)
    standing: bool = False
    told: str = ""
    failing: bool = False
    """A failure was logged, and no success since."""
    log_from: float = 0.0


class Watch:
    """Looks at all sources until it is closed. ``on_notice`` is called from their threads."""

    def __init__(
        self,
        words: Sequence[str],
        *,
        interval_s: float,
        clock: Clock,
        on_notice: Callable[[Notice], None],
        log: Callable[..., Any],
    ) -> None:
        """Parse ``words``.

        Raises:
            Refused: BAD_SETTING; one of them is not a source.
        """
        # Without the query of a URL: it may hold a secret.
        self._looking = tuple(_Looking(word.partition("?")[0], parse(word)) for word in words)
        self._interval_s = interval_s
        self._clock = clock
        self._on_notice = on_notice
        self._log = log
        self._closed = threading.Event()

    @property
    def standing(self) -> bool:
        """Whether some source says, as far as is known, that this machine is to go."""
        return any(one.standing for one in self._looking)

    def start(self) -> None:
        """Begin to look, and wait a moment for the first answers.

        Whoever starts again on a machine that is about to go has to know it before it says that it is there.
        """
        for one in self._looking:
            threading.Thread(
                target=self._look_on, args=(one,), name=f"notice {one.name}", daemon=True
            ).start()
        end = self._clock.monotonic() + FIRST_LOOK_S_MAX
        for one in self._looking:
            one.looked.wait(max(0.0, end - self._clock.monotonic()))

    def close(self) -> None:
        """Look no more."""
        self._closed.set()

    def _look_on(self, one: _Looking) -> None:
        while not self._closed.is_set():
            self._look(one)
            one.looked.set()
            self._closed.wait(self._interval_s)

    def _look(self, one: _Looking) -> None:
        try:
            notice = one.source.look(self._clock.wall())
        except BaseException as error:  # noqa: BLE001 - code of others, which may even end its thread
            self._failed(one, error)
            return
        if one.failing:
            one.failing = False
            self._log("preemption notices work again", notices=one.name)
        if notice is None:
            if one.standing:
                self._log("preemption notice withdrawn", notices=one.name)
            one.standing, one.told = False, ""
            return
        one.standing = True
        if notice.reason != one.told:
            one.told = notice.reason
            self._log("preemption notice", notices=one.name, reason=notice.reason, left_s=notice.left_s)
            self._on_notice(notice)

    def _failed(self, one: _Looking, error: BaseException) -> None:
        # What was said before still stands: a metadata service may go before its machine does.
        now = self._clock.monotonic()
        if now < one.log_from:
            return
        one.log_from, one.failing = now + FAILURE_LOG_S, True
        text = f"{type(error).__name__}: {error}"[:300]
        self._log("preemption notices fail", notices=one.name, error=text, training="goes on")
