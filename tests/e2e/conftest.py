"""One cluster per test module: 3 coordinators, 3 agents with 2 slots, a folder as store."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.harness import Harness

HERE = Path(__file__).parent


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run tests of this folder in the order they are written: those of a module share one story."""
    places = [index for index, item in enumerate(items) if HERE in item.path.parents]
    ours = sorted((items[index] for index in places), key=lambda item: (item.path, _line(item)))
    for index, item in zip(places, ours, strict=True):
        items[index] = item


def _line(item: pytest.Item) -> int:
    return item.location[1] or 0


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    """A cluster whose whole history is audited when the module is done."""
    with Harness(tmp_path_factory.mktemp("h")) as made:
        made.await_ready()
        yield made
        made.assert_clean()


@pytest.fixture(autouse=True)
def audited(request: pytest.FixtureRequest) -> Iterator[None]:
    """A violation fails the test during which it happened."""
    yield
    if "harness" in request.fixturenames:
        request.getfixturevalue("harness").assert_audited(catch_up=False)
