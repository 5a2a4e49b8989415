"""Which images are run, and whose leftovers are swept."""

import subprocess
import sys

import pytest

from dtrain.protocol.errors import Refused
from dtrain.testing import DtrainCluster, ProcessCluster, engine
from dtrain.testing.images import ETCD, Images, is_built_here


def test_an_image_is_named_by_parameter_then_variable_then_default(monkeypatch):
    for name in ("COORDINATOR", "AGENT", "ETCD", "STORE", "TOOLS"):
        monkeypatch.delenv(f"DTRAIN_IMAGE_{name}", raising=False)
    monkeypatch.setenv("DTRAIN_IMAGE_AGENT", "mine:2")
    found = Images(coordinator="given:1").resolved()
    assert (found.coordinator, found.agent, found.etcd) == ("given:1", "mine:2", ETCD)


@pytest.mark.parametrize(
    ("image", "built"),
    [
        ("dtrain-agent:0.2.0", True),
        ("dtrain-etcd:local", True),
        ("quay.io/coreos/etcd:v3.5.21", False),
        ("registry.example/dtrain-agent:1", False),
        ("etcd:3", False),
    ],
)
def test_only_what_a_registry_may_have_is_pulled(image, built):
    assert is_built_here(image) is built


def test_a_cluster_belongs_to_its_process_and_to_nobody_after_it():
    assert not engine._is_dead(engine.owner())
    ended = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True
    )
    machine, _, started = engine.owner().rsplit("/", 2)
    assert engine._is_dead(f"{machine}/{ended.stdout.strip()}/{started}")


def test_a_pid_that_is_used_again_is_another_owner():
    machine, pid, started = engine.owner().rsplit("/", 2)
    assert engine._is_dead(f"{machine}/{pid}/{int(started) + 1}")


def test_clusters_of_other_machines_are_left_alone():
    assert not engine._is_dead("elsewhere-12345678/1/1")
    assert not engine._is_dead("")


def test_without_an_engine_the_reason_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/nothing.sock")
    assert DtrainCluster.available().startswith("no container engine answers")
    with pytest.raises(Refused, match="no container engine answers"), DtrainCluster():
        pass


def test_what_only_containers_can_do_is_refused_by_processes():
    cluster = ProcessCluster()
    with pytest.raises(Refused, match="a1 and etcd-0"):
        cluster.partition(["a1"], ["etcd-0"])
    with pytest.raises(Refused, match="disk of etcd-0"):
        cluster.fill_disk("etcd-0")
    with pytest.raises(Refused, match="another image"):
        cluster.replace("a1", image="next:2")


def test_a_small_disk_is_for_a_member_of_etcd(tmp_path):
    with pytest.raises(Refused, match="no member a1"):
        DtrainCluster(small_disk={"a1": "260m"})


def test_published_ports_are_looked_for_where_the_engine_is(monkeypatch):
    class Client:
        class api:  # noqa: N801
            base_url = "http://docker:2375"

    monkeypatch.setattr(engine.testcontainers_config, "tc_host_override", None)
    assert engine.hosts(Client) == ["docker"]
    Client.api.base_url = "http+docker://localhost"
    assert engine.hosts(Client)[0] == "127.0.0.1"
