"""``Writer``: the storage of ``dcp.save`` and ``dcp.async_save``."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal

from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from dtrain.protocol.errors import DtrainError, ErrorCode, Refused
from dtrain.trainer.checkpoint import rng, state
from dtrain.trainer.checkpoint.arena import Arena
from dtrain.trainer.dcp import blob, contents
from dtrain.trainer.session import Ask, Session

Wait = Literal["snapshotted", "committed"]


class Writer(StorageWriter):
    """Makes one checkpoint of ``step`` out of what ``dcp.save`` or ``dcp.async_save`` hands over.

    Made by ``Run.dcp_writer`` where training stands at ``step``: random numbers are taken there.
    """

    def __init__(
        self,
        session: Session,
        *,
        rank: int,
        world_size: int,
        step: int,
        wait: Wait,
        lock_arena: Callable[[], AbstractContextManager[Arena]],
    ) -> None:
        if wait not in ("snapshotted", "committed"):
            raise Refused(ErrorCode.USAGE, f"wait is {wait!r}, not snapshotted or committed")
        self.step = step
        self.seq: int | None = None
        """Number of the checkpoint, once its snapshot is taken."""
        self._session = session
        self._rank = rank
        self._world_size = world_size
        self._wait = wait
        self._lock_arena = lock_arena
        self._own = state.capture({}, rng.collect(rank), rank)
        self._ask: Ask | None = None
        self._used = False
        session.intend(step)

    def __reduce__(self) -> tuple[object, ...]:
        raise Refused(
            ErrorCode.USAGE,
            "a writer cannot leave its rank: another process has no part in the job",
            fix="use the thread executor of async_save, or dcp.save with wait='snapshotted'",
        )

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Does nothing: the step and the job say where it goes."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """False: no path leads here."""
        del checkpoint_id
        return False

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Begin the one save that this writer is for.

        Raises:
            Refused: USAGE; it was used before, or each rank would save for itself.
        """
        del is_coordinator, args
        if self._used:
            raise Refused(ErrorCode.USAGE, "a writer is for one save: call run.dcp_writer(step) for each")
        if not kwargs.get("use_collectives", True):
            raise Refused(
                ErrorCode.USAGE, "use_collectives=False is not supported: one commit covers all ranks"
            )
        self._used = True

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """The plans as they are."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Freeze this rank's part in its arena; storing it goes on without the script.

        Raises:
            Refused: STATE_NOT_SAVABLE; it has a part that is neither a tensor nor JSON.
                CHECKPOINT_ABORTED; not all ranks save this step.
        """
        try:
            found = contents.gather(plan, planner, self._own, self._rank, self._world_size)
            problem = None
        except Exception as error:  # noqa: BLE001
            # It is told in the answer to the order, so that no rank waits for this one in vain.
            problem = error
        ask, begin = self._session.ask_save(self.step)
        try:
            if problem is not None:
                raise problem
            with self._lock_arena() as arena:
                sealed = blob.seal(arena, begin, found)
        except Exception as error:
            told = error.message if isinstance(error, DtrainError) else f"{type(error).__name__}: {error}"
            self._session.give_up(begin, told[:500])
            raise
        self._session.keep(sealed)
        self._ask, self.seq = ask, int(begin.seq)
        sizes = {(piece.name, piece.origin): piece.size_bytes for piece in found.pieces}
        done: Future[list[WriteResult]] = Future()
        done.set_result(
            [
                WriteResult(item.index, sizes.get((item.index.fqn, tuple(item.index.offset or ())), 0), None)
                for item in plan.items
            ]
        )
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the coordinator rank: wait for what the writer was told to wait for.

        Raises:
            Refused: CHECKPOINT_ABORTED; with the reason. All ranks get it from torch.
            TimedOut: WAIT_TIMED_OUT; it may still be committed.
        """
        del metadata, results  # the ranks' manifests say all of it
        if self._wait == "committed" and self._ask is not None:
            self._session.await_answer(self._ask, durable=False)
