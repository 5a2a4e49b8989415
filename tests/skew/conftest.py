"""The former release, installed once per worker, and clusters of two releases."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from tests.skew import old
from tests.skew.old import Release
from tests.support.harness import Harness

HERE = Path(__file__).parent


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run tests of this folder in the order they are written: those of a module share one story."""
    places = [index for index, item in enumerate(items) if HERE in item.path.parents]
    ours = sorted((items[index] for index in places), key=lambda item: (item.path, item.location[1] or 0))
    for index, item in zip(places, ours, strict=True):
        items[index] = item


@pytest.fixture(scope="session")
def former(tmp_path_factory: pytest.TempPathFactory) -> Release:
    """The release before this one, in an environment of its own."""
    return old.install(old.wheel_of(old.FORMER), tmp_path_factory.mktemp("former"))


Clusters = Callable[..., AbstractContextManager[Harness]]


@pytest.fixture(scope="module")
def cluster_of(former: Release, tmp_path_factory: pytest.TempPathFactory) -> Clusters:
    """``cluster_of(coordinators="old", agents="new")``: a cluster whose whole history is audited."""

    @contextmanager
    def made(*, coordinators: str, agents: str, **settings: object) -> Iterator[Harness]:
        kinds = {"c": coordinators, "a": agents}
        pythons = {"old": former.python, "new": old.current().python}
        defaults: dict[str, object] = {"coordinators": 2, "agents": 2, "env": {"PYTHONPATH": ""}}
        defaults |= {"python_of": lambda name: pythons[kinds[name[0]]]}
        with Harness(tmp_path_factory.mktemp("s"), **(defaults | settings)) as harness:
            harness.await_ready()
            yield harness
            harness.assert_clean()

    return made
