"""Settings of the agent."""

from pathlib import Path

import pytest

from dtrain.agent import config
from dtrain.protocol.errors import Refused


def _load(*argv: str, **environ: str) -> config.Config:
    return config.load(["--name", "node-a", *argv], {"CUDA_VISIBLE_DEVICES": "", **environ})


def test_defaults_suit_one_machine() -> None:
    found = _load(XDG_STATE_HOME="/state")
    assert found.host == "127.0.0.1"
    assert found.listen == "127.0.0.1:0"
    assert found.advertised(7071) == "127.0.0.1:7071"
    assert found.slots == 1
    assert found.data_dir == Path("/state/dtrain/default/node-a")


def test_ranks_that_are_kept_need_not_be_drained() -> None:
    assert _load().drain_grace_s == 60.0
    assert _load(DTRAIN_DRAIN_GRACE="0").drain_grace_s == 0.0
    assert _load("--keep-ranks", "yes").drain_grace_s == 0.0


def test_the_host_of_listen_is_the_host_of_the_machine() -> None:
    assert _load("--listen", "10.0.1.1:7071").host == "10.0.1.1"
    assert _load("--listen", "0.0.0.0:7071").host == "127.0.0.1"


def test_ipv6_is_bracketed() -> None:
    assert _load("--host", "fd00::1").advertised(7071) == "[fd00::1]:7071"


def test_slots_are_the_gpus_that_can_be_seen(tmp_path: Path) -> None:
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    assert config.count_gpus({}, tmp_path) == 2
    assert config.count_gpus({"CUDA_VISIBLE_DEVICES": "1"}, tmp_path) == 1
    assert config.count_gpus({"CUDA_VISIBLE_DEVICES": "-1"}, tmp_path) == 0
    assert _load("--slots", "8").slots == 8


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("0", 0), ("1500", 1500), ("200GB", 200 * 10**9), ("1.5 TiB", 3 * 2**39), ("8mb", 8 * 10**6)],
)
def test_the_cache_has_a_size_and_by_default_none(text: str, size_bytes: int) -> None:
    assert _load().cache_bytes == 0
    assert _load("--cache-size", text).cache_bytes == size_bytes
    assert _load(DTRAIN_CACHE_SIZE=text).cache_bytes == size_bytes


@pytest.mark.parametrize(
    "argv",
    [
        ("--cache-size", "much"),
        ("--cache-size", "-1"),
        ("--cache-size", "1PB"),
        ("--slots", "0"),
        ("--ttl", "3"),
        ("--orphan-grace", "1"),
        ("--listen", "7071"),
        ("--cluster", "../x"),
        ("--stop-grace", "-1"),
        ("--drain-grace", "-1"),
        ("--drain-grace", "inf"),
        ("--preemption-interval", "0"),
        ("--preemption-interval", "nan"),
    ],
)
def test_what_cannot_work_is_refused(argv: tuple[str, str]) -> None:
    with pytest.raises(Refused):
        _load(*argv)


def test_notices_are_a_list_by_commas_or_by_flags() -> None:
    assert _load().preemption_notices == ()
    assert _load(DTRAIN_PREEMPTION_NOTICE="aws, /run/preempted").preemption_notices == (
        "aws",
        "/run/preempted",
    )
    flags = ("--preemption-notice", "aws", "--preemption-notice", "gcp,azure")
    assert _load(*flags).preemption_notices == ("aws", "gcp", "azure")


def test_ranks_that_a_stop_leaves_alone_go_with_their_machine() -> None:
    found = _load("--keep-ranks", "yes", "--drain-grace", "40")
    assert (found.drain_grace_s, found.notice_grace_s) == (0.0, 40.0)
