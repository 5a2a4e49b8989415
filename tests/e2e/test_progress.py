"""A checkpoint's way to the store and back is seen while it goes on, for all machines together."""

import os
import subprocess
import sys
import time

import pytest
from tests.support.harness import Harness

from dtrain.cli import listing
from dtrain.local.proxy import PASS, Behaviour, Flow, TcpProxy
from dtrain.protocol.job import JobPhase
from dtrain.protocol.rows import Movement

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]


def moving(harness: Harness, job: str) -> Movement | None:
    rows = listing.jobs(harness.client).rows
    return next((one for row in rows if row.name == job for one in row.moving), None)


def test_a_slow_upload_is_seen_to_rise_until_all_of_it_is_there(harness: Harness) -> None:
    # 34 MB of weights and momentum, shared by two machines: each writes for about eight seconds.
    stop = harness.stop_file("slow")
    args = f"--steps 100000 --pause-ms 20 --size 2048 --stop-file {stop}"
    job = harness.start("slow", args, every_steps=0, bandwidth_mb_s=2.0)
    waits = subprocess.Popen(
        [sys.executable, "-m", "dtrain.cli", "checkpoint", job, "--wait"],
        env=os.environ | {"DTRAIN_COORDINATORS": ",".join(harness.cluster.addresses)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    seen: list[Movement] = []
    while waits.poll() is None:
        if (now := moving(harness, job)) is not None and now not in seen:
            seen.append(now)
        time.sleep(0.1)
    out, err = waits.communicate()
    assert waits.returncode == 0, err
    (record,) = harness.commits(job)
    assert f"checkpoint {record.seq} of step {record.step} is committed" in out
    # Who waited was told, too: in plain lines, as it is no terminal.
    assert f"Saving: checkpoint {record.seq} (step {record.step}): " in err
    done = [one.done_bytes for one in seen]
    assert done == sorted(done)
    assert {(one.kind, one.seq, one.step) for one in seen} == {("save", record.seq, record.step)}
    under_way = [one for one in seen if 0 < one.done_bytes < record.bytes]
    assert len({one.done_bytes for one in under_way}) >= 3, seen
    assert any(one.bytes_per_s > 0 and one.left_s for one in under_way), seen
    assert {one.total_bytes for one in seen if one.machines == 2} <= {0, record.bytes}
    harness.until("nothing moves any more", lambda: moving(harness, job) is None)
    stop.touch()
    harness.await_end(job)
    harness.assert_released(job)


def test_a_slow_restore_is_seen_to_rise(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("s3")
    with Harness(folder, store="s3", coordinators=1, agents=1) as harness:
        harness.await_ready()
        assert harness.cluster.weed is not None
        uri = harness.cluster.store_uri
        with TcpProxy(uri.partition("endpoint=")[2].partition("&")[0]) as proxy:
            # 34 MB of weights and momentum in two blobs, two chunks each.
            stop = harness.stop_file("back")
            job = harness.start(
                "back",
                f"--steps 100000 --pause-ms 20 --size 2100 --stop-file {stop}",
                nnodes=1,
                every_steps=0,
                store=uri.replace(uri.partition("endpoint=")[2].partition("&")[0], f"http://{proxy.address}"),
            )
            harness.client.set_intent(job, wanted="suspend")
            harness.until("it is suspended", lambda: harness.status(job).phase is JobPhase.SUSPENDED)
            (record,) = harness.commits(job)
            proxy.set(Behaviour(to_client=Flow(bytes_per_s=4e6)))
            harness.client.set_intent(job, wanted="run")
            seen: list[Movement] = []

            def trains() -> bool:
                if (now := moving(harness, job)) is not None and now not in seen:
                    seen.append(now)
                return harness.status(job).phase is JobPhase.RUNNING

            harness.until("it trains again", trains)
            proxy.set(PASS)
            assert {(one.kind, one.seq, one.step) for one in seen} == {("restore", record.seq, record.step)}
            done = [one.done_bytes for one in seen]
            assert done == sorted(done)
            assert any(0 < one.done_bytes < record.bytes for one in seen), seen
            assert {one.total_bytes for one in seen} <= {0, record.bytes}
            stop.touch()
            harness.await_end(job)
