"""Deliberate bugs in the ledger of a job's time."""

from tests.mutants.mutant import CORE, ON_COORDINATOR, Mutant, mutant

_TESTS = f"{ON_COORDINATOR}/test_ledger.py"

MUTANTS: tuple[Mutant, ...] = (
    mutant(
        "ledger-goes-on-after-the-end",
        "A job that is over goes on adding time.",
        f"{CORE}/ledger.py",
        ("    if before is not None and before.phase in TERMINAL_PHASES:\n", "    if False:\n"),
        f"{_TESTS}::test_the_value_freezes_at_the_terminal_write",
    ),
    mutant(
        "lost-work-not-taken-back",
        "Steps that are done again count twice.",
        f"{CORE}/ledger.py",
        (
            "        self.move(PRODUCTIVE, LOST_WORK, self.spent.get(PRODUCTIVE, 0) - ms)\n",
            "",
        ),
        f"{_TESTS}::test_steps_that_are_done_again_are_lost_work",
    ),
    mutant(
        "time-goes-back-with-the-clock",
        "A leader whose clock is behind makes time negative.",
        f"{CORE}/ledger.py",
        ("(elapsed_ms if ahead_ms < 0 or is_set else ahead_ms)", "ahead_ms"),
        f"{_TESTS}::test_a_leader_whose_clock_differs_makes_no_time_negative",
    ),
    mutant(
        "time-stands-still-behind-the-record",
        "A leader whose clock is behind counts nothing until it has caught up.",
        f"{CORE}/ledger.py",
        (
            "            elapsed_ms = max(0, round((turn.now - turn.seen_at) * 1000))\n",
            "            elapsed_ms = 0\n",
        ),
        f"{_TESTS}::test_a_leader_whose_clock_is_behind_counts_on_with_its_monotonic_one",
    ),
    mutant(
        "ways-back-forgotten",
        "A checkpoint that is given up takes back only what no other had.",
        f"{CORE}/ledger.py",
        ("        self.ways.sort(key=_by_step)\n", "        self.ways = self.ways[:0]\n"),
        f"{_TESTS}::test_a_checkpoint_that_is_given_up_takes_back_what_it_had_saved",
    ),
    mutant(
        "holds-counted-again",
        "What checkpoints have held ranks for counts with every write anew.",
        f"{CORE}/ledger.py",
        (
            "        held_before = self.held_ms if self.attempt == before.attempt else 0\n",
            "        held_before = 0\n",
        ),
        f"{_TESTS}::test_what_checkpoints_hold_ranks_for_is_a_stall",
    ),
    mutant(
        "detection-believes-an-agents-clock",
        "A wrong clock of an agent makes steps into detection.",
        f"{CORE}/ledger.py",
        (
            "return DETECTION, min(since_ms, age_ms)",
            "return DETECTION, max(since_ms, age_ms)",
        ),
        f"{_TESTS}::test_an_agents_clock_that_is_wrong_takes_no_more_than_there_was",
    ),
    mutant(
        "a-failure-that-nobody-led-through-counts-as-work",
        "What passed between a failure and the next leader is productive.",
        f"{CORE}/ledger.py",
        ("since_ms += self._seen_late(age_ms - since_ms)", "pass"),
        f"{_TESTS}::test_a_failure_while_nobody_led_is_detection_from_when_its_agent_saw_it",
    ),
    mutant(
        "unsaved-steps-in-the-counter",
        "A counter of productive time falls when steps are lost.",
        "common/dtrain/protocol/ledger.py",
        ("    seconds[PRODUCTIVE] = ledger.saved_ms / 1000\n", ""),
        f"{_TESTS}::test_counters_only_rise_while_steps_come_and_go",
    ),
)
