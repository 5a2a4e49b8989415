"""Options of the test run. They are here because pytest reads no deeper file before it parses them."""

import signal
from collections.abc import Iterator

import pytest
import structlog
from hypothesis import HealthCheck, settings

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell that starts a run in the background has it ignored, and every program of a test inherits that.
    signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes says how busy the machine is, and nothing about the product.
settings.register_profile("dtrain", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("dtrain")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rewrite",
        action="store_true",
        help="write what the scenarios do now into tests/scenarios/*.txt; then read the diff",
    )


@pytest.fixture(autouse=True)
def own_log() -> Iterator[None]:
    """No test's programs decide where the next test's lines go."""
    yield
    if structlog.is_configured():
        structlog.reset_defaults()
