"""Training frameworks under dtrain: a killed rank costs steps, and never a bit of the result."""

from pathlib import Path

import pytest
from tests.support.harness import Harness

from dtrain.protocol.ids import JobName

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(500)]

EXAMPLES = Path(__file__).parents[2] / "examples"
STEPS = 26
LIMIT_S = 200.0


@pytest.mark.parametrize("framework", ["huggingface", "lightning"])
def test_a_killed_rank_changes_nothing_of_the_result(harness: Harness, framework: str) -> None:
    """Several epochs, in each of them evaluations that draw random numbers; killed in the middle of one."""
    pytest.importorskip("transformers" if framework == "huggingface" else framework)
    settings = {"folder": EXAMPLES / framework, "nnodes": 1, "every_steps": 7, "marks": False}
    calm = harness.submit(f"{framework}-calm", f"--steps {STEPS}", **settings)
    broken = harness.submit(f"{framework}-broken", f"--steps {STEPS} --pause-ms 500", **settings)
    harness.until(f"{broken} has a commit", lambda: harness.commits(broken), LIMIT_S)
    harness.cluster.kill_rank(1, job=broken)
    for job in (calm, broken):
        harness.until(f"{job} ends", lambda job=job: harness.status(JobName(job)).finished_at, LIMIT_S)
        harness.assert_succeeded(job, STEPS)
    status = harness.status(broken)
    assert status.attempt == 2
    assert status.restore is not None
    assert 0 < status.restore.step < STEPS
    assert harness.status(calm).attempt == 1
    assert harness.digests(broken) == harness.digests(calm)
