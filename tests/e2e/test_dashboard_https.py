"""The dashboard over HTTPS in a real browser: pages live, changes need the token, plain HTTP is answered."""

import base64
import hashlib
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.browser import Page, chromium
from tests.support.harness import Harness

from dtrain.protocol.ids import Rank

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate of 127.0.0.1 by openssl, its key beside it."""
    made = tmp_path_factory.mktemp("pki") / "cert.pem"
    subprocess.run(
        [
            *(
                "openssl",
                "req",
                "-x509",
                "-newkey",
                "rsa:2048",
                "-nodes",
                "-days",
                "2",
                "-subj",
                "/CN=dashboard",
            ),
            *("-addext", "subjectAltName=IP:127.0.0.1", "-out", made, "-keyout", made.with_name("key.pem")),
        ],
        check=True,
        capture_output=True,
    )
    return made


@pytest.fixture(scope="module")
def harness(certificate: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    flags = ("--dashboard-cert", str(certificate), "--dashboard-key", str(certificate.with_name("key.pem")))
    folder = tmp_path_factory.mktemp("d")
    with Harness(folder, coordinators=1, agents=2, dashboards=True, coordinator_flags=flags) as made:
        made.await_ready()
        yield made
        made.assert_clean()


@pytest.fixture(scope="module")
def page(certificate: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """A browser that takes this certificate, and no other that nobody vouches for."""
    key = subprocess.run(
        ["openssl", "x509", "-in", certificate, "-pubkey", "-noout"], check=True, capture_output=True
    ).stdout
    der = subprocess.run(
        ["openssl", "pkey", "-pubin", "-outform", "DER"], input=key, check=True, capture_output=True
    ).stdout
    pin = base64.b64encode(hashlib.sha256(der).digest()).decode()
    flag = f"--ignore-certificate-errors-spki-list={pin}"
    with chromium(tmp_path_factory.mktemp("chromium"), flag) as made:
        yield made


def url(harness: Harness) -> str:
    return harness.cluster.dashboards["c1"].replace("http://", "https://")


def ask(harness: Harness, certificate: Path, path: str, **more: Any) -> Any:
    """Ask as a program does that trusts this certificate and looks at the name in it."""
    context = ssl.create_default_context(cafile=str(certificate))
    request = urllib.request.Request(url(harness) + path, **more)
    return urllib.request.urlopen(request, timeout=10, context=context)


def test_pages_live_over_https_and_change_something_for_the_token_only(
    harness: Harness, page: Page, certificate: Path
) -> None:
    job = harness.start("locked", "--steps 1000000 --pause-ms 20", every_steps=50)
    harness.await_training(job)
    page.open(f"{url(harness)}/jobs/{job}")
    page.until_text("RUNNING", "h1")
    page.until_text("live from c1", "#link")
    assert page.run("return location.protocol + window.isSecureContext") == "https:true"
    page.run("window.openedOnce = true")
    os.kill(harness.pids(job)[Rank(0)], signal.SIGKILL)
    page.until("attempt 2 on the page", lambda: page.text("#fact-attempt") == "2")
    page.until_text("RUNNING", "h1")
    assert page.run("return window.openedOnce"), "the page was loaded again"

    for headers in ({}, {"Authorization": "Bearer 0123456789abcdef0123"}):
        with pytest.raises(urllib.error.HTTPError) as refused:
            ask(
                harness,
                certificate,
                f"/api/jobs/{job}/cancel",
                data=b"{}",
                headers={"Content-Type": "application/json", **headers},
            )
        assert refused.value.code == 401
    before = len(harness.commits(job))
    page.click("Unlock changes")
    token = harness.cluster.dashboard_token.read_text().strip()
    page.run("document.querySelector('#token-input').value = arguments[0]", token)
    page.click("Unlock")
    page.until_text("Checkpoint now")
    page.click("Checkpoint now")
    harness.until("a checkpoint", lambda: len(harness.commits(job)) > before)
    # A log that the new attempt does not have yet is asked for in vain, over HTTP as well.
    wrong = ("ERR_", "Mixed Content", "Content Security")
    assert not [line for line in page.complaints() if any(word in line for word in wrong)]
    harness.client.set_intent(job, wanted="cancel", by="test")
    harness.assert_released(job)


def test_the_replicas_record_says_https(harness: Harness, certificate: Path) -> None:
    with ask(harness, certificate, "/api/view?page=replicas") as answer:
        assert url(harness) in json.dumps(json.load(answer))
    with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
        urllib.request.urlopen(url(harness), timeout=10)


def test_plain_http_to_that_port_is_told_to_begin_with_https(harness: Harness, certificate: Path) -> None:
    plain = url(harness).replace("https://", "http://")
    for more in ({}, {"data": b"x" * 50_000, "headers": {"Authorization": "Bearer not-a-token-of-anybody"}}):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(urllib.request.Request(f"{plain}/jobs/x", **more), timeout=10)
        assert refused.value.code == 400
        assert re.search("begin the address with https://", refused.value.read().decode())
    # Who says nothing, or nothing that is known, keeps nobody out.
    host, port = plain.removeprefix("http://").split(":")
    silent = [socket.create_connection((host, int(port))) for _ in range(20)]
    silent[0].sendall(b"\x16nonsense")
    with ask(harness, certificate, "/") as answer:
        assert answer.status == 200
    for one in silent:
        one.close()
