"""Where each record lives, and the parser that inverts it.

Grouped by writer, so that etcd roles can be least-privilege. Sequence numbers
are zero-padded: key order is number order.
"""

from dataclasses import dataclass

from dtrain.protocol.ids import AgentName, ClusterName, JobName, ReplicaId, Seq, is_name

ROOT = "/dtrain/"
SEQ_DIGITS = 20


@dataclass(frozen=True, slots=True)
class Parsed:
    """One key taken apart: ``kind`` and the names in it.

    ``kind`` is one of: leader, coordinator, node, worker, cordon, suspicion, spec, intent,
    status, open, checkpoint, latest, pin, garbage, bad, verified, order, event.
    """

    kind: str
    job: JobName = JobName("")
    agent: AgentName = AgentName("")
    seq: Seq = Seq(0)
    name: str = ""


@dataclass(frozen=True, slots=True)
class Keys:
    """Key builder of one cluster."""

    cluster: ClusterName

    @property
    def root(self) -> str:
        """Prefix of everything this cluster owns."""
        return f"{ROOT}{self.cluster}/"

    @property
    def leader(self) -> str:
        return f"{self.root}leader"

    @property
    def test(self) -> str:
        """There only on a cluster that may be broken on purpose; ``parse`` passes it over."""
        return f"{self.root}test"

    @property
    def packages(self) -> str:
        """Which packages are being deleted; ``parse`` passes it over."""
        return f"{self.root}packages"

    def webhook(self, name: str) -> str:
        """How far a webhook has got; ``parse`` passes it over."""
        return f"{self.root}webhooks/{name}"

    def coordinator(self, replica: ReplicaId) -> str:
        return f"{self.root}coordinators/{replica}"

    @property
    def agents(self) -> str:
        return f"{self.root}agents/"

    def node(self, agent: AgentName) -> str:
        return f"{self.root}agents/{agent}/node"

    def worker(self, agent: AgentName, job: JobName) -> str:
        return f"{self.root}agents/{agent}/workers/{job}"

    def workers_of(self, agent: AgentName) -> str:
        return f"{self.root}agents/{agent}/workers/"

    @property
    def cordons(self) -> str:
        return f"{self.root}cordons/"

    def cordon(self, agent: AgentName) -> str:
        return f"{self.root}cordons/{agent}"

    def suspicion(self, agent: AgentName) -> str:
        return f"{self.root}suspicions/{agent}"

    @property
    def jobs(self) -> str:
        return f"{self.root}jobs/"

    def job(self, job: JobName) -> str:
        """Prefix of one job's records."""
        return f"{self.root}jobs/{job}/"

    def spec(self, job: JobName) -> str:
        return f"{self.job(job)}spec"

    def intent(self, job: JobName) -> str:
        return f"{self.job(job)}intent"

    def status(self, job: JobName) -> str:
        return f"{self.job(job)}status"

    def open(self, job: JobName, seq: Seq) -> str:
        return f"{self.job(job)}open/{seq:0{SEQ_DIGITS}d}"

    def checkpoint(self, job: JobName, seq: Seq) -> str:
        return f"{self.job(job)}checkpoints/{seq:0{SEQ_DIGITS}d}"

    def latest(self, job: JobName) -> str:
        return f"{self.job(job)}latest"

    def pins(self, job: JobName, seq: Seq) -> str:
        """Prefix of all pins on one checkpoint."""
        return f"{self.job(job)}pins/{seq:0{SEQ_DIGITS}d}/"

    def pin(self, job: JobName, seq: Seq, holder: str) -> str:
        return f"{self.pins(job, seq)}{holder}"

    def verified(self, job: JobName, seq: Seq) -> str:
        return f"{self.job(job)}verified/{seq:0{SEQ_DIGITS}d}"

    def orders(self, job: JobName) -> str:
        """Prefix of what operators have asked the leader to do about checkpoints."""
        return f"{self.job(job)}orders/"

    def order(self, job: JobName, order_id: str) -> str:
        return f"{self.orders(job)}{order_id}"

    def garbage(self, job: JobName, seq: Seq) -> str:
        return f"{self.job(job)}garbage/{seq:0{SEQ_DIGITS}d}"

    def bad(self, job: JobName, seq: Seq) -> str:
        return f"{self.job(job)}bad/{seq:0{SEQ_DIGITS}d}"

    def event(self, job: JobName, seq: int) -> str:
        return f"{self.job(job)}events/{seq:0{SEQ_DIGITS}d}"

    def parse(self, key: str) -> Parsed | None:
        """Take a key apart; None for one that is not ours or of a newer version."""
        if not key.startswith(self.root):
            return None
        match key[len(self.root) :].split("/"):
            case ["leader"]:
                return Parsed("leader")
            case ["coordinators", name]:
                return Parsed("coordinator", name=name)
            case ["agents" | "cordons" | "suspicions", agent, *_] if not is_name(agent):
                return None
            case ["agents", agent, "node"]:
                return Parsed("node", agent=AgentName(agent))
            case ["agents", agent, "workers", job]:
                return Parsed("worker", job=JobName(job), agent=AgentName(agent))
            case ["cordons", agent]:
                return Parsed("cordon", agent=AgentName(agent))
            case ["suspicions", agent]:
                return Parsed("suspicion", agent=AgentName(agent))
            case ["jobs", job, ("spec" | "intent" | "status" | "latest") as kind]:
                return Parsed(kind, job=JobName(job))
            case ["jobs", job, folder, seq] if folder in _SEQ_FOLDERS and _is_seq(seq):
                return Parsed(_SEQ_FOLDERS[folder], job=JobName(job), seq=Seq(int(seq)))
            case ["jobs", job, "pins", seq, reader] if _is_seq(seq):
                return Parsed("pin", job=JobName(job), seq=Seq(int(seq)), name=reader)
            case ["jobs", job, "orders", order_id]:
                return Parsed("order", job=JobName(job), name=order_id)
            case _:
                return None


def _is_seq(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= SEQ_DIGITS


_SEQ_FOLDERS = {
    "open": "open",
    "checkpoints": "checkpoint",
    "garbage": "garbage",
    "bad": "bad",
    "verified": "verified",
    "events": "event",
}
