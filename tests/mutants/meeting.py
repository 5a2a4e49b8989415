"""Deliberate bugs in torchrun's rendezvous: who takes part, who is missed, and what holds while nobody looks."""

# ruff: noqa: E501 - code is quoted as it stands

from tests.mutants.mutant import Mutant, mutant

HERE = "integrations/dtrain/integrations/rendezvous"
ON_CORE = "tests/unit/integrations/test_rendezvous_core.py"
ON_ETCD = "tests/contract/rendezvous/test_handler.py"

MUTANTS: tuple[Mutant, ...] = (
    mutant(
        "rendezvous-death-unnoticed",
        "A node's death ends no round: the others train on until a collective fails.",
        f"{HERE}/core.py",
        (
            "    lost = not mine or any(node not in alive for node in state.world)\n",
            "    lost = not mine\n",
        ),
        f"{ON_CORE}::test_a_lost_node_is_a_reason_to_restart_for_the_others",
    ),
    mutant(
        "rendezvous-full-round-restarts-for-ever",
        "Who waits for a place that does not exist stays on the list that makes others restart.",
        f"{HERE}/core.py",
        (
            "    waiting, standby = state.waiting[:free], (*state.standby, *state.waiting[free:])\n",
            "    waiting, standby = state.waiting, state.standby\n",
        ),
        f"{ON_CORE}::test_nobody_who_waits_is_left_over_to_restart_a_full_round_for_ever",
    ),
    mutant(
        "rendezvous-old-store",
        "A round is announced with the store of the round before it, and its keys pass for news.",
        f"{HERE}/core.py",
        (
            'return replace(kept, complete=False, round=kept.round + 1, store="")\n',
            "return replace(kept, complete=False, round=kept.round + 1)\n",
        ),
        f"{ON_CORE}::test_the_store_of_a_round_is_forgotten_with_it",
    ),
    mutant(
        "rendezvous-dead-node-writes",
        "A node that was taken for dead writes itself into a round under a lease that has ended.",
        f"{HERE}/board.py",
        (
            "        if node:\n",
            "        if node and not lease:\n",
        ),
        f"{ON_ETCD}::test_who_was_taken_for_dead_writes_nothing",
    ),
    mutant(
        "rendezvous-blind-write",
        "Two nodes that join at once overwrite each other: one waits for ever in no round.",
        f"{HERE}/board.py",
        (
            "        compares = [Compare(self.keys.state, Target.MOD, view.state_revision)]\n",
            "        compares: list[Compare] = []\n",
        ),
        f"{ON_ETCD}::test_of_two_who_saw_the_same_one_writes",
    ),
)
