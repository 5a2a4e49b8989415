"""Files that change under a running client, refused logins, versions with holes: with a clock of ours."""

import os
import ssl
import subprocess
from pathlib import Path
from typing import Any

import pytest

from dtrain.protocol.errors import ErrorCode, Refused
from dtrain.runtime.config import ETCD, EtcdOptions, etcd_options, parse
from dtrain.runtime.watched import COMPLAIN_EVERY_S, POLL_S, Watched, read_endpoints, read_password
from dtrain.storage.etcd.access import (
    REST_S_MAX,
    Access,
    LiveAccess,
    LoginRefused,
    Logins,
    expiry_problem,
    not_after,
)
from dtrain.storage.etcd.endpoints import Endpoints
from dtrain.storage.etcd.open import open_etcd
from dtrain.storage.etcd.versions import version_warnings


class Hand:
    """A clock, and what was reported."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.lines: list[tuple[str, dict[str, Any]]] = []

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return self.now

    def report(self, event: str, **fields: Any) -> None:
        self.lines.append((event, fields))

    def watched(self, path: Path, **settings: Any) -> Watched[str]:
        return Watched(
            "the file",
            (str(path),),
            lambda: read_password(str(path)),
            monotonic=self.monotonic,
            report=self.report,
            **settings,
        )


@pytest.fixture
def hand() -> Hand:
    return Hand()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_text("one\n")
    return path


def test_a_file_is_looked_at_once_a_second_at_most(hand: Hand, file: Path) -> None:
    watched = hand.watched(file)
    assert watched.get() == ("one", 1)
    file.write_text("two\n")
    assert watched.get() == ("one", 1)
    hand.now += POLL_S
    assert watched.get() == ("two", 2)
    assert [event for event, _ in hand.lines] == ["the file replaced"]


def test_a_touched_file_is_no_new_one(hand: Hand, file: Path) -> None:
    watched = hand.watched(file)
    watched.get()
    os.utime(file, (1, 1))
    hand.now += POLL_S
    assert watched.get() == ("one", 1)
    file.with_name("copy").write_text("one\n")
    file.with_name("copy").replace(file)
    hand.now += POLL_S
    assert watched.get() == ("one", 1)
    assert not hand.lines


def test_a_file_behind_a_link_that_is_switched_is_read_anew(hand: Hand, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "password").write_text(name)
    (tmp_path / "data").symlink_to("one")
    watched = hand.watched(tmp_path / "data" / "password")
    assert watched.get()[0] == "one"
    (tmp_path / "new").symlink_to("two")
    (tmp_path / "new").replace(tmp_path / "data")
    hand.now += POLL_S
    assert watched.get()[0] == "two"


def test_what_cannot_be_used_changes_nothing_and_is_told_once_a_minute(hand: Hand, file: Path) -> None:
    watched = hand.watched(file)
    watched.get()
    file.unlink()
    for _ in range(int(COMPLAIN_EVERY_S)):
        hand.now += POLL_S
        assert watched.get() == ("one", 1)
    assert [event for event, _ in hand.lines] == ["the file not usable"]
    assert watched.problem
    hand.now += POLL_S
    watched.get()
    assert len(hand.lines) == 2
    file.write_text("")
    hand.now += POLL_S
    assert watched.get() == ("one", 1)
    file.write_text("two")
    hand.now += POLL_S
    assert watched.get() == ("two", 2)
    assert watched.problem == ""


def test_without_a_good_value_the_error_comes_out_until_there_is_one(hand: Hand, tmp_path: Path) -> None:
    watched = hand.watched(tmp_path / "none")
    for _ in range(2):
        with pytest.raises(OSError, match="No such file"):
            watched.get()
    (tmp_path / "none").write_text("now")
    hand.now += POLL_S
    assert watched.get() == ("now", 1)


def test_the_value_at_the_start_stands_in_for_a_file_that_is_away(hand: Hand, file: Path) -> None:
    content = file.read_text()
    file.unlink()
    watched = hand.watched(file, initial="one")
    assert watched.get() == ("one", 1)
    file.write_text(content)
    hand.now += POLL_S
    assert watched.get() == ("one", 1)


def test_lists_of_members_are_read_with_commas_lines_and_comments(file: Path) -> None:
    file.write_text("# members\nhttp://a:1, http://b:2 # two\n\nhttps://c:3\nhttp://a:1\n")
    assert read_endpoints(str(file)) == ("http://a:1", "http://b:2", "https://c:3")


@pytest.mark.parametrize("content", [b"", b"# x\n", b",,\n", b"\xff\xfe\x00"])
def test_a_list_without_members_is_refused(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    with pytest.raises(ValueError, match="file"):
        read_endpoints(str(file))


def test_a_huge_file_is_refused_unread(file: Path) -> None:
    with file.open("wb") as out:
        out.truncate(3 * 1024 * 1024)
    with pytest.raises(ValueError, match="larger"):
        read_password(str(file))


def test_a_password_that_is_no_text_is_not_quoted(file: Path) -> None:
    file.write_bytes(b"hush\xff\xfe")
    with pytest.raises(ValueError, match="no text") as caught:
        read_password(str(file))
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


# Logins ------------------------------------------------------------------------------------


def test_refused_logins_rest_longer_and_longer_and_a_new_password_is_tried_at_once(hand: Hand) -> None:
    logins = Logins("u", hand.monotonic, hand.report)
    tried = 0
    for _ in range(600):
        hand.now += 0.1
        try:
            logins.check(1)
        except LoginRefused:
            continue
        tried += 1
        logins.refused(1, "authentication failed")
    assert 6 <= tried <= 18
    assert [event for event, _ in hand.lines] == ["etcd refuses the login"]
    assert logins.problem
    logins.check(2)
    logins.refused(2, "authentication failed")
    with pytest.raises(LoginRefused):
        logins.check(2)
    hand.now += REST_S_MAX
    logins.check(2)
    logins.accepted()
    assert logins.problem == ""
    assert hand.lines[-1][0] == "etcd accepts the login again"
    logins.check(2)


def test_logins_after_a_loss_are_spread_within_what_the_call_may_take(hand: Hand) -> None:
    logins = Logins("u", hand.monotonic, hand.report)
    long = [logins.spread_s(5.0) for _ in range(300)]
    assert min(long) < 0.1
    assert 0.9 < max(long) <= 1.0
    assert max(logins.spread_s(0.8) for _ in range(300)) <= 0.2


# Certificates ------------------------------------------------------------------------------


def test_the_end_of_a_certificate_is_read_from_the_file(tmp_path: Path) -> None:
    path = tmp_path / "c.pem"
    for days in ("3", "30000"):
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
             "-keyout", str(tmp_path / "k.pem"), "-out", str(path), "-days", days, "-subj", "/O=x"],
            check=True, capture_output=True,
        )  # fmt: skip
        said = subprocess.run(
            ["openssl", "x509", "-in", str(path), "-noout", "-enddate"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        ends = ssl.cert_time_to_seconds(said.strip().split("=")[1])
        assert not_after(ssl.PEM_cert_to_DER_cert(path.read_text())) == ends
        assert "days or less" in expiry_problem(str(path), ends - 86400.0)
        assert "has expired" in expiry_problem(str(path), ends + 1.0)
        assert expiry_problem(str(path), ends - 30 * 86400.0) == ""


def test_a_certificate_that_ends_soon_is_told_once_a_day(hand: Hand, tmp_path: Path) -> None:
    cert, key = tmp_path / "c.pem", tmp_path / "k.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
         "-keyout", str(key), "-out", str(cert), "-days", "3", "-subj", "/O=x"],
        check=True, capture_output=True,
    )  # fmt: skip
    access = LiveAccess(Access(("https://a:1",), str(cert), str(cert), str(key)), hand.monotonic, hand.report)
    for _ in range(3):
        access.context()
        hand.now += 3600
    assert [event for event, _ in hand.lines] == ["certificate for etcd"]
    hand.now += 86400
    access.context()
    assert len(hand.lines) == 2


@pytest.mark.parametrize(
    "text", ["", "nothing", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----"]
)
def test_what_is_no_certificate_has_no_end(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.pem").write_text(text)
    assert expiry_problem(str(tmp_path / "c.pem"), 0.0) == ""


# Members -----------------------------------------------------------------------------------


def test_a_list_that_changes_keeps_the_member_in_use() -> None:
    import random

    endpoints = Endpoints(["http://a:1", "http://b:2"], Hand(), random.Random(1))
    current = endpoints.in_order()[0]
    other = endpoints.in_order()[1]
    assert endpoints.replace([str(current), "http://c:3"]) == (other,)
    assert endpoints.in_order()[0] == current
    endpoints.failed(other)
    endpoints.worked(other)
    assert endpoints.in_order()[0] == current
    assert endpoints.replace(["http://d:4"]) != ()
    assert [str(one) for one in endpoints.in_order()] == ["http://d:4"]
    assert current not in endpoints


def test_another_cluster_is_known_by_its_number(hand: Hand) -> None:
    access = LiveAccess(Access(("http://a:1",)), hand.monotonic, hand.report)
    assert [access.is_foreign(number) for number in (0, 7, 7, 0, 8, 7)] == [
        False,
        False,
        False,
        False,
        True,
        False,
    ]


# Settings and secrets ----------------------------------------------------------------------


def options(argv: list[str], environ: dict[str, str]) -> EtcdOptions:
    return etcd_options(parse("t", "", ETCD, argv, environ))


def test_files_named_in_settings_are_read_and_remembered(file: Path, tmp_path: Path) -> None:
    members = tmp_path / "members"
    members.write_text("http://a:1\nhttp://b:2\n")
    found = options(
        ["--user", "u"], {"DTRAIN_ENDPOINTS_FILE": str(members), "DTRAIN_PASSWORD_FILE": str(file)}
    )
    assert found.endpoints == ("http://a:1", "http://b:2")
    assert (found.password, found.password_file, found.endpoints_file) == ("one", str(file), str(members))


def test_a_file_that_is_not_there_is_a_bad_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dtrain.runtime.config.READ_TRIES_S", 0.05)
    for name in ("endpoints-file", "password-file"):
        with pytest.raises(Refused, match=name) as caught:
            options([f"--{name}", "/nowhere/file"], {})
        assert caught.value.code is ErrorCode.BAD_SETTING


def test_a_password_on_the_command_line_is_refused_and_not_repeated() -> None:
    with pytest.raises(Refused) as caught:
        options(["--user", "u:hush"], {})
    assert "hush" not in str(caught.value) + caught.value.fix
    assert options([], {"ETCDCTL_USER": "u:hush"}).password == "hush"


def test_no_repr_shows_a_password(hand: Hand) -> None:
    shown = repr(Access(("http://a:1",), user="u", password="hush"))
    shown += repr(LiveAccess(Access(("http://a:1",), user="u", password="hush"), hand.monotonic, hand.report))
    found = EtcdOptions(("http://a:1",), user="u", password="hush")
    etcd = open_etcd(found)
    etcd.close()
    assert "hush" not in shown + repr(found) + repr(etcd) + str(etcd.problems())


# Versions ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "auth", "words"),
    [
        ("3.4.23", False, ["line has ended"]),
        ("3.4.23", True, ["line has ended", "CVE-2026-33413"]),
        ("3.5.1", False, ["lose or mix up"]),
        ("3.5.1", True, ["lose or mix up", "CVE-2026-33413"]),
        ("3.5.16", False, []),
        ("3.5.16", True, ["GHSA-xg4h-6gfc-h4m8"]),
        ("3.5.32", True, ["CVE-2026-33343"]),
        ("3.5.33", True, []),
        ("3.6.13", True, ["CVE-2026-33343"]),
        ("3.6.14", True, []),
        ("3.7.0", True, ["CVE-2026-33343"]),
        ("3.7.0-rc.1", True, ["CVE-2026-33343"]),
        ("3.7.1", True, []),
        ("3.8.0", True, []),
        ("4.0.0", True, []),
        ("", True, []),
        ("nonsense", True, []),
    ],
)
def test_versions_with_known_holes_are_warned_of(version: str, auth: bool, words: list[str]) -> None:
    found = version_warnings(version, auth)
    assert len(found) == len(words)
    for word, text in zip(words, found, strict=True):
        assert word in text
        assert version in text
