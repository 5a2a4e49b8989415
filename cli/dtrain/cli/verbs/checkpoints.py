"""``dtrain checkpoints``: list, verify, export, import, pin, unpin, delete, gc."""

import click

from dtrain.cli import confirming
from dtrain.cli.options import SECONDS, complete_job, connected, examples, formatted, settings

FORMATS = ("safetensors", "torch", "dcp")


@click.group(
    short_help="Verify, export, import, pin and delete committed checkpoints.",
    epilog=examples(
        "dtrain checkpoints list digits",
        "dtrain checkpoints verify digits",
        "dtrain checkpoints export digits --to model.safetensors --only model",
    ),
)
def command() -> None:
    """Look after committed checkpoints.

    SEQ is a number as listed. Where it may be left out, the newest good one is meant.
    """


@command.command(
    "list", epilog=examples("dtrain checkpoints list digits", "dtrain checkpoints list digits -o json")
)
@click.argument("job", shell_complete=complete_job)
@formatted()
@connected
def list_(job: str) -> None:
    """List a job's checkpoints: committed, open, bad, being deleted; * marks the newest."""
    from dtrain.cli import checkpointing, context
    from dtrain.cli.client import closing

    with closing(context.connect(settings())) as client:
        checkpointing.listing(client, job, settings().output)


@command.command(
    "verify",
    epilog=examples(
        "dtrain checkpoints verify digits 7", "dtrain checkpoints verify digits --all --no-quarantine -o json"
    ),
)
@click.argument("job", shell_complete=complete_job)
@click.argument("seqs", nargs=-1, type=click.IntRange(1), metavar="[SEQ]...")
@click.option("--all", "everything", is_flag=True, help="All committed ones.")
@click.option(
    "--quarantine/--no-quarantine",
    default=True,
    help="Have the leader look at what is damaged here, and put the checkpoint aside if it sees it too.",
)
@click.option("--store", metavar="URI", default="", help="The job's store as it is reached from here.")
@click.option("--timeout", type=SECONDS, default="2m", show_default=True, help="Longest wait for the leader.")
@formatted("table", "json", "yaml")
@connected
def verify(
    *, job: str, seqs: tuple[int, ...], everything: bool, quarantine: bool, store: str, timeout: float
) -> int:
    """Read every byte of checkpoints of JOB from the store; damaged ones end with exit code 8."""
    from dtrain.cli import checkpointing, context, exits, output, reading
    from dtrain.cli.client import closing
    from dtrain.cli.durations import show_bytes
    from dtrain.cli.render import checkpoints

    with closing(context.connect(settings())) as client:
        found, _ = reading.job(client, job)
        name = found.name
        wanted = list(seqs) or (sorted(found.commits) if everything else [0])
        results = [
            checkpointing.verify(client, name, seq, store_uri=store, report=quarantine, timeout_s=timeout)
            for seq in wanted
        ]
    if settings().output != "table":
        items = [result.as_json(name) for result in results]
        single = {"v": 1, "kind": "CheckpointVerificationList", "items": items}
        output.document(items[0] if len(items) == 1 else single, settings().output)
    for result in results if settings().output == "table" else []:
        damages = result.report.damages
        chunks = "chunk is" if len(damages) == 1 else "chunks are"
        state = f"{len(damages)} {chunks} damaged" if damages else "every byte is what was committed"
        click.echo(f"{name}: checkpoint {result.seq} of step {result.record.step}: {state}"
                   f" ({show_bytes(result.report.bytes)})")  # fmt: skip
        for damage in damages:
            click.echo(checkpoints.damage_line(damage))
        if result.quarantined:
            click.echo(f"  {result.quarantined}")
    return exits.CHECK_FAILED if any(result.report.damages for result in results) else exits.OK


@command.command(
    "export",
    epilog=examples(
        "dtrain checkpoints export digits --to model.safetensors --only model",
        "dtrain checkpoints export digits 7 --format torch --to digits.pt",
        "dtrain checkpoints export digits --format dcp --to digits-dcp",
    ),
)
@click.argument("job", shell_complete=complete_job)
@click.argument("seq", type=click.IntRange(1), required=False)
@click.option("--to", type=click.Path(), required=True, help="File or folder to write; it must not exist.")
@click.option(
    "--format",
    "kind",
    type=click.Choice(FORMATS),
    help="safetensors: one file, or a folder of several with an index; torch: one file for torch.load; "
    "dcp: a folder for torch.distributed.checkpoint (default: torch for a name in .pt or .pth, else "
    "safetensors).",
)
@click.option("--only", multiple=True, metavar="NAME", help="Only what is tracked under this name.")
@click.option("--full", is_flag=True, help="With the ranks' random states: all that an import needs to go on "
              "with the same bits.")  # fmt: skip
@click.option("--shard-gb", type=click.FloatRange(0.001), default=5.0, show_default=True,
              help="Size of one of several safetensors files.")  # fmt: skip
@click.option("--store", metavar="URI", default="", help="The job's store as it is reached from here.")
@formatted("table", "json", "yaml", "name")
@connected
def export(
    *,
    job: str,
    seq: int | None,
    to: str,
    kind: str | None,
    only: tuple[str, ...],
    full: bool,
    shard_gb: float,
    store: str,
) -> int:
    """Write a checkpoint of JOB in a format of other programs; every byte is verified on the way."""
    from pathlib import Path

    from dtrain.cli import checkpointing, context, output, pinning, reading
    from dtrain.cli.client import closing
    from dtrain.cli.durations import show_bytes
    from dtrain.cli.progress import Progress
    from dtrain.storage.checkpoints.exporting import Format
    from dtrain.storage.checkpoints.exporting import export as write

    with closing(context.connect(settings())) as client:
        name = reading.name(client, job)
        with pinning.held(client, name, seq or 0, "export") as hold:
            record = hold.pinned.record
            with checkpointing.opened(store or hold.pinned.store) as opened:
                manifest = checkpointing.manifest_of(opened, record)
                with Progress(f"checkpoint {record.seq}") as progress:
                    done = write(
                        opened,
                        manifest,
                        Path(to).absolute(),
                        Format(kind or ("torch" if to.endswith((".pt", ".pth")) else "safetensors")),
                        only=only,
                        full=full,
                        shard_bytes=int(shard_gb * 1e9),
                        on_progress=progress,
                    )
    if settings().output in ("json", "yaml"):
        told = {"v": 1, "kind": "CheckpointExport", "job": name, "seq": record.seq, "step": record.step}
        output.document(
            {**told, "path": done.path, "format": done.format, "tensors": done.tensors, "bytes": done.bytes},
            settings().output,
        )
    elif settings().output == "name":
        click.echo(done.path)
    else:
        click.echo(f"{name}: checkpoint {record.seq} of step {record.step} is in {done.path}"
                   f" ({done.tensors} tensors, {show_bytes(done.bytes)})")  # fmt: skip
    return 0


@command.command(
    "import",
    epilog=examples(
        "dtrain checkpoints import digits-2 exported-folder",
        "dtrain checkpoints import finetune llama-folder --weights-only --map module.=model.",
        "dtrain checkpoints import digits-2 state.pt --dry-run",
    ),
)
@click.argument("job", shell_complete=complete_job)
@click.argument("path", type=click.Path(exists=True))
@click.option(
    "--format", "kind", type=click.Choice(FORMATS), help="What PATH must be (default: told from its bytes)."
)
@click.option(
    "--step", type=click.IntRange(0), help="Training goes on after it (default: the exported one, or 0)."
)
@click.option("--map", "maps", multiple=True, metavar="OLD=NEW",
              help="Replace the beginning of full names; the first that fits counts.")  # fmt: skip
@click.option(
    "--prefix", metavar="NAME.", help="Put before tensors that have no tracked name (default: model.)."
)
@click.option("--only", multiple=True, metavar="NAME", help="Only what has this tracked name.")
@click.option(
    "--weights-only",
    is_flag=True,
    help="What is tracked and not imported begins fresh, with a line in the log.",
)
@click.option("--trust", is_flag=True, help="Let torch unpickle a DCP folder, in a process of its own: "
              "whoever wrote the folder can run code in it.")  # fmt: skip
@click.option("--scratch", type=click.Path(exists=True, file_okay=False),
              help="Folder with room for a DCP folder's state (default: the temporary one).")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Read and name everything, show it, write nothing.")
@click.option("--store", metavar="URI", default="", help="The job's store as it is reached from here.")
@click.option("--timeout", type=SECONDS, default="6h", show_default=True, help="Longest time for all of it.")
@formatted("table", "json", "yaml", "name")
@connected
def import_(
    *,
    job: str,
    path: str,
    kind: str | None,
    step: int | None,
    maps: tuple[str, ...],
    prefix: str | None,
    only: tuple[str, ...],
    weights_only: bool,
    trust: bool,
    scratch: str | None,
    dry_run: bool,
    store: str,
    timeout: float,
) -> int:
    """Make of PATH a committed checkpoint of JOB, which its first attempt begins from.

    PATH is a safetensors file or folder, a file of torch.save, a DCP folder, or an export in one of these
    formats. JOB must not have begun: submit it with checkpoint.await_import, and it waits.
    """
    from pathlib import Path

    from dtrain.cli import context, importing, output, reading
    from dtrain.cli.client import closing
    from dtrain.cli.durations import show_bytes
    from dtrain.cli.progress import Progress
    from dtrain.cli.render import checkpoints
    from dtrain.storage.checkpoints.exporting import Format
    from dtrain.storage.checkpoints.importing import arrange

    pairs = [(old, new) for old, equals, new in (one.partition("=") for one in maps) if old and equals]
    if len(pairs) != len(maps):
        raise click.UsageError("--map takes OLD=NEW")
    wanted = Format(kind) if kind else None
    opened = importing.source(
        Path(path).absolute(), wanted, trust=trust, scratch=Path(scratch) if scratch else None
    )
    with opened as contents:
        arranged = arrange(contents, maps=pairs, prefix=prefix, only=only, partial=weights_only)
        at = step if step is not None else int(contents.origin.get("step", 0))
        told = {
            "v": 1,
            "kind": "CheckpointImport",
            "job": job,
            "step": at,
            "format": contents.format,
            "names": arranged.names,
            "tensors": len(arranged.tensors),
            "bytes": arranged.size_bytes,
        }
        form = settings().output
        if dry_run:
            rows = {n: (one.dtype, one.shape, one.size_bytes) for n, one in arranged.tensors.items()}
            if form in ("json", "yaml"):
                contents_told = {n: [dtype, list(shape)] for n, (dtype, shape, _) in rows.items()}
                output.document({**told, "dry_run": True, "contents": contents_told}, form)
            else:
                for line in output.coloured(checkpoints.imports(rows).lines(0)):
                    click.echo(line)
                output.say(f"would be checkpoint of step {at} with {', '.join(arranged.names)}")
            return 0
        with closing(context.connect(settings())) as client:
            name = reading.name(client, job)
            with Progress(f"import into {name}") as progress:
                done = importing.into(
                    client,
                    name,
                    arranged,
                    step=at,
                    store_uri=store,
                    timeout_s=timeout,
                    on_progress=progress,
                )
    if form in ("json", "yaml"):
        output.document({**told, "job": name, "seq": done.seq}, form)
    elif form == "name":
        click.echo(f"checkpoint/{name}/{done.seq}")
    else:
        click.echo(f"{name}: checkpoint {done.seq} of step {done.step} holds {', '.join(arranged.names)}"
                   f" ({len(arranged.tensors)} tensors, {show_bytes(arranged.size_bytes)})")  # fmt: skip
    return 0


@command.command(
    "pin",
    epilog=examples(
        "dtrain checkpoints pin digits 7", 'dtrain checkpoints pin digits 7 --holder paper --why "table 2"'
    ),
)
@click.argument("job", shell_complete=complete_job)
@click.argument("seq", type=click.IntRange(1))
@click.option(
    "--holder", default="operator", show_default=True, help="Who needs it; each one's pin is its own."
)
@click.option("--why", default="", help="For those who wonder later.")
@formatted("table", "json", "name")
@connected
def pin(job: str, seq: int, holder: str, why: str) -> int:
    """Keep checkpoint SEQ of JOB until it is unpinned, whatever the policy says."""
    from dtrain.cli import context, output, reading
    from dtrain.cli.client import closing
    from dtrain.cli.identity import whoami

    with closing(context.connect(settings())) as client:
        name = reading.name(client, job)
        done = client.pin_checkpoint(name, seq, holder=holder, ttl_s=0, why=why, by=whoami())
    if settings().output == "json":
        told = {"v": 1, "kind": "Pinned", "job": name, "seq": seq, "holder": holder}
        output.document({**told, "revision": done.revision}, "json")
    elif settings().output == "name":
        click.echo(f"checkpoint/{name}/{seq}")
    else:
        click.echo(f"{name}: checkpoint {seq} stays until it is unpinned")
    return 0


@command.command(
    "unpin", epilog=examples("dtrain checkpoints unpin digits 7", "dtrain checkpoints unpin digits 7 --all")
)
@click.argument("job", shell_complete=complete_job)
@click.argument("seq", type=click.IntRange(1))
@click.option("--holder", default="operator", show_default=True, help="Whose pin is taken off.")
@click.option("--all", "everybody", is_flag=True, help="Everybody's, readers' too.")
@formatted("table", "json", "name")
@connected
def unpin(job: str, seq: int, holder: str, everybody: bool) -> int:
    """Take a pin off checkpoint SEQ of JOB: the policy decides about it again."""
    from dtrain.cli import context, output, reading
    from dtrain.cli.client import closing

    with closing(context.connect(settings())) as client:
        name = reading.name(client, job)
        removed = client.unpin_checkpoint(name, seq, holder="*" if everybody else holder)
    if settings().output == "json":
        output.document({"v": 1, "kind": "Unpinned", "job": name, "seq": seq, "removed": removed}, "json")
    elif settings().output == "name":
        click.echo(f"checkpoint/{name}/{seq}")
    else:
        click.echo(f"{name}: checkpoint {seq} {'is unpinned' if removed else 'had no such pin'}")
    return 0


@command.command(
    "delete",
    epilog=examples("dtrain checkpoints delete digits 7", "dtrain checkpoints delete digits 7 --yes"),
)
@click.argument("job", shell_complete=complete_job)
@click.argument("seq", type=click.IntRange(1))
@confirming.option
@click.option("--wait/--no-wait", default=True, help="Return when it is deleted, or when that is asked for.")
@click.option("--timeout", type=SECONDS, default="1m", show_default=True, help="Longest --wait.")
@formatted("table", "json", "name")
@connected
def delete(job: str, seq: int, yes: bool, wait: bool, timeout: float) -> int:
    """Delete checkpoint SEQ of JOB for good. The newest, a pinned and a restored-from one are refused."""
    from dtrain.cli import checkpointing, context, output, reading
    from dtrain.cli.client import closing

    with closing(context.connect(settings())) as client:
        name = reading.name(client, job)
        confirming.confirm(f"Delete checkpoint {seq} of {name}? It cannot be brought back", yes=yes)
        gone = checkpointing.delete(client, name, seq, timeout_s=timeout if wait else None)
    if settings().output == "json":
        output.document({"v": 1, "kind": "CheckpointDeleted", "job": name, "seq": seq, "done": gone}, "json")
    elif settings().output == "name":
        click.echo(f"checkpoint/{name}/{seq}")
    else:
        click.echo(f"{name}: checkpoint {seq} is {'deleted' if gone else 'about to be deleted'}")
    return 0


@command.command(
    "gc", epilog=examples("dtrain checkpoints gc digits --dry-run", "dtrain checkpoints gc digits --yes")
)
@click.argument("job", shell_complete=complete_job)
@click.option("--dry-run", is_flag=True, help="Only show what would be deleted, and why.")
@confirming.option
@click.option(
    "--timeout", type=SECONDS, default="10m", show_default=True, help="Longest wait for the leader."
)
@formatted("table", "wide", "json", "yaml", "name")
@connected
def gc(job: str, dry_run: bool, yes: bool, timeout: float) -> int:
    """Delete now what nobody needs: surplus checkpoints of JOB, and orphans in its store."""
    import time

    from dtrain.cli import checkpointing, context, output, reading
    from dtrain.cli.client import closing
    from dtrain.cli.render import checkpoints

    with closing(context.connect(settings())) as client:
        name = reading.name(client, job)
        wanted = settings().output
        if dry_run:
            review = client.review_garbage(name, timeout_s=timeout)
            shown = [item for item in review.items if item.deleted or wanted in ("wide", "json", "yaml")]
            output.listing(
                "Garbage",
                [item.as_json(name) for item in shown],
                checkpoints.garbage(shown, wide=wanted == "wide"),
                [f"{name}/{item.seq or item.what}" for item in shown],
                output=wanted,
                revision=review.revision,
                nothing=f"nothing of {name} would be deleted",
            )
            if review.problem:
                output.say(f"orphans would stay: {review.problem}")
            return 0
        confirming.confirm(f"Delete what nobody needs of {name}? --dry-run shows it", yes=yes)
        told = checkpointing.collect(client, name, timeout)
    if wanted in ("json", "yaml"):
        at = int(time.time())
        output.document({"v": 1, "kind": "GarbageCollected", "job": name, "message": told, "at": at}, wanted)
    elif wanted == "name":
        click.echo(f"job/{name}")
    else:
        click.echo(f"{name}: {told}")
    return 0
