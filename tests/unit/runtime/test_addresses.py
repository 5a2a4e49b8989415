"""What a daemon says it can be reached at."""

import pytest

from dtrain.coordinator import config
from dtrain.protocol.errors import Refused
from dtrain.runtime.addresses import bracketed, is_wildcard, towards


def test_the_address_towards_etcd_is_one_of_this_machine() -> None:
    assert towards(("http://127.0.0.1:2379",), "--host") == "127.0.0.1"
    assert towards(("http://no.such.host.invalid:1", "127.0.0.1:2379"), "--host") == "127.0.0.1"


def test_without_a_route_the_setting_is_asked_for() -> None:
    with pytest.raises(Refused) as caught:
        towards(("http://no.such.host.invalid:2379",), "--advertise")
    assert "--advertise" in caught.value.fix


def test_wildcards_are_known() -> None:
    assert is_wildcard("0.0.0.0:7070")
    assert is_wildcard("[::]:7070")
    assert not is_wildcard("10.0.0.1:7070")
    assert bracketed("fd00::1") == "[fd00::1]"


@pytest.mark.parametrize(
    ("argv", "address"),
    [
        (("--listen", "0.0.0.0:0"), "127.0.0.1:41"),
        (("--listen", "[::]:0"), "127.0.0.1:41"),
        (("--listen", "0.0.0.0:0", "--endpoints", "http://[::1]:2379"), "[::1]:41"),
        (("--listen", "0.0.0.0:0", "--advertise", "c1.example:7070"), "c1.example:7070"),
        (("--listen", "10.0.0.1:0"), "10.0.0.1:41"),
    ],
)
def test_a_coordinator_advertises_what_others_can_call(argv: tuple[str, ...], address: str) -> None:
    settings = config.load(argv, {})
    listen = settings.listen.rpartition(":")[0]
    assert settings.advertised(f"{listen}:41") == address


def test_an_address_for_probes_must_be_one() -> None:
    assert config.load((), {}).health_listen == ""
    assert config.load((), {"DTRAIN_HEALTH_LISTEN": "0.0.0.0:7080"}).health_listen == "0.0.0.0:7080"
    with pytest.raises(Refused, match="--health-listen"):
        config.load(("--health-listen", "7080"), {})
