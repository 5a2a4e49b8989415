"""Preemption notices over HTTP: the metadata services of three clouds, and any URL of one's own.

With ``http.client`` alone: nothing here follows a redirect or a proxy, which a
metadata service must never be asked through. Every call has tight limits.
"""

import email.utils
import http.client
import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from urllib.parse import SplitResult, unquote, urlsplit

from dtrain.agent.notice_value import Notice, epoch_s, one_line
from dtrain.protocol.errors import ErrorCode, Refused

CALL_S_MAX = 2.0
"""For connecting, and for each part of the answer."""

BODY_BYTES_MAX = 64 * 1024

METADATA = "http://169.254.169.254"
"""Where all three clouds serve it to their machines."""

AWS_TOKEN_S = 21600
AZURE_VERSION = "2020-07-01"
AZURE_TAKES_AWAY = frozenset({"Preempt", "Terminate", "Redeploy", "Reboot"})
"""Events of Azure that end the ranks of a machine; a Freeze is a pause of seconds."""

GCP_LEFT_S = 30.0
"""What Compute Engine gives a machine that it preempts."""


class NoticeFailed(Exception):
    """A source gave no usable answer."""


@dataclass(frozen=True, slots=True)
class Answer:
    """``at``: the server's own clock, epoch seconds, None if it does not tell."""

    status: int
    body: str
    at: float | None


def call(base: SplitResult, path: str, headers: Mapping[str, str], *, method: str = "GET") -> Answer:
    """Ask once.

    Raises:
        OSError, http.client.HTTPException: no answer within the limits.
    """
    made = http.client.HTTPSConnection if base.scheme == "https" else http.client.HTTPConnection
    connection = made(base.hostname or "", base.port, timeout=CALL_S_MAX)
    try:
        connection.request(method, path, headers={"Connection": "close", **headers})
        response = connection.getresponse()
        end = time.monotonic() + CALL_S_MAX
        parts: list[bytes] = []
        size = 0
        while size < BODY_BYTES_MAX and (part := response.read1(BODY_BYTES_MAX - size)):
            parts.append(part)
            size += len(part)
            if time.monotonic() > end:
                raise TimeoutError("the answer comes too slowly")
        sent = response.getheader("Date", "")
        return Answer(response.status, b"".join(parts).decode(errors="replace"), _http_date(sent))
    finally:
        connection.close()


@dataclass(frozen=True, slots=True)
class Generic:
    """Status 200 is a notice, if the body fits; another success, 404 and 410 are none."""

    base: SplitResult
    path: str
    shown: str
    pattern: re.Pattern[str] | None

    def look(self, wall: float) -> Notice | None:
        del wall  # no answer is asked for a time
        answer = call(self.base, self.path, {})
        if answer.status in (404, 410) or 200 < answer.status < 300:
            return None
        if answer.status != 200:
            raise NoticeFailed(f"HTTP status {answer.status}")
        if self.pattern is not None and not self.pattern.search(answer.body):
            return None
        return Notice(f"preemption notice from {self.shown}")


@dataclass(slots=True)
class Aws:
    """EC2's spot interruption notice, two minutes ahead, by IMDSv2."""

    base: SplitResult
    token: str = ""

    def look(self, wall: float) -> Notice | None:
        answer = self._ask()
        if answer.status == 401:
            # The token is over, or another machine's after a restore from an image.
            self.token = ""
            answer = self._ask()
        if answer.status == 404:
            return None
        if answer.status != 200:
            raise NoticeFailed(f"HTTP status {answer.status}")
        told = _object(answer.body)
        at = str(told.get("time", ""))
        until = epoch_s(at)
        what = one_line(f"AWS: {told.get('action', 'interruption')} at {at}")
        return Notice(what, None if until is None else until - (answer.at or wall))

    def _ask(self) -> Answer:
        if not self.token:
            lasts = {"X-aws-ec2-metadata-token-ttl-seconds": str(AWS_TOKEN_S)}
            got = call(self.base, "/latest/api/token", lasts, method="PUT")
            if got.status != 200 or not re.fullmatch(r"[\x21-\x7e]+", got.body.strip()):
                raise NoticeFailed(f"no token: HTTP status {got.status}")
            self.token = got.body.strip()
        return call(
            self.base, "/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": self.token}
        )


@dataclass(slots=True)
class Gcp:
    """Compute Engine's ``preempted``, half a minute ahead."""

    base: SplitResult
    since: float | None = None

    def look(self, wall: float) -> Notice | None:
        path = "/computeMetadata/v1/instance/preempted"
        answer = call(self.base, path, {"Metadata-Flavor": "Google"})
        if answer.status != 200:
            raise NoticeFailed(f"HTTP status {answer.status}")
        if answer.body.strip().upper() != "TRUE":
            self.since = None
            return None
        if self.since is None:
            self.since = wall
        return Notice("GCP: the machine is preempted", GCP_LEFT_S - (wall - self.since))


@dataclass(slots=True)
class Azure:
    """Azure's scheduled events that concern this machine and end what runs on it."""

    base: SplitResult
    own_name: str = field(default="")

    def look(self, wall: float) -> Notice | None:
        answer = self._ask(f"/metadata/scheduledevents?api-version={AZURE_VERSION}")
        events = _object(answer.body).get("Events") or []
        if not isinstance(events, list):
            raise NoticeFailed("the answer has no list of events")
        coming = [event for event in events if isinstance(event, dict) and self._is_ours(event)]
        if not coming:
            return None
        now = answer.at or wall
        # Without a time it has begun.
        left = [(_http_date(str(event.get("NotBefore", ""))) or now) - now for event in coming]
        soonest = left.index(min(left))
        when = str(coming[soonest].get("NotBefore", "")) or "now"
        return Notice(one_line(f"Azure: {coming[soonest].get('EventType')} at {when}"), left[soonest])

    def _is_ours(self, event: Mapping[str, object]) -> bool:
        if event.get("EventType") not in AZURE_TAKES_AWAY or event.get("EventStatus") == "Completed":
            return False
        resources = event.get("Resources")
        if not isinstance(resources, list) or not resources:
            return True
        # Everybody in a scale set hears of everybody's events.
        return self._name() in resources

    def _name(self) -> str:
        if not self.own_name:
            path = f"/metadata/instance/compute/name?api-version={AZURE_VERSION}&format=text"
            self.own_name = self._ask(path).body.strip()
        return self.own_name

    def _ask(self, path: str) -> Answer:
        answer = call(self.base, path, {"Metadata": "true"})
        if answer.status != 200:
            raise NoticeFailed(f"HTTP status {answer.status}")
        return answer


PRESETS: Mapping[str, Callable[[SplitResult], Aws | Gcp | Azure]] = {"aws": Aws, "gcp": Gcp, "azure": Azure}


def preset(name: str, base: str) -> Aws | Gcp | Azure:
    """Return the metadata service of a cloud, at another address if ``base`` is one.

    Raises:
        Refused: BAD_SETTING; ``base`` is no URL of a host.
    """
    found = _split(base or METADATA)
    if found.path.strip("/") or found.query or found.fragment:
        raise _bad(f"{name}:{base}", "the address of a metadata service has no path")
    return PRESETS[name](found)


def generic(text: str) -> Generic:
    """Return the source that is a URL; behind ``#`` a regular expression that the body has to match.

    Raises:
        Refused: BAD_SETTING; it is no usable URL or expression.
    """
    found = _split(text)
    pattern = None
    if found.fragment:
        try:
            pattern = re.compile(unquote(found.fragment))
        except re.error as error:
            raise _bad(text, f"what stands behind # is no regular expression: {error}") from error
    path = (found.path or "/") + (f"?{found.query}" if found.query else "")
    # Without the query: it may hold a secret, and reasons are shown.
    return Generic(found, path, one_line(f"{found.scheme}://{found.netloc}{found.path}"), pattern)


def _split(text: str) -> SplitResult:
    try:
        found = urlsplit(text)
        usable = found.scheme in ("http", "https") and bool(found.hostname) and found.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise _bad(text, "that is no URL of a host")
    if "@" in found.netloc or re.search(r"[^\x21-\x7e]", text):
        raise _bad("a URL", "it holds a password, or characters that a URL cannot have")
    return found


def _bad(text: str, why: str) -> Refused:
    return Refused(
        ErrorCode.BAD_SETTING,
        f"--preemption-notice cannot be {text!r}: {why}",
        fix="use a URL such as http://127.0.0.1:8080/preempted#TRUE",
    )


def _object(body: str) -> Mapping[str, object]:
    try:
        found = json.loads(body)
    except ValueError as error:
        raise NoticeFailed("the answer is not JSON") from error
    if not isinstance(found, dict):
        raise NoticeFailed("the answer is no JSON object")
    return found


def _http_date(text: str) -> float | None:
    try:
        return email.utils.parsedate_to_datetime(text).timestamp() if text else None
    except ValueError:
        return None
