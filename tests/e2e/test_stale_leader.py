"""A few of the freezes of ``python -m tests.e2e.stale_leader``, which does fifty."""

from pathlib import Path

import pytest
from tests.e2e.stale_leader import run
from tests.support.harness import say

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


def test_no_acknowledged_write_is_lost_to_a_frozen_leader(tmp_path: Path) -> None:
    outcome = run(tmp_path, 5)
    say(str(outcome))
    assert (outcome.lost, outcome.late_applied, outcome.violations) == (0, 0, [])
    # Each leader came back with writes in its hands, and etcd refused them.
    assert outcome.freezes_with_late_writes == 5
    assert outcome.late_rejected >= 5


def test_without_the_fence_the_same_run_loses_writes(tmp_path: Path) -> None:
    """It is the fence that does it: nothing else here stops a leader of the past."""
    outcome = run(tmp_path, 2, fence=False)
    say(str(outcome))
    assert outcome.lost > 0
    assert outcome.late_applied > 0
