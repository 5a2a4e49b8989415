"""The catalogue is true to the code: every mutant still applies, compiles, and has a killer."""

import re

import pytest

from tests.mutants.catalogue import MUTANTS
from tests.mutants.mutant import Mutant
from tests.mutants.runner import FOLDERS, ROOT, _of_simulation, _of_tests

LEAST = 250


def test_there_are_enough_and_each_has_a_name_of_its_own() -> None:
    names = [mutant.id for mutant in MUTANTS]
    assert len(names) >= LEAST
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9.]+)*", name) for name in names)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.id)
def test_a_mutant_applies_and_its_killer_exists(mutant: Mutant) -> None:
    assert mutant.file.partition("/")[0] in FOLDERS
    assert mutant.breaks.endswith(".")
    text = (ROOT / mutant.file).read_text("utf-8")
    assert text.count(mutant.old) == 1, (
        f"{mutant.old!r} occurs {text.count(mutant.old)} times in {mutant.file}"
    )
    assert mutant.new != mutant.old
    compile(text.replace(mutant.old, mutant.new), mutant.file, "exec")
    for node in (part for part in mutant.killer if "::" in part):
        path, _, name = node.partition("::")
        name, _, case = name.partition("[")
        source = (ROOT / path).read_text("utf-8")
        assert re.search(rf"^def {name}\(", source, re.M), f"{path} has no test {name}"
        assert not case or case.endswith("]")


def test_only_a_failed_assertion_counts_as_caught() -> None:
    failed = "E       assert 1 == 2\nFAILED tests/x.py::test_y - assert 1 == 2\n"
    assert _of_tests(1, failed) == "failed"
    assert _of_tests(0, "1 passed") == "passed"
    assert _of_tests(2, "ERROR collecting tests/x.py") == "broken"
    assert _of_tests(1, "ERROR tests/x.py::test_y - the fixture failed") == "broken"
    assert _of_tests(1, "E   ImportError: no\nFAILED tests/x.py::test_y") == "broken"
    assert _of_simulation(1, "seed 3 FAILED: I1 at revision 7") == "failed"
    assert _of_simulation(1, "Traceback (most recent call last)") == "broken"
