"""What a job may look like, checked before it is stored. Pure."""

import math

from dtrain.protocol import labels, patterns
from dtrain.protocol.errors import ErrorCode, Refused
from dtrain.protocol.ids import parse_name
from dtrain.protocol.job import RULE_REASONS, JobSpec, NonFiniteAction
from dtrain.protocol.package import Package
from dtrain.runtime import redact

NODES_MAX = 10_000
RANKS_PER_NODE_MAX = 1_024
ENV_BYTES_MAX = 64 * 1024
ENV_VARIABLES_MAX = 1_000
ARGS_MAX = 4_000
TEXT_BYTES_MAX = 100 * 1024
"""Of one argument or value: Linux starts no process with a longer one."""
SPEC_BYTES_MAX = 250 * 1024
"""As stored; below what anybody reads, so that no accepted job is unreadable."""
PRELOAD_MAX = 64
STARTUP_S_MIN = 0.001
"""A script that may take no time at all to its first step would hang in each attempt."""
PRIORITY_MAX = 1000
KEEP_LAST_MAX = 1_000
RULES_MAX = 32
CORDON_S_MAX = 30 * 86_400.0
METRICS_MAX = 8
"""Numbers that must stay finite: agents tell of no more."""
STORES = ("/", "file:///", "s3://", "memory://")


def check(spec: JobSpec) -> None:
    """Return if ``spec`` can be run, as far as its values tell.

    Raises:
        Refused: BAD_NAME or BAD_JOB_FILE, naming the field.
    """
    parse_name(spec.name, "job")
    check_nodes(spec.nnodes_min, spec.nnodes_max)
    _between("nproc_per_node", spec.nproc_per_node, 0, RANKS_PER_NODE_MAX)
    _between("spares", spec.spares, 0, NODES_MAX)
    _seconds("grow_cooldown", spec.grow_cooldown_s, 0.0)
    if not spec.entry.target.strip():
        raise _bad("script", "is empty", "name a script, a module or a command")
    if spec.working_dir and not spec.working_dir.startswith("/"):
        raise _bad("working_dir", "is not an absolute path", "use a path that exists on every machine")
    texts = [spec.entry.target, *spec.entry.args, spec.working_dir, *spec.env, *spec.env.values()]
    if any("\0" in text for text in texts):
        raise _bad("args and env", "hold a NUL character", "remove it")
    if len(spec.entry.args) > ARGS_MAX:
        raise _bad("args", f"has {len(spec.entry.args)} words", f"use at most {ARGS_MAX}, or a file")
    if any(len(text.encode()) > TEXT_BYTES_MAX for text in texts):
        raise _bad("args and env", f"hold a text of more than {TEXT_BYTES_MAX} bytes", "pass it in a file")
    if len(spec.env) > ENV_VARIABLES_MAX:
        raise _bad("env", f"has {len(spec.env)} variables", f"use at most {ENV_VARIABLES_MAX}")
    for name in spec.env:
        if not name or "=" in name:
            raise _bad("env", f"has a variable named {name[:40]!r}", "use NAME: value")
    size = sum(len(name) + len(value) for name, value in spec.env.items())
    if size > ENV_BYTES_MAX:
        raise _bad("env", f"takes {size} bytes", f"use at most {ENV_BYTES_MAX}")
    if why := labels.problem(spec.labels):
        raise _bad("labels", f"cannot be used: {why}", "write them as NAME: value")
    if len(spec.preload) > PRELOAD_MAX:
        raise _bad("preload", f"has {len(spec.preload)} modules", f"use at most {PRELOAD_MAX}")
    for module in spec.preload:
        if not all(part.isidentifier() for part in module.split(".")):
            raise _bad("preload", f"names {module[:80]!r}, which is no module", "use names such as torch.nn")
    if spec.package is not None:
        _check_package(spec.package)
    policy = spec.checkpoint
    if holds_credentials(policy.store):
        # Without the URI: it would carry the secret on, into logs and terminals.
        raise _bad("checkpoint.store", "holds credentials", "set them where coordinators and agents run")
    if policy.store and not policy.store.startswith(STORES):
        raise _bad(
            "checkpoint.store",
            f"{policy.store[:80]!r} is not a store",
            "use s3://bucket/prefix or file:///path",
        )
    _between("checkpoint.every_steps", policy.every_steps, 0, 10**12)
    _between("checkpoint.keep_last", policy.keep_last, 1, KEEP_LAST_MAX)
    _between("checkpoint.keep_every_steps", policy.keep_every_steps, 0, 10**12)
    _seconds("checkpoint.every_seconds", policy.every_seconds, 0.0)
    _seconds("checkpoint.timeout", policy.timeout_s, 1.0)
    _between("restarts.max", spec.restarts.max_restarts, 0, 10**6)
    _seconds("restarts.window", spec.restarts.window_s, 1.0)
    if len(spec.failure_rules) > RULES_MAX:
        raise _bad("failure_rules", f"has {len(spec.failure_rules)} rules", f"use at most {RULES_MAX}")
    for number, rule in enumerate(spec.failure_rules, start=1):
        field = f"failure_rules[{number}]"
        unknown = sorted(set(rule.reasons) - RULE_REASONS.keys())
        if unknown:
            raise _bad(
                f"{field}.reasons", f"names {unknown[0][:40]!r}", f"use some of {', '.join(RULE_REASONS)}"
            )
        # Whoever leads searches with it: what costs too much would cost the lease.
        if why := patterns.problem(rule.message):
            raise _bad(f"{field}.message", why, "write it simpler, or as several rules")
        _between(f"{field}.back", rule.back, 1, 1000)
        _seconds(f"{field}.cordon", rule.cordon_s, 0.0)
        if rule.cordon_s > CORDON_S_MAX:
            raise _bad(f"{field}.cordon", f"is {rule.cordon_s:g} seconds", f"use at most {CORDON_S_MAX:g}")
    _seconds("hang.timeout", spec.hang.timeout_s, 0.0)
    _seconds("hang.startup", spec.hang.startup_s, STARTUP_S_MIN)
    numbers = spec.nonfinite
    _between("nonfinite.back", numbers.back, 1, KEEP_LAST_MAX)
    _between("nonfinite.metrics", len(numbers.metrics), 0, METRICS_MAX)
    if numbers.action is NonFiniteAction.ROLLBACK and numbers.back >= policy.keep_last:
        raise _bad(
            "nonfinite.back",
            f"is {numbers.back}, and only {policy.keep_last} checkpoints are kept",
            f"set checkpoint.keep_last to {numbers.back + 1} or more",
        )
    _seconds("shutdown_grace", spec.shutdown_grace_s, 0.0)
    _seconds("isolation_grace", spec.isolation_grace_s, 0.0)
    _seconds("reschedule_grace", spec.reschedule_grace_s, 0.0)
    _between("priority", spec.priority, -PRIORITY_MAX, PRIORITY_MAX)


def _check_package(package: Package) -> None:
    if why := package.problem():
        raise _bad("package", why, "submit the job with dtrain submit, which packs the folder")
    if holds_credentials(package.store):
        raise _bad("package.store", "holds credentials", "set them where coordinators and agents run")
    if not package.store.startswith(STORES) or "\0" in package.source + package.store:
        raise _bad("package.store", f"{package.store[:80]!r} is not a store", "use the job's own store")


def check_nodes(low: int, high: int) -> None:
    """Return if a job may have from ``low`` to ``high`` machines.

    Raises:
        Refused: BAD_JOB_FILE.
    """
    _between("nnodes", low, 1, NODES_MAX)
    _between("nnodes", high, low, NODES_MAX)


def holds_credentials(uri: str) -> bool:
    """Tell whether a store's URI, which is stored and shown, has a user, password or key in it."""
    place, _, options = uri.partition("?")
    in_options = any(redact.is_secret(part.partition("=")[0]) for part in options.split("&"))
    host = place.partition("://")[2].partition("/")[0]
    return "@" in host or "@" in options or "%40" in options or in_options


def _between(field: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise _bad(field, f"is {value}", f"use {least} to {most}")


def _seconds(field: str, value: float, least: float) -> None:
    if not math.isfinite(value) or value < least:
        raise _bad(field, f"is {value} seconds", f"use {least:g} or more")


def _bad(field: str, what: str, fix: str) -> Refused:
    return Refused(ErrorCode.BAD_JOB_FILE, f"{field} {what}", fix=fix)
