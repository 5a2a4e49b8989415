"""An S3 server that is killed in the middle of a save, and comes back."""

import pytest
from tests.e2e import outage
from tests.support.harness import Harness

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

OUTAGE_S = 20.0


def test_a_save_outlives_its_store_if_it_has_the_time_and_is_aborted_if_not(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    with Harness(tmp_path_factory.mktemp("outage"), store="s3", agents=2) as harness:
        harness.await_ready()
        outage.run(harness, OUTAGE_S)
