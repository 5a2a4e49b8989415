"""``dtrain etcdctl``: stock etcdctl, led to the cluster's etcd."""

import click

from dtrain.cli.options import connected, examples, formatted, settings


@click.command(
    short_help="Run etcdctl on the cluster's etcd.",
    epilog=examples(
        "dtrain etcdctl get --prefix /dtrain/local/jobs/digits/",
        "dtrain etcdctl watch --prefix /dtrain/local/",
        "dtrain --endpoints https://e0:2379 --cacert ca.pem etcdctl endpoint status",
    ),
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@formatted("table")
@connected
@click.argument("words", metavar="ARGUMENT...", nargs=-1, type=click.UNPROCESSED)
def command(words: tuple[str, ...]) -> int:
    """Run the installed etcdctl, or the one beside a local cluster's etcd, with all ARGUMENTs.

    Its environment says where etcd is. Options of dtrain stand before its first argument.
    """
    import os

    from dtrain.cli import context, etcdctl

    found = context.local_cluster(settings())
    if found is not None:
        program, variables = etcdctl.local(found.endpoints, found.etcdctl, os.environ)
    else:
        program, variables = etcdctl.remote(settings(), os.environ)
    os.execve(program, [program, *words], {**os.environ, **variables})  # noqa: S606 - it is what was asked for
