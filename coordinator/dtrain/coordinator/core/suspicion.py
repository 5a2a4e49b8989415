"""Bad machines: what attempts of all jobs have ended because of them, and keeping ranks off them.

A leader writes a blame in the transaction that ends the attempt, so none is counted twice and none is
lost. Blames fade. A machine that has gathered enough of them is cordoned for a while, if the
fleet and the job can spare it; if not, an event says so and nothing else happens.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from dtrain.coordinator.core import placement
from dtrain.coordinator.core.draft import Draft
from dtrain.coordinator.core.stamps import iso
from dtrain.protocol.cluster import Blame, Cordon, Suspicion
from dtrain.protocol.events import EventReason
from dtrain.protocol.ids import AgentName
from dtrain.protocol.snapshot import Failure, FailureKind
from dtrain.protocol.wording import count

SUSPECT_AT = 2.5
"""Score from which on a machine is kept free: three blames within a few hours."""

HALF_LIFE_S = 6 * 3600.0
KEPT_S = 48 * 3600.0
BLAMES_KEPT = 32

ONE_JOB_MAX = 2.0
"""What one submission's program can add: one that crashes wherever it runs makes no machine a bad one."""

TOGETHER_S = 60.0
"""Several jobs lose one machine at once: that is one loss."""

CORDON_SHARE = 0.25
"""Of the fleet: more than that is never cordoned because of a suspicion, operators' cordons counted."""

MACHINE_KINDS = frozenset(
    {
        FailureKind.AGENT_LOST,
        FailureKind.UNREACHABLE,
        FailureKind.UNKILLABLE,
        FailureKind.ISOLATED,
    }
)
"""The machine itself failed."""

EITHER_KINDS = frozenset({FailureKind.PREPARE, FailureKind.SIGNAL, FailureKind.HANG, FailureKind.NONFINITE})
"""Programs and machines both fail in this way: what a launcher imports may be what ends it."""

_ORDERLY = frozenset({1, 2, 15})
"""SIGHUP, SIGINT, SIGTERM: somebody sent them."""

_HARDWARE_SIGNS = ("cuda error", "uncorrectable", "input/output error", "cudnn_status", "bus error")
"""In lower case: what exceptions say when it was the machine."""


def blames(failure: Failure) -> bool:
    """Whether ``failure`` speaks against the machine that it happened on."""
    if failure.kind is FailureKind.EXCEPTION:
        text = failure.message.lower()
        return any(sign in text for sign in _HARDWARE_SIGNS)
    if failure.kind is FailureKind.SIGNAL:
        return failure.signal not in _ORDERLY
    return failure.kind in MACHINE_KINDS | EITHER_KINDS


def score(found: Iterable[Blame], wall: float) -> float:
    """How much speaks against a machine now; each blame halves every HALF_LIFE_S."""
    total, lost_at = 0.0, float("-inf")
    of_job: dict[str, float] = {}
    for blame in sorted(found, key=lambda blame: blame.at):
        age_s = max(0.0, wall - blame.at)
        weight = 0.5 ** (age_s / HALF_LIFE_S) if age_s < KEPT_S else 0.0
        if blame.kind not in MACHINE_KINDS:
            of_job[blame.uid] = min(ONE_JOB_MAX, of_job.get(blame.uid, 0.0) + weight)
        elif blame.at - lost_at >= TOGETHER_S:
            total, lost_at = total + weight, blame.at
    return total + sum(of_job.values())


def note(draft: Draft, failure: Failure, others: Sequence[Failure], *, cordon_s: float = 0.0) -> None:
    """Write down what ``failure`` says of its machine, and cordon it if that is enough.

    ``others`` failed with it. ``cordon_s``: a rule of the job wants the machine kept free so long.
    Called once in a decision, while the attempt that ends is that of the draft.
    """
    agent = failure.agent
    if not agent:
        return
    if cordon_s > 0:
        _keep_off(draft, agent, cordon_s, f"a failure rule of job {draft.job.name} asks for it")
        if agent in draft.fleet.cordoned:
            return
    if draft.fleet.cordon_s <= 0 or not blames(failure) or agent in draft.fleet.left:
        return
    together = MACHINE_KINDS | {FailureKind.PREPARE}
    if any(other.agent not in ("", agent) and other.kind in together for other in others):
        return  # several go together: the network or etcd is the likelier cause
    before = draft.fleet.suspicions.get(agent)
    known = () if before is None else before.value.blames
    wall = draft.moment.wall
    blame = Blame(draft.job.name, draft.status.uid, draft.status.attempt, failure.kind, wall)
    fresh = tuple(one for one in known if wall - one.at < KEPT_S)
    now = (*fresh, blame)[-BLAMES_KEPT:]
    record = Suspicion(draft.fleet.term, agent, now)
    mod = 0 if before is None else before.mod_revision
    draft.put(draft.keys.suspicion(agent), record, mod, lease_ttl_s=KEPT_S)
    if score(now, wall) < SUSPECT_AT or agent in draft.fleet.cordoned:
        return
    jobs = len({one.uid for one in now})
    text = f"{count(len(now), 'attempt')} of {count(jobs, 'job')} ended because of it lately"
    _keep_off(draft, agent, draft.fleet.cordon_s, text)


def _keep_off(draft: Draft, agent: AgentName, ttl_s: float, why: str) -> None:
    about = f"agent/{agent}"
    if agent in draft.fleet.cordoned:
        return
    obstacle = _needed(draft, agent)
    if obstacle:
        draft.event(EventReason.MACHINE_SUSPECTED, f"{agent}: {why}; {obstacle}", about, warning=True)
        return
    until = iso(draft.moment.wall + ttl_s)
    record = Cordon(agent, why, by=f"job {draft.job.name}", until=until, auto=True)
    draft.put(draft.keys.cordon(agent), record, 0, lease_ttl_s=ttl_s)
    # The placement that follows in this decision must know of it.
    draft.fleet = replace(draft.fleet, cordoned=draft.fleet.cordoned | {agent})
    draft.event(EventReason.CORDONED, f"{agent} gets no new ranks until {until}: {why}", about, warning=True)


def _needed(draft: Draft, agent: AgentName) -> str:
    """Why ``agent`` cannot be spared, or ""."""
    fleet = draft.fleet
    machines = fleet.agents.keys() | {agent}
    most = max(1, int(len(machines) * CORDON_SHARE))
    already = len(fleet.cordoned & machines)
    if already + 1 > most:
        return f"it is not cordoned, since {already} of {len(machines)} machines are"
    left = [name for name in placement.candidates(draft) if name != agent]
    if len(left) < draft.spec.nnodes_min:
        return "it is not cordoned, since the job could not be placed without it"
    return ""
