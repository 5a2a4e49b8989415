"""What every test of the trainer leaves behind is let go of."""

from collections.abc import Iterator

import pytest
from tests.unit.trainer import pipeline


@pytest.fixture(autouse=True)
def _memory() -> Iterator[None]:
    yield
    pipeline.let_go()
