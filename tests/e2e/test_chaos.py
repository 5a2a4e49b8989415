"""A short chaos run: a few random kills, and the same weights as without them."""

from pathlib import Path

import pytest
from tests.e2e import chaos

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]


def test_random_kills_change_no_bit_of_the_weights(tmp_path: Path) -> None:
    done = chaos.run(seed=5, kills=8, agents=3, minutes=10.0, folder=tmp_path)
    assert done.counts.total() == 8
