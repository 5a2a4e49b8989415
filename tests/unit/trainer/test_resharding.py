"""Whatever is saved at A ranks comes back at B, on every mesh, as a full gather of it says."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from tests.unit.trainer import resharding

LIMIT_S = 500.0


@pytest.mark.timeout(600)
def test_every_way_to_shard_restores_as_every_other(tmp_path: Path) -> None:
    store = dist.TCPStore("127.0.0.1", 0, resharding.WORLD, is_master=True, wait_for_workers=False)
    reports = [tmp_path / f"{rank}.json" for rank in range(resharding.WORLD)]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.unit.trainer.resharding", str(rank), str(store.port), str(report)]
        )
        for rank, report in enumerate(reports)
    ]
    deadline = time.monotonic() + LIMIT_S
    try:
        # The first to fail tells why: the others then wait for it in vain.
        while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
            for report in reports:
                if report.exists() and report.read_text() and "error" in json.loads(report.read_text()):
                    pytest.fail(json.loads(report.read_text())["error"])
            time.sleep(0.1)
        found = [json.loads(report.read_text()) for report in reports]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [f.get("error") for f in found] == [None] * resharding.WORLD
    assert {f["pairs"] for f in found} == {14 * 14}
