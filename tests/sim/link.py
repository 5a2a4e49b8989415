"""One node's way to its peers, to etcd or to the store, cut in one direction or in both.

Faults overlap: each block is one token, and a direction is open when nobody blocks it.
"""

from dataclasses import dataclass, field


@dataclass(slots=True)
class Link:
    """``out``: what the node sends arrives. ``in_``: what is sent to it arrives."""

    blocked_out: dict[object, None] = field(default_factory=dict)
    blocked_in: dict[object, None] = field(default_factory=dict)
    auth_denied: int = 0
    """etcd refuses its credentials."""
    lag_s: float = 0.0
    """The member it talks to shows changes that much later."""

    @property
    def out(self) -> bool:
        return not self.blocked_out

    @property
    def in_(self) -> bool:
        return not self.blocked_in

    @property
    def open(self) -> bool:
        return not (self.blocked_out or self.blocked_in)

    @property
    def closed(self) -> bool:
        """Nothing passes at all: a connection is refused rather than lost."""
        return bool(self.blocked_out and self.blocked_in)

    def block(self, token: object, *, out: bool = True, in_: bool = True) -> None:
        """Let nothing pass in the given directions until ``token`` is unblocked."""
        if out:
            self.blocked_out[token] = None
        if in_:
            self.blocked_in[token] = None

    def unblock(self, token: object) -> None:
        self.blocked_out.pop(token, None)
        self.blocked_in.pop(token, None)
