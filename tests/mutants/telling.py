"""Deliberate bugs in what webhooks are told."""

from tests.mutants.mutant import COORDINATOR, ON_COORDINATOR, Mutant, mutant

_SENDER = f"{COORDINATOR}/webhooks/sender.py"
_SIM = "tests/sim/test_sim_webhooks.py::test_every_event_is_told_at_least_once_and_in_order[1]"
_TESTS = f"{ON_COORDINATOR}/test_webhooks.py"

MUTANTS: tuple[Mutant, ...] = (
    mutant(
        "webhook-cursor-stands-still",
        "The cursor is written and never moves: each new leader tells everything again.",
        _SENDER,
        (
            "WebhookCursor(term, self._hook.name, self._done)",
            "WebhookCursor(term, self._hook.name, self._stored)",
        ),
        _SIM,
    ),
    mutant(
        "webhook-no-answer-is-an-answer",
        "What a receiver that is away was told counts as told: at least once is at most once.",
        _SENDER,
        ("        if answer.ok:\n", "        if answer.ok or not answer.status:\n"),
        _SIM,
    ),
    mutant(
        "webhook-new-leader-begins-anew",
        "A new leader knows the cursor's revision as none: what was told is told again.",
        _SENDER,
        ("self._stored = 0 if cursor is None else cursor.revision", "self._stored = 0"),
        _SIM,
    ),
    mutant(
        "webhook-rings-not-read-again",
        "A new leader hears of what happens from now on, and forgets what its predecessor had not told.",
        _SENDER,
        (
            "            self._fresh.clear()\n            self._missed = True\n        self._due.clear()\n",
            "            self._fresh.clear()\n            self._missed = False\n        self._due.clear()\n",
        ),
        _SIM,
    ),
    mutant(
        "webhook-cursor-not-fenced",
        "A deposed leader moves the cursor.",
        _SENDER,
        ("Txn((fence, mine), (Put(key, record),)", "Txn((mine,), (Put(key, record),)"),
        f"{_TESTS}::test_a_deposed_leader_cannot_move_the_cursor",
    ),
    mutant(
        "webhook-tries-are-refusals",
        "A receiver that was away and stumbles once as it comes back has refused for good.",
        _SENDER,
        (
            "        if self._refusals >= REFUSED_TIMES_MAX:\n",
            "        if self._refusals and tries >= REFUSED_TIMES_MAX:\n",
        ),
        f"{_TESTS}::test_a_receiver_that_was_away_for_long_and_stumbles_once_has_not_refused",
    ),
)
