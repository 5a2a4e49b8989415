"""Which of many are meant: names and their beginnings, phases, labels. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from dtrain.cli import naming
from dtrain.protocol.errors import ErrorCode, Refused
from dtrain.protocol.phases import TERMINAL_PHASES, JobPhase
from dtrain.protocol.rows import AgentRow, JobRow

R = TypeVar("R", JobRow, AgentRow)

_GROUPS = {
    "active": frozenset(JobPhase) - TERMINAL_PHASES,
    "finished": TERMINAL_PHASES,
}
"""Words for several phases."""

AGENT_STATES = ("Ready", "Draining", "Cordoned", "Blocked", "Lost")


@dataclass(frozen=True, slots=True)
class Label:
    """One part of a label selector. ``value`` None: it is there, with whatever value."""

    name: str
    value: str | None
    wanted: bool

    def fits(self, labels: Mapping[str, str]) -> bool:
        """Whether something with these labels is meant; what lacks the label differs from every value."""
        found = self.name in labels if self.value is None else labels.get(self.name) == self.value
        return found is self.wanted


def labels(texts: Sequence[str]) -> tuple[Label, ...]:
    """Read ``a=b``, ``a!=b``, ``a`` and ``!a``, separated by commas or given several times: all must fit.

    Raises:
        Refused: USAGE; one of them is none of these.
    """
    found = []
    for text in (part.strip() for one in texts for part in one.split(",") if part.strip()):
        name, equals, value = text.partition("=")
        wanted = not (name.endswith("!") or text.startswith("!"))
        name = name.strip("!= ")
        if not name or "=" in value.removeprefix("=") or (text.startswith("!") and equals):
            raise Refused(
                ErrorCode.USAGE,
                f"{text!r} selects nothing",
                fix="write -l name=value, name!=value, name or !name; several with commas",
            )
        found.append(Label(name, value.removeprefix("=").strip() if equals else None, wanted))
    return tuple(found)


def phases(texts: Sequence[str]) -> frozenset[str]:
    """Read phases, ``active`` or ``finished``, in any case, separated by commas; none: all.

    Raises:
        Refused: USAGE; there is no such phase.
    """
    found: set[str] = set()
    for word in (part.strip() for one in texts for part in one.split(",") if part.strip()):
        if word.lower() in _GROUPS:
            found |= _GROUPS[word.lower()]
        elif word.upper() in JobPhase.__members__:
            found.add(word.upper())
        else:
            raise _no_such(word, "phase", [*JobPhase, *_GROUPS])
    return frozenset(found)


def states(texts: Sequence[str]) -> frozenset[str]:
    """The same for the states of agents."""
    known = {state.lower(): state for state in AGENT_STATES}
    words = [part.strip() for one in texts for part in one.split(",") if part.strip()]
    for word in words:
        if word.lower() not in known:
            raise _no_such(word, "status", AGENT_STATES)
    return frozenset(known[word.lower()] for word in words)


@dataclass(frozen=True, slots=True)
class Selection:
    """Names or beginnings of names, phases and labels; empty: all."""

    names: tuple[str, ...] = ()
    phases: frozenset[str] = frozenset()
    labels: tuple[Label, ...] = ()

    @property
    def single(self) -> bool:
        """One was named: the answer is that one, not a list."""
        return len(self.names) == 1 and not self.names[0].endswith("*")

    def choose(self, rows: Sequence[R], what: str) -> list[R]:
        """Those that are meant, in their order. ``NAME*`` may mean none, a name may not.

        Raises:
            NotFound, Refused: a name means none, or several.
        """
        known = {row.name: row for row in rows}
        chosen = set(known)
        if self.names:
            chosen = {found for name in self.names for found in _meant(known, name, what)}
        return [row for row in rows if row.name in chosen and self.fits(row)]

    def may_be(self, name: str) -> bool:
        """Whether something of this name could be meant: for what is yet to come."""
        beginnings = [text.rpartition("/")[2].removesuffix("*") for text in self.names]
        return not beginnings or name.startswith(tuple(beginnings))

    def fits(self, row: JobRow | AgentRow) -> bool:
        """Whether its phase and labels are those that are meant."""
        phase = str(row.phase) if isinstance(row, JobRow) else row.status
        if self.phases and phase not in self.phases:
            return False
        return all(label.fits(row.labels) for label in self.labels)


def _meant(known: Mapping[str, object], name: str, what: str) -> list[str]:
    if name.endswith("*"):
        start = name.removeprefix(f"{what}/").removesuffix("*")
        return [one for one in known if one.startswith(start)]
    return [naming.find(known, name, what)]


def _no_such(word: str, what: str, known: Sequence[str]) -> Refused:
    import difflib

    near = difflib.get_close_matches(word.upper(), [one.upper() for one in known], n=1)
    fix = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
    return Refused(ErrorCode.USAGE, f"there is no {what} {word!r}", fix=fix)
