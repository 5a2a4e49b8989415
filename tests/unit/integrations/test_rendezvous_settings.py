"""What --rdzv-conf may say, and the records of a run."""

import pytest

from dtrain.integrations.rendezvous.core import RunState
from dtrain.integrations.rendezvous.records import decode, encode, keys_of
from dtrain.integrations.rendezvous.settings import parse
from dtrain.protocol.errors import ErrorCode, Refused


def read(endpoint="h:2379", environ=None, **conf):
    return parse(endpoint, conf, environ or {})


def test_defaults():
    settings = read()
    assert settings.etcd.endpoints == ("http://h:2379",)
    assert (settings.ttl, settings.join_timeout, settings.last_call_timeout) == (10, 600.0, 30.0)


def test_several_endpoints():
    assert read("a:1,http://b:2, c:3").etcd.endpoints == ("http://a:1", "http://b:2", "http://c:3")


def test_torchs_names_are_understood():
    settings = read(ca_cert="ca.pem", ssl_cert="c.pem", ssl_cert_key="k.pem", timeout="7", is_host="0")
    assert settings.etcd.endpoints == ("https://h:2379",)
    assert (settings.etcd.cacert, settings.etcd.cert, settings.etcd.key) == ("ca.pem", "c.pem", "k.pem")
    assert settings.join_timeout == 7.0


def test_heartbeats_of_torch_make_a_lease():
    assert read(keep_alive_interval="2", keep_alive_max_attempt="4").ttl == 8


def test_etcdctls_variables_are_honoured():
    env = {"ETCDCTL_ENDPOINTS": "http://x:1", "ETCDCTL_USER": "u:secret", "ETCDCTL_CACERT": "ca"}
    settings = read("", env)
    assert settings.etcd.endpoints == ("http://x:1",)
    assert (settings.etcd.user, settings.etcd.password, settings.etcd.cacert) == ("u", "secret", "ca")
    assert "secret" not in repr(settings)


def test_a_ca_means_tls_unless_the_endpoint_says_otherwise():
    env = {"ETCDCTL_CACERT": "ca"}
    assert read("h:1", env).etcd.endpoints == ("https://h:1",)
    assert read("http://h:1", env).etcd.endpoints == ("http://h:1",)
    assert read("h:1", env, protocol="http").etcd.endpoints == ("http://h:1",)


def test_the_flag_comes_before_the_environment():
    env = {"ETCDCTL_ENDPOINTS": "http://x:1", "ETCDCTL_USER": "u:secret"}
    settings = read("h:1", env, user="w")
    assert settings.etcd.endpoints == ("http://h:1",)
    assert settings.etcd.user == "w"


@pytest.mark.parametrize(
    ("conf", "says"),
    [
        ({"ttll": "3"}, "did you mean ttl"),
        ({"ttl": "1"}, "shortest lease"),
        ({"ttl": "x"}, "positive number"),
        ({"ttl": "4", "keep_alive_interval": "3"}, "more than half"),
        ({"join_timeout": "-1"}, "positive number"),
        ({"join_timeout": "inf"}, "positive number"),
        ({"protocol": "ftp"}, "http or https"),
        ({"prefix": "/"}, "must be a path"),
        ({"user": "me:secret"}, "password"),
        ({"password_file": "/does/not/exist"}, "password-file"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(conf, says):
    with pytest.raises(ValueError, match=says):
        read(**conf)


@pytest.mark.parametrize("endpoint", ["http://h:2379/path", "h:port"])
def test_a_wrong_endpoint_is_refused(endpoint):
    from dtrain.storage.etcd.open import open_etcd

    with pytest.raises((ValueError, Refused), match="endpoint"):
        open_etcd(read(endpoint).etcd)


def test_runs_do_not_meet_in_etcd():
    assert keys_of("/p/", "a").state == "/p/a/state"
    assert not keys_of("/p", "ab").state.startswith(keys_of("/p", "a").prefix)
    assert "/" not in keys_of("/p", "a/b é").prefix.removeprefix("/p/").removesuffix("/")
    assert keys_of("/p", "a/b é").state.isascii()


def test_a_state_survives_etcd():
    state = RunState(3, True, False, ("a",), ("a", "b"), ("c",), ("d",), "h:1")
    assert decode(encode(state)) == state


def test_fields_of_a_later_release_are_left_out():
    assert decode(encode(RunState())[:-1] + b',"more":1}') == RunState()


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"[]",
        b'{"v":2}',
        b"\x80\x04N.",
        encode(RunState()).replace(b'"round":0', b'"round":"0"'),
        encode(RunState(complete=True, participants=("a",))),
    ],
)
def test_a_damaged_state_is_refused(value):
    with pytest.raises(Refused) as caught:
        decode(value)
    assert caught.value.code is ErrorCode.BAD_RECORD
    assert caught.value.fix


def test_a_state_that_etcd_would_not_take_is_refused():
    with pytest.raises(Refused, match="bytes"):
        encode(RunState(participants=tuple(f"{'x' * 60}{n}" for n in range(20_000))))
