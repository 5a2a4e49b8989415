"""Who may see and change what on the dashboard."""

from pathlib import Path

import pytest
from starlette.datastructures import Headers

from dtrain.coordinator.web import gate
from dtrain.coordinator.web.gate import Denied, Token
from dtrain.coordinator.web.settings import DashboardSettings
from dtrain.protocol.errors import DtrainError

TOKEN = "0123456789abcdef0123"


def bearer(token: str) -> Headers:
    return Headers({"authorization": f"Bearer {token}"})


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text(TOKEN + "\n")
    return path


def test_the_right_token_is_let_in_and_no_other(token_file: Path) -> None:
    token = Token(str(token_file))
    token.check(bearer(TOKEN))
    for headers in (
        bearer(TOKEN + "x"),
        bearer(""),
        Headers({}),
        Headers({"authorization": f"Basic {TOKEN}"}),
    ):
        with pytest.raises(Denied) as refused:
            token.check(headers)
        assert refused.value.status == 401


def test_without_a_token_nobody_changes_anything() -> None:
    with pytest.raises(Denied) as refused:
        Token("").check(bearer(TOKEN))
    assert refused.value.status == 403
    assert "read-only" in refused.value.message


def test_a_replaced_token_counts_at_once_and_a_removed_one_lets_nobody_in(token_file: Path) -> None:
    token = Token(str(token_file))
    token.check(bearer(TOKEN))
    token_file.write_text("another-token-of-enough-characters")
    with pytest.raises(Denied):
        token.check(bearer(TOKEN))
    token.check(bearer("another-token-of-enough-characters"))
    token_file.unlink()
    with pytest.raises(Denied) as refused:
        token.check(bearer("another-token-of-enough-characters"))
    assert refused.value.status == 403


def test_guessing_is_stopped_even_for_the_right_guess_and_forgiven_later(token_file: Path) -> None:
    now = [100.0]
    token = Token(str(token_file), monotonic=lambda: now[0])
    for _ in range(gate.FAILURES_MAX):
        with pytest.raises(Denied) as refused:
            token.check(bearer("wrong" * 5))
        assert refused.value.status == 401
    with pytest.raises(Denied) as refused:
        token.check(bearer(TOKEN))
    assert refused.value.status == 429
    now[0] += gate.FAILURES_S + 0.1
    token.check(bearer(TOKEN))


@pytest.mark.parametrize(
    ("header", "known"),
    [
        ("127.0.0.1:7090", True),
        ("[::1]:7090", True),
        ("localhost", True),
        ("LOCALHOST:7090", True),
        ("train.example.org", True),
        ("evil.example.org:7090", False),
        ("127.0.0.1.evil.example.org", False),
        ("", False),
    ],
)
def test_only_names_of_ours_and_addresses_are_answered(header: str, known: bool) -> None:
    names = gate.known_names(DashboardSettings("127.0.0.1:7090", hosts=("train.example.org",)))
    assert gate.is_known_host(header, names) is known


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"listen": "nowhere"}, "host:port"),
        ({"listen": "127.0.0.1:7090", "cert": "/etc/hostname"}, "both"),
        ({"listen": "127.0.0.1:7090", "token_file": "/nowhere/token"}, "can read"),
        ({"listen": "0.0.0.0:7090", "secured": True}, "dashboard-token-file"),
        ({"listen": "[::]:7090", "secured": True}, "dashboard-token-file"),
    ],
)
def test_settings_that_cannot_be_are_refused_with_what_to_do(settings: dict[str, str], says: str) -> None:
    with pytest.raises(DtrainError) as refused:
        DashboardSettings(**settings)  # type: ignore[arg-type]
    assert says in refused.value.fix


def test_a_token_that_could_be_guessed_is_refused(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("short\n")
    with pytest.raises(DtrainError) as refused:
        DashboardSettings("127.0.0.1:7090", str(tmp_path / "token"))
    assert "openssl rand" in refused.value.fix


def test_beyond_loopback_a_cluster_with_tls_shows_nothing_without_the_token(token_file: Path) -> None:
    assert DashboardSettings("0.0.0.0:7090", str(token_file), secured=True).reading_needs_token
    assert not DashboardSettings("0.0.0.0:7090", str(token_file)).reading_needs_token
    assert not DashboardSettings("127.0.0.1:7090", secured=True).reading_needs_token


def test_the_address_that_others_are_told_is_one_that_can_be_called() -> None:
    assert DashboardSettings("0.0.0.0:7090").url("10.0.0.7") == "http://10.0.0.7:7090"
    assert DashboardSettings("[::]:7090").url("fd00::7") == "http://[fd00::7]:7090"
    assert DashboardSettings("127.0.0.1:7090").url("10.0.0.7") == "http://127.0.0.1:7090"
    assert DashboardSettings("127.0.0.1:0").url("10.0.0.7") == ""
