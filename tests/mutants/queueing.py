"""Deliberate bugs in who waits for whom: the queue, suspending, and releases beside each other."""

# ruff: noqa: E501 - code is quoted as it stands

from tests.mutants.mutant import CORE, ON_COORDINATOR, Mutant, mutant

MUTANTS: tuple[Mutant, ...] = (
    # The queue -----------------------------------------------------------------------------
    mutant(
        "claims-of-others-ignored",
        "Machines that are kept for the first in the queue are given to others.",
        f"{CORE}/placement.py",
        (
            "        if not has_room(draft.spec, view, fleet.used.get(name, 0) + held.get(name, 0)):",
            "        if not has_room(draft.spec, view, fleet.used.get(name, 0)):",
        ),
        f"{ON_COORDINATOR}/test_plan_suspending.py::test_claims_of_others_are_respected_and_told",
    ),
    mutant(
        "equals-preempted",
        "A job makes room for one of its own priority.",
        f"{CORE}/queue.py",
        (
            "            if prey.priority >= one.priority or able",
            "            if prey.priority > one.priority or able",
        ),
        f"{ON_COORDINATOR}/test_queue.py::test_the_less_important_make_room_the_least_important_first_then_the_youngest",
    ),
    mutant(
        "suspended-in-vain",
        "Jobs make room although all of them together would not do.",
        f"{CORE}/queue.py",
        (
            "        if able < one.nodes_min:\n            return ()\n        for prey in list(chosen)",
            "        for prey in list(chosen)",
        ),
        f"{ON_COORDINATOR}/test_queue.py::test_the_less_important_make_room_the_least_important_first_then_the_youngest",
    ),
    mutant(
        "backfill-beyond-the-reservation",
        "Jobs behind take what is kept for the first one.",
        f"{CORE}/queue.py",
        ("if self.turns[of] < turn)", "if self.turns[of] < turn - 1)"),
        f"{ON_COORDINATOR}/test_queue.py::test_what_the_first_can_have_now_is_not_for_those_behind",
    ),
    mutant(
        "more-make-room-than-needed",
        "A job is suspended whose machines nobody needs.",
        f"{CORE}/queue.py",
        (
            "            if able + (lost := self._shift(one, total, prey, -1)) < one.nodes_min:\n",
            "            if able + (lost := self._shift(one, total, prey, -1)) < 10**9:\n",
        ),
        f"{ON_COORDINATOR}/test_queue.py::test_no_more_jobs_make_room_than_needed",
    ),
    mutant(
        "important-jobs-make-room-first",
        "The most important of the less important jobs is suspended.",
        f"{CORE}/queue.py",
        (
            "self._prey.sort(key=lambda one: (one.priority, ",
            "self._prey.sort(key=lambda one: (-one.priority, ",
        ),
        f"{ON_COORDINATOR}/test_queue.py::test_the_less_important_make_room_the_least_important_first_then_the_youngest",
    ),
    mutant(
        "suspended-again-at-once",
        "A job that has just come back makes room again.",
        f"{CORE}/queue.py",
        (
            "            elif one.made_room and now < one.since + REST_S:\n                self.instants.append(one.since + REST_S)\n",
            "",
        ),
        f"{ON_COORDINATOR}/test_queue.py::test_who_made_room_before_is_left_alone_for_a_while",
    ),
    mutant(
        "restart-loses-its-machines",
        "A job that starts again finds its machines given away.",
        f"{CORE}/queue.py",
        (
            "    again = [one for one in order if one.restarts and room.has(one)]\n",
            "    again = [one for one in order if one.restarts and not room.has(one)]\n",
        ),
        f"{ON_COORDINATOR}/test_queue.py::test_a_job_that_starts_again_finds_its_machines_whoever_waits",
    ),
    mutant(
        "hopeless-job-reserves",
        "Machines are kept for a job that could never begin.",
        f"{CORE}/queue.py",
        ("        if not one.ready or one.job in never:\n", "        if not one.ready:\n"),
        f"{ON_COORDINATOR}/test_queue.py::test_nothing_is_kept_for_a_job_that_all_machines_together_could_not_hold",
    ),
    mutant(
        "unready-job-suspends-others",
        "Jobs make room for one whose store does not answer.",
        f"{CORE}/queue.py",
        (
            "        if not one.ready or one.job in never:\n",
            "        if one.job in never:\n",
        ),
        f"{ON_COORDINATOR}/test_queue.py::test_nobody_makes_room_for_a_job_that_could_not_begin",
    ),
    mutant(
        "idle-head-blocks-the-queue",
        "A job that could begin and does not holds up all others for ever.",
        f"{CORE}/queue.py",
        (
            "            if now < since + HOLD_S:\n                instants",
            "            if since:\n                instants",
        ),
        f"{ON_COORDINATOR}/test_queue.py::test_a_job_that_could_begin_and_does_not_is_not_waited_for_without_end",
    ),
    mutant(
        "each-waiting-job-reserves",
        "Every job in the queue has machines kept for it, and small ones starve.",
        f"{CORE}/queue.py",
        ("            reserved = True\n", ""),
        f"{ON_COORDINATOR}/test_queue.py::test_only_the_first_that_cannot_begin_reserves",
    ),
    mutant(
        "victim-overtakes",
        "A job that made room begins again before the one it made room for.",
        f"{CORE}/queue.py",
        ("(max(one.key, keys.get(one.after, one.key)), one.after in keys)", "(one.key, one.after in keys)"),
        f"{ON_COORDINATOR}/test_queue.py::test_who_made_room_comes_after_it_whatever_the_clocks_say",
    ),
    mutant(
        "leaving-jobs-not-awaited",
        "A second job is suspended although machines come free anyway.",
        f"{CORE}/queue.py",
        (
            "        if able >= one.nodes_min:\n            return tuple(self._leaving)\n",
            "        able = self._able(one, self._free)\n",
        ),
        f"{ON_COORDINATOR}/test_queue.py::test_what_comes_free_by_itself_is_awaited_before_anybody_has_to_make_room",
    ),
    mutant(
        "running-job-kept-from-its-machines",
        "A claim of a waiting job keeps a running one from its machines.",
        f"{CORE}/queue.py",
        (
            "        if turn is None or not self.claims:\n            return {}\n",
            "        turn = 10**9 if turn is None else turn\n",
        ),
        f"{ON_COORDINATOR}/test_queue.py::test_a_running_job_is_kept_from_nothing",
    ),
    # Suspending ----------------------------------------------------------------------------
    mutant(
        "preempted-under-the-brake",
        "Jobs are suspended while nobody knows which machines there are.",
        f"{CORE}/suspending.py",
        ("(not by or draft.fleet.brake)", "not by"),
        f"{ON_COORDINATOR}/test_plan_suspending.py::test_nobody_makes_room_while_the_brake_is_on",
    ),
    mutant(
        "preempted-job-stays-suspended",
        "A job that made room never comes back by itself.",
        f"{CORE}/suspending.py",
        (
            '    if is_wanted(draft):\n        text = f"suspended{_asked_by',
            '    if is_wanted(draft) or status.preempted_by:\n        text = f"suspended{_asked_by',
        ),
        f"{ON_COORDINATOR}/test_plan_suspending.py::test_the_less_important_job_makes_room_and_returns_to_the_queue",
    ),
    mutant(
        "suspend-waits-for-ever",
        "A checkpoint that never ends keeps a job from being suspended.",
        f"{CORE}/suspending.py",
        (
            "    if draft.now >= until or checkpoints.is_pointless(draft, members):\n        return True\n    draft.wake(until)\n    if not",
            "    if checkpoints.is_pointless(draft, members):\n        return True\n    draft.wake(until)\n    if not",
        ),
        f"{ON_COORDINATOR}/test_plan_suspending.py::test_ranks_that_are_always_past_the_step_do_not_put_it_off_for_ever",
    ),
    mutant(
        "suspended-job-resumes-by-itself",
        "A suspended job goes back into the queue unasked.",
        f"{CORE}/suspending.py",
        (
            "    closing.release_strays(draft)\n    if is_wanted(draft):\n        draft.say",
            "    closing.release_strays(draft)\n    if not is_wanted(draft):\n        draft.say",
        ),
        f"{ON_COORDINATOR}/test_plan_suspending.py::test_resumed_it_waits_in_the_queue_and_goes_on_where_it_was",
    ),
    mutant(
        "suspended-by-another-s-wish",
        "The wish of a former submission suspends the present one.",
        f"{CORE}/suspending.py",
        (
            "intent.value.uid == draft.status.uid and intent.value.wanted is Wanted.SUSPEND",
            "intent.value.wanted is Wanted.SUSPEND",
        ),
        f"{ON_COORDINATOR}/test_plan_suspending.py::test_an_intent_of_another_submission_is_nobodys_business",
    ),
    mutant(
        "cancel-ignored-while-suspending",
        "A job that is being suspended cannot be cancelled.",
        f"{CORE}/suspending.py",
        (
            "    if closing.wants_cancel(draft):\n        closing.cancel(draft)\n        return\n    members",
            "    members",
        ),
        f"{ON_COORDINATOR}/test_plan_suspending.py::test_it_can_be_cancelled_at_any_time",
    ),
    mutant(
        "exit-93-forgotten-while-suspending",
        "A job that must not be retried is resumed.",
        f"{CORE}/suspending.py",
        (
            "    if ending.do_not_retry:\n        settling.settle",
            "    if False:\n        settling.settle",
        ),
        f"{ON_COORDINATOR}/test_plan_suspending.py::test_exit_code_93_meanwhile_ends_the_job",
    ),
    # An older release beside ---------------------------------------------------------------
    mutant(
        "older-release-written-to",
        "Phases are stored that a coordinator of the older release cannot read.",
        f"{CORE}/releases.py",
        ("int(found[2])) < SINCE\n", "int(found[2])) < (0, 0)\n"),
        f"{ON_COORDINATOR}/test_releases.py::test_a_coordinator_of_an_older_release_is_named",
    ),
    mutant(
        "suspended-beside-an-older-release",
        "A job is suspended while an older coordinator might lead next.",
        f"{CORE}/suspending.py",
        ("        return False\n    # Without a step", "        pass\n    # Without a step"),
        f"{ON_COORDINATOR}/test_plan_suspending.py::test_a_job_is_suspended_only_once_every_coordinator_could_read_that_it_is",
    ),
    mutant(
        "hang-ended-beside-an-older-release",
        "A hang is written that an older coordinator cannot read.",
        f"{CORE}/hangs.py",
        ('draft.fleet.withheld}")\n        return None', 'draft.fleet.withheld}")'),
        f"{ON_COORDINATOR}/test_plan_hangs.py::test_nobody_is_called_hung_while_a_coordinator_could_not_read_it",
    ),
    mutant(
        "rolled-back-beside-an-older-release",
        "The same of a number that is not finite.",
        f"{CORE}/nonfinite.py",
        ("    if not found or draft.fleet.withheld:", "    if not found:"),
        f"{ON_COORDINATOR}/test_plan_nonfinite.py::test_nothing_is_rolled_back_while_a_coordinator_could_not_read_why",
    ),
    # Pausing -------------------------------------------------------------------------------
    mutant(
        "outcome-told-while-paused",
        "Ranks of a paused job hear that their checkpoint is committed, and go on.",
        f"{CORE}/outcomes.py",
        (
            "            if seq not in undecided and seq != draft.status.held:",
            "            if seq not in undecided:",
        ),
        f"{ON_COORDINATOR}/test_plan_pausing.py::test_after_the_commit_nobody_is_told_how_it_ended",
    ),
    mutant(
        "pause-outlives-its-attempt",
        "A status says that ranks are held which are gone.",
        f"{CORE}/draft.py",
        ('        over = {"held": Seq(0), **changes}', "        over = {**changes}"),
        f"{ON_COORDINATOR}/test_plan_pausing.py::test_a_lost_machine_ends_the_attempt_and_the_next_one_is_paused_again",
    ),
    mutant(
        "pause-never-ends",
        "An operator's word that a job may go on changes nothing.",
        f"{CORE}/pausing.py",
        ("    if not is_wanted(draft):\n        draft.event(", "    if False:\n        draft.event("),
        f"{ON_COORDINATOR}/test_plan_pausing.py::test_unpaused_all_are_told_and_go_on",
    ),
    mutant(
        "held-for-a-moment-only",
        "Ranks of a paused job go on as soon as a checkpoint may take.",
        f"{CORE}/pausing.py",
        ("hold_s=HOLD_S_MAX)", "hold_s=draft.spec.checkpoint.timeout_s)"),
        f"{ON_COORDINATOR}/test_plan_pausing.py::test_all_ranks_are_held_at_one_step_that_is_saved",
    ),
    mutant(
        "hour-of-pause-counted-as-steps",
        "The first checkpoint after a pause is opened as far ahead as the pause was long.",
        f"{CORE}/targets.py",
        ("(0.0 if _is_held(draft, seat) else rate", "(0.0 if False else rate"),
        f"{ON_COORDINATOR}/test_plan_pausing.py::test_what_was_paused_for_an_hour_is_not_an_hour_ahead_when_it_is_let_go",
    ),
)
