"""Partitions on paper, and the commands that make them."""

from dtrain.testing.wires import NOBODY, Cuts, cut_script, mend_script


def test_a_cut_holds_in_both_directions():
    cuts = Cuts()
    cuts.cut(["a1"], ["etcd-0", "etcd-1"])
    assert cuts.peers("a1") == {"etcd-0", "etcd-1"}
    assert cuts.peers("etcd-1") == {"a1"}
    assert cuts.peers("a2") == set()


def test_several_cuts_hold_at_once_and_heal_together():
    cuts = Cuts()
    cuts.cut(["a1"], ["etcd-0"])
    cuts.cut(["a1", "a2"], ["c1"])
    assert cuts.peers("a1") == {"etcd-0", "c1"}
    assert cuts.heal() == {"a1": {"etcd-0", "c1"}, "etcd-0": {"a1"}, "a2": {"c1"}, "c1": {"a1", "a2"}}
    assert cuts.peers("a1") == set()
    assert cuts.heal() == {}


def test_nobody_is_cut_off_from_itself():
    cuts = Cuts()
    cuts.cut(["a1", "a2"], ["a2", "a1"])
    assert cuts.peers("a1") == {"a2"}


def test_packets_to_a_cut_off_node_go_to_nobody():
    script = cut_script("10.0.0.0/24", ["10.0.0.7"])
    assert f"ip neigh replace 10.0.0.7 lladdr {NOBODY} nud permanent dev $dev" in script
    assert int(NOBODY[:2], 16) & 0b11 == 0b10, "locally administered, and no multicast address"


def test_mending_what_is_gone_already_is_no_error():
    assert mend_script("10.0.0.0/24", ["10.0.0.7"]).endswith("ip neigh del 10.0.0.7 dev $dev || true")
