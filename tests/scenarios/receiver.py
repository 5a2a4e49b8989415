"""The receiver of a webhook in a scenario, and the real sender of each coordinator, called instead of run."""

import json
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from dtrain.coordinator.webhooks.sender import Answer, Sender
from dtrain.coordinator.webhooks.settings import Webhook
from dtrain.protocol.errors import DtrainError
from dtrain.storage.etcd.mirror import Change
from tests.sim.process import SimClock
from tests.sim.scheduler import Killed

if TYPE_CHECKING:
    from tests.scenarios.stage import Coordinator, Stage

HOOK = Webhook("ops", "http://receiver.invalid/hook")

ANSWERS = {
    "takes": Answer(200),
    "is away": Answer(0, "it does not answer: timed out"),
    "fails": Answer(503, "it answers with status 503"),
    "refuses": Answer(400, "it answers with status 400"),
}
LAST = "takes one more while its leader dies"


class Receiver:
    """Somebody's server."""

    def __init__(self, stage: "Stage") -> None:
        self._stage = stage
        self.mood = "takes"

    def call(self, coordinator: "Coordinator", data: bytes) -> Answer:
        """Answer as the script wants it."""
        found = json.loads(data)
        event = f"event {found['event']['seq']} ({found['event']['reason']})"
        if self.mood == LAST:
            self.mood = "takes"
            self._stage.told.line("receiver", f"takes {event} from {coordinator.name}")
            coordinator.crash()
            raise Killed
        by = f" from {coordinator.name}" if self.mood == "takes" else ""
        self._stage.told.line("receiver", f"{self.mood}{'' if by else ' at'} {event}{by}")
        return ANSWERS[self.mood]


class StageSender(Sender):
    """One life's sender. ``tell`` is a turn of its thread."""

    def __init__(self, receiver: Receiver, coordinator: "Coordinator", etcd: Any) -> None:
        stage = coordinator.stage
        reads: Any = _Mirror(coordinator)
        super().__init__(
            HOOK,
            stage.name,
            etcd,
            reads,
            SimClock(stage.scheduler, 0.0, 1.0),
            term=lambda: coordinator.term,
            log=lambda event, **_fields: stage.told.line(coordinator.name, event),
        )
        self._receiver, self._coordinator = receiver, coordinator
        self._rng = stage.scheduler.rng

    def tell(self, changes: tuple[Change, ...] = ()) -> None:
        """Take note of changes, and do what is due."""
        self.note(changes)
        with suppress(DtrainError, Killed):
            self.work()

    def _call(self, _identity: str, data: bytes, _tries: int) -> Answer:
        return self._receiver.call(self._coordinator, data)


class _Mirror:
    """The coordinator's, which nobody waits for."""

    def __init__(self, coordinator: "Coordinator") -> None:
        self._state = coordinator.mirror
        self.prefix = self._state.prefix

    @property
    def revision(self) -> int:
        return self._state.revision

    def wait_for(self, revision: int, _timeout_s: float) -> bool:
        return self.revision >= revision
