"""Commands to protobuf and back: the only translation between values and ``pb``."""

import math
from typing import assert_never

from dtrain.protocol import codec
from dtrain.protocol.commands import (
    AbortCheckpoint,
    BeginCheckpoint,
    Command,
    ConfirmCheckpoint,
    DumpStacks,
    Header,
    Prepare,
    Start,
    Stop,
    Warm,
)
from dtrain.protocol.errors import ErrorCode, Refused
from dtrain.protocol.ids import (
    Attempt,
    ClusterName,
    JobName,
    Rank,
    Seq,
    Step,
    Term,
    Uid,
    parse_name,
    parse_token,
)
from dtrain.protocol.job import JobSpec, RestorePoint
from dtrain.protocol.pb import agent_pb2 as pb


def command_to_pb(command: Command) -> pb.Command:
    """Translate a command for the wire."""
    head = command.header
    message = pb.Command(
        header=pb.Header(
            cluster=head.cluster,
            term=head.term,
            job=head.job,
            uid=head.uid,
            attempt=head.attempt,
            id=head.id,
        )
    )
    match command:
        case Prepare():
            message.prepare.CopyFrom(
                pb.Prepare(
                    spec=codec.encode(command.spec),
                    store=command.store,
                    node_rank=command.node_rank,
                    nnodes=command.nnodes,
                    first_rank=command.first_rank,
                    world_size=command.world_size,
                    serve_store=command.serve_store,
                    max_restarts=command.max_restarts,
                    nproc=command.nproc,
                )
            )
        case Start():
            message.start.CopyFrom(
                pb.Start(rendezvous=command.rendezvous, restore=_restore_to_pb(command.restore))
            )
        case BeginCheckpoint():
            message.begin_checkpoint.CopyFrom(
                pb.BeginCheckpoint(
                    seq=command.seq,
                    nonce=command.nonce,
                    step=command.step,
                    hold_s=command.hold_s,
                    asked=command.asked,
                )
            )
        case AbortCheckpoint():
            message.abort_checkpoint.CopyFrom(
                pb.AbortCheckpoint(seq=command.seq, why=command.why, final=command.final)
            )
        case ConfirmCheckpoint():
            message.confirm_checkpoint.CopyFrom(
                pb.ConfirmCheckpoint(
                    seq=command.seq, final=command.final, manifest=command.manifest, digest=command.digest
                )
            )
        case Stop():
            message.stop.CopyFrom(pb.Stop(grace_s=command.grace_s, release=command.release, why=command.why))
        case Warm():
            message.warm.CopyFrom(pb.Warm(spec=codec.encode(command.spec), nproc=command.nproc))
        case DumpStacks():
            message.dump_stacks.CopyFrom(pb.DumpStacks(why=command.why))
        case _:
            assert_never(command)
    return message


def command_from_pb(message: pb.Command) -> Command:
    """Translate a command from the wire.

    Raises:
        Refused: BAD_RECORD; its body is of a kind this version does not know.
            BAD_NAME; a name in it could leave the folder or key made of it.
    """
    head = Header(
        ClusterName(parse_name(message.header.cluster, "cluster")),
        Term(message.header.term),
        JobName(parse_name(message.header.job, "job")),
        Uid(parse_token(message.header.uid, "uid of a job")),
        Attempt(message.header.attempt),
        message.header.id,
    )
    match message.WhichOneof("body"):
        case "prepare":
            prepare = message.prepare
            return Prepare(
                head,
                codec.decode(JobSpec, prepare.spec),
                prepare.store,
                prepare.node_rank,
                prepare.nnodes,
                Rank(prepare.first_rank),
                prepare.world_size,
                prepare.serve_store,
                prepare.max_restarts,
                prepare.nproc,
            )
        case "start":
            restore = message.start.restore if message.start.HasField("restore") else None
            return Start(head, message.start.rendezvous, _restore_from_pb(restore))
        case "begin_checkpoint":
            begin = message.begin_checkpoint
            # What is no duration holds nobody: it goes on to the ranks as JSON.
            hold_s = begin.hold_s if math.isfinite(begin.hold_s) else 0.0
            nonce = parse_token(begin.nonce, "nonce")
            return BeginCheckpoint(
                head, Seq(begin.seq), nonce, Step(begin.step), max(0.0, hold_s), begin.asked
            )
        case "abort_checkpoint":
            abort = message.abort_checkpoint
            return AbortCheckpoint(head, Seq(abort.seq), abort.why, abort.final)
        case "confirm_checkpoint":
            confirm = message.confirm_checkpoint
            return ConfirmCheckpoint(head, Seq(confirm.seq), confirm.final, confirm.manifest, confirm.digest)
        case "stop":
            return Stop(head, message.stop.grace_s, message.stop.release, message.stop.why)
        case "warm":
            return Warm(head, codec.decode(JobSpec, message.warm.spec), message.warm.nproc)
        case "dump_stacks":
            return DumpStacks(head, message.dump_stacks.why)
        case other:
            raise Refused(
                ErrorCode.BAD_RECORD,
                f"a command of unknown kind ({other})",
                fix="upgrade agents before coordinators send new commands",
            )


def _restore_to_pb(point: RestorePoint | None) -> pb.RestorePoint | None:
    if point is None:
        return None
    return pb.RestorePoint(seq=point.seq, step=point.step, manifest=point.manifest, digest=point.digest)


def _restore_from_pb(point: pb.RestorePoint | None) -> RestorePoint | None:
    if point is None:
        return None
    return RestorePoint(Seq(point.seq), Step(point.step), point.manifest, point.digest)
