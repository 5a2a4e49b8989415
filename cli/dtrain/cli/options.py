"""What several verbs share on the command line, with click as the only import."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from dtrain.cli.globals import Settings

F = TypeVar("F", bound=Callable[..., Any])

FORMATS = ("table", "wide", "json", "yaml", "name")

_TLS = (
    ("tls-cert", "Your certificate for gRPC"),
    ("tls-key", "Its key"),
    ("tls-cacert", "CA bundle of the coordinators' certificates"),
)


def settings() -> Settings:
    """Return the settings of the running command."""
    found = click.get_current_context().find_root().obj
    assert isinstance(found, Settings)
    return found


def _remember(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
    found = ctx.find_root().obj
    if value is not None and value is not False and isinstance(found, Settings) and param.name:
        # The environment must not undo what a flag before the verb said.
        source = ctx.get_parameter_source(param.name)
        if source is not click.core.ParameterSource.ENVIRONMENT or not getattr(found, param.name):
            setattr(found, param.name, value)
    return value


ETCD_ACCESS = (
    ("cacert", "FILE", "CA bundle that signs etcd's certificates"),
    ("cert", "FILE", "Client certificate for etcd"),
    ("key", "FILE", "Its key"),
    ("user", "NAME[:PASSWORD]", "etcd user; one that may read is enough"),
    ("password-file", "FILE", "File with its password"),
)
"""etcdctl's own words for how etcd is reached; ``runtime.config.ETCD`` reads DTRAIN_* and ETCDCTL_*."""


def etcd_access(function: F, *, shown: bool = True) -> F:
    """Add the options that say how to reach etcd itself; the environment works too."""
    for name, value, text in reversed(ETCD_ACCESS):
        function = click.option(
            f"--{name}",
            metavar=value,
            help=f"{text} [ETCDCTL_{name.upper()}]." if name != "password-file" else f"{text}.",
            hidden=not shown,
            expose_value=False,
            callback=_remember,
        )(function)
    return function


def connected(function: F, *, etcd: bool = False) -> F:
    """Add the options that say which cluster is meant; ``etcd``: help shows those for etcd, too.

    They count everywhere: replicas may be looked up there.
    """
    function = etcd_access(function, shown=etcd)
    for option in reversed(
        (
            click.option(
                "--cluster",
                envvar="DTRAIN_CLUSTER",
                metavar="NAME",
                help="Cluster to talk to (default: the one of the last 'dtrain up').",
                expose_value=False,
                callback=_remember,
            ),
            click.option(
                "--coordinators",
                envvar="DTRAIN_COORDINATORS",
                metavar="HOST:PORT,...",
                help="Addresses of coordinator replicas; any of them will do.",
                expose_value=False,
                callback=_remember,
            ),
            click.option(
                "--endpoints",
                envvar=["DTRAIN_ENDPOINTS", "ETCDCTL_ENDPOINTS"],
                metavar="URL,...",
                help="etcd endpoints: the replicas are looked up there.",
                expose_value=False,
                callback=_remember,
            ),
            *(
                click.option(
                    f"--{name}",
                    envvar=f"DTRAIN_{name.upper().replace('-', '_')}",
                    metavar="FILE",
                    help=f"{text} (PEM); all three, or none for plain text.",
                    expose_value=False,
                    callback=_remember,
                )
                for name, text in _TLS
            ),
            debugging,
        )
    ):
        function = option(function)
    return function


def debugging(function: F) -> F:
    """Add ``--debug``."""
    return click.option(
        "--debug",
        is_flag=True,
        help="Show the traceback of an error.",
        expose_value=False,
        callback=_remember,
    )(function)


def formatted(*formats: str) -> Callable[[F], F]:
    """Add ``-o``; without arguments all formats are offered."""
    return click.option(
        "-o",
        "--output",
        type=click.Choice(formats or FORMATS),
        help="Output format (default: table).",
        expose_value=False,
        callback=_remember,
    )


def selected(function: F) -> F:
    """Add ``-l``."""
    return click.option(
        "-l", "--selector", "labels", multiple=True, metavar="LABEL=VALUE,...", help="Only with these labels."
    )(function)


def watched(function: F) -> F:
    """Add ``--watch``."""
    return click.option(
        "-w",
        "--watch",
        is_flag=True,
        help="Stay and show changes: in place, or a JSON line each when piped.",
    )(function)


def timed(function: F) -> F:
    """Add ``--iso``."""
    return click.option("--iso", is_flag=True, help="Times in UTC instead of ages.")(function)


def complete_job(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Offer live job names, within 300 ms; nothing if the cluster does not answer."""
    del param
    from dtrain.cli import completing

    return completing.names("jobs/", incomplete, ctx)


def complete_agent(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Offer live agent names, within 300 ms; nothing if the cluster does not answer."""
    del param
    from dtrain.cli import completing

    return completing.names("agents/", incomplete, ctx)


if TYPE_CHECKING:
    FloatType = click.ParamType[float]
else:
    # Generic only in newer releases of click.
    FloatType = click.ParamType


class SecondsType(FloatType):
    """A duration: seconds, or a number with ms, s, m, h or d, such as 1h30m."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        from dtrain.cli.durations import parse_s

        try:
            return parse_s(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


SECONDS = SecondsType()


def examples(*lines: str) -> str:
    r"""Epilog of a verb's help: each example on its own line (``\b`` stops re-wrapping)."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)
