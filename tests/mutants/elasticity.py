"""Deliberate bugs in who gets ranks: spares, growing and shrinking, machines that leave, launchers that import ahead."""

# ruff: noqa: E501 - code is quoted as it stands

from tests.mutants.mutant import AGENT, CORE, ON_AGENT, ON_COORDINATOR, Mutant, mutant

MUTANTS: tuple[Mutant, ...] = (
    # Machines that are ready ---------------------------------------------------------------
    mutant(
        "warm-for-another-submission",
        "A launcher of another submission counts as ready: all stand still while it imports.",
        f"{CORE}/placement.py",
        (
            "    if stored is None or view is None or stored.value.uid != draft.status.uid:\n        return False\n    snapshot",
            "    if stored is None or view is None:\n        return False\n    snapshot",
        ),
        f"{ON_COORDINATOR}/test_plan_elastic.py::test_what_another_submission_left_there_goes_before_the_machine_joins",
    ),
    mutant(
        "former-life-counts-as-warm",
        "A launcher that died with its machine counts as ready.",
        f"{CORE}/placement.py",
        (
            "    return snapshot.incarnation == view.node.incarnation and (snapshot.warm or runs)",
            "    return snapshot.warm or runs",
        ),
        f"{ON_COORDINATOR}/test_plan_spares.py::test_what_a_former_life_of_the_agent_had_warmed_counts_for_nothing",
    ),
    mutant(
        "failed-launcher-counts-as-warm",
        "A launcher that may be what failed keeps its machine in the job.",
        f"{CORE}/placement.py",
        ("snapshot.phase in STARTED_PHASES - {WorkerPhase.ERROR} or", "snapshot.phase in STARTED_PHASES or"),
        f"{ON_COORDINATOR}/test_plan_spares.py::test_a_machine_whose_launcher_died_gives_way_to_a_warm_one",
    ),
    mutant(
        "left-behind-ranks-count-as-warm",
        "A machine that is back before its lease has ended joins at once: all stand still while it imports.",
        f"{CORE}/placement.py",
        (
            "    runs = started and (not members or any(member.agent == name for member in members))\n",
            "    runs = started\n",
        ),
        f"{ON_COORDINATOR}/test_plan_elastic.py::test_a_machine_that_is_back_before_its_former_life_has_ended_is_not_taken_for_warm",
    ),
    mutant(
        "cold-machine-before-a-warm-one",
        "A spare is kept warm and a cold machine takes the lost one's place.",
        f"{CORE}/placement.py",
        (
            "    return doubtful, not is_warm(draft, name), place, name",
            "    return doubtful, False, place, name",
        ),
        f"{ON_COORDINATOR}/test_plan_spares.py::test_a_machine_whose_launcher_died_gives_way_to_a_warm_one",
    ),
    mutant(
        "recovery-waits-for-imports",
        "A job that may shrink stands still until a cold machine has imported.",
        f"{CORE}/placement.py",
        (
            "        if len(ready) >= spec.nnodes_min:\n            return",
            "        if len(ready) >= spec.nnodes_max:\n            return",
        ),
        f"{ON_COORDINATOR}/test_plan_elastic.py::test_it_waits_for_no_machine_that_has_to_import_first",
    ),
    mutant(
        "ranks-change-machines",
        "Machines restore what others hold in memory: ranks do not keep their places over sizes.",
        f"{CORE}/placement.py",
        (
            "        if place_before is not None and place_before < len(chosen) and place_before not in places:",
            "        if place_before is not None and place_before == len(chosen):",
        ),
        f"{ON_COORDINATOR}/test_plan_elastic.py::test_machines_keep_their_ranks_over_sizes",
    ),
    mutant(
        "slots-of-others-given-away",
        "Two jobs share a machine's slots: a job that takes it whole is placed beside another.",
        f"{CORE}/placement.py",
        (
            "    return 0 < ranks_on(spec, view) <= view.node.slots - used",
            "    return 0 < ranks_on(spec, view) <= view.node.slots - (used if spec.nproc_per_node else 0)",
        ),
        f"{ON_COORDINATOR}/test_plan_elastic.py::test_a_machine_of_which_others_use_a_part_has_no_room_for_a_job_that_takes_it_whole",
    ),
    mutant(
        "cordoned-machine-used",
        "A cordoned machine gets new ranks.",
        f"{CORE}/placement.py",
        ("        if name in fleet.cordoned or blocked", "        if blocked"),
        f"{ON_COORDINATOR}/test_plan_start.py::test_a_full_or_cordoned_agent_gets_no_ranks",
    ),
    mutant(
        "spare-is-a-member",
        "The machines that train are ordered to import beside their ranks.",
        f"{CORE}/spares.py",
        (
            "        name for name in placement.candidates(draft) if name not in taken and not _was_released(draft, name)\n",
            "        name for name in placement.candidates(draft) if not _was_released(draft, name)\n",
        ),
        f"{ON_COORDINATOR}/test_plan_spares.py::test_as_many_as_asked_for_are_warmed_once_the_job_trains",
    ),
    mutant(
        "all-idle-machines-warmed",
        "More machines than `spares` hold the memory of a job's imports.",
        f"{CORE}/spares.py",
        ("name))[: draft.spec.spares])", "name)))"),
        f"{ON_COORDINATOR}/test_plan_spares.py::test_as_many_as_asked_for_are_warmed_once_the_job_trains",
    ),
    mutant(
        "released-spare-comes-back",
        "A late order brings back a spare that was released.",
        f"{CORE}/spares.py",
        ("    if _was_released(draft, name):\n        return", "    if False:\n        return"),
        f"{ON_COORDINATOR}/test_plan_spares.py::test_one_that_was_released_is_warmed_again_in_the_next_attempt_only",
    ),
    mutant(
        "warm-spare-released",
        "What a spare has imported is thrown away in each decision.",
        f"{CORE}/closing.py",
        (
            "        if spares.is_kept(draft, agent) or elastic.is_joining(draft, agent):",
            "        if elastic.is_joining(draft, agent):",
        ),
        f"{ON_COORDINATOR}/test_plan_spares.py::test_a_warm_machine_is_left_alone_and_not_released",
    ),
    # Sizes ---------------------------------------------------------------------------------
    mutant(
        "joining-machine-released",
        "What a joining machine has imported is thrown away before it joins.",
        f"{CORE}/closing.py",
        (
            "        if spares.is_kept(draft, agent) or elastic.is_joining(draft, agent):",
            "        if spares.is_kept(draft, agent):",
        ),
        f"{ON_COORDINATOR}/test_plan_elastic.py::test_a_machine_that_comes_free_imports_first_while_training_goes_on",
    ),
    mutant(
        "scale-ignored",
        "`dtrain scale` changes nothing.",
        f"{CORE}/elastic.py",
        ("if 1 <= low <= high else spec", "if 1 <= low > high else spec"),
        f"{ON_COORDINATOR}/test_plan_elastic.py::test_a_job_scaled_down_leaves_its_last_machines_at_a_checkpoint",
    ),
    mutant(
        "bounds-of-another-submission",
        "The size that was set for a former submission is taken for the present one.",
        f"{CORE}/elastic.py",
        ("    if intent is None or intent.value.uid != spec.uid:\n", "    if intent is None:\n"),
        f"{ON_COORDINATOR}/test_plan_elastic.py::test_bounds_of_another_submission_or_that_are_none_do_not_count",
    ),
    mutant(
        "grows-cold",
        "The same: a newcomer that has imported nothing counts as warm.",
        f"{CORE}/elastic.py",
        (
            "        if placement.is_warm(draft, name):\n            warm.append(name)",
            "        if name:\n            warm.append(name)",
        ),
        f"{ON_COORDINATOR}/test_plan_elastic.py::test_a_machine_that_comes_free_imports_first_while_training_goes_on",
    ),
    mutant(
        "waits-for-the-slow-for-ever",
        "One machine that never gets ready keeps all others from joining.",
        f"{CORE}/elastic.py",
        ("(waiting if asked_s < patience_s else cold)", "(waiting if asked_s < 1000 * patience_s else cold)"),
        f"{ON_COORDINATOR}/test_plan_elastic.py::test_an_agent_that_never_becomes_warm_joins_after_a_while",
    ),
    mutant(
        "cooldown-ignored",
        "The job stops for each machine that comes: grow_cooldown_s is not kept.",
        f"{CORE}/elastic.py",
        (
            "    left_s = draft.spec.grow_cooldown_s - _since_s(draft, status.grown_at)\n",
            "    left_s = 0.0\n",
        ),
        f"{ON_COORDINATOR}/test_plan_elastic.py::test_it_does_not_grow_again_before_its_cooldown_is_over",
    ),
    mutant(
        "cooldown-after-a-loss",
        "Shrinking begins a cooldown: a machine that comes back waits for its end.",
        f"{CORE}/elastic.py",
        (
            '    changes = {"grown_at": iso(draft.moment.wall)} if change.joiners else {}\n',
            '    changes = {"grown_at": iso(draft.moment.wall)}\n',
        ),
        f"{ON_COORDINATOR}/test_plan_elastic.py::test_shrinking_begins_no_cooldown",
    ),
    mutant(
        "grows-without-the-held-checkpoint",
        "Growing repeats the steps since the newest checkpoint.",
        f"{CORE}/phases.py",
        (
            "        if elastic.is_due(draft, members, change):\n",
            "        if change.joiners or elastic.is_due(draft, members, change):\n",
        ),
        f"{ON_COORDINATOR}/test_plan_elastic.py::test_once_it_is_warm_the_job_grows_at_a_checkpoint_that_ranks_hold_at",
    ),
    mutant(
        "growth-does-not-hold",
        "Steps done behind the checkpoint that a change of size ends with are done twice.",
        f"{CORE}/elastic.py",
        (
            "    checkpoints.drive(draft, members, hold_s=draft.spec.checkpoint.timeout_s)\n",
            "    checkpoints.drive(draft, members)\n",
        ),
        f"{ON_COORDINATOR}/test_plan_elastic.py::test_once_it_is_warm_the_job_grows_at_a_checkpoint_that_ranks_hold_at",
    ),
    mutant(
        "grows-with-any-commit",
        "The job changes its size at a checkpoint that its ranks have trained on from: the steps since are done twice.",
        f"{CORE}/elastic.py",
        (
            "    return any(record.seq in held for record in draft.committed)",
            "    return bool(draft.committed)",
        ),
        f"{ON_COORDINATOR}/test_plan_elastic.py::test_a_checkpoint_that_is_under_way_is_none_to_grow_at",
    ),
    mutant(
        "shrinks-without-a-checkpoint",
        "`dtrain scale` to fewer machines loses the steps since the newest checkpoint.",
        f"{CORE}/phases.py",
        (
            "        if elastic.is_due(draft, members, change):\n",
            "        if change.leavers or elastic.is_due(draft, members, change):\n",
        ),
        f"{ON_COORDINATOR}/test_plan_elastic.py::test_a_job_scaled_down_leaves_its_last_machines_at_a_checkpoint",
    ),
    mutant(
        "unsavable-job-resized",
        "A job that cannot be checkpointed loses all of its work to a machine that comes free.",
        f"{CORE}/elastic.py",
        ("    if not checkpoints.can_checkpoint(draft, members):\n", "    if False:\n"),
        f"{ON_COORDINATOR}/test_plan_elastic.py::test_a_job_that_cannot_be_saved_does_not_grow",
    ),
    mutant(
        "the-first-machines-leave",
        "Scaled down, the machine of rank 0 leaves instead of the last ones.",
        f"{CORE}/elastic.py",
        (
            "members[draft.spec.nnodes_max :])\n        return Resize(leavers",
            "members[:surplus])\n        return Resize(leavers",
        ),
        f"{ON_COORDINATOR}/test_plan_elastic.py::test_a_job_scaled_down_leaves_its_last_machines_at_a_checkpoint",
    ),
    mutant(
        "leavers-restart-with-the-job",
        "A job that was scaled down is placed on the machines that it has to leave.",
        f"{CORE}/elastic.py",
        (
            "{member.agent for member in status.members} - set(change.leavers)",
            "{member.agent for member in status.members}",
        ),
        f"{ON_COORDINATOR}/test_plan_elastic.py::test_a_member_that_did_not_answer_once_stays_all_the_same",
    ),
    mutant(
        "resizing-costs-a-restart",
        "Growing counts as a fruitless attempt.",
        f"{CORE}/elastic.py",
        ("draft.set(charge=False, fruitless=0, **changes)", "draft.set(charge=True, fruitless=0, **changes)"),
        f"{ON_COORDINATOR}/test_plan_elastic.py::test_once_it_is_warm_the_job_grows_at_a_checkpoint_that_ranks_hold_at",
    ),
    mutant(
        "newcomers-join-one-by-one",
        "Each machine that comes stops the job anew, although the next one was seen a moment later.",
        f"{CORE}/elastic.py",
        ("    if ready and len(joining) < room and draft.now < together:", "    if False:"),
        f"{ON_COORDINATOR}/test_plan_elastic.py::test_machines_that_come_one_after_the_other_join_together",
    ),
    mutant(
        "grows-at-its-end",
        "A job whose training has ended is restarted to grow.",
        f"{CORE}/elastic.py",
        ("        return None  # training has ended, or is about to", "        pass"),
        f"{ON_COORDINATOR}/test_plan_elastic.py::test_a_job_whose_training_has_ended_does_not_grow",
    ),
    mutant(
        "each-newcomer-makes-all-wait-anew",
        "A stream of newcomers keeps a job from growing by any.",
        f"{CORE}/elastic.py",
        (
            "    since = status.joining_since if joining and status.joining else iso(draft.moment.wall)\n",
            "    since = iso(draft.moment.wall)\n",
        ),
        f"{ON_COORDINATOR}/test_plan_elastic.py::test_whoever_comes_later_makes_nobody_wait_anew",
    ),
    mutant(
        "grows-beside-a-missing-member",
        "A job changes its size while one of its machines is not seen.",
        f"{CORE}/elastic.py",
        (
            "    if draft.fleet.brake or any(seat.standing is not Standing.PRESENT for seat in members):\n        return None",
            "    if draft.fleet.brake:\n        return None",
        ),
        f"{ON_COORDINATOR}/test_plan_elastic.py::test_nothing_is_changed_while_a_member_is_not_seen",
    ),
    mutant(
        "resize-forgets-who",
        "Whoever is there takes part in the attempt after a change of size, prepared or not.",
        f"{CORE}/phases.py",
        ("    recovering(draft, only=only)\n", "    recovering(draft)\n"),
        f"{ON_COORDINATOR}/test_plan_elastic.py::test_an_agent_that_never_becomes_warm_joins_after_a_while",
    ),
    mutant(
        "left-behind-start-kept",
        "A machine that an attempt went on without is kept as it is: it imports nothing, and joins minutes later.",
        f"{CORE}/elastic.py",
        (
            "    ours = snapshot.uid == draft.status.uid and snapshot.phase is WorkerPhase.IDLE\n",
            "    ours = snapshot.uid == draft.status.uid\n",
        ),
        f"{ON_COORDINATOR}/test_plan_elastic.py::test_so_does_what_an_attempt_that_went_on_without_it_left_there",
    ),
    mutant(
        "former-submission-s-launcher-kept",
        "What another submission left on a machine keeps it from joining.",
        f"{CORE}/elastic.py",
        (
            "    ours = snapshot.uid == draft.status.uid and snapshot.phase is WorkerPhase.IDLE\n",
            "    ours = snapshot.phase is WorkerPhase.IDLE\n",
        ),
        f"{ON_COORDINATOR}/test_plan_elastic.py::test_what_another_submission_left_there_goes_before_the_machine_joins",
    ),
    mutant(
        "outcome-told-to-those-who-hold",
        "Ranks that hold at the checkpoint of a change of size go on: their steps are done twice.",
        f"{CORE}/phases.py",
        (
            "            resize(draft, change)\n            return\n",
            "            checkpoints.tell_outcomes(draft, members)\n            resize(draft, change)\n            return\n",
        ),
        f"{ON_COORDINATOR}/test_plan_elastic.py::test_once_it_is_warm_the_job_grows_at_a_checkpoint_that_ranks_hold_at",
    ),
    # Machines that go ----------------------------------------------------------------------
    mutant(
        "vacated-machine-in-a-hurry",
        "A machine that stays is given an agent's grace: its checkpoint is given up.",
        f"{CORE}/draining.py",
        ("draft.spec.checkpoint.timeout_s\n    return", "1.0\n    return"),
        f"{ON_COORDINATOR}/test_plan_suspicion.py::test_an_operators_drain_moves_the_job_and_keeps_the_agent",
    ),
    mutant(
        "draining-costs-a-restart",
        "A machine that goes costs a restart.",
        f"{CORE}/draining.py",
        ("    draft.set(charge=False)\n", "    draft.set(charge=True)\n"),
        f"{ON_COORDINATOR}/test_plan_draining.py::test_its_commit_and_the_next_attempt_are_one_decision_and_free",
    ),
    mutant(
        "drain-given-up-too-late",
        "The whole grace is spent on the checkpoint, and ranks are killed in the middle.",
        f"{CORE}/draining.py",
        ("GRACE_SHARE = 0.9\n", "GRACE_SHARE = 1.5\n"),
        f"{ON_COORDINATOR}/test_plan_draining.py::test_the_leader_gives_up_before_the_agent_does",
    ),
    # Launchers -----------------------------------------------------------------------------
    mutant(
        "import-ahead-beside-ranks",
        "An order to import ends ranks that train.",
        f"{AGENT}/core/warming.py",
        ("    if job.phase is not WorkerPhase.IDLE or job.stopping is not None:\n", "    if False:\n"),
        f"{ON_AGENT}/test_core_warming.py::test_it_is_refused_where_ranks_are",
    ),
    mutant(
        "draining-machine-warmed",
        "A machine that is about to go imports for a job.",
        f"{AGENT}/core/warming.py",
        ("    if state.drain is not None:\n", "    if False:\n"),
        f"{ON_AGENT}/test_core_warming.py::test_it_is_refused_beside_another_submission_while_draining_and_for_an_older_attempt",
    ),
    mutant(
        "other-submission-s-launcher-ended",
        "An order to import ends what another submission has there.",
        f"{AGENT}/core/warming.py",
        ("    if job.uid != head.uid:\n        return", "    if False:\n        return"),
        f"{ON_AGENT}/test_core_warming.py::test_it_is_refused_beside_another_submission_while_draining_and_for_an_older_attempt",
    ),
    mutant(
        "late-order-brings-a-released-job-back",
        "A released machine imports again for an attempt that is over.",
        f"{AGENT}/core/warming.py",
        ("    if head.attempt <= state.over.get(head.uid, 0):\n", "    if False:\n"),
        f"{ON_AGENT}/test_core_warming.py::test_a_late_one_does_not_bring_a_released_job_back",
    ),
    mutant(
        "importing-launcher-called-warm",
        "A spare is called ready while it still imports.",
        f"{AGENT}/core/warming.py",
        (
            "        and job.launcher.status is LauncherStatus.READY\n        and not job.launcher.quitting",
            "        and not job.launcher.quitting",
        ),
        f"{ON_AGENT}/test_core_warming.py::test_a_launcher_imports_ahead_and_the_snapshot_says_when_it_is_done",
    ),
    mutant(
        "launcher-restarted-at-once",
        "A launcher that cannot import is started again without a pause.",
        f"{AGENT}/core/warming.py",
        ("warm_at=now + AGAIN_S, note", "warm_at=now, note"),
        f"{ON_AGENT}/test_core_warming.py::test_a_launcher_that_ends_by_itself_is_started_again_but_not_at_once",
    ),
    mutant(
        "forked-beside-threads",
        "Ranks are forked while a thread of the launcher may hold a lock.",
        f"{AGENT}/launch/preload.py",
        (
            "        if names:\n            return f",
            "        if names and self.offenders:\n            return f",
        ),
        f"{ON_AGENT}/test_launcher_parts.py::test_what_makes_a_fork_unsafe_is_named_whenever_it_was_begun",
    ),
    mutant(
        "forked-with-a-gpu",
        "Ranks inherit a GPU context that does not survive a fork.",
        f"{AGENT}/launch/preload.py",
        ("        if _holds_gpu():\n", "        if False:\n"),
        f"{ON_AGENT}/test_launcher_parts.py::test_what_makes_a_fork_unsafe_is_named_whenever_it_was_begun",
    ),
    mutant(
        "offender-not-named",
        "A module that starts threads is not named.",
        f"{AGENT}/launch/preload.py",
        ("            result.offenders.append(name)\n", "            pass\n"),
        f"{ON_AGENT}/test_launcher_parts.py::test_a_module_that_starts_a_thread_when_it_is_imported_is_named",
    ),
    mutant(
        "unknown-owner-by-name",
        "The library whose threads forbid forking is not named.",
        f"{AGENT}/launch/preload.py",
        (
            '        return ", ".join(sorted(known)) or "something that was imported"',
            '        assert known is not None\n        return "something that was imported"',
        ),
        f"{ON_AGENT}/test_launcher_parts.py::test_what_makes_a_fork_unsafe_is_named_whenever_it_was_begun",
    ),
)
