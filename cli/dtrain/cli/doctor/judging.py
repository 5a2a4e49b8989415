"""What measured values mean: one function per question. Pure.

Sources of the bounds are in ``docs/doctor.md``.
"""

from collections.abc import Mapping, Sequence

from dtrain.cli.doctor.findings import Verdict, fail, passed, skipped, warn
from dtrain.cli.durations import show_bytes, show_s
from dtrain.protocol.wording import some
from dtrain.storage.etcd.versions import FLOOR, SAFE_WITH_USERS

Version = tuple[int, int, int]

QUOTA_WARN, QUOTA_FAIL = 0.5, 0.8
UNCOMPACTED_MAX = 1_000_000
CLOCK_WARN_S = 5.0
EXPIRY_WARN_S = 14 * 86400.0
FSYNC_WARN_S = 0.1
MIRROR_STALE_S = 15.0
NOFILE_WARN = 4096
FREE_WARN_BYTES, FREE_FAIL_BYTES = 10e9, 1e9
STORE_SLOW_BYTES_S = 20e6
MEMORY_WARN_SHARE = 0.5
NAMED_MAX = 5


def version_of(text: str) -> Version | None:
    """Read ``3.5.16`` or ``3.6.0-rc.1``; None if it is no version."""
    parts = text.split("-", maxsplit=1)[0].split(".")
    if len(parts) != 3 or not all(part.isdecimal() for part in parts):
        return None
    return int(parts[0]), int(parts[1]), int(parts[2])


# etcd ---------------------------------------------------------------------------


def etcd_version(text: str, *, for_test: bool, users: bool) -> Verdict:
    """``users``: whether etcd has users, which is what the newer faults are about."""
    version = version_of(text)
    if version is None:
        return skipped(f"it does not say which release it is ({text or 'nothing'})")
    if version < FLOOR:
        fix = "upgrade etcd to 3.5.13 or newer, one member at a time: docs/etcd.md"
        said = f"{text} can lose what it has confirmed"
        return warn(f"{said}; this is a test cluster", fix) if for_test else fail(said, fix)
    floor = SAFE_WITH_USERS.get(version[:2])
    if users and floor is not None and version[2] < floor:
        return warn(
            f"{text} has known ways around the permissions of its users",
            f"upgrade to {version[0]}.{version[1]}.{floor} or newer: docs/etcd.md",
        )
    return passed(text)


def etcd_quorum(asked: int, healthy: int, gone: Sequence[str]) -> Verdict:
    """``gone``: the endpoints that did not answer, or not well."""
    names = ", ".join(gone)
    if healthy == asked:
        if asked == 1:
            return passed("1 member answers (of one, nothing may fail; three survive the loss of one)")
        return passed(f"all {asked} members answer")
    if healthy <= asked // 2:
        return fail(
            f"{healthy} of {asked} endpoints are well; {names} is not: there may be no majority",
            "start its members again; ranks train on meanwhile, nothing is committed: docs/etcd.md",
        )
    return warn(f"{healthy} of {asked} endpoints are well; {names} is not", f"see what is wrong at {names}")


def commit_latency(samples_s: Sequence[float], ttl_s: float) -> Verdict:
    """Of writes that a majority has on disk."""
    if not samples_s:
        return skipped("nothing could be written")
    worst = max(samples_s)
    middle = sorted(samples_s)[len(samples_s) // 2]
    said = f"a write takes {_ms(middle)}, at worst {_ms(worst)} of {len(samples_s)}"
    if worst > ttl_s / 10:
        return fail(
            f"{said}; leases of {ttl_s:g} s want {_ms(ttl_s / 10)} at most",
            "give etcd a disk of its own (SSD), close to the coordinators, or raise --ttl everywhere",
        )
    if worst > ttl_s / 20:
        return warn(f"{said}: half of what leases of {ttl_s:g} s allow", "give etcd a faster disk")
    return passed(said)


def fsync(p99_s: float | None) -> Verdict:
    """Of the write-ahead log."""
    if p99_s is None:
        return skipped("the member's /metrics does not tell")
    if p99_s > FSYNC_WARN_S:
        return warn(
            f"99 % of its syncs to disk take up to {_ms(p99_s)}",
            "give etcd an SSD of its own; a busy neighbour on the same disk delays every lease",
        )
    return passed(f"99 % of its syncs to disk take {_ms(p99_s)} or less")


def database(size_bytes: float, quota_bytes: float) -> Verdict:
    """Size against quota; 0: unknown."""
    if not size_bytes:
        return skipped("the member does not tell the size of its database")
    if not quota_bytes:
        return passed(f"{show_bytes(size_bytes)}; its quota is not told")
    share = size_bytes / quota_bytes
    said = f"{show_bytes(size_bytes)} of {show_bytes(quota_bytes)}, {share:.0%}"
    fix = "compact and defragment (deploy/etcd/maintain.sh), or raise --quota-backend-bytes"
    if share > QUOTA_FAIL:
        return fail(f"{said}: when it is full, nothing can be written", fix)
    return warn(said, fix) if share > QUOTA_WARN else passed(said)


def alarms(raised: Sequence[str]) -> Verdict:
    """What etcd itself shouts about."""
    if "CORRUPT" in raised:
        return fail("CORRUPT: members do not hold the same data", "replace the bad member: docs/etcd.md")
    if "NOSPACE" in raised:
        return fail(
            "NOSPACE: it refuses all writes",
            "compact, defragment, then etcdctl alarm disarm: deploy/etcd/maintain.sh",
        )
    if raised:
        return warn(", ".join(raised), "etcdctl alarm list")
    return passed("none is raised")


def compaction(revision: float | None, compacted: float | None) -> Verdict:
    """Whether history is thrown away at times."""
    if revision is None or compacted is None:
        return skipped("the member's /metrics does not tell")
    kept = int(revision - max(compacted, 0.0))
    if kept > UNCOMPACTED_MAX:
        return warn(
            f"{kept:,} revisions are kept: history is not compacted",
            "start etcd with --auto-compaction-mode periodic --auto-compaction-retention 1h",
        )
    return passed(f"{kept:,} revisions are kept")


def clock(offset_s: float | None, whose: str) -> Verdict:
    """Wall clocks are for people and certificates; nothing of dtrain's own depends on them."""
    if offset_s is None:
        return skipped(f"{whose} does not say what time it is")
    if abs(offset_s) > CLOCK_WARN_S:
        ahead = "ahead of" if offset_s > 0 else "behind"
        return warn(
            f"{whose} is {show_s(abs(offset_s))} {ahead} this machine: times that people read will mislead",
            "run NTP (chrony, systemd-timesyncd) on all machines",
        )
    return passed(f"{whose} agrees with this machine within {max(1.0, abs(offset_s)):.0f} s")


def etcd_access(*, user: str, tls: bool, local: bool) -> Verdict:
    """Who may write to what decides everything."""
    if local:
        return passed("etcd is on loopback")
    if user and tls:
        return passed(f"TLS, as user {user}")
    missing = " and ".join(what for what, there in (("TLS", tls), ("users", bool(user))) if not there)
    return warn(
        f"etcd is reached without {missing}: whoever reaches it can change what jobs do",
        "docs/security.md; deploy/etcd/make-certs.sh and setup-auth.sh make certificates and users",
    )


def expiry(path: str, left_s: float) -> Verdict:
    """Of one certificate."""
    if left_s <= 0:
        return fail(f"{path} has expired", "renew it; daemons take up new files by themselves")
    if left_s < EXPIRY_WARN_S:
        return warn(f"{path} ends in {show_s(left_s)}", "renew it; daemons take up new files by themselves")
    return passed(f"{path} is good for {show_s(left_s)}")


# The cluster's own -----------------------------------------------------------------


def leadership(
    replicas: Sequence[str], leaders: Sequence[tuple[str, int]], unreachable: Sequence[str]
) -> Verdict:
    """``leaders``: (replica, term) of those that say they lead."""
    if not replicas:
        return fail("no replica answers", "start one: dtrain coordinator, or dtrain up on this machine")
    if not leaders:
        return fail(
            "no replica leads",
            "wait one TTL; if it stays so, see the replicas' problems: dtrain get coordinators",
        )
    newest = max(leaders, key=lambda leader: leader[1])
    said = f"{newest[0]} leads under term {newest[1]}"
    if len(leaders) > 1:
        # One of them has not noticed yet; its writes are refused.
        return warn(f"{said}; {len(leaders)} believe they do", "look again in one TTL: the older term ends")
    if unreachable:
        return warn(f"{said}; {', '.join(unreachable)} does not answer", "restart it: it has no state")
    if len(replicas) == 1:
        return warn(f"{said}, and there is no other", "run three: nobody leads while the only one is away")
    return passed(f"{said}; {len(replicas)} replicas answer")


def mirror(replica: str, age_s: float) -> Verdict:
    """How old a replica's copy of etcd is."""
    if age_s > MIRROR_STALE_S:
        return fail(
            f"{replica}'s copy of etcd is {show_s(age_s)} old"
            if age_s < 1e9
            else f"{replica} has read nothing yet",
            "see that it reaches etcd; without a fresh copy it decides nothing",
        )
    return passed(f"{replica}'s copy of etcd is {age_s:.1f} s old")


def versions(found: Mapping[str, Sequence[str]]) -> Verdict:
    """``found``: by release, who runs it."""
    if len(found) <= 1:
        return passed("all run " + (next(iter(found)) if found else "nothing"))
    said = "; ".join(f"{version}: {some(sorted(who), NAMED_MAX)}" for version, who in sorted(found.items()))
    minors = sorted({version[:2] for text in found if (version := version_of(text)) is not None})
    if minors and (minors[0][0] != minors[-1][0] or minors[-1][1] - minors[0][1] > 1):
        return fail(said, "at most one minor release may lie between them: docs/compatibility.md")
    return warn(said, "finish the upgrade: coordinators first, then agents (docs/compatibility.md)")


def agents(total: int, blocked: Mapping[str, str], cordoned: Sequence[str], free: int, slots: int) -> Verdict:
    """``blocked``: by agent, what keeps it from taking ranks."""
    if not total:
        return fail("no agent is registered", "start one per machine: dtrain agent --endpoints ...")
    if blocked:
        name, why = next(iter(blocked.items()))
        more = f", and {len(blocked) - 1} more" if len(blocked) > 1 else ""
        return fail(f"{name} takes no ranks: {why}{more}", f"dtrain describe agent {name}")
    said = f"{total} registered, {free} of {slots} slots free"
    if len(cordoned) == total:
        return warn(f"{said}; all are cordoned", "dtrain uncordon NAME")
    return passed(f"{said}, {len(cordoned)} cordoned" if cordoned else said)


def links(asked: int, refused: Sequence[str]) -> Verdict:
    """Whether the addresses that agents advertise answer from here."""
    if not asked:
        return skipped("there is no agent to connect to")
    if refused:
        return warn(
            f"{some(refused, NAMED_MAX)} cannot be connected to from here: if not from the coordinators"
            " either, they get no commands",
            "check --advertise and --host of the agent, and firewalls towards its port",
        )
    return passed(f"{asked} addresses of agents answer")


# This machine ------------------------------------------------------------------------


def python(version: tuple[int, int]) -> Verdict:
    """Of this interpreter."""
    text = ".".join(map(str, version))
    if version < (3, 11):
        return fail(f"Python {text}", "use Python 3.11 or newer")
    return passed(f"Python {text}")


def open_files(soft: int) -> Verdict:
    """The soft limit, which processes start with."""
    if soft < NOFILE_WARN:
        return warn(
            f"{soft} files may be open at once",
            f"ulimit -n 65536, or LimitNOFILE=65536 in the unit; {NOFILE_WARN} will do",
        )
    return passed(f"{soft} files may be open at once")


def locked_memory(soft_bytes: float, *, gpus: int) -> Verdict:
    """NCCL over InfiniBand locks memory."""
    if gpus and soft_bytes < 1e9:
        return warn(
            f"{show_bytes(soft_bytes)} of memory may be locked",
            "ulimit -l unlimited, or LimitMEMLOCK=infinity: NCCL over InfiniBand needs it",
        )
    return passed("no bound on locked memory" if soft_bytes == float("inf") else show_bytes(soft_bytes))


def free_space(path: str, free_bytes: float) -> Verdict:
    """Where an agent or a store keeps its files."""
    said = f"{show_bytes(free_bytes)} free at {path}"
    fix = "free some, or choose another --data-dir: journal, logs and packages live there"
    if free_bytes < FREE_FAIL_BYTES:
        return fail(said, fix)
    return warn(said, fix) if free_bytes < FREE_WARN_BYTES else passed(said)


def unwritable(path: str) -> Verdict:
    """Of the folder that an agent would use."""
    return fail(f"{path} cannot be written to by this user", "choose another --data-dir")


def ports(wanted: Sequence[str], taken: Sequence[str]) -> Verdict:
    """Of daemons that would be started here with their defaults."""
    if taken:
        return warn(
            f"{', '.join(taken)} is in use on loopback",
            "fine if a daemon of dtrain runs here already; else give yours another --listen",
        )
    return passed(f"{', '.join(wanted)} are free")


def arena(memory_bytes: float, limit_bytes: float) -> Verdict:
    """Room for snapshots: each holds a rank's share of the state, outside of the GPU."""
    available = min(memory_bytes, limit_bytes)
    bound = " (this control group's limit)" if limit_bytes < memory_bytes else ""
    said = f"{show_bytes(available)} of memory{bound}"
    if available < 2e9:
        return warn(said, "snapshots of checkpoints are kept in memory, one copy of the state per rank")
    return passed(said)


def torch_found(facts: Mapping[str, object]) -> Verdict:
    """``facts``: what a child process that imports torch tells; ``error`` instead if it cannot."""
    if not facts.get("torch"):
        return warn(
            f"torch cannot be imported: {facts.get('error', 'it is not installed')}",
            "pip install 'dtrain[agent]' on machines that train; coordinators need no torch",
        )
    gpus, nccl = facts.get("gpus", 0), facts.get("nccl", "")
    said = f"torch {facts['torch']}, CUDA {facts.get('cuda') or 'none'}, {gpus} GPUs, NCCL {nccl or 'none'}"
    if not facts.get("gloo"):
        return fail(f"{said}, no gloo", "use a torch that is built with distributed support")
    if facts.get("devices_seen") and not gpus:
        return fail(
            f"{said}, although there are GPUs (/dev/nvidia*)",
            "install a CUDA build of torch that fits the driver: nvidia-smi shows which",
        )
    if gpus and not nccl:
        return fail(said, "use a torch that is built with NCCL")
    return passed(said)


def fork_safety(facts: Mapping[str, object]) -> Verdict:
    """Whether ranks can be forked from a process that has imported this; else they are started by exec."""
    modules = facts.get("preload") or ["torch"]
    assert isinstance(modules, list)
    names = ", ".join(map(str, modules))
    if facts.get("error"):
        return fail(f"{names} cannot be imported: {facts['error']}", "install it, or take it out of preload")
    threads = facts.get("threads", 1)
    assert isinstance(threads, int)
    if facts.get("cuda_initialized"):
        return warn(
            f"importing {names} initialises CUDA: ranks are not forked, which takes seconds more", _IMPORTS
        )
    if threads > 1:
        return warn(
            f"importing {names} starts {threads - 1} threads: ranks are not forked, which takes seconds more",
            _IMPORTS,
        )
    return passed(f"importing {names} leaves one thread and no CUDA context: ranks can be forked")


_IMPORTS = "take what does that out of preload, or have it begin with the first use"


def kernel(pidfd: bool, ptrace_scope: int | None) -> Verdict:
    """What supervising and looking at ranks needs of it."""
    if not pidfd:
        return fail(
            "pidfd_open is not available", "use Linux 5.4 or newer, and a seccomp profile that allows it"
        )
    if ptrace_scope is not None and ptrace_scope > 1:
        return warn(
            f"kernel.yama.ptrace_scope is {ptrace_scope}: stacks of hung ranks show Python only",
            "sysctl kernel.yama.ptrace_scope=1",
        )
    return passed("pidfd_open works, ptrace is allowed for own children")


def store_speed(what: str, count_bytes: float, seconds: float) -> Verdict:
    """Of one sequential transfer."""
    rate = count_bytes / seconds if seconds else float("inf")
    said = f"{what} {show_bytes(count_bytes)} in {seconds:.2f} s, {show_bytes(rate)}/s"
    if rate < STORE_SLOW_BYTES_S:
        return warn(said, "checkpoints will take long: check the network between here and the store")
    return passed(said)


def fits(needed: int, slots_each: int, free: Sequence[int], total: Sequence[int]) -> Verdict:
    """Whether ``needed`` machines have ``slots_each`` slots: free ones, and all of them."""
    now = sum(1 for slots in free if slots >= slots_each)
    ever = sum(1 for slots in total if slots >= slots_each)
    said = f"{needed} machines with {slots_each} slots are needed; {now} have them free, {ever} in all"
    if ever < needed:
        return fail(said, "start more agents, or lower nnodes or nproc_per_node")
    return (
        warn(f"{said}: it will wait", "dtrain get jobs shows who has them") if now < needed else passed(said)
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds >= 0.0095 else f"{seconds * 1000:.1f} ms"
