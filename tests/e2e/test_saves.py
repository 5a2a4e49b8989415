"""Scripts that choose their own steps, through the SDK and through torch.distributed.checkpoint."""

from pathlib import Path

import pytest
from tests.support.harness import Harness

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_the_steps_that_the_script_saves_are_committed_and_no_others(harness: Harness) -> None:
    job = harness.submit("saves", "20 0 50", script="saves.py", every_steps=0, marks=False)
    harness.await_end(job)
    commits = harness.commits(job)
    assert [(record.step, record.final) for record in commits] == [(20, False), (40, False), (50, True)]
    for rank in range(4):
        log = harness.client.read_log(job, rank, "stdout", offset=0).data.decode()
        assert f"rank {rank}: step 20 is checkpoint {commits[0].seq}" in log
    harness.assert_released(job)


def test_a_step_that_one_rank_saves_alone_is_refused_and_training_goes_on(harness: Harness) -> None:
    job = harness.submit("alone", "30 10 40", script="saves.py", every_steps=0, timeout_s=5.0, marks=False)
    harness.await_end(job)
    log = harness.client.read_log(job, 0, "stdout", offset=0).data.decode()
    assert "of step 10 is aborted" in log
    assert "ranks 0 asked for step 10" in log
    assert "asked for none" in log
    assert [record.step for record in harness.commits(job)] == [30, 40]
    assert harness.status(job).attempt == 1


def test_a_killed_fsdp_job_goes_on_from_the_commit_of_its_last_dcp_save(harness: Harness) -> None:
    job = harness.submit(
        "dcp",
        "--steps 90 --every 20 --pause-ms 20",
        folder=EXAMPLES / "dcp",
        every_steps=0,
        keep_last=9,
        marks=False,
    )
    first = harness.await_commit(job)
    assert first.step == 20
    harness.cluster.kill_rank(3, job=job)
    status = harness.await_end(job)
    assert status.attempt >= 2
    log = harness.client.read_log(job, 0, "stdout", offset=0).data.decode()
    assert "goes on from step" in log
    commits = harness.commits(job)
    assert [record.step for record in commits] == [20, 40, 60, 80, 90]
    manifest = harness.manifest(commits[-1])
    assert manifest.paths["app.model.0.weight"] == ["app", "model", "0.weight"]
    assert len(manifest.tensors["app.model.0.weight"].chunks) == 4
    harness.assert_released(job)
