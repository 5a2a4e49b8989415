"""What a restarted agent does with the jobs in its journal.

The launchers and their ranks went on without it. Those that are found report
themselves (``LauncherState``, then each rank on a new connection); for those
that are not, the driver reports ``LauncherEnded``.
"""

import dataclasses

from dtrain.agent.core import hangs
from dtrain.agent.core.advance import KILL_AGAIN_S
from dtrain.agent.core.decisions import Action, LauncherOrder
from dtrain.agent.core.state import AgentState, Launcher, LauncherStatus
from dtrain.agent.launching import Quit


def adopt(state: AgentState, now: float) -> tuple[AgentState, tuple[Action, ...]]:
    """Return the state to go on from, and orders for launchers that should long have quit."""
    out: list[Action] = []
    for name, job in state.jobs.items():
        launcher = job.launcher
        if launcher.process is None:
            # The former agent ended before it knew the process; without ranks it will quit by itself.
            launcher = Launcher()
        else:
            launcher = dataclasses.replace(launcher, status=LauncherStatus.STARTING, adopted=True)
        departing = tuple(
            dataclasses.replace(one, asked_at=now) for one in job.departing if one.process is not None
        )
        out.extend(LauncherOrder(name, one.uid, Quit(0.0)) for one in departing)
        stopping = job.stopping
        if stopping is not None:
            stopping = dataclasses.replace(stopping, kill_at=now + KILL_AGAIN_S)
        # A failure's survivors may not have been killed: doing it twice is no harm.
        kill_at = now if job.failure is not None and job.alive else None
        state = state.with_job(
            dataclasses.replace(
                hangs.adopted(job), launcher=launcher, departing=departing, stopping=stopping, kill_at=kill_at
            )
        )
    return state, tuple(out)
