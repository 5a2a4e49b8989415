"""The certificates that ``deploy/etcd/make-certs.sh`` makes."""

import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[3] / "deploy" / "etcd" / "make-certs.sh"


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([str(SCRIPT), *arguments], capture_output=True, text=True, timeout=60, check=False)


def make(folder: Path, *arguments: str) -> str:
    done = run(str(folder), *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def openssl(*arguments: str) -> str:
    return subprocess.run(["openssl", *arguments], capture_output=True, text=True, check=True).stdout


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def pki(tmp_path: Path) -> Path:
    make(
        tmp_path / "pki",
        "--cluster",
        "prod",
        "etcd:e1=10.0.0.1",
        "coordinator:c1=c1.example",
        "agent:a1",
        "reader:b@x.y",
    )
    return tmp_path / "pki"


def test_certificates_say_who_their_holder_is(pki: Path) -> None:
    def names(path: str) -> str:
        return openssl("x509", "-in", str(pki / path), "-noout", "-ext", "subjectAltName")

    assert "URI:dtrain://prod/agent/a1, DNS:a1.agent.prod.dtrain" in names("agent/a1/grpc.crt")
    found = names("coordinator/c1/grpc.crt")
    assert "URI:dtrain://prod/coordinator/c1, DNS:coordinator.prod.dtrain, DNS:c1.example" in found
    assert "URI:dtrain://prod/reader/b@x.y" in names("reader/b@x.y/grpc.crt")
    assert "DNS:e1, IP Address:10.0.0.1" in names("etcd/e1/server.crt")


def test_no_certificate_carries_a_common_name(pki: Path) -> None:
    leaves = [
        path for path in pki.rglob("*.crt") if path.parent.name != "ca" and not path.stem.endswith("-ca")
    ]
    assert len(leaves) == 8
    for leaf in leaves:
        assert "CN" not in openssl("x509", "-in", str(leaf), "-noout", "-subject")


def test_each_is_signed_by_the_authority_of_its_use_and_no_other(pki: Path) -> None:
    uses = {
        "etcd-client": ["agent/a1/etcd.crt", "etcd/e1/server.crt"],
        "etcd-peer": ["etcd/e1/peer.crt"],
        "grpc": ["agent/a1/grpc.crt", "coordinator/c1/grpc.crt"],
    }
    for use, leaves in uses.items():
        for authority in uses:
            for leaf in leaves:
                done = subprocess.run(
                    ["openssl", "verify", "-CAfile", str(pki / "ca" / f"{authority}.crt"), str(pki / leaf)],
                    capture_output=True,
                    check=False,
                )
                assert (done.returncode == 0) == (use == authority), (leaf, authority)


def test_keys_are_readable_by_their_owner_alone(pki: Path) -> None:
    keys = list(pki.rglob("*.key"))
    assert len(keys) == 11
    assert {path.stat().st_mode & 0o777 for path in keys} == {0o600}


def test_a_second_run_changes_nothing_and_adds_what_is_missing(pki: Path) -> None:
    before = files(pki)
    make(pki, "etcd:e1=10.0.0.1", "coordinator:c1", "agent:a1")
    assert files(pki) == before
    make(pki, "agent:a2")
    after = files(pki)
    assert {name: after[name] for name in before} == before
    assert "agent/a2/grpc.crt" in after
    make(pki, "coordinator:c1=elsewhere.example")
    assert files(pki)["coordinator/c1/grpc.crt"] != before["coordinator/c1/grpc.crt"]


def test_renewal_gives_new_keys_under_the_same_authorities(pki: Path) -> None:
    before = files(pki)
    make(pki, "renew", "--within", "30")
    assert files(pki) == before
    make(pki, "renew", "--days", "20", "agent:a1")
    after = files(pki)
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {f"agent/a1/{use}.{kind}" for use in ("etcd", "grpc") for kind in ("crt", "key")}
    assert "renewed agent:a1" in make(pki, "renew", "--within", "30")
    assert make(pki, "list").count("until") == 8


def test_authorities_are_replaced_in_steps_that_never_break_trust(pki: Path) -> None:
    def trusted(leaf: bytes) -> bool:
        path = pki / "leaf"
        path.write_bytes(leaf)
        bundle = pki / "agent" / "a1" / "grpc-ca.crt"
        command = ["openssl", "verify", "-CAfile", str(bundle), str(path)]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    former = (pki / "agent" / "a1" / "grpc.crt").read_bytes()
    make(pki, "new-ca")
    assert trusted(former)
    make(pki, "renew")
    fresh = (pki / "agent" / "a1" / "grpc.crt").read_bytes()
    assert fresh != former
    assert trusted(former)
    assert trusted(fresh)
    make(pki, "drop-ca")
    assert trusted(fresh)
    assert not trusted(former)


@pytest.mark.parametrize(
    "holder",
    [
        "agent:../x",
        "agent:A",
        "agent:",
        "agent",
        "boss:x",
        "agent:-a",
        "agent:a=x;rm",
        "reader:.x",
        "agent:a\nb",
    ],
)
def test_what_is_no_holder_is_refused_before_anything_is_made(tmp_path: Path, holder: str) -> None:
    done = run(str(tmp_path / "pki"), "agent:good", holder)
    assert done.returncode != 0
    assert not (tmp_path / "pki").exists()


def test_a_folder_belongs_to_one_cluster(pki: Path) -> None:
    done = run(str(pki), "--cluster", "other", "agent:a1")
    assert (done.returncode, "belongs to the cluster prod" in done.stderr) == (1, True)
