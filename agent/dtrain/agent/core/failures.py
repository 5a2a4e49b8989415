"""What ended a rank, in words and in kind: causes told apart from their consequences."""

import dataclasses
import json
import signal
from typing import Any

from dtrain.agent.core.fingerprint import STARTUP_S, fingerprint
from dtrain.agent.core.state import JobState, LocalRank
from dtrain.agent.launching import RankEnded
from dtrain.protocol.ids import AgentName
from dtrain.protocol.snapshot import Failure, FailureKind, WorkerPhase

LOG_TAIL_CHARS_MAX = 2048
MESSAGE_CHARS_MAX = 500
CAUSE_GRACE_S = 0.5
"""A collective aborted because a peer went: the peer's own end, if it is on this
machine, is awaited this long, so that the survivors' kill does not hide the cause."""

_CONSEQUENCES = (FailureKind.COLLECTIVE, FailureKind.ISOLATED)

_OWN_ERRORS = (FailureKind.EXCEPTION, FailureKind.EXIT)

_PEER_SIGNS = (
    "connection closed by peer",
    "connection reset by peer",
    "connection refused",
    "connection was likely closed",
    "broken pipe",
    "gloo/transport",
    "nccl error",
    "ncclremoteerror",
    "ncclsystemerror",
    "ncclinternalerror",
    "nccl communicator was aborted",
    "process group watchdog",
    "watchdog caught collective operation timeout",
    "heartbeat monitor timed out",
    "application timeout caused pair closure",
    "timed out waiting",
)
"""In lower case: what gloo, NCCL and the TCPStore say when another rank has gone."""


def rank_failure(
    agent: AgentName, job: JobState, rank: LocalRank, report: RankEnded, *, now: float
) -> Failure:
    """Describe a rank that ended with other than 0."""
    message = error_message(report.error)
    number = -report.exit_code if report.exit_code < 0 else None
    if number is not None:
        kind, text = FailureKind.SIGNAL, f"rank {rank.rank} was ended by {signal_name(number)}"
    elif message:
        looks_like_peer = any(sign in message.lower() for sign in _PEER_SIGNS)
        kind, text = (FailureKind.COLLECTIVE if looks_like_peer else FailureKind.EXCEPTION), message
    else:
        kind, text = FailureKind.EXIT, f"rank {rank.rank} exited with code {report.exit_code}"
    return Failure(
        kind=kind,
        message=text[:MESSAGE_CHARS_MAX],
        agent=agent,
        attempt=job.attempt,
        rank=rank.rank,
        pid=report.pid,
        exit_code=report.exit_code,
        signal=number,
        step=rank.step,
        at=report.at,
        log_tail=report.log_tail[-LOG_TAIL_CHARS_MAX:],
        fingerprint=fingerprint(report.error, report.log_tail)
        if kind in _OWN_ERRORS and _knows_where(rank, now)
        else "",
    )


def _knows_where(rank: LocalRank, now: float) -> bool:
    """Whether the step of ``rank`` says where its program was: without the SDK it is always 0."""
    young = rank.forked_at is not None and now - rank.forked_at <= STARTUP_S
    return rank.sdk or young


def error_message(text: str) -> str:
    """Return the sentence in an ``error.json`` as torch's ``@record`` writes it; "" if there is none."""
    try:
        document: Any = json.loads(text) if text else None
    except (ValueError, RecursionError):
        return ""
    message = document.get("message") if isinstance(document, dict) else None
    if isinstance(message, dict):
        message = message.get("message")
    return message.strip() if isinstance(message, str) else ""


def signal_name(number: int) -> str:
    """Return SIGKILL for 9, and so on."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def fail(job: JobState, failure: Failure, now: float) -> JobState:
    """Record a failure: phase ERROR, the survivors are to be killed.

    The first one stays, except that a cause replaces a consequence until the
    survivors have been killed: what happens after that is our own doing.
    """
    first = job.failure
    if first is not None:
        replaces = first.kind in _CONSEQUENCES and failure.kind is not FailureKind.COLLECTIVE
        if not (replaces and job.kill_at is not None):
            return job
    wait_s = CAUSE_GRACE_S if failure.kind is FailureKind.COLLECTIVE else 0.0
    return dataclasses.replace(job, phase=WorkerPhase.ERROR, failure=failure, kill_at=now + wait_s)
