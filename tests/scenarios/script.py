"""Scenario files: blocks of commands, each followed by the transcript it produced.

A block is lines of commands, a line ``----``, and the transcript up to the next empty line. Lines that
begin with ``#`` are comments. ``play`` runs the commands and returns the text with what happened now.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from dtrain.coordinator.core.stamps import iso
from dtrain.protocol.checkpoint import CommitRecord
from dtrain.protocol.cluster import Blame, Cordon, Suspicion
from dtrain.protocol.events import EventReason
from dtrain.protocol.ids import AgentName, Attempt, JobName, Term, Uid
from dtrain.protocol.job import (
    TERMINAL_PHASES,
    CheckpointPolicy,
    Entry,
    EntryKind,
    Intent,
    JobSpec,
    NonFiniteAction,
    NonFinitePolicy,
    RestartPolicy,
    Wanted,
)
from dtrain.protocol.snapshot import FailureKind, StackKind
from dtrain.storage.etcd.port import Delete, Txn
from tests.scenarios.receiver import ANSWERS, LAST
from tests.scenarios.stage import TICK_S, WALL_AT_START, Stage, StageMachine
from tests.sim.training import SimRank

RULE = "----"
UNTIL_S_MAX = 600.0


class ScriptError(Exception):
    """A scenario says something that nobody understands, or that never comes."""


@dataclass(frozen=True, slots=True)
class Block:
    """Commands and comments as written, and the transcript that is expected of them."""

    commands: tuple[str, ...]
    transcript: tuple[str, ...]


def parse(text: str) -> list[Block]:
    """Take a scenario apart."""
    blocks = []
    for part in text.strip().split("\n\n"):
        lines = part.splitlines()
        if RULE in lines:
            at = lines.index(RULE)
            blocks.append(Block(tuple(lines[:at]), tuple(lines[at + 1 :])))
        elif all(line.startswith("#") for line in lines):
            blocks.append(Block(tuple(lines), ()))
        else:
            # A block just written: ``--rewrite`` adds its transcript.
            blocks.append(Block(tuple(lines), ()))
    return blocks


def render(blocks: list[Block]) -> str:
    """Put a scenario together."""
    parts = []
    for block in blocks:
        lines = list(block.commands)
        if any(not line.startswith("#") for line in block.commands):
            lines += [RULE, *block.transcript]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def play(text: str) -> str:
    """Run a scenario on a new stage; return it with the transcript of this run.

    Raises:
        ScriptError: a command is not known, or what it waits for does not come.
    """
    stage = Stage()
    script = Script(stage)
    played = []
    for block in parse(text):
        for line in block.commands:
            if not line.startswith("#"):
                script.run(line)
        played.append(replace(block, transcript=tuple(stage.told.take())))
    stage.run(0.0)
    return render(played)


class Script:
    """The commands. Each method is one, named by its first word; its docstring is its manual."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._saved = 0
        """The revision that the backup of etcd is of."""
        self._submitted_at: dict[str, float] = {}

    def run(self, line: str) -> None:
        """Run one line."""
        verb, *words = line.split()
        command: Callable[..., None] | None = getattr(self, f"do_{verb}", None)
        if command is None:
            raise ScriptError(f"no command {verb!r} in {line!r}")
        command(*words)

    # The cast.

    def do_agents(self, *words: str) -> None:
        """``agents a1 a2 slots=2``: machines are switched on."""
        names, options = _options(words)
        for name in names:
            self._stage.machines[name] = StageMachine(self._stage, name, int(options.get("slots", "2")))
        self._stage.run(0.1)

    def do_submit(self, name: str, *words: str) -> None:
        """``submit JOB nnodes=1[:2] nproc=1 every_steps=0 steps=1000 keep=3 restarts=10 timeout=60``,

        ``isolation_grace=0 reschedule_grace=0 spares=0 nonfinite=warn|fail|rollback:2 priority=0``.
        """
        _, options = _options(words)
        low, _, high = options.get("nnodes", "1").partition(":")
        action, _, back = options.get("nonfinite", "warn").partition(":")
        stage, job = self._stage, JobName(name)
        saves: dict[tuple[int, int], int] = {}
        stage.jobs[job] = SimpleNamespace(
            total_steps=int(options.get("steps", "1000")),
            saves=saves,
            save_of=lambda rank, step: saves.get((rank, step)),
        )
        spec = JobSpec(
            job,
            Uid(f"u{len(stage.specs) + 1}"),
            Entry(EntryKind.SCRIPT, "/train.py"),
            int(low),
            int(high or low),
            int(options.get("nproc", "1")),
            checkpoint=CheckpointPolicy(
                every_steps=int(options.get("every_steps", "0")),
                keep_last=int(options.get("keep", "3")),
                timeout_s=float(options.get("timeout", "60")),
            ),
            restarts=RestartPolicy(max_restarts=int(options.get("restarts", "10"))),
            shutdown_grace_s=5.0,
            isolation_grace_s=float(options.get("isolation_grace", "0")),
            reschedule_grace_s=float(options.get("reschedule_grace", "0")),
            spares=int(options.get("spares", "0")),
            nonfinite=NonFinitePolicy(NonFiniteAction(action), back=int(back or "1")),
            priority=int(options.get("priority", "0")),
            submitted_at=iso(WALL_AT_START + stage.scheduler.now),
        )
        stage.told.several = bool(stage.specs)
        stage.jobs[job].spec = spec
        # The simulation's checks find a job by its submission.
        stage.jobs[JobName(spec.uid)] = stage.jobs[job]
        stage.specs[job] = spec
        self._submitted_at[name] = stage.scheduler.now
        stage.put(stage.keys.spec(job), spec)
        self._intend(job, Intent(spec.uid))

    def do_cancel(self, name: str) -> None:
        """``cancel JOB``: an operator cancels it."""
        job = JobName(name)
        self._intend(job, replace(self._stage.intents[job], wanted=Wanted.CANCEL, by="ann"))

    def do_suspend(self, name: str) -> None:
        """``suspend JOB``: an operator wants its machines for something else."""
        job = JobName(name)
        self._intend(job, replace(self._stage.intents[job], wanted=Wanted.SUSPEND, by="ann"))

    def do_resume(self, name: str) -> None:
        """``resume JOB``."""
        job = JobName(name)
        self._intend(job, replace(self._stage.intents[job], wanted=Wanted.RUN, by="ann"))

    def do_pause(self, name: str) -> None:
        """``pause JOB``: an operator wants its ranks to stand still."""
        job = JobName(name)
        self._intend(job, replace(self._stage.intents[job], paused=True, by="ann"))

    def do_unpause(self, name: str) -> None:
        """``unpause JOB``."""
        job = JobName(name)
        self._intend(job, replace(self._stage.intents[job], paused=False, by="ann"))

    def do_scale(self, name: str, nnodes: str) -> None:
        """``scale JOB 1:3``: an operator sets its bounds."""
        low, _, high = nnodes.partition(":")
        intent = self._stage.intents[JobName(name)]
        self._intend(
            JobName(name), replace(intent, nnodes_min=int(low), nnodes_max=int(high or low), by="ann")
        )

    def do_save(self, name: str, *words: str) -> None:
        """``save JOB at=40 ranks=0,1 step=40``: scripts of these ranks save a step at ``at``."""
        _, options = _options(words)
        for rank in options["ranks"].split(","):
            self._stage.jobs[JobName(name)].saves[int(rank), int(options["at"])] = int(
                options.get("step", options["at"])
            )

    def do_checkpoint(self, name: str) -> None:
        """``checkpoint JOB``: an operator wants one now."""
        intent = self._stage.intents[JobName(name)]
        token = f"{intent.checkpoint_token}t"
        self._intend(JobName(name), replace(intent, checkpoint_token=token))

    def _intend(self, job: JobName, intent: Intent) -> None:
        self._stage.intents[job] = intent
        self._stage.put(self._stage.keys.intent(job), intent)

    # Time.

    def do_tick(self, count: str = "1") -> None:
        """``tick 5``: seconds pass."""
        self._stage.run(TICK_S * int(count))

    def do_train(self, steps: str) -> None:
        """``train 120``: until every rank has done so many more steps."""
        goal = self._step() + int(steps)
        self._wait(f"step {goal}", lambda: self._step() >= goal)

    def do_until(self, *words: str) -> None:
        """Up to the very event by which something comes true:

        ``until JOB PHASE``, ``until JOB over``, ``until AGENT PHASE``, ``until released``,
        ``until step 120``, ``until attempt 2``, ``until term 2``,
        ``until open 1``, ``until sealed 1``, ``until durable 1``, ``until commit 1``,
        ``until event AgentLost``, ``until lost a2``, ``until held 2`` (commands),
        ``until committing`` (the leader is about to).
        """
        stage, checks = self._stage, self._stage.checks
        kind, what = words[0], words[-1]
        known = len(self._events())
        conditions: dict[str, Callable[[], bool]] = {
            "released": lambda: not self._keys_of("worker"),
            "step": lambda: self._step() >= int(what),
            "attempt": lambda: self._status() is not None and self._status().attempt >= int(what),
            "term": lambda: checks.auditor.terms >= int(what),
            "open": lambda: int(what) in self._keys_of("open"),
            "sealed": lambda: self._count("sealed", int(what)),
            "durable": lambda: self._count("durable", int(what)),
            "commit": lambda: int(what) in self._commits(),
            "held": lambda: len(stage.held) >= int(what),
            "committing": lambda: any("/checkpoints/" in key for key in stage.leader().in_hand),
            "event": lambda: EventReason(what) in self._events()[known:],
            "lost": lambda: not stage.etcd.range(stage.keys.node(what)).items,  # type: ignore[arg-type]
        }
        if kind in stage.specs:
            phases = TERMINAL_PHASES if what == "over" else {what}
            history = checks.history(JobName(kind))
            self._wait(" ".join(words), lambda: history.status is not None and history.status.phase in phases)
        elif kind in stage.machines:
            self._wait(" ".join(words), lambda: stage.told.phase(kind) == what)
        elif kind in conditions:
            self._wait(" ".join(words), conditions[kind])
        else:
            raise ScriptError(f"nobody knows when {' '.join(words)!r} is")

    def _wait(self, what: str, holds: Callable[[], bool]) -> None:
        self._stage.run(UNTIL_S_MAX, holds)
        if not holds():
            told = "\n".join(self._stage.told.take()[-20:])
            raise ScriptError(f"{what!r} does not come within {UNTIL_S_MAX:.0f} ticks; at last:\n{told}")

    # Failures.

    def do_crash(self, what: str, name: str = "") -> None:
        """``crash rank 3`` (SIGKILL), ``crash agent a2`` (it comes back), ``crash leader``."""
        if what == "rank":
            self._rank(int(name)).exit(-9, "killed")
        elif what == "agent":
            machine = self._stage.machines[name]
            machine.end_agent()
            self._stage.scheduler.after(1.0, machine.start_agent)
        elif what == "leader":
            self._stage.leader().crash()
        else:
            raise ScriptError(f"nobody knows how to crash {what!r}")

    def do_nan(self, _rank: str, number: str, *words: str) -> None:
        """``nan rank 1 steps=1``: its loss is NaN in the steps to come."""
        _, options = _options(words)
        self._rank(int(number)).sick_steps = int(options.get("steps", "1"))

    def do_hang(self, _rank: str, number: str, kind: str) -> None:
        """``hang rank 2 code``: it completes no step any more, and its stack says this (see StackKind)."""
        self._rank(int(number)).hung = StackKind(kind)

    def do_exit(self, _rank: str, number: str, code: str, *words: str) -> None:
        """``exit rank 2 1 ValueError: bad batch``: a rank ends with a code and an error."""
        self._rank(int(number)).exit(int(code), "", error=" ".join(words))

    def do_power(self, way: str, name: str) -> None:
        """``power off a2``, ``power on a2``: the machine and all that runs on it."""
        machine = self._stage.machines[name]
        machine.power_on() if way == "on" else machine.power_off()

    def do_drain(self, *words: str) -> None:
        """``drain a2 grace=60``: SIGTERM at its guardian."""
        names, options = _options(words)
        for name in names:
            self._stage.machines[name].drain(float(options.get("grace", "60")))

    def do_suspect(self, seconds: str) -> None:
        """``suspect 60``: machines that are blamed too often are cordoned for so long."""
        self._stage.cordon_s = float(seconds)
        for coordinator in self._stage.coordinators.values():
            coordinator.driver.world._cordon_s = float(seconds)

    def do_blamed(self, name: str, times: str) -> None:
        """``blamed a2 2``: so many attempts of other jobs have ended because of it."""
        agent, began = AgentName(name), WALL_AT_START
        blames = tuple(
            Blame(JobName(f"other-{n}"), Uid(f"o{n}"), Attempt(1), FailureKind.SIGNAL, began)
            for n in range(int(times))
        )
        self._stage.put(self._stage.keys.suspicion(agent), Suspicion(Term(1), agent, blames))

    def do_cordon(self, name: str, *words: str) -> None:
        """``cordon a2 [drain] new disk``: an operator wants it free of new ranks, or empty."""
        drain, agent = words[:1] == ("drain",), AgentName(name)
        reason = " ".join(words[1:] if drain else words)
        self._stage.put(self._stage.keys.cordon(agent), Cordon(agent, reason, "ann", drain=drain))

    def do_uncordon(self, name: str) -> None:
        """``uncordon a2``: an operator lets ranks on it again."""
        self._stage.etcd.txn(Txn(success=(Delete(self._stage.keys.cordon(AgentName(name))),)))
        self._stage.publish()

    def do_notice(self, *words: str) -> None:
        """``notice a2 grace=25``: its cloud says that the machine goes; it goes by ``power off``."""
        names, options = _options(words)
        for name in names:
            self._stage.machines[name].notice(float(options.get("grace", "25")))

    def do_cut(self, name: str) -> None:
        """``cut a2``: its agent reaches neither etcd nor a coordinator; its ranks reach the others."""
        self._stage.machines[name].cut()

    def do_cutetcd(self, name: str) -> None:
        """``cutetcd a2``: its agent reaches coordinators, not etcd."""
        self._stage.machines[name].cut(etcd_only=True)

    def do_heal(self, name: str) -> None:
        """``heal a2``: the end of a cut."""
        self._stage.machines[name].heal()

    def do_freeze(self, _leader: str) -> None:
        """``freeze leader``: it stands still, with all that it was about to do, until ``thaw``."""
        self._stage.leader().process.freeze()

    def do_thaw(self, name: str) -> None:
        """``thaw c1``: it goes on where it stood."""
        self._stage.coordinators[name].process.thaw()

    def do_backup(self, _etcd: str) -> None:
        """``backup etcd``: a snapshot is taken of what it holds now."""
        self._saved = self._stage.etcd.revision

    def do_restore(self, _etcd: str) -> None:
        """``restore etcd``: it holds again what it held at ``backup etcd``, its revisions raised."""
        self._stage.restore(self._saved)

    def do_drop(self, _commands: str, count: str) -> None:
        """``drop commands 2``: the next ones never arrive."""
        self._stage.to_drop = int(count)

    def do_hold(self, _commands: str, count: str) -> None:
        """``hold commands 2``: the next ones stay on their way until ``release commands``."""
        self._stage.to_hold = int(count)

    def do_release(self, _commands: str) -> None:
        """``release commands``: what was held arrives."""
        held, self._stage.held = self._stage.held, []
        for arrive in held:
            arrive()

    def do_duplicate(self, _commands: str, count: str) -> None:
        """``duplicate commands 4``: the next ones arrive twice."""
        self._stage.to_double = int(count)

    def do_ambiguous(self, kind: str, how: str) -> None:
        """``ambiguous write|commit applied|lost``: the reply to the leader's next one is lost."""
        if kind not in ("write", "commit") or how not in ("applied", "lost"):
            raise ScriptError(f"nobody knows an ambiguous {kind} that is {how}")
        self._stage.to_lose.append(f"{kind} {how}")

    def do_break(self, _saves: str) -> None:
        """``break saves``: no rank can seal a snapshot, until ``mend saves``."""
        self._stage.faults.seal_failure = 1.0

    def do_mend(self, _saves: str) -> None:
        """``mend saves``."""
        self._stage.faults.seal_failure = 0.0

    def do_corrupt(self, _checkpoint: str, seq: str) -> None:
        """``corrupt checkpoint 1``: one byte of one of its blobs flips in the store."""
        blobs, folder = self._stage.store._blobs, f"blobs/{int(seq):020d}/"
        key = next(key for key in sorted(blobs) if folder in key and key.endswith(".st"))
        data, crc = blobs[key]
        blobs[key] = (data[:-1] + bytes([data[-1] ^ 1]), crc)
        self._stage.checks.damaged.add(key)

    def do_receiver(self, *words: str) -> None:
        """``receiver takes``, ``receiver is away``, ``receiver fails`` (503), ``receiver refuses`` (400),

        ``receiver takes one more while its leader dies``: what a webhook's receiver does; the first of these
        names the webhook, which is told of warnings.
        """
        mood = " ".join(words)
        if mood not in (*ANSWERS, LAST):
            raise ScriptError(f"nobody knows a receiver that {mood}")
        if self._stage.receiver is None:
            self._stage.name_webhook()
        assert self._stage.receiver is not None
        self._stage.receiver.mood = mood

    def do_ledger(self, name: str) -> None:
        """``ledger JOB``: tell where its time went, by the newest status, beside the time that has passed."""
        stage, status = self._stage, self._stage.checks.history(JobName(name)).status
        if status is None or status.ledger is None:
            raise ScriptError(f"{name} has no ledger")
        parts = ", ".join(f"{name} {ms / 1000:.1f}" for name, ms in status.ledger.spent.items())
        all_s = sum(status.ledger.spent.values()) / 1000
        passed_s = stage.told.written_at[name] - self._submitted_at[name]
        stage.told.line("time", f"{parts}; {all_s:.1f} of the {passed_s:.1f} s that have passed")

    # Looking.

    def _status(self) -> Any:
        """The newest status of the newest job."""
        return self._stage.checks.history(list(self._stage.specs)[-1]).status

    def _commits(self) -> dict[int, CommitRecord]:
        return self._stage.checks.history(list(self._stage.specs)[-1]).commits

    def _ranks(self) -> list[SimRank]:
        return [rank for machine in self._stage.machines.values() for rank in machine.ranks()]

    def _rank(self, number: int) -> SimRank:
        found = [rank for rank in self._ranks() if rank.rank == number]
        if not found:
            raise ScriptError(f"rank {number} does not run")
        return max(found, key=lambda rank: rank.attempt)

    def _step(self) -> int:
        status = self._status()
        ranks = [rank for rank in self._ranks() if status is not None and rank.attempt == status.attempt]
        return min((rank.step for rank in ranks), default=0)

    def _keys_of(self, kind: str) -> set[int]:
        parsed = [self._stage.keys.parse(key) for key in sorted(self._stage.etcd._live)]
        return {int(place.seq or 0) for place in parsed if place is not None and place.kind == kind}

    def _events(self) -> list[EventReason]:
        return self._stage.told.events

    def _count(self, what: str, seq: int) -> bool:
        """Whether every rank of the attempt has its part of a checkpoint."""
        status = self._status()
        if status is None:
            return False
        if what == "durable":
            return bool(self._stage.told.durable(seq) >= status.world_size > 0)
        sealed = [
            local
            for machine in self._stage.machines.values()
            for launcher in machine.launchers.values()
            for local, of in launcher.arena
            if of == seq
        ]
        return bool(len(sealed) >= status.world_size > 0)


def _options(words: tuple[str, ...]) -> tuple[list[str], dict[str, str]]:
    names = [word for word in words if "=" not in word]
    return names, dict(word.split("=", 1) for word in words if "=" in word)
