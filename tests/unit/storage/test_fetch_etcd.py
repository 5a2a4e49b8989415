import os
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[3] / "deploy" / "etcd" / "fetch-etcd.sh"


def fetch(*arguments: str, **env: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["/bin/sh", str(SCRIPT), *arguments],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | env,
        timeout=60,
    )


def one_sentence(done: "subprocess.CompletedProcess[str]") -> str:
    assert done.returncode != 0
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_without_apt_it_says_what_to_do(tmp_path: Path) -> None:
    assert "apt-get is not here" in one_sentence(fetch(str(tmp_path / "x"), PATH=str(tmp_path)))


def test_without_a_debian_mirror_it_says_so(tmp_path: Path) -> None:
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list").write_text("deb http://archive.example/ubuntu jammy main\n")
    said = one_sentence(fetch(str(tmp_path / "x"), FETCH_ETCD_SOURCES=str(tmp_path)))
    assert "no Debian archive is configured" in said


def test_a_mirror_that_fails_is_named(tmp_path: Path) -> None:
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "key").write_text("")
    for form in (
        f"deb [arch=amd64 signed-by={tmp_path}/key] http://127.0.0.1:1/debian bookworm main\n",
        f"Types: deb\n# a comment\nURIs: http://127.0.0.1:1/debian\nSuites: bookworm\n"
        "Components: main contrib\n"
        f"Signed-By: {tmp_path}/key\n",
    ):
        name = "sources.list" if form.startswith("deb ") else "sources.list.d/debian.sources"
        (tmp_path / name).write_text(form)
        said = one_sentence(fetch(str(tmp_path / "x"), FETCH_ETCD_SOURCES=str(tmp_path)))
        assert "the mirror http://127.0.0.1:1/debian did not serve suite trixie" in said
        (tmp_path / name).unlink()


def test_a_suite_is_a_name(tmp_path: Path) -> None:
    assert "is not the name of a Debian suite" in one_sentence(fetch(str(tmp_path / "x"), "tri/../xie"))


def test_an_unpacked_etcd_is_left_alone(tmp_path: Path) -> None:
    etcd = tmp_path / "usr" / "bin" / "etcd"
    etcd.parent.mkdir(parents=True)
    etcd.write_text("#!/bin/sh\n")
    etcd.chmod(0o755)
    assert fetch(str(tmp_path), PATH="/usr/bin:/bin").returncode == 0
    assert etcd.read_text() == "#!/bin/sh\n"
