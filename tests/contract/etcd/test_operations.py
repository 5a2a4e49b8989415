"""What operators do to etcd by deploy/etcd's scripts: save it, restore it, look after it."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.contract.etcd.members import backup, etcdctl, leader_of, restore, script, status
from tests.contract.etcd.secured import Users, server_tls
from tests.contract.etcd.support import binary

from dtrain.local.etcd import EtcdCluster
from dtrain.protocol.ids import RESTORE_BUMP_LEAST
from dtrain.storage.etcd.port import Etcd, Put, Txn
from dtrain.storage.etcd.transport import GatewayEtcd

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdCluster]:
    folder = tmp_path_factory.mktemp("ops")
    with EtcdCluster(folder, size=3, binary=binary("3.5"), fsync=False) as cluster:
        yield cluster


def fill(etcd: Etcd, keys: int, size: int = 100) -> int:
    revision = 0
    for number in range(keys):
        revision = etcd.txn(Txn((), (Put(f"/ops/{number % 50}", b"x" * size),))).revision
    return revision


def meta(snapshot: Path) -> dict[str, str]:
    lines = snapshot.with_suffix(".meta").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines)


# Backup


def test_a_backup_is_whole_and_says_what_it_is_of(three: EtcdCluster, tmp_path: Path) -> None:
    revision = fill(GatewayEtcd(three.endpoints), 5)
    saved = backup(three, tmp_path)
    facts = meta(saved)
    assert int(facts["revision"]) >= revision
    assert saved.name.endswith(f"-r{facts['revision']}.db")
    assert int(facts["cluster_id"], 16) == status(three, 0)["header"]["cluster_id"]
    assert facts["etcd"] == ".".join(map(str, three.binary.version))
    assert int(facts["bytes"]) == saved.stat().st_size
    assert facts["member"] != three.endpoints[leader_of(three)], "a follower has less to do"
    assert saved.stat().st_mode & 0o077 == 0, "it holds all that etcd holds"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_the_newest_backups_are_kept_and_nothing_else_is_touched(three: EtcdCluster, tmp_path: Path) -> None:
    for hour in range(5):
        for end in ("db", "meta"):
            (tmp_path / f"etcd-20200101T0{hour}0000Z-r{hour}.{end}").touch()
    (tmp_path / "etcd-mine.db").touch()
    done = script(three, "backup.sh", "--keep", "3", str(tmp_path))
    assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in tmp_path.glob("etcd-*T*Z-r*.db"))
    assert len(names) == 3
    assert names[:2] == ["etcd-20200101T030000Z-r3.db", "etcd-20200101T040000Z-r4.db"]
    assert len(list(tmp_path.glob("*.meta"))) == 3
    assert (tmp_path / "etcd-mine.db").exists()


def test_a_backup_without_a_healthy_member_fails_and_deletes_nothing(
    three: EtcdCluster, tmp_path: Path
) -> None:
    old = tmp_path / "etcd-20200101T000000Z-r1.db"
    old.touch()
    env = {"ETCDCTL_ENDPOINTS": "127.0.0.1:1"}
    done = script(three, "backup.sh", "--keep", "1", str(tmp_path), env=env)
    assert done.returncode == 3
    assert "healthy" in done.stderr
    assert list(tmp_path.iterdir()) == [old]


def test_a_backup_that_was_cut_off_is_not_kept(three: EtcdCluster, tmp_path: Path) -> None:
    liar = tmp_path / "etcdctl"
    real = three.binary.etcdctl
    liar.write_text(
        f'#!/bin/sh\n{real} "$@" || exit\nif [ "$2" = save ]; then truncate -s -100 "$3"; fi\n', "utf-8"
    )
    liar.chmod(0o755)
    folder = tmp_path / "backups"
    done = script(three, "backup.sh", str(folder), env={"ETCDCTL": str(liar)})
    assert done.returncode == 4
    assert not list(folder.iterdir())


def test_wrong_words_are_told_from_failures(three: EtcdCluster, tmp_path: Path) -> None:
    assert script(three, "backup.sh").returncode == 2
    assert script(three, "backup.sh", "--keep", "none", str(tmp_path)).returncode == 2
    assert script(three, "restore.sh", "x.db").returncode == 2
    assert script(three, "maintain.sh").returncode == 2
    assert script(three, "maintain.sh", "improve").returncode == 2


# Restore


def test_a_restored_cluster_has_its_id_its_data_and_raised_revisions(tmp_path: Path) -> None:
    with EtcdCluster(tmp_path / "c", size=3, binary=binary("3.5"), fsync=False) as cluster:
        etcd = GatewayEtcd(cluster.endpoints)
        known = fill(etcd, 20)
        before = status(cluster, 0)["header"]["cluster_id"]
        saved = backup(cluster, tmp_path / "backups")
        newest = etcd.txn(Txn((), (Put("/ops/later", b"x"),))).revision
        cluster.stop()
        said = restore(cluster, saved, tmp_path)
        assert said.count("nothing: coordinators and agents go on by themselves") == 3
        cluster.start()
        cluster.wait_ready()
        assert status(cluster, 0)["header"]["cluster_id"] == before
        found = etcd.range("/ops/19")
        assert found.items[0].mod_revision == known
        assert found.revision >= newest + RESTORE_BUMP_LEAST
        assert not etcd.range("/ops/later").items
        etcd.close()


def restored_words(folder: Path, *more: str) -> tuple[str, ...]:
    words = ("--name", "m", "--data-dir", str(folder), "--initial-cluster", "m=http://127.0.0.1:1")
    return (*words, *more)


def test_a_data_folder_that_is_there_is_never_touched(three: EtcdCluster, tmp_path: Path) -> None:
    saved = backup(three, tmp_path / "b")
    data = tmp_path / "data"
    data.mkdir()
    (data / "kept").write_text("x")
    done = script(three, "restore.sh", *restored_words(data), str(saved))
    assert done.returncode == 3
    assert str(data) in done.stderr
    assert [path.name for path in data.iterdir()] == ["kept"]
    (data / "kept").unlink()
    assert script(three, "restore.sh", *restored_words(data), str(saved)).returncode == 0
    assert (data / "member" / "snap" / "db").exists()


def test_a_snapshot_that_was_changed_is_refused(three: EtcdCluster, tmp_path: Path) -> None:
    saved = backup(three, tmp_path / "b")
    with saved.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * 16)
    done = script(three, "restore.sh", *restored_words(tmp_path / "data"), str(saved))
    assert done.returncode == 4
    saved.with_suffix(".meta").unlink()
    done = script(three, "restore.sh", *restored_words(tmp_path / "data"), str(saved))
    assert done.returncode == 4, "the file has a digest of its own"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b"]


def test_another_token_gives_another_cluster_and_it_is_said_what_that_means(
    three: EtcdCluster, tmp_path: Path
) -> None:
    saved = backup(three, tmp_path / "b")
    done = script(three, "restore.sh", *restored_words(tmp_path / "d", "--token", "new"), str(saved))
    assert done.returncode == 0, done.stderr
    assert "the cluster id is new" in done.stdout
    assert "--keep-ranks" in done.stdout


def test_a_tool_that_cannot_raise_revisions_is_refused_unless_it_is_wanted(tmp_path: Path) -> None:
    old = binary("3.4")
    with EtcdCluster(tmp_path / "c", binary=old, fsync=False) as cluster:
        fill(GatewayEtcd(cluster.endpoints), 3)
        saved = backup(cluster, tmp_path / "b")
        words = restored_words(tmp_path / "data")
        done = script(cluster, "restore.sh", *words, str(saved))
        assert done.returncode == 5
        assert "--no-bump" in done.stderr
        assert not (tmp_path / "data").exists()
        done = script(cluster, "restore.sh", *words, "--no-bump", str(saved))
        assert done.returncode == 0, done.stderr
        assert "--accept-restored-etcd" in done.stdout
        # A newer tool reads it all the same.
        newer = {"ETCDUTL": str(binary("3.5").etcdctl)}
        other = restored_words(tmp_path / "other")
        done = script(cluster, "restore.sh", *other, str(saved), env=newer)
        assert done.returncode == 0, done.stderr


# Upkeep


def test_members_are_defragmented_one_by_one_the_leader_last(three: EtcdCluster) -> None:
    etcd = GatewayEtcd(three.endpoints)
    fill(etcd, 400, size=8192)
    leader = three.endpoints[leader_of(three)]
    done = script(three, "maintain.sh", "compact", "10")
    assert done.returncode == 0, done.stderr
    before = sum(status(three, index)["dbSize"] for index in range(3))
    done = script(three, "maintain.sh", "defrag", "1")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "http" in line]
    assert len(lines) == 3
    assert leader in lines[-1]
    assert sum(status(three, index)["dbSize"] for index in range(3)) < before
    assert "left as it is" in script(three, "maintain.sh", "defrag", "99").stdout
    done = script(three, "maintain.sh", "status")
    assert done.returncode == 0
    assert "leader etcd 3.5" in done.stdout
    assert "alarms: none" in done.stdout
    etcd.close()


def test_nothing_is_defragmented_while_a_member_is_away_or_not_named(three: EtcdCluster) -> None:
    done = script(three, "maintain.sh", "defrag", env={"ETCDCTL_ENDPOINTS": three.endpoints[0]})
    assert done.returncode == 3
    assert "name them all" in done.stderr
    follower = (leader_of(three) + 1) % 3
    three.kill(follower)
    try:
        done = script(three, "maintain.sh", "defrag")
        assert done.returncode == 3
        assert three.endpoints[follower] in done.stderr
        assert script(three, "maintain.sh", "status").returncode == 3
    finally:
        three.start_member(follower)
        three.wait_ready()


def test_a_full_etcd_is_writable_again_after_one_command(tmp_path: Path) -> None:
    quota = 2 * 1024 * 1024
    with EtcdCluster(tmp_path, binary=binary("3.5"), fsync=False, quota_bytes=quota) as cluster:
        etcd = GatewayEtcd(cluster.endpoints)
        with pytest.raises(Exception, match="space"):
            # What is kept of it, 50 keys, is far below the quota.
            fill(etcd, 1000, size=16384)
        assert "NOSPACE" in etcdctl(cluster, "alarm", "list")
        done = script(cluster, "maintain.sh", "nospace")
        assert done.returncode == 0, done.stderr
        fill(etcd, 1)
        assert not etcdctl(cluster, "alarm", "list").strip()
        etcd.close()


def test_the_scripts_work_with_certificates_and_users(tmp_path: Path) -> None:
    tls = server_tls(tmp_path / "pki")
    with EtcdCluster(tmp_path / "c", binary=binary("3.5"), fsync=False, tls=tls) as cluster:
        users = Users(cluster, tmp_path / "secrets", tls.client)

        def run(user: str, name: str, *words: str) -> "subprocess.CompletedProcess[str]":
            login = ("--user", user, "--password-file", users.password_file(user))
            return script(cluster, name, *login, *words, env=users._env())

        done = run("root", "backup.sh", str(tmp_path / "b"))
        assert done.returncode == 0, done.stderr
        [saved] = (tmp_path / "b").glob("*.db")
        assert int(meta(saved)["keys"]) > 0
        done = run("reader", "backup.sh", str(tmp_path / "stolen"))
        assert done.returncode == 1, "only root may read everything"
        assert not list((tmp_path / "stolen").iterdir())
        for words in (("status",), ("compact", "1"), ("defrag", "0")):
            done = run("root", "maintain.sh", *words)
            assert done.returncode == 0, done.stderr
        # Restoring asks nobody, so nobody's variables are in its way.
        done = script(cluster, "restore.sh", *restored_words(tmp_path / "data"), str(saved), env=users._env())
        assert done.returncode == 0, done.stderr


def test_the_scripts_are_plain_posix_shell() -> None:
    folder = Path(__file__).parents[3] / "deploy" / "etcd"
    shells = [shell for shell in ("dash", "busybox") if shutil.which(shell)]
    assert shells, "no plain shell is here"
    for path in sorted(folder.glob("*.sh")):
        for shell in shells:
            command = [shell, *(["sh"] if shell == "busybox" else []), "-n", str(path)]
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
            assert done.returncode == 0, done.stderr


def test_a_cluster_id_is_told_as_etcd_prints_it(three: EtcdCluster) -> None:
    number = status(three, 0)["header"]["cluster_id"]
    library = Path(__file__).parents[3] / "deploy" / "etcd" / "lib.sh"
    for value in (number, 2**64 - 1, 2**63, 15):
        done = subprocess.run(
            ["sh", "-c", f'. "{library}"; hex {value}'],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        )
        assert done.stdout.strip() == f"{value:x}"
