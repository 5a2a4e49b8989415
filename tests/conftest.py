"""Options of the test run. They are here because pytest reads no deeper file before it parses them."""

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes says how busy the machine is, and nothing about the product.
settings.register_profile("dtrain", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("dtrain")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rewrite",
        action="store_true",
        help="write what the scenarios do now into tests/scenarios/*.txt; then read the diff",
    )
