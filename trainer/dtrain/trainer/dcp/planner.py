"""Planners that never pickle, for those who derive from torch's; and what any planner is given.

``dcp.save`` and ``dcp.load`` may leave the planner out: the writer takes objects from torch's
default planner as they are, and the reader puts them where its planner would.
"""

import io
import json
from typing import Any

import torch
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.planner import LoadPlanner as AnyLoadPlanner
from torch.distributed.checkpoint.planner import ReadItem, WriteItem, WriteItemType

from dtrain.protocol import codec
from dtrain.protocol.errors import ErrorCode, Refused
from dtrain.trainer.checkpoint import state


class SavePlanner(DefaultSavePlanner):
    """Torch's, without ``torch.save``: objects become JSON, with any storage."""

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:  # noqa: A002
        """A tensor as it is; the JSON of anything else.

        Raises:
            Refused: STATE_NOT_SAVABLE; it is not JSON.
        """
        if write_item.type is not WriteItemType.BYTE_IO:
            return object
        name = write_item.index.fqn
        captured = state.capture({}, {name: object}, 0)
        if captured.leaves:
            raise Refused(ErrorCode.STATE_NOT_SAVABLE, f"cannot save {name} as JSON: there is an array in it")
        return io.BytesIO(codec.dumps(captured.objects[name]))


class LoadPlanner(DefaultLoadPlanner):
    """Torch's, without unpickling."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Take in what ``SavePlanner`` has written.

        Raises:
            Refused: RESTORE_FAILED; it is not that: perhaps a pickle, which is never opened.
        """
        try:
            encoded = json.loads(value.getvalue())
        except ValueError as error:
            raise Refused(
                ErrorCode.RESTORE_FAILED,
                f"{read_item.storage_index.fqn} was not saved by dtrain's planner; pickles are not opened",
            ) from error
        self.load_object(read_item, state.decode(encoded, _no_tensor))

    def load_object(self, read_item: ReadItem, value: Any) -> None:
        """Put an object into the state; override it to change what is loaded."""
        put(self, read_item, value)


def assign(planner: AnyLoadPlanner, item: ReadItem, value: Any) -> None:
    """Give a decoded object to whatever planner the load was given.

    Raises:
        Refused: RESTORE_FAILED; it only takes pickles.
    """
    if isinstance(planner, LoadPlanner):
        planner.load_object(item, value)
    elif (
        isinstance(planner, DefaultLoadPlanner) and type(planner).load_bytes is DefaultLoadPlanner.load_bytes
    ):
        put(planner, item, value)
    else:
        raise Refused(
            ErrorCode.RESTORE_FAILED,
            f"{type(planner).__name__} would unpickle {item.storage_index.fqn}; nothing is pickled here",
            fix="derive the planner from dtrain.trainer.dcp.planner.LoadPlanner",
        )


def put(planner: DefaultLoadPlanner, item: ReadItem, value: Any) -> None:
    """What torch's planner does with an object once it has unpickled it."""
    name = item.dest_index.fqn
    if planner.flatten_state_dict:
        set_element(planner.original_state_dict, planner.mappings[name], value)
    else:
        planner.state_dict[name] = value


def _no_tensor(name: str) -> torch.Tensor:
    raise Refused(ErrorCode.RESTORE_FAILED, f"there is no tensor {name} behind this JSON")
