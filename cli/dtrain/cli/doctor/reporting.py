"""Findings and settings as they are shown."""

import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import click

from dtrain.cli import context, terminal
from dtrain.cli.doctor.findings import Finding, Level
from dtrain.cli.globals import Settings

_COLOURS = {Level.PASS: "green", Level.WARN: "yellow", Level.FAIL: "red", Level.SKIPPED: "bright_black"}
_VARIABLES = {
    "cluster": ("DTRAIN_CLUSTER",),
    "coordinators": ("DTRAIN_COORDINATORS",),
    "endpoints": ("DTRAIN_ENDPOINTS", "ETCDCTL_ENDPOINTS"),
    "cacert": ("DTRAIN_CACERT", "ETCDCTL_CACERT"),
    "cert": ("DTRAIN_CERT", "ETCDCTL_CERT"),
    "key": ("DTRAIN_KEY", "ETCDCTL_KEY"),
    "user": ("DTRAIN_USER", "ETCDCTL_USER"),
    "password_file": ("DTRAIN_PASSWORD_FILE",),
    "tls_cert": ("DTRAIN_TLS_CERT",),
    "tls_key": ("DTRAIN_TLS_KEY",),
    "tls_cacert": ("DTRAIN_TLS_CACERT",),
}
_KEPT = ("coordinators", "endpoints", "tls_cert", "tls_key", "tls_cacert")


def lines(found: Sequence[Finding], *, quiet: bool) -> Iterator[str]:
    """The lines for one check; ``quiet``: those that want something done."""
    for one in found:
        if quiet and one.level not in (Level.WARN, Level.FAIL):
            continue
        where = f"{one.scope}/{one.check}"
        yield f"{_word(one.level)} {where:<22} {terminal.text(one.measured)}"
        if one.fix and one.level is not Level.PASS:
            yield f"{'':<8}{'':<22} fix: {terminal.text(one.fix)}"


def summary(found: Sequence[Finding]) -> str:
    """One line at the end."""
    count = Counter(one.level for one in found)
    return (
        ", ".join(f"{count[level]} {level.value}" for level in Level if count[level]) or "nothing to look at"
    )


def document(found: Sequence[Finding]) -> dict[str, Any]:
    """All of it for ``-o json``."""
    count = Counter(one.level for one in found)
    return {
        "v": 1,
        "kind": "Diagnosis",
        "healthy": not count[Level.FAIL],
        "counts": {level.value: count[level] for level in Level},
        "findings": [one.as_json() for one in found],
    }


def configuration(settings: Settings) -> dict[str, Any]:
    """Where each setting of the command line comes from: flag, variable, context file or default."""
    current, known = context.load()
    entry = known.get(settings.cluster or current)
    found = {}
    for name, variables in _VARIABLES.items():
        given = str(getattr(settings, name))
        variable = next((one for one in variables if os.environ.get(one)), "")
        value, source = "", "default"
        if given and given != os.environ.get(variable, ""):
            value, source = given, "flag"
        elif variable:
            value, source = os.environ[variable], variable
        elif entry is not None and name in _KEPT and getattr(entry, name):
            kept = getattr(entry, name)
            value, source = kept if isinstance(kept, str) else ",".join(kept), str(context.path())
        elif name == "cluster" and current:
            value, source = current, str(context.path())
        # A user may be written NAME:PASSWORD.
        found[name] = {"value": value.partition(":")[0] if name == "user" else value, "source": source}
    return {"v": 1, "kind": "Configuration", "settings": found}


def _word(level: Level) -> str:
    text = f"{level.value:<7}"
    if terminal.colours(sys.stdout):
        return click.style(text, fg=_COLOURS[level])
    return text
