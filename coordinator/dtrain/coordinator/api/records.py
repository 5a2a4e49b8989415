"""Operators' records: submitted jobs and intents, written by any replica.

Not fenced by a term, since a replica needs no leader for it: each write is
guarded by the revisions of what it was decided from.
"""

import difflib
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TypeVar

from dtrain.coordinator import packages
from dtrain.coordinator.api import validate
from dtrain.coordinator.api.errors import contended
from dtrain.coordinator.core import releases
from dtrain.protocol import codec
from dtrain.protocol.cluster import ReplicaRecord
from dtrain.protocol.errors import (
    Conflict,
    ErrorCode,
    NotFound,
    OutcomeUnknown,
    Refused,
)
from dtrain.protocol.ids import ClusterName, JobName, ReplicaId, Uid, parse_name
from dtrain.protocol.job import TERMINAL_PHASES, Intent, JobSpec, JobStatus, Wanted
from dtrain.protocol.keys import Keys
from dtrain.runtime.clock import Clock, iso
from dtrain.storage.blobs.open import open_store
from dtrain.storage.blobs.port import BlobStore
from dtrain.storage.etcd.port import Compare, Etcd, Get, KeyValue, Put, Target, Txn, flatten, prefix_end

T = TypeVar("T")

TRIES_MAX = 5
BY_CHARACTERS_MAX = 100


@dataclass(frozen=True, slots=True)
class Submitted:
    """A job's spec as stored; ``created`` False: an earlier call with the same request id did it."""

    spec: JobSpec
    created: bool
    revision: int


@dataclass(frozen=True, slots=True)
class _Found:
    """A job's records at one revision, with the compares that say 'still so'."""

    spec: JobSpec | None
    intent: Intent | None
    status: JobStatus | None
    guards: tuple[Compare, ...]
    revision: int
    intent_stored: bytes = b""
    """As it stands in etcd, with what a newer release may have put there."""


class Operators:
    """Writes operators' records. Safe for several threads."""

    def __init__(
        self,
        etcd: Etcd,
        cluster: ClusterName,
        clock: Clock,
        stores: Callable[[str], BlobStore] = open_store,
    ) -> None:
        self._etcd = etcd
        self._keys = Keys(cluster)
        self._clock = clock
        self._stores = stores

    def prepare(self, document: bytes, request_id: str) -> JobSpec:
        """Return the spec to store: checked, with a uid and the time of submission.

        Raises:
            Refused: it cannot be run.
        """
        spec = codec.decode(JobSpec, document)
        validate.check(spec)
        request_id = request_id or spec.request_id or secrets.token_hex(8)
        spec = replace(
            spec,
            uid=Uid(secrets.token_hex(4)),
            submitted_at=iso(self._clock.wall()),
            request_id=_request_id(request_id),
        )
        size = len(codec.encode(spec))
        if size > validate.SPEC_BYTES_MAX:
            raise Refused(
                ErrorCode.BAD_JOB_FILE,
                f"the job takes {size} bytes, the limit is {validate.SPEC_BYTES_MAX}",
                fix="keep data in files: args and env are for settings",
            )
        return spec

    def submit(self, spec: JobSpec) -> Submitted:
        """Create the job, or find that this very request did so before.

        Raises:
            Conflict: ALREADY_EXISTS, a job of this name has not ended; or CONFLICT,
                others kept changing it.
            Refused, Unavailable, OutcomeUnknown: of etcd.
        """
        intent = Intent(spec.uid, at=spec.submitted_at)
        keys = self._keys
        unknown: OutcomeUnknown | None = None
        for _ in range(TRIES_MAX):
            found = self._read(spec.name)
            if found.spec is not None and found.spec.request_id == spec.request_id:
                # Our own write too, when its answer was lost: told apart by the uid.
                return Submitted(found.spec, found.spec.uid == spec.uid, found.revision)
            if found.spec is not None and not _has_ended(found):
                raise Conflict(
                    ErrorCode.ALREADY_EXISTS,
                    f"job {spec.name} exists already and has not ended",
                    fix=f"choose another name, or end it first: dtrain cancel {spec.name}",
                )
            guards = (*found.guards, *self._package_guards(spec))
            puts = (
                Put(keys.spec(spec.name), codec.encode(spec)),
                Put(keys.intent(spec.name), codec.encode(intent)),
            )
            try:
                result = self._etcd.txn(Txn(guards, puts))
            except OutcomeUnknown as error:
                unknown = error
                continue
            if result.succeeded:
                return Submitted(spec, True, result.revision)
        if unknown is not None:
            raise unknown
        raise contended(f"job {spec.name}")

    def _package_guards(self, spec: JobSpec) -> tuple[Compare, ...]:
        if spec.package is None:
            return ()
        self._need_all_to_know("a packed working directory can be used", ErrorCode.OLDER_RELEASE)
        return (
            packages.guard(self._etcd, self._keys.cluster, self._stores(spec.package.store), spec.package),
        )

    def set_intent(
        self,
        job: str,
        wanted: str,
        checkpoint_token: str,
        by: str,
        known: Iterable[str],
        *,
        nnodes: tuple[int, int] = (0, 0),
        pause: str = "",
    ) -> tuple[Intent, int]:
        """Change what is wanted of a job; return the intent as stored and its revision.

        ``nnodes``: fewest and most machines from now on; (0, 0): as before. ``pause``: "pause" or
        "unpause"; "": as before.

        Raises:
            NotFound: there is no such job; the fix names one of ``known`` that is like it.
            Conflict: the job has ended, or others kept changing it.
            Refused: ``wanted`` or ``pause`` is no such thing, or ``nnodes`` no range.
        """
        name = JobName(parse_name(job, "job"))
        asked = _wanted(wanted)
        paused = _paused(pause)
        if asked is Wanted.SUSPEND or paused:
            self._need_all_to_know("jobs can be suspended and paused")
        if nnodes != (0, 0):
            validate.check_nodes(*nnodes)
        unknown: OutcomeUnknown | None = None
        for _ in range(TRIES_MAX):
            found = self._read(name)
            if found.spec is None:
                near = difflib.get_close_matches(name, sorted(known), n=1)
                raise NotFound(
                    ErrorCode.NOT_FOUND,
                    f"there is no job {name}",
                    fix=f"did you mean {near[0]}?" if near else "list jobs: dtrain get jobs",
                )
            before = found.intent
            if before is None or before.uid != found.spec.uid:
                before = Intent(found.spec.uid)
            after = replace(
                before,
                wanted=asked or before.wanted,
                checkpoint_token=checkpoint_token[:BY_CHARACTERS_MAX] or before.checkpoint_token,
                nnodes_min=nnodes[0] or before.nnodes_min,
                nnodes_max=nnodes[1] or before.nnodes_max,
                # What gives its machines back stands still no more, and is to run when it has some again.
                paused=(before.paused if paused is None else paused) and asked in (None, Wanted.RUN),
            )
            if after == before and found.intent is not None:
                return before, found.revision
            if _has_ended(found):
                phase = found.status.phase.value if found.status is not None else ""
                raise Conflict(ErrorCode.CONFLICT, f"job {name} has ended already: {phase}")
            if before.wanted is Wanted.CANCEL and after.wanted is not Wanted.CANCEL:
                raise Conflict(ErrorCode.CONFLICT, f"job {name} is being cancelled, which cannot be undone")
            if paused and after.wanted is Wanted.SUSPEND:
                raise Conflict(
                    ErrorCode.CONFLICT,
                    f"job {name} is suspended: it has no ranks to hold",
                    fix=f"let it go on first: dtrain resume {name}",
                )
            after = replace(after, by=by[:BY_CHARACTERS_MAX], at=iso(self._clock.wall()))
            try:
                result = self._etcd.txn(
                    Txn(
                        found.guards,
                        (Put(self._keys.intent(name), codec.encode(after, over=found.intent_stored)),),
                    )
                )
            except OutcomeUnknown as error:
                # Read again: if it was applied, the next round finds nothing left to change.
                unknown = error
                continue
            if result.succeeded:
                return after, result.revision
        if unknown is not None:
            raise unknown
        raise contended(f"job {name}")

    def _need_all_to_know(self, what: str, code: ErrorCode = ErrorCode.CONFLICT) -> None:
        """Refuse what a coordinator of a former release could not read, if it led next."""
        versions = {}
        replicas = f"{self._keys.root}coordinators/"
        for kv in self._etcd.range(replicas, prefix_end(replicas)).items:
            parsed = self._keys.parse(kv.key)
            if parsed is not None:
                versions[ReplicaId(parsed.name)] = codec.decode(ReplicaRecord, kv.value).version
        if why := releases.withheld(versions):
            raise Conflict(
                code,
                f"{what} once all coordinators know how: {why}",
                fix="upgrade it first; what is running goes on meanwhile",
            )

    def _read(self, name: JobName) -> _Found:
        keys = self._keys
        names = (keys.spec(name), keys.intent(name), keys.status(name))
        result = self._etcd.txn(Txn(success=tuple(Get(key) for key in names)))
        at = flatten(result.responses)
        spec = _value(at.get(names[0]), JobSpec)
        status = _value(at.get(names[2]), JobStatus)
        guards = [
            Compare(key, Target.MOD, at[key].mod_revision if key in at else 0) for key in (names[0], names[1])
        ]
        intent = at.get(names[1])
        found = _Found(
            spec,
            _value(intent, Intent),
            status,
            (),
            result.revision,
            intent.value if intent is not None else b"",
        )
        if _has_ended(found):
            # A terminal phase is what allows replacing the job: it must still be so. A running
            # job's status changes far too often to be compared.
            guards.append(Compare(names[2], Target.MOD, at[names[2]].mod_revision))
        return replace(found, guards=tuple(guards))


def _request_id(text: str) -> str:
    if len(text) > BY_CHARACTERS_MAX or not (text.isascii() and text.isprintable()):
        raise Refused(
            ErrorCode.USAGE,
            f"{text[:40]!r} is no request id",
            fix=f"use at most {BY_CHARACTERS_MAX} ASCII characters, or none: one is chosen",
        )
    return text


def _has_ended(found: _Found) -> bool:
    return (
        found.spec is not None
        and found.status is not None
        and found.status.uid == found.spec.uid
        and found.status.phase in TERMINAL_PHASES
    )


def _value(kv: KeyValue | None, kind: type[T]) -> T | None:
    return None if kv is None else codec.decode(kind, kv.value)


def _wanted(text: str) -> Wanted | None:
    if not text:
        return None
    try:
        return Wanted(text)
    except ValueError as error:
        raise Refused(
            ErrorCode.USAGE,
            f"a job cannot be made to {text[:40]!r}",
            fix=f"use one of: {', '.join(Wanted)}",
        ) from error


def _paused(text: str) -> bool | None:
    if text not in ("", "pause", "unpause"):
        raise Refused(ErrorCode.USAGE, f"{text[:40]!r} is no pause", fix="use one of: pause, unpause")
    return None if not text else text == "pause"
