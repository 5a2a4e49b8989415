"""The bars of ``tests.e2e.bars`` with numbers that fit into a suite."""

import os
from pathlib import Path

import pytest
from tests.e2e import bars
from tests.support.harness import say

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

EVENTS = int(os.environ.get("DTRAIN_TEST_WATCH_EVENTS", "5000"))
AWAY_S = float(os.environ.get("DTRAIN_TEST_OUTAGE_S", "8"))


def test_no_event_is_lost_or_told_twice_on_a_way_full_of_faults(tmp_path: Path) -> None:
    say(str(bars.watch(tmp_path, EVENTS)))


def test_losing_the_quorum_changes_no_rank_and_no_pace(tmp_path: Path) -> None:
    figures = bars.quorum(tmp_path, AWAY_S)
    say(str(figures))
    # Loosely: the suite runs beside others. The bar itself compares with the noise of its slices.
    assert figures.change > -0.4
    assert figures.commit_s < 20.0
