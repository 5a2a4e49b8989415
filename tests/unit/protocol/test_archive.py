"""Bundles of the archive: what is packed is what is read, and nothing else is taken for it."""

import pytest

from dtrain.protocol import archive
from dtrain.protocol.archive import Mark, Part
from dtrain.protocol.errors import ErrorCode, Refused
from dtrain.protocol.ids import AgentName, Attempt, ClusterName, JobName, Rank, Uid

PARTS = (
    Part("3/stdout", 100, b"two\nlines\n", (Mark(105, 1000), Mark(110, 2000))),
    Part("3/stderr", 0, bytes(range(256))),
)


def test_a_bundle_returns_what_was_packed() -> None:
    assert archive.unpack(archive.pack(PARTS)) == PARTS


def test_the_same_parts_are_the_same_bytes() -> None:
    assert archive.pack(PARTS) == archive.pack(PARTS)


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.9])
def test_a_bundle_that_was_cut_off_is_refused(keep: float) -> None:
    data = archive.pack(PARTS)
    cut = data[: int(keep if keep == 0 or keep > 1 else keep * len(data))]
    with pytest.raises(Refused) as caught:
        archive.unpack(cut)
    assert caught.value.code is ErrorCode.BAD_RECORD


def test_a_bundle_of_another_version_is_refused() -> None:
    import gzip

    with pytest.raises(Refused, match="version"):
        archive.unpack(gzip.compress(b'{"v":2,"parts":[]}\n'))


def test_keys_say_whose_logs_a_bundle_holds() -> None:
    prefix = archive.logs_prefix(ClusterName("c"), JobName("j"), Uid("u"))
    key = archive.bundle_key(
        prefix, Attempt(2), AgentName("gpu-01"), first=Rank(8), last=Rank(15), number=3, nonce="ab12"
    )
    found = archive.parse_bundle_key(prefix, key)
    assert found is not None
    assert (found.attempt, found.agent, found.first, found.last, found.number) == (2, "gpu-01", 8, 15, 3)
    assert archive.parse_bundle_key(prefix, key + ".tmp") is None
    assert archive.parse_bundle_key("c/_archive/logs/other/u/", key) is None


def test_no_job_can_have_the_archives_name() -> None:
    from dtrain.protocol.ids import is_name

    assert not is_name(archive.archive_root(ClusterName("c")).split("/")[1])


def test_thinned_marks_keep_the_last_one() -> None:
    marks = tuple(Mark(n, n) for n in range(1000))
    kept = archive.thinned(marks, 100)
    assert len(kept) <= 100
    assert kept[-1] == marks[-1]


def test_a_line_of_times_that_was_cut_off_is_left_out() -> None:
    assert archive.marks_from("5 100\n9 200\n1") == (Mark(5, 100), Mark(9, 200))
