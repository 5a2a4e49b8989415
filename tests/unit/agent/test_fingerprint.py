"""The same error has the same fingerprint wherever it comes; another one, or a passing one, has not."""

import json

import pytest

from dtrain.agent.core.fingerprint import fingerprint

STACK = """Traceback (most recent call last):
  File "{home}/train.py", line 12, in main
    step(batch)
  File "{home}/model.py", line 40, in step
    raise ValueError("bad batch")
{last}
"""


def error(
    home: str = "/data/ann/x", last: str = "ValueError: bad batch 17 at 0x7f3a", message: str = ""
) -> str:
    stack = STACK.format(home=home, last=last)
    return json.dumps({"message": {"message": message or last, "extraInfo": {"py_callstack": stack}}})


def test_paths_numbers_and_addresses_do_not_count() -> None:
    one = fingerprint(error(), "")
    other = fingerprint(error("/srv/jobs/7", "ValueError: bad batch 99 at 0x1234"), "")
    assert one
    assert one == other


def test_another_line_or_error_is_another_one() -> None:
    one = fingerprint(error(), "")
    assert fingerprint(error(last="KeyError: 'x'"), "") != one
    assert fingerprint(error().replace("line 40", "line 41"), "") != one


def test_the_log_tells_where_there_is_no_error_file() -> None:
    tail = "step 3\n" + STACK.format(home="/x", last="ValueError: bad batch 3 at 0x1")
    assert fingerprint("", tail) == fingerprint(error(), "")
    assert fingerprint("", "Killed\n") == ""


def test_a_sentence_alone_will_do() -> None:
    assert fingerprint(json.dumps({"message": {"message": "ValueError: bad"}}), "")


@pytest.mark.parametrize(
    "last",
    [
        "requests.exceptions.ConnectionError: host",
        "OSError: [Errno 5] Input/output error",
        "RuntimeError: CUDA error: uncorrectable ECC error encountered",
        "TimeoutError",
    ],
)
def test_what_may_go_well_elsewhere_or_later_has_none(last: str) -> None:
    assert fingerprint(error(last=last), "") == ""


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"message": 3}', '{"message": {"extraInfo": {"py_callstack": 3}}}']
)
def test_an_error_file_that_makes_no_sense_has_none(text: str) -> None:
    assert fingerprint(text, "") == ""
