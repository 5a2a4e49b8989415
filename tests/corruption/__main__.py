"""Damage committed checkpoints: ``python -m tests.corruption --cases 1000 --seed 7`` sees every case caught.

``--rivals`` prints what torch.save, safetensors and torch.distributed.checkpoint make of the same kinds.
"""

# ruff: noqa: T201 - its purpose is to print

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from dtrain.local.weed import WeedServer
from dtrain.storage.blobs.port import BlobStore
from tests.corruption.buckets import Bucket
from tests.corruption.campaign import Campaign, Tally, before_digest
from tests.corruption.damage import UNREAD
from tests.corruption.making import Folder, Shelf


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.corruption", description=__doc__)
    parser.add_argument("--cases", type=int, default=1000, help="how many that do harm, over all kinds")
    parser.add_argument("--seed", type=int, default=1, help="of the damages drawn")
    parser.add_argument("--no-s3", action="store_true", help="a directory store only")
    parser.add_argument("--rivals", action="store_true", help="what other formats catch instead")
    parser.add_argument("--trials", type=int, default=25, help="with --rivals: of each kind")
    options = parser.parse_args()
    if options.rivals:
        from tests.corruption import rivals

        print(rivals.table(options.trials, options.seed))
        return 0
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        share = 0.0 if options.no_s3 else 0.1
        near = int(options.cases * (1 - share))
        ways = [play(Folder(folder / "store"), near, options.seed, big=True)]
        beyond = limits(Folder(folder / "limits").store, 20, options.seed)
        if share:
            server = WeedServer(folder / "weed")
            server.start()
            try:
                ways.append(play(Bucket(server), options.cases - near, options.seed, big=False))
            finally:
                server.close()
    print(f"seed {options.seed}, {time.monotonic() - began:.0f} s")
    for name, tally in zip(("directory", "S3"), ways, strict=False):
        print(f"\n{name}: {tally.cases} cases, {tally.caught.total()} caught,", end=" ")
        print(f"{tally.harmless.total()} harmless (bit-identical restore), {len(tally.wrong)} WRONG")
        for kind in sorted(tally.caught | tally.harmless):
            print(f"  {kind:28} caught {tally.caught[kind]:4}   harmless {tally.harmless[kind]:4}")
    print(f"\nnot claimed:\n{beyond}")
    wrong = [sentence for tally in ways for sentence in tally.wrong]
    print("\n".join(wrong))
    return 1 if wrong else 0


def play(shelf: Shelf, cases: int, seed: int, *, big: bool) -> Tally:
    """Nine in ten at rest, the others while the checkpoint is being made."""
    campaign = Campaign(shelf, big=big, worlds=(3, 1) if big else (2,))
    rng = random.Random(seed)
    early = cases // 20
    campaign.reported(early, rng)
    campaign.arena(early, rng)
    campaign.at_rest(cases - 2 * early, rng, big_share=0.1)
    campaign.at_rest(cases // 10, rng, kinds=UNREAD)
    return campaign.tally


def limits(store: BlobStore, cases: int, seed: int) -> str:
    """What becomes of a bit that flips in the snapshot before anything was hashed."""
    rng, said = random.Random(seed), []
    for index in (False, True):
        found = Counter(before_digest(store, 1000 + 2 * n + index, rng, index=index) for n in range(cases))
        where = "the index" if index else "the blob"
        said.append(f"a bit of {where} flipped before it was hashed: " + _counts(found))
    return "\n".join(said)


def _counts(found: Counter[str]) -> str:
    return ", ".join(f"{count} {what}" for what, count in sorted(found.items()))


if __name__ == "__main__":
    sys.exit(main())
