"""``dtrain logs``: which lines, of whom, in which form."""

import json

import pytest
from tests.unit.cli.fakes import FakeReplica, running_job

from dtrain.cli.main import run


def shown(address: str, capfd: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    code = run(["logs", "digits", "--coordinators", address, *args])
    told = capfd.readouterr()
    return code, told.out, told.err


@pytest.fixture(autouse=True)
def job(replica: FakeReplica) -> None:
    replica.items = running_job()  # type: ignore[assignment]
    for rank in (0, 1):
        replica.logs |= {
            (3, rank, "stdout"): f"rank {rank} loss=1\nrank {rank} fine\n".encode(),
            (3, rank, "stderr"): b"",
        }


def test_lines_that_a_pattern_is_found_in(address: str, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = shown(address, capfd, "--grep", "loss=", "--rank", "0,1")
    assert (code, out) == (0, "a1/0 | rank 0 loss=1\na1/1 | rank 1 loss=1\n")


def test_an_object_a_line_for_programs(address: str, capfd: pytest.CaptureFixture[str]) -> None:
    _, out, _ = shown(address, capfd, "-o", "json", "--tail", "1")
    line = json.loads(out)
    assert (line["job"], line["attempt"], line["rank"], line["line"]) == ("digits", 3, 0, "rank 0 fine")


def test_what_cannot_be_meant_is_refused(address: str, capfd: pytest.CaptureFixture[str]) -> None:
    for args in (
        ("--since", "yesterday"),
        ("--grep", "("),
        ("--previous", "--attempt", "1"),
        ("-f", "--previous"),
        ("--rank", "one"),
    ):
        assert shown(address, capfd, *args)[0] == 2, args


def test_a_machine_that_had_no_rank_is_not_found(address: str, capfd: pytest.CaptureFixture[str]) -> None:
    code, _, err = shown(address, capfd, "--agent", "gpu-99")
    assert code == 4
    assert "gpu-99" in err


def test_a_replica_of_an_earlier_release_has_no_former_machines(
    address: str, capfd: pytest.CaptureFixture[str]
) -> None:
    code, _, err = shown(address, capfd, "--previous")
    assert code == 4
    assert "earlier release" in err
