"""How many ranks the machines have, by job: what is decided, and what is about to be."""

from collections.abc import Iterable, Mapping

from dtrain.protocol.ids import AgentName, JobName
from dtrain.protocol.job import PLACED_PHASES, JobStatus


class Slots:
    """Counted change by change: asking for one job must not cost a look at all of them."""

    def __init__(self) -> None:
        self.used: dict[AgentName, int] = {}
        self.reserved: dict[JobName, JobStatus] = {}
        """Statuses whose commit is in flight."""
        self._by_job: dict[JobName, dict[AgentName, int]] = {}

    def of(self, job: JobName) -> Mapping[AgentName, int]:
        """Return what one job takes."""
        return self._by_job.get(job, {})

    def of_others(self, job: JobName) -> Mapping[AgentName, int]:
        """Return what all jobs but one take."""
        used = dict(self.used)
        for agent, slots in self.of(job).items():
            used[agent] -= slots
            if not used[agent]:
                del used[agent]
        return used

    def count(self, name: JobName, statuses: Iterable[JobStatus | None]) -> tuple[bool, bool]:
        """Take over what a job takes by any of its statuses; return whether that changed, and freed any."""
        new: dict[AgentName, int] = {}
        for status in statuses:
            if status is not None and status.phase in PLACED_PHASES:
                for member in status.members:
                    new[member.agent] = max(new.get(member.agent, 0), member.nproc)
        old = self._by_job.get(name, {})
        if new == old:
            return False, False
        for agent in old.keys() | new.keys():
            left = self.used.get(agent, 0) + new.get(agent, 0) - old.get(agent, 0)
            if left:
                self.used[agent] = left
            else:
                self.used.pop(agent, None)
        if new:
            self._by_job[name] = new
        else:
            self._by_job.pop(name, None)
        return True, any(new.get(agent, 0) < slots for agent, slots in old.items())
