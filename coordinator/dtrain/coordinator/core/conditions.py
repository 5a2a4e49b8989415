"""Conditions of a job: what programs wait for, derived from its status.

A condition's time moves only with its status. Conditions are derived when the
status is written anyway; they never cause a write.
"""

from collections.abc import Mapping
from types import MappingProxyType

from dtrain.coordinator.core.stamps import iso
from dtrain.coordinator.core.views import FleetView, Moment
from dtrain.protocol.checkpoint import CommitRecord
from dtrain.protocol.job import PLACED_PHASES, TERMINAL_PHASES, Condition, JobPhase, JobSpec, JobStatus
from dtrain.protocol.wording import some

NAMED_MAX = 8
"""So many members are told by name."""

OF_RANKS = ("NonFinite", "Straggling")
"""Conditions that only some jobs ever have."""
_SUSPENDED = (JobPhase.SUSPENDING, JobPhase.SUSPENDED)

BRAKE_ON = "BrakeOn"
"""Reason of the condition Degraded while the brake is on."""

CANNOT_PAUSE = "CannotPause"
"""Reason of the condition Paused of a job that goes on although somebody wants it to stand still."""


def derive(
    fleet: FleetView,
    moment: Moment,
    spec: JobSpec,
    status: JobStatus,
    *,
    newest: CommitRecord | None,
    noted: Mapping[str, Condition] = MappingProxyType({}),
) -> tuple[Condition, ...]:
    """All conditions of ``status``, in a fixed order; ``newest`` is its newest checkpoint.

    ``noted`` are those that its ranks' reports have brought about: they stay while training does,
    and are shown as over after that.
    """
    before = {condition.type: condition for condition in status.conditions}
    stamp = iso(moment.wall)
    found = [
        Condition("Accepted", "True", "Valid", "the job file is valid"),
        _placed(status),
        _ranks_ready(status),
        _progressing(status),
        _checkpointed(status, newest),
        _degraded(fleet, spec, status),
        *_of_ranks(status, noted, before),
        _finished(status),
    ]
    if status.phase in _SUSPENDED or "Suspended" in before:
        found.append(_suspended(status))
    if "Paused" in noted:
        found.append(noted["Paused"])
    elif status.held or "Paused" in before:
        found.append(_paused(status))
    result = []
    for condition in found:
        old = before.get(condition.type)
        since = old.last_transition if old is not None and old.status == condition.status else stamp
        result.append(Condition(condition.type, condition.status, condition.reason, condition.message, since))
    return tuple(result)


def _of_ranks(
    status: JobStatus, noted: Mapping[str, Condition], before: Mapping[str, Condition]
) -> list[Condition]:
    found = []
    for name in OF_RANKS:
        condition = noted.get(name) or before.get(name)
        if condition is None:
            continue
        if status.phase is not JobPhase.RUNNING:
            condition = Condition(name, "False", "NotTraining")
        found.append(condition)
    return found


def _placed(status: JobStatus) -> Condition:
    if status.phase in PLACED_PHASES and status.members:
        names = some((member.agent for member in status.members), NAMED_MAX)
        return Condition("Placed", "True", "MembersChosen", names)
    return Condition("Placed", "False", status.phase.value.capitalize(), status.reason)


def _ranks_ready(status: JobStatus) -> Condition:
    ready = status.phase is JobPhase.RUNNING
    return Condition("RanksReady", "True" if ready else "False", "AllTraining" if ready else "NotTraining")


def _progressing(status: JobStatus) -> Condition:
    if status.held:
        return Condition("Progressing", "False", "Paused")
    running = status.phase is JobPhase.RUNNING
    return Condition("Progressing", "True" if running else "False", status.phase.value.capitalize())


def _checkpointed(status: JobStatus, newest: CommitRecord | None) -> Condition:
    if not status.store and status.attempt:
        return Condition(
            "Checkpointed", "False", "NoStore", "no store is configured: a restart begins from scratch"
        )
    if newest is None:
        return Condition("Checkpointed", "False", "NoCommit", "no checkpoint has been committed yet")
    return Condition("Checkpointed", "True", "Committed", f"checkpoint {newest.seq} of step {newest.step}")


def _degraded(fleet: FleetView, spec: JobSpec, status: JobStatus) -> Condition:
    if status.phase in TERMINAL_PHASES:
        return Condition("Degraded", "False", "Finished")
    if fleet.brake:
        return Condition("Degraded", "True", BRAKE_ON, fleet.brake)
    if status.members and len(status.members) < spec.nnodes_max:
        return Condition(
            "Degraded",
            "True",
            "FewerMachines",
            f"{len(status.members)} of {spec.nnodes_max} machines",
        )
    if status.failed_saves:
        return Condition("Degraded", "True", "CheckpointFailed", "the last checkpoint failed")
    return Condition("Degraded", "False", "AsWanted")


def _suspended(status: JobStatus) -> Condition:
    if status.phase is JobPhase.SUSPENDED:
        return Condition("Suspended", "True", "AsAsked", status.reason)
    if status.phase is JobPhase.QUEUED and status.preempted_by:
        return Condition("Suspended", "True", "Preempted", f"it made room for {status.preempted_by}")
    return Condition("Suspended", "False", status.phase.value.capitalize())


def _paused(status: JobStatus) -> Condition:
    if status.held and status.phase is JobPhase.RUNNING:
        return Condition("Paused", "True", "AsAsked", status.reason)
    return Condition("Paused", "False", status.phase.value.capitalize())


def _finished(status: JobStatus) -> Condition:
    over = status.phase in TERMINAL_PHASES
    return Condition("Finished", "True" if over else "False", status.phase.value.capitalize(), status.reason)
