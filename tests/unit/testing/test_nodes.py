"""What the containers of a test cluster are told."""

import pytest

from dtrain.testing import nodes
from dtrain.testing.images import Images
from dtrain.testing.nodes import Kind, Shape, recipe

SHAPE = Shape(
    cluster="test",
    token="test-1",
    images=Images("coordinator:1", "agent:1", "etcd:1", "store:1", "tools:1"),
    etcd_members=("etcd-0", "etcd-1", "etcd-2"),
    ttl_s=5,
    slots=2,
    report_s=0.2,
    credentials=("key", "secret"),
    env={"LR": "0.1"},
)


def test_a_coordinator_has_a_disk_it_cannot_write():
    made = recipe(SHAPE, Kind.COORDINATOR, "c1", "10.0.0.9")
    assert made.read_only
    assert made.env["DTRAIN_ADVERTISE"] == "10.0.0.9:7070"
    assert made.env["DTRAIN_ID"] == "c1"


def test_every_daemon_knows_every_member_of_etcd_and_the_store():
    for kind in (Kind.COORDINATOR, Kind.AGENT):
        env = recipe(SHAPE, kind, "x", "10.0.0.9").env
        assert env["DTRAIN_ENDPOINTS"] == "http://etcd-0:2379,http://etcd-1:2379,http://etcd-2:2379"
        assert (env["AWS_ACCESS_KEY_ID"], env["AWS_SECRET_ACCESS_KEY"], env["LR"]) == ("key", "secret", "0.1")


def test_members_of_etcd_advertise_names_not_the_wildcard():
    command = recipe(SHAPE, Kind.ETCD, "etcd-1", "10.0.0.9").command
    advertised = [word for word in command if "advertise" in word]
    assert advertised == [
        "--advertise-client-urls=http://etcd-1:2379",
        "--initial-advertise-peer-urls=http://etcd-1:2380",
    ]
    assert "--initial-cluster-state=new" in command


def test_a_member_that_replaces_another_joins_what_is_there():
    command = recipe(SHAPE, Kind.ETCD, "etcd-1", "10.0.0.9", etcd_peers=("etcd-0", "etcd-1")).command
    assert "--initial-cluster-state=existing" in command
    assert "--initial-cluster=etcd-0=http://etcd-0:2380,etcd-1=http://etcd-1:2380" in command


@pytest.mark.parametrize("kind", Kind)
def test_another_image_may_be_given_for_one_node(kind):
    assert recipe(SHAPE, kind, "x", "10.0.0.9").image == f"{kind}:1"
    assert recipe(SHAPE, kind, "x", "10.0.0.9", image="next:2").image == "next:2"


def test_secrets_are_given_by_environment_never_by_flag():
    for kind in Kind:
        assert "secret" not in " ".join(recipe(SHAPE, kind, "x", "10.0.0.9").command)


def test_the_store_is_one_the_agents_can_reach():
    assert recipe(SHAPE, Kind.COORDINATOR, "c1", "10.0.0.9").env["DTRAIN_DEFAULT_STORE"] == SHAPE.store_uri
    assert f"http://store:{nodes.S3_PORT}" in SHAPE.store_uri
