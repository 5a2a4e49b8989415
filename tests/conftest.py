"""Options of the test run. They are here because pytest reads no deeper file before it parses them."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rewrite",
        action="store_true",
        help="write what the scenarios do now into tests/scenarios/*.txt; then read the diff",
    )
