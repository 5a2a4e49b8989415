"""The deliberate bugs. Each says which promise it breaks, and which test must notice.

``old`` must occur exactly once in ``file``: where the code has changed, the mutant has to follow it.
``killer``: pytest nodes, or the arguments of ``python -m`` for a simulation.
"""

# ruff: noqa: E501 - code is quoted as it stands

from tests.mutants import causes, counting, elasticity, goodput, meeting, queueing, telling
from tests.mutants.mutant import (
    AGENT,
    COORDINATOR,
    CORE,
    ETCD,
    ON_AGENT,
    ON_COORDINATOR,
    ON_ETCD,
    TRAINER,
    Mutant,
)
from tests.mutants.mutant import mutant as _mutant

MUTANTS: tuple[Mutant, ...] = (
    # Fenced writes ------------------------------------------------------------------------
    _mutant(
        "fence-dropped",
        "G1: a leader's transaction does not compare the leader key, so a deposed one still writes.",
        f"{COORDINATOR}/persistence.py",
        (
            "    compares = [Compare(keys.leader, Target.CREATE, term)]\n",
            "    compares: list[Compare] = []\n",
        ),
        f"{ON_COORDINATOR}/test_persistence.py::test_a_stale_leader_cannot_commit",
    ),
    _mutant(
        "fence-dropped-in-simulation",
        "G1: the same, noticed by the auditor of a whole cluster whose leaders sleep beyond their lease.",
        f"{COORDINATOR}/persistence.py",
        (
            "    compares = [Compare(keys.leader, Target.CREATE, term)]\n",
            "    compares: list[Compare] = []\n",
        ),
        "tests/sim/test_sim_catches.py::test_a_leader_that_slept_with_its_clocks_writes_nothing",
    ),
    _mutant(
        "record-guards-dropped",
        "G1: a decision does not compare the records it was made from, and overwrites newer ones.",
        f"{COORDINATOR}/persistence.py",
        (
            "    compares += [Compare(key, Target.MOD, mod_revision) for key, mod_revision in expected.items()]\n",
            "",
        ),
        f"{ON_COORDINATOR}/test_persistence.py::test_a_changed_record_is_a_conflict_at_its_revision",
    ),
    _mutant(
        "absence-not-compared",
        "G3: a reader that pins a checkpoint while it is being retired does not stop that.",
        f"{COORDINATOR}/persistence.py",
        ("for rule in decision.absent\n", "for rule in decision.absent[:0]\n"),
        f"{ON_COORDINATOR}/test_persistence.py::test_a_pin_that_came_meanwhile_stops_a_retirement",
    ),
    _mutant(
        "unknown-taken-for-success",
        "G2: a write whose answer was lost counts as done, so commands leave for what may never be.",
        f"{COORDINATOR}/persistence.py",
        (
            "        except OutcomeUnknown:\n            return self._look(term, txn)\n",
            "        except OutcomeUnknown:\n            return Committed(1)\n",
        ),
        f"{ON_COORDINATOR}/test_persistence.py::test_a_write_that_may_still_come_is_unknown_and_harmless_when_it_comes",
    ),
    _mutant(
        "unknown-taken-for-failure",
        "G7: a write whose answer was lost counts as not done, so it is decided twice.",
        f"{COORDINATOR}/persistence.py",
        (
            "        except OutcomeUnknown:\n            return self._look(term, txn)\n",
            '        except OutcomeUnknown:\n            return NotWritten("no answer", retry=True)\n',
        ),
        f"{ON_COORDINATOR}/test_persistence.py::test_a_lost_answer_of_an_applied_write_is_found_by_reading",
    ),
    _mutant(
        "unknown-retried-without-reading",
        "G7: a write whose answer was lost is sent again at once; its own first try then looks like a rival.",
        f"{COORDINATOR}/persistence.py",
        (
            "        except OutcomeUnknown:\n            return self._look(term, txn)\n",
            "        except OutcomeUnknown:\n            return self.commit(term, decision)\n",
        ),
        f"{ON_COORDINATOR}/test_persistence.py::test_a_lost_answer_of_an_applied_write_is_found_by_reading",
    ),
    _mutant(
        "deadline-not-checked-before-a-commit",
        "A replica whose lease may be over still sends transactions.",
        f"{COORDINATOR}/persistence.py",
        (
            "        if not self._may_act():\n            # Correctness",
            "        if False:\n            # Correctness",
        ),
        f"{ON_COORDINATOR}/test_persistence.py::test_a_replica_that_may_not_act_does_not_even_try",
    ),
    _mutant(
        "submission-overwrites-a-running-job",
        "G7: two submissions at once both believe that they created the job.",
        f"{COORDINATOR}/api/records.py",
        ("for key in (names[0], names[1])\n", "for key in ()\n"),
        f"{ON_COORDINATOR}/test_api.py::test_a_submission_that_came_between_reading_and_writing_is_not_overwritten",
    ),
    # The leader's loop ----------------------------------------------------------------------
    _mutant(
        "acts-before-the-mirror-has-reached-the-term",
        "G1: a new leader decides from what its predecessor has changed since.",
        f"{COORDINATOR}/driver.py",
        (
            "        if self._term is None or self.leads or self._revision < self._term:\n",
            "        if self._term is None or self.leads:\n",
        ),
        f"{ON_COORDINATOR}/test_driver.py::test_nothing_is_decided_before_the_mirror_has_reached_the_term",
    ),
    _mutant(
        "own-writes-not-awaited",
        "G7: a job is decided about again before the mirror shows what was just decided.",
        f"{COORDINATOR}/driver.py",
        (
            "track.in_flight is None and self._revision >= track.reach and now >= track.not_before",
            "track.in_flight is None and now >= track.not_before",
        ),
        f"{ON_COORDINATOR}/test_driver.py::test_a_job_is_not_looked_at_again_while_its_commit_is_in_flight_or_unseen",
    ),
    _mutant(
        "commands-before-their-decision-is-durable",
        "G4: agents act on a decision that a successor cannot read back.",
        f"{COORDINATOR}/driver.py",
        (
            "        track.in_flight = decision\n        self.world.reserve(",
            "        self._perform(job, track, decision, now)\n"
            "        track.in_flight = decision\n        self.world.reserve(",
        ),
        f"{ON_COORDINATOR}/test_driver.py::test_commands_leave_only_after_their_decision_is_durable",
    ),
    _mutant(
        "answer-trusted-instead-of-the-snapshot",
        "G7: a command that was answered is never sent again, though its effect may have died with the agent.",
        f"{COORDINATOR}/driver.py",
        (
            "        if sent is not None and now < sent.at + wait_s:\n",
            "        if sent is not None and not sent.failed:\n            return\n"
            "        if sent is not None and now < sent.at + wait_s:\n",
        ),
        f"{ON_COORDINATOR}/test_driver.py::test_a_command_is_repeated_each_retry_and_sooner_after_a_failure",
    ),
    _mutant(
        "readiness-taken-from-an-agent-s-former-life",
        "G6: START goes out on the word of an agent that has restarted since.",
        f"{CORE}/liveness.py",
        ("(seat.phase is WorkerPhase.READY and seat.current)", "(seat.phase is WorkerPhase.READY)"),
        f"{ON_COORDINATOR}/test_plan_start.py::"
        "test_agent_that_restarts_after_ready_is_prepared_again_before_any_start",
    ),
    _mutant(
        "poison-job-stops-the-loop",
        "G8: one job whose plan crashes takes the coordinator, and the next, with it.",
        f"{COORDINATOR}/driver.py",
        (
            "        except Exception as error:  # noqa: BLE001 - one job's poison",
            "        except LookupError as error:  # noqa: BLE001 - one job's poison",
        ),
        f"{ON_COORDINATOR}/test_driver.py::test_a_job_that_crashes_its_plan_is_quarantined_and_the_others_go_on",
    ),
    _mutant(
        "slots-not-reserved-until-seen",
        "Two jobs decided in one moment get the same slots.",
        f"{COORDINATOR}/driver.py",
        ("        self.world.reserve(job, _status_in(decision))\n", ""),
        f"{ON_COORDINATOR}/test_driver.py::test_two_jobs_decided_in_one_moment_do_not_take_the_same_slots",
    ),
    _mutant(
        "older-leader-decides",
        "G1: a leader writes over what a later term has decided.",
        f"{CORE}/plan.py",
        ("status.term > fleet.term", "status.term > fleet.term + 10**9"),
        f"{ON_COORDINATOR}/test_plan_leaders.py::test_leader_of_an_older_term_decides_nothing",
    ),
    # Draining -------------------------------------------------------------------------------
    _mutant(
        "drained-machine-chosen-again",
        "G6: the next attempt is placed on the very machine that is about to go.",
        f"{CORE}/placement.py",
        (" or view.draining_at is not None:\n", ":\n"),
        f"{ON_COORDINATOR}/test_plan_draining.py::test_nothing_new_is_placed_on_a_draining_machine",
    ),
    _mutant(
        "drained-ranks-told-to-go-on",
        "Ranks that hold at the last checkpoint train on while it is uploaded: those steps are done twice.",
        f"{CORE}/checkpoints.py",
        (
            "record.nonce, record.step, record.hold_s, record.asked",
            "record.nonce, record.step, 0.0, record.asked",
        ),
        f"{ON_COORDINATOR}/test_plan_draining.py::"
        "test_a_checkpoint_is_opened_at_once_and_all_ranks_are_to_hold_at_it",
    ),
    _mutant(
        "drain-waits-for-nobody-s-answer",
        "An agent without a leader waits out its whole grace before it ends.",
        f"{AGENT}/core/draining.py",
        ("    if not drain.answered and now >= _answer_due(drain):\n", "    if False:\n"),
        f"{ON_AGENT}/test_core_draining.py::test_without_a_leader_the_wait_is_a_share_of_the_grace",
    ),
    _mutant(
        "drain-forgotten-by-a-successor",
        "An agent that dies while it drains comes back as if nobody had told it to end.",
        f"{ETCD}/guardian.py",
        ("        told = self._signals > 0\n", "        told = False\n"),
        f"{ON_ETCD}/test_guardian.py::test_a_draining_child_that_dies_is_started_again_and_knows_since_when",
    ),
    _mutant(
        "notice-with-less-time-ignored",
        "A machine that drains by its own clock is taken away in the middle of it: the notice was heard and not heeded.",
        f"{AGENT}/core/draining.py",
        ("    elif until >= known.until:\n", "    elif known is not None:\n"),
        f"{ON_AGENT}/test_core_draining.py::"
        "test_a_wish_with_less_time_shortens_the_first_one_and_one_with_more_changes_nothing",
    ),
    _mutant(
        "notice-given-up-before-its-time",
        "Ranks on a machine that goes in two minutes are ended after ten seconds without a leader, instead of saved by the next.",
        f"{AGENT}/core/draining.py",
        ('    if drain.stays:\n        return ""\n', ""),
        f"{ON_AGENT}/test_core_draining.py::test_ranks_on_a_machine_that_goes_are_not_ended_before_it_does",
    ),
    _mutant(
        "notice-looked-at-after-registering",
        "An agent that starts on a machine that is about to go gets ranks in the seconds before it says so.",
        f"{AGENT}/main.py",
        ("        self._notices.start()\n        self._begin_drain()\n", "        self._begin_drain()\n"),
        f"{ON_AGENT}/test_main.py::"
        "test_a_machine_that_is_to_go_says_so_before_anything_is_placed_there_and_stays_until_it_goes",
    ),
    _mutant(
        "preempted-agent-ends-by-itself",
        "An agent that its notice has drained ends, is started again by its supervisor, and ends, until the machine goes.",
        f"{AGENT}/main.py",
        (
            "        if self._told_to_drain_at is not None or not self._notices.standing:\n",
            "        if True:\n",
        ),
        f"{ON_AGENT}/test_main.py::"
        "test_a_machine_that_is_to_go_says_so_before_anything_is_placed_there_and_stays_until_it_goes",
    ),
    _mutant(
        "notice-without-a-reserve",
        "The drain's grace ends when the machine does: its ranks are not ended in order, and the last bytes are cut off.",
        f"{AGENT}/notices.py",
        (
            "    return max(GRACE_S_LEAST, notice.left_s - slack_s)\n",
            "    return max(GRACE_S_LEAST, notice.left_s)\n",
        ),
        f"{ON_AGENT}/test_notices.py::test_a_reserve_is_kept_of_what_a_notice_leaves",
    ),
    _mutant(
        "notice-of-another-machine-heeded",
        "Azure tells all machines of a scale set of each one's end, and all of them drain at once.",
        f"{AGENT}/notice_http.py",
        ("        return self._name() in resources\n", "        return True\n"),
        f"{ON_AGENT}/test_notices.py::test_azure_s_events_count_if_they_take_this_machine_away",
    ),
    _mutant(
        "notice-by-the-machine-s-own-clock",
        "On a machine whose clock is ahead every notice is over before it has come, and nothing is saved.",
        f"{AGENT}/notice_http.py",
        ("until - (answer.at or wall)", "until - wall"),
        f"{ON_AGENT}/test_notices.py::test_aws_is_asked_with_a_token_that_is_renewed",
    ),
    _mutant(
        "failing-source-withdraws-its-notice",
        "A metadata service that goes before its machine takes its notice back: the agent ends, and its next life takes ranks.",
        f"{AGENT}/notices.py",
        (
            "            self._failed(one, error)\n            return\n",
            "            self._failed(one, error)\n            one.standing = False\n            return\n",
        ),
        f"{ON_AGENT}/test_notices.py::test_a_notice_is_told_once_and_stands_until_it_is_withdrawn",
    ),
    _mutant(
        "rolled-back-and-not-noticed",
        "I5: the auditor does not see an attempt that begins from the very checkpoint that was rolled back past.",
        "common/dtrain/protocol/audit.py",
        (
            "        if begins_from is not None and begins_from.seq in record.passed_over:\n",
            "        if begins_from is not None and not record.passed_over:\n",
        ),
        "tests/unit/protocol/test_audit.py::test_the_auditor_names[an attempt that begins from what training was rolled back past]",
    ),
    # Leadership -----------------------------------------------------------------------------
    _mutant(
        "lost-claim-not-recognised",
        "A replica whose winning answer was lost waits for itself until the lease ends.",
        f"{COORDINATOR}/leadership/elector.py",
        (
            "        elif holder is not None and (holder.lease, holder.nonce) == (self._lease, self._nonce):\n",
            "        elif False and holder is not None:\n",
        ),
        f"{ON_COORDINATOR}/test_elector.py::test_a_create_whose_answer_was_lost_is_recognised_by_its_nonce",
    ),
    _mutant(
        "former-life-s-key-taken-for-ours",
        "G1: a restarted replica takes the key of its former life for its own term.",
        f"{COORDINATOR}/leadership/elector.py",
        ("(holder.lease, holder.nonce) == (self._lease, self._nonce)", "holder.lease == self._lease"),
        f"{ON_COORDINATOR}/test_elector.py::test_the_key_of_a_former_life_of_this_replica_is_not_ours",
    ),
    _mutant(
        "leads-beyond-its-deadline",
        "A leader whose lease was not renewed goes on as if it had been.",
        f"{COORDINATOR}/leadership/lease.py",
        (
            "        if self._term is not None and not self._session.may_act(now):\n",
            "        if False:\n",
        ),
        f"{ON_COORDINATOR}/test_elector.py::test_a_leader_past_its_deadline_is_over",
    ),
    _mutant(
        "session-ignores-its-deadline",
        "G1: a process cut off from etcd never learns from its session that it must stop acting.",
        f"{ETCD}/session.py",
        (
            "        return now < view.demote_at and self._acting in (0, view.generation)\n",
            "        return self._acting in (0, view.generation)\n",
        ),
        f"{ON_ETCD}/test_guardian.py::"
        "test_a_leader_cut_from_etcd_stops_acting_and_is_killed_before_its_lease_can_end",
    ),
    _mutant(
        "deadline-counted-from-the-answer",
        "G1: a slow answer to a renewal stretches the time for which a leader believes in its lease.",
        f"{ETCD}/lease_keeper.py",
        (
            "            self._held = replace(self._held, ttl_s=ttl_s, sent_at=sent_at)\n",
            "            self._held = replace(self._held, ttl_s=ttl_s, sent_at=boottime())\n",
        ),
        f"{ON_ETCD}/test_corners.py::test_deadlines_count_from_before_the_renewal_was_sent",
    ),
    _mutant(
        "revoked-before-the-child-is-dead",
        "G1: the guardian gives the lease up while its child can still act, so that two leaders do.",
        f"{ETCD}/guardian.py",
        (
            '                self._report("child killed", pid=child.process.pid, why=why)\n'
            "                child.process.kill()\n",
            '                self._report("child killed", pid=child.process.pid, why=why)\n'
            "                if self._config.policy is Policy.COORDINATOR:\n"
            "                    self._give_up_lease()\n"
            "                    time.sleep(1.0)\n"
            "                child.process.kill()\n",
        ),
        f"{ON_ETCD}/test_guardian.py::test_a_coordinator_s_lease_is_revoked_only_after_it_is_gone[19]",
    ),
    _mutant(
        "stuck-child-ignored",
        "A coordinator that hangs keeps the lease, and nobody leads.",
        f"{ETCD}/guardian.py",
        (
            "        if child.memory.has_flag(STARTED) and now - child.beat_at > hang_s:\n",
            "        if False and now - child.beat_at > hang_s:\n",
        ),
        f"{ON_ETCD}/test_guardian.py::test_a_coordinator_s_lease_is_revoked_only_after_it_is_gone[19]",
    ),
    _mutant(
        "child-outlives-its-guardian",
        "G1: a coordinator whose guardian died acts on under a lease that nobody renews.",
        f"{ETCD}/session.py",
        ("_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0", "_PR_SET_PDEATHSIG, 0, 0, 0, 0"),
        f"{ON_ETCD}/test_guardian.py::test_a_child_dies_with_its_guardian",
    ),
    _mutant(
        "agent-s-lease-ends-with-the-agent",
        "G6: a crash of the agent's process alone looks like the loss of its machine.",
        f"{ETCD}/guardian.py",
        (
            "        keeps_lease = self._config.policy is Policy.AGENT\n",
            "        keeps_lease = False\n",
        ),
        f"{ON_ETCD}/test_guardian.py::test_an_agent_is_restarted_under_the_lease_it_had[9]",
    ),
    _mutant(
        "leader-not-killed-when-its-lease-was-not-renewed",
        "G1: a leader that does not stop by itself lives beyond its lease.",
        f"{ETCD}/guardian.py",
        ("            if now > held.kill_at:\n", "            if False:\n"),
        f"{ON_ETCD}/test_guardian.py::"
        "test_a_leader_cut_from_etcd_stops_acting_and_is_killed_before_its_lease_can_end",
    ),
    _mutant(
        "leader-of-a-lost-lease-not-killed",
        "G1: a leader whose lease etcd has called lost goes on.",
        f"{ETCD}/guardian.py",
        ("            if held.lost or acting != held.generation:\n", "            if False:\n"),
        f"{ON_ETCD}/test_guardian.py::test_a_leader_whose_lease_was_revoked_is_killed",
    ),
    _mutant(
        "deadline-not-checked-before-a-command",
        "A replica whose lease may be over still commands agents.",
        f"{COORDINATOR}/main.py",
        (
            "        if self.leadership.may_act():\n            judge_unknown",
            "        if True:\n            judge_unknown",
        ),
        f"{ON_COORDINATOR}/test_main.py::test_no_command_leaves_a_replica_whose_deadline_has_passed",
    ),
    _mutant(
        "dispatcher-sends-after-its-end",
        "I6: commands of a deposed leader still leave.",
        f"{COORDINATOR}/dispatch.py",
        ("            if self._closed:\n                return\n", ""),
        f"{ON_COORDINATOR}/test_dispatch.py::test_after_close_nothing_leaves",
    ),
    # Watching etcd --------------------------------------------------------------------------
    _mutant(
        "watch-resumes-too-late",
        "I8: a watch that is opened again skips a revision, and the mirror is wrong for ever.",
        f"{ETCD}/mirror.py",
        ("prefix_end(self._prefix), max(1, self.revision))", "prefix_end(self._prefix), self.revision + 2)"),
        f"{ON_ETCD}/test_mirror.py::test_a_mirror_holds_what_was_there_and_follows_what_comes[memory]",
    ),
    _mutant(
        "watch-resumes-right-behind-the-applied-revision",
        "I8: on servers before 3.5.16 a deletion at exactly the compacted revision is missed.",
        f"{ETCD}/mirror.py",
        ("prefix_end(self._prefix), max(1, self.revision))", "prefix_end(self._prefix), self.revision + 1)"),
        f"{ON_ETCD}/test_corners.py::test_a_deletion_at_the_compacted_revision_is_not_missed",
    ),
    _mutant(
        "applied-events-applied-again",
        "I8: an event that was applied before takes the mirror back to an older value.",
        f"{ETCD}/mirror.py",
        ("            if kv.mod_revision <= self.revision:\n                continue\n", ""),
        f"{ON_ETCD}/test_mirror.py::test_killing_the_watched_member_under_writes_loses_and_repeats_nothing",
    ),
    _mutant(
        "canceled-watch-ignored",
        "I8: a watch that etcd has refused is waited on for ever.",
        f"{ETCD}/watching.py",
        ('            if result.get("canceled"):\n', '            if result.get("no such field"):\n'),
        f"{ON_ETCD}/test_port.py::test_a_watch_from_before_the_compaction_is_refused_as_compacted[gateway-3.5]",
    ),
    _mutant(
        "compact-revision-ignored",
        "I8: a compacted resume point is taken for a broken stream and asked for again for ever.",
        f"{ETCD}/watching.py",
        ('int(result.get("compact_revision", 0))', 'int(result.get("no such field", 0))'),
        f"{ON_ETCD}/test_port.py::test_a_watch_from_before_the_compaction_is_refused_as_compacted[gateway-3.5]",
    ),
    _mutant(
        "no-new-list-after-a-compaction",
        "I8: a mirror goes on watching where history is gone.",
        f"{ETCD}/mirror.py",
        (
            '            self._log.warning("mirror lists again", prefix=self._prefix, why=str(error))\n'
            "            self._list_again(Relist.COMPACTED)\n",
            '            self._log.warning("mirror lists again", prefix=self._prefix, why=str(error))\n',
        ),
        f"{ON_ETCD}/test_mirror.py::"
        "test_compaction_past_the_resume_point_lists_again_and_finds_missed_deletions",
    ),
    _mutant(
        "list-keeps-what-was-deleted",
        "I8: deletions that happened between two lists are never noticed.",
        f"{ETCD}/mirror.py",
        (
            "        fresh = {kv.key: kv for kv in items}\n",
            "        fresh = {**self._items, **{kv.key: kv for kv in items}}\n",
        ),
        f"{ON_ETCD}/test_mirror.py::"
        "test_compaction_past_the_resume_point_lists_again_and_finds_missed_deletions",
    ),
    _mutant(
        "list-keeps-what-was-deleted-in-simulation",
        "I8: the same, in a whole cluster whose watches are cut and compacted.",
        f"{ETCD}/mirror.py",
        (
            "        fresh = {kv.key: kv for kv in items}\n",
            "        fresh = {**self._items, **{kv.key: kv for kv in items}}\n",
        ),
        "tests/sim/test_sim_catches.py::test_deletions_between_two_lists_are_not_missed",
    ),
    _mutant(
        "pages-not-pinned",
        "I8: a list in pages mixes several revisions.",
        f"{ETCD}/mirror.py",
        ("self._etcd.range(after, end, revision=revision, limit", "self._etcd.range(after, end, limit"),
        f"{ON_ETCD}/test_corners.py::test_a_list_in_pages_is_of_one_revision",
    ),
    _mutant(
        "status-of-one-member-believed",
        "A member that lags is taken for a restored etcd, and a replica stops for good.",
        f"{ETCD}/mirror.py",
        (
            "        self._identity = status\n",
            "        if known is not None and status.raft_term < known.raft_term:\n"
            '            raise _went_back("the raft term is lower")\n'
            "        self._identity = status\n",
        ),
        f"{ON_ETCD}/test_mirror.py::"
        "test_a_member_that_lags_is_not_taken_for_an_older_etcd_however_often_it_answers",
    ),
    _mutant(
        "quorum-of-an-older-term-believed",
        "The mirror goes on with an etcd that was restored from an older state.",
        f"{ETCD}/mirror.py",
        ("        elif 0 < answer.raft_term < self._raft_term:\n", "        elif False:\n"),
        f"{ON_ETCD}/test_mirror.py::test_a_quorum_of_an_older_raft_term_is_refused_with_an_alarm",
    ),
    _mutant(
        "silence-not-noticed",
        "A stream that swallows events is trusted for ever.",
        f"{ETCD}/mirror.py",
        ("elif now - heard_at > 3 * self._interval_s:", "elif now - heard_at > 3000 * self._interval_s:"),
        f"{ON_ETCD}/test_mirror.py::test_a_stream_that_swallows_events_is_given_up",
    ),
    _mutant(
        "line-cap-dropped",
        "A stream without a line feed fills the memory.",
        f"{ETCD}/framing.py",
        ("        if len(self._line) > self._line_bytes_max:\n", "        if False:\n"),
        "tests/unit/storage/test_etcd_framing.py::test_a_line_beyond_the_cap_ends_the_stream",
    ),
    # The transport --------------------------------------------------------------------------
    _mutant(
        "other-cluster-accepted",
        "A member of another cluster is believed.",
        f"{ETCD}/transport.py",
        ("        if cluster_id != self._cluster_id:\n", "        if False:\n"),
        f"{ON_ETCD}/test_gateway_faults.py::test_another_cluster_is_refused",
    ),
    _mutant(
        "lower-raft-term-accepted",
        "An etcd that was restored from an older state is believed.",
        f"{ETCD}/transport.py",
        ("        if 0 < term < term_at_send and not raised:\n", "        if False:\n"),
        f"{ON_ETCD}/test_gateway_faults.py::test_a_lower_raft_term_is_refused",
    ),
    _mutant(
        "older-term-of-the-newest-revision-is-refused",
        "A member that has caught up by a snapshot is taken for a restored etcd, and a replica stops for good.",
        f"{ETCD}/transport.py",
        ("        if certain or now - since >= OLDER_TERM_S:\n", "        if True:\n"),
        f"{ON_ETCD}/test_gateway_faults.py::test_another_member_is_asked_when_one_tells_a_lower_raft_term",
    ),
    _mutant(
        "older-term-that-stays-is-never-refused",
        "An etcd that was restored and has grown beyond what was seen is asked for ever, and nobody is told.",
        f"{ETCD}/transport.py",
        ("        if certain or now - since >= OLDER_TERM_S:\n", "        if certain:\n"),
        f"{ON_ETCD}/test_gateway_faults.py::"
        "test_a_lower_raft_term_with_the_newest_revision_is_refused_only_when_it_stays",
    ),
    _mutant(
        "token-not-renewed",
        "An expired or foreign token is an error for good.",
        f"{ETCD}/transport.py",
        (
            "        except LoginNeeded:\n            if not self._user:\n",
            "        except LoginNeeded:\n            if True:\n",
        ),
        f"{ON_ETCD}/test_gateway_faults.py::test_an_expired_token_costs_one_login_and_no_error",
    ),
    _mutant(
        "timed-out-request-taken-for-nothing-happened",
        "G7: a 'request timed out', which was seen to be applied later, counts as not applied.",
        f"{ETCD}/outcomes.py",
        (
            '    if "no leader" in text or "not a primary',
            '    if "request timed out" in text or "no leader" in text or "not a primary',
        ),
        f"{ON_ETCD}/test_gateway_faults.py::test_answers_are_told_apart",
    ),
    _mutant(
        "write-resent-to-the-next-member",
        "G7: a transaction that one member may have applied is sent to the next one.",
        f"{ETCD}/transport.py",
        ("deadline_s, resend=not writes, linearizable=True", "deadline_s, resend=True, linearizable=True"),
        f"{ON_ETCD}/test_corners.py::test_a_write_is_not_sent_to_another_member_while_its_outcome_is_unknown",
    ),
    # The model ------------------------------------------------------------------------------
    _mutant(
        "model-compares-all-of-a-range-as-any",
        "The simulation runs on an etcd that does not exist.",
        f"{ETCD}/semantics.py",
        (
            "        return all(_relates(compare, kv) for kv in found)\n",
            "        return any(_relates(compare, kv) for kv in found)\n",
        ),
        f"{ON_ETCD}/test_differential.py::test_the_model_and_a_server_agree_on_random_programs[3.5]",
    ),
    _mutant(
        "model-keeps-a-key-under-its-former-lease",
        "The simulation runs on an etcd that deletes keys which were put again without their lease.",
        f"{ETCD}/memory.py",
        (
            "            self._leases[before.lease].keys.discard(put.key)\n",
            "            self._leases[before.lease].keys.add(put.key)\n",
        ),
        f"{ON_ETCD}/test_differential.py::test_the_model_and_a_server_agree_on_random_programs[3.5]",
    ),
    # Agents and machines --------------------------------------------------------------------
    _mutant(
        "agent-obeys-a-lower-term",
        "I6: a deposed leader still ends training.",
        f"{AGENT}/core/commands.py",
        ("    if head.term < state.term:\n", "    if False:\n"),
        f"{ON_AGENT}/test_core_attempts.py::test_a_lower_term_is_refused",
    ),
    _mutant(
        "agent-obeys-an-unconfirmed-term",
        "I6: anybody who sends a large number is obeyed.",
        f"{AGENT}/core/commands.py",
        ("        if not event.confirmed:\n", "        if False:\n"),
        f"{ON_AGENT}/test_core_attempts.py::test_a_higher_term_is_refused_until_it_is_confirmed",
    ),
    _mutant(
        "term-confirmed-without-reading",
        "I6: an agent takes any higher term for confirmed.",
        f"{AGENT}/main.py",
        ("        return bool(found) and found[0].create_revision == term\n", "        return bool(found)\n"),
        f"{ON_AGENT}/test_main.py::test_a_term_counts_only_if_etcd_says_that_it_leads",
    ),
    _mutant(
        "agent-obeys-a-lower-attempt",
        "I6: a late PREPARE of an older attempt ends the present one's ranks.",
        f"{AGENT}/core/commands.py",
        (
            "        if head.attempt < job.attempt:\n            return Answer",
            "        if False:\n            return Answer",
        ),
        f"{ON_AGENT}/test_core_attempts.py::test_a_lower_attempt_is_refused",
    ),
    _mutant(
        "command-carried-out-twice",
        "I7: a repeated command has a second effect.",
        f"{AGENT}/core/commands.py",
        ("    if known and not _is", "    if False and not _is"),
        f"{ON_AGENT}/test_core_attempts.py::"
        "test_a_repeated_command_is_accepted_has_no_second_effect_and_is_answered_by_a_snapshot",
    ),
    _mutant(
        "journal-after-the-act",
        "I6: an agent that dies between act and journal does not know its own ranks.",
        f"{AGENT}/driver.py",
        (
            "        if not self._journal(state, decision, event):\n",
            "        self._carry_out(decision.actions)\n"
            "        if not self._journal(state, decision, event):\n",
        ),
        f"{ON_AGENT}/test_driver.py::test_without_a_journal_no_command_is_taken",
    ),
    _mutant(
        "snapshot-not-fenced-by-the-registration",
        "I6: an agent's former life overwrites the snapshots of the present one.",
        f"{AGENT}/reporter.py",
        (
            "Txn((fence, newest), (Put(key, value, self._lease),), reread)",
            "Txn((newest,), (Put(key, value, self._lease),), reread)",
        ),
        f"{ON_AGENT}/test_reporter.py::test_a_restarted_agent_takes_over_under_the_same_lease_and_fences_its_former_self",
        f"{ON_AGENT}/test_reporter.py::test_a_name_taken_meanwhile_fences_every_snapshot",
    ),
    _mutant(
        "ready-while-older-ranks-live",
        "I6: an attempt begins beside processes of an older one that were not seen to be gone.",
        f"{AGENT}/core/preparing.py",
        ("        and job.cleared\n", ""),
        f"{ON_AGENT}/test_core_attempts.py::test_ready_waits_for_whatever_comes_last[clear]",
    ),
    _mutant(
        "kill-not-verified",
        "I6: the launcher says 'cleared' as soon as it has sent SIGKILL.",
        f"{AGENT}/launch/family.py",
        (
            "        signal_all(left, signal.SIGKILL)\n        if not left:\n            return True, ()\n",
            "        signal_all(left, signal.SIGKILL)\n        return True, ()\n",
        ),
        f"{ON_AGENT}/test_launcher_parts.py::test_what_cannot_die_is_named_after_the_patience",
    ),
    _mutant(
        "orphan-grace-ignored",
        "G6: ranks without an agent go on for ever.",
        f"{AGENT}/launcher.py",
        (
            "        return self._alone_since is not None and now >=",
            "        return False and self._alone_since is not None and now >=",
        ),
        "tests/e2e/test_launcher.py::test_without_an_agent_everything_ends_after_the_orphan_grace",
    ),
    _mutant(
        "restarted-agent-forgets-its-launcher",
        "G5: an agent that restarts does not find its ranks again.",
        f"{AGENT}/core/adoption.py",
        ("        if launcher.process is None:\n", "        if True:\n"),
        f"{ON_AGENT}/test_driver.py::test_a_launcher_that_died_with_the_agent_is_a_failed_attempt",
    ),
    _mutant(
        "rank-of-an-older-attempt-welcomed",
        "G4: a zombie rank takes part in the present attempt.",
        f"{AGENT}/core/ranks.py",
        ("    if job.attempt != hello.attempt:\n", "    if False:\n"),
        f"{ON_AGENT}/test_core_attempts.py::test_a_zombie_rank_is_sent_away_from_a_running_attempt",
    ),
    # Losses ---------------------------------------------------------------------------------
    _mutant(
        "new-leader-settles-nothing",
        "G5: a change of leader alone makes agents count as lost.",
        f"{CORE}/liveness.py",
        (
            "        due = max(fleet.took_office_at + fleet.agent_ttl_s, ",
            "        due = max(fleet.took_office_at, ",
        ),
        f"{ON_COORDINATOR}/test_plan_failures.py::test_agent_missing_since_the_change_of_leader_gets_one_ttl",
    ),
    _mutant(
        "brake-ignored",
        "I9: when etcd or the network fails, the whole fleet is declared lost.",
        f"{CORE}/liveness.py",
        (
            "(Standing.SETTLING if draft.fleet.brake else Standing.LOST)",
            "Standing.LOST",
        ),
        f"{ON_COORDINATOR}/test_plan_failures.py::test_nothing_is_lost_under_the_brake",
    ),
    _mutant(
        "stale-mirror-does-not-brake",
        "I9: losses are declared from a mirror that has not heard of etcd.",
        f"{COORDINATOR}/losses.py",
        ("now - heard_at > MIRROR_AGE_S_MAX:", "now - heard_at > 1000 * MIRROR_AGE_S_MAX:"),
        f"{ON_COORDINATOR}/test_world.py::test_a_stale_mirror_brakes_and_says_when_it_will",
    ),
    _mutant(
        "brake-counts-any-loss",
        "I9: a third of the fleet may vanish at once without a doubt.",
        f"{COORDINATOR}/losses.py",
        ("len(gone) > BRAKE_SHARE * total", "len(gone) > total"),
        f"{ON_COORDINATOR}/test_world.py::test_the_brake_comes_on_when_a_third_of_the_fleet_vanishes",
    ),
    _mutant(
        "attempt-not-numbered-anew",
        "I5: two attempts share a number, so that an older one can commit.",
        f"{CORE}/phases.py",
        (
            "    number = Attempt(draft.status.attempt + 1)\n",
            "    number = Attempt(max(1, draft.status.attempt))\n",
        ),
        f"{ON_COORDINATOR}/test_plan_failures.py::test_failed_rank_starts_the_next_attempt_in_one_transaction",
    ),
    _mutant(
        "budget-charged-later-than-the-attempt",
        "I5: a crash between two transactions gives an attempt for free, or takes a restart for none.",
        f"{CORE}/phases.py",
        (
            "    draft.set(restarts=(*used, draft.moment.wall), charge=False)\n    return True\n",
            "    if draft.status.charge:\n        draft.set(restarts=(*used, draft.moment.wall), charge=False)\n"
            "        return False\n    return True\n",
        ),
        f"{ON_COORDINATOR}/test_plan_failures.py::test_failed_rank_starts_the_next_attempt_in_one_transaction",
    ),
    _mutant(
        "restore-point-not-fixed",
        "G6: ranks of one attempt may restore different checkpoints.",
        f"{CORE}/phases.py",
        (
            "        restore=restore,\n        store=store,\n",
            "        restore=draft.status.restore,\n        store=store,\n",
        ),
        f"{ON_COORDINATOR}/test_plan_checkpoints.py::test_next_attempt_restores_the_newest_commit",
    ),
    # Checkpoints ----------------------------------------------------------------------------
    _mutant(
        "settle-skipped",
        "G2: an open checkpoint of an older attempt may still be committed behind the new one's back.",
        f"{CORE}/settling.py",
        (
            "    since = draft.in_phase_since if waits else None\n",
            "    return True\n    since = draft.in_phase_since if waits else None\n",
        ),
        f"{ON_COORDINATOR}/test_plan_checkpoints.py::test_incomplete_checkpoint_is_deleted_before_the_next_attempt",
    ),
    _mutant(
        "suspended-before-the-ranks-are-gone",
        "Machines count as free while ranks of a job that is being suspended still run on them.",
        f"{CORE}/suspending.py",
        ("since is not None and (not alive or draft.now >= due)", "since is not None"),
        f"{ON_COORDINATOR}/test_plan_suspending.py"
        "::test_after_its_commit_all_ranks_are_stopped_and_only_then_the_machines_are_free",
    ),
    _mutant(
        "suspended-without-a-checkpoint",
        "Whoever is suspended loses the steps since its last checkpoint.",
        f"{CORE}/suspending.py",
        ("        elif _is_saved(draft, members):\n", "        elif True:\n"),
        f"{ON_COORDINATOR}/test_plan_suspending.py::test_a_checkpoint_is_taken_that_all_ranks_hold_at",
    ),
    _mutant(
        "nobody-ages-in-the-queue",
        "A job starves behind a stream of more important ones.",
        f"{CORE}/queue.py",
        (
            "return self.since - self.priority * AGING_S, -self.priority, self.job",
            "return -self.priority * AGING_S, int(self.since), self.job",
        ),
        f"{ON_COORDINATOR}/test_queue.py::test_waiting_makes_up_for_priority_so_that_nobody_starves",
    ),
    _mutant(
        "machines-are-not-kept-for-the-first",
        "A job of many machines starves behind a stream of small ones.",
        f"{CORE}/queue.py",
        ("                claims[one.job] = room.reserve(one)\n", "                pass\n"),
        f"{ON_COORDINATOR}/test_queue.py::test_small_jobs_slip_in_until_the_patience_of_the_first_is_over",
    ),
    _mutant(
        "growth-onto-what-others-claim",
        "A running job grows onto the machines that are kept for one that waits.",
        f"{CORE}/placement.py",
        (
            "held = fleet.queue.claimed() if growing else fleet.queue.held_from(draft.job.name)",
            "held = fleet.queue.held_from(draft.job.name)",
        ),
        f"{ON_COORDINATOR}/test_plan_elastic.py::"
        "test_a_machine_that_is_kept_for_a_job_that_waits_is_none_to_grow_by",
    ),
    _mutant(
        "growth-onto-what-the-first-is-about-to-claim",
        "A running job takes for good what the first in the queue would have claimed a moment later.",
        f"{CORE}/queue.py",
        ("        {} if patient is None else room.reserve(patient),\n", "        {},\n"),
        f"{ON_COORDINATOR}/test_queue.py::"
        "test_what_the_first_is_about_to_claim_is_nothing_to_grow_onto_either",
    ),
    _mutant(
        "commands-before-the-intent",
        "G2: ranks write blobs under a number that no record protects.",
        f"{CORE}/checkpoints.py",
        ("    draft.put(draft.keys.open(name, seq), record, 0)\n", ""),
        f"{ON_COORDINATOR}/test_plan_checkpoints.py::test_intent_is_written_before_any_command",
    ),
    _mutant(
        "commit-without-a-rank",
        "G2: a checkpoint is committed although a rank's part is missing.",
        f"{CORE}/committing.py",
        ("    return len(parts) == record.world_size\n", "    return len(parts) >= record.world_size - 1\n"),
        f"{ON_COORDINATOR}/test_plan_checkpoints.py::test_commit_needs_every_rank_and_a_good_verdict",
    ),
    _mutant(
        "parts-of-another-step-counted",
        "G2: parts of two steps make up one checkpoint.",
        f"{CORE}/committing.py",
        (
            "    return (part.seq, part.attempt, part.step, part.nonce) == (\n"
            "        record.seq,\n        record.attempt,\n        record.step,\n        record.nonce,\n    )",
            "    return (part.seq, part.attempt, part.nonce) == (\n"
            "        record.seq,\n        record.attempt,\n        record.nonce,\n    )",
        ),
        f"{ON_COORDINATOR}/test_plan_checkpoints.py::test_parts_of_a_zombie_are_not_counted",
    ),
    _mutant(
        "parts-of-another-attempt-counted",
        "G4: what a zombie of an older attempt reports makes up the present one's checkpoint.",
        f"{CORE}/committing.py",
        (
            "    return (part.seq, part.attempt, part.step, part.nonce) == (\n"
            "        record.seq,\n        record.attempt,\n        record.step,\n        record.nonce,\n    )",
            "    return (part.seq, part.step, part.nonce) == (\n"
            "        record.seq,\n        record.step,\n        record.nonce,\n    )",
        ),
        f"{ON_COORDINATOR}/test_plan_checkpoints.py::test_parts_of_a_zombie_are_not_counted",
    ),
    _mutant(
        "commit-without-a-verdict",
        "G2: a checkpoint that the store does not hold is committed.",
        f"{CORE}/checkpoints.py",
        (
            "    elif verdict is not None and verdict.ok and committing.is_complete(parts, record):\n        if ended",
            "    elif verdict is not None and committing.is_complete(parts, record):\n        if ended",
        ),
        f"{ON_COORDINATOR}/test_plan_checkpoints.py::"
        "test_refused_verdict_aborts_and_a_silent_store_is_asked_again",
    ),
    _mutant(
        "unfit-state-is-committed",
        "A checkpoint whose reported loss is not finite is committed.",
        f"{CORE}/checkpoints.py",
        (
            "    if unfit := nonfinite.refusal(draft, record):\n        committing.abort_unfit(draft, stored, unfit)\n    elif",
            "    if",
        ),
        f"{ON_COORDINATOR}/test_plan_nonfinite.py::"
        "test_what_a_rank_calls_unfit_is_never_committed_however_durable_it_is",
    ),
    _mutant(
        "unfit-state-is-settled",
        "A checkpoint whose reported loss is not finite is committed between attempts.",
        f"{CORE}/settling.py",
        (
            "    if unfit := nonfinite.refusal(draft, record):\n        committing.abort_unfit(draft, stored, unfit)\n        return True\n",
            "",
        ),
        f"{ON_COORDINATOR}/test_plan_nonfinite.py::"
        "test_an_unfit_checkpoint_of_an_attempt_that_is_over_is_not_settled_into_one",
    ),
    _mutant(
        "unfit-state-is-handed-on",
        "A rank hands its agent a copy of a state that a number speaks against.",
        "trainer/dtrain/trainer/session.py",
        (
            " and not self._refuse_unfit(sealed):\n                self._sealed = sealed",
            ":\n                self._sealed = sealed",
        ),
        "tests/unit/trainer/test_unfit.py::test_a_copy_that_was_made_all_the_same_is_not_handed_on",
    ),
    _mutant(
        "rollbacks-cost-nothing",
        "Training is rolled back past the same checkpoints for ever.",
        f"{CORE}/failures.py",
        (" and not rolled:", ":"),
        f"{ON_COORDINATOR}/test_plan_nonfinite.py::"
        "test_rolling_back_again_and_again_spends_the_budget_whatever_is_committed_between",
    ),
    _mutant(
        "a-straggler-is-named-at-once",
        "A rank that is slow for a moment is called persistently slow.",
        f"{CORE}/stragglers.py",
        ("NAMED_AFTER_S = 10.0", "NAMED_AFTER_S = 0.0"),
        f"{ON_COORDINATOR}/test_plan_stragglers.py::test_a_rank_that_stays_slow_is_named_and_cleared_once_it_keeps_up",
    ),
    _mutant(
        "commit-not-guarded-by-its-intent",
        "G2: a checkpoint that was aborted meanwhile is committed all the same.",
        f"{CORE}/committing.py",
        (
            "    draft.delete(keys.open(name, record.seq), stored.mod_revision)\n    latest",
            "    draft.delete(keys.open(name, record.seq), None)\n    latest",
        ),
        f"{ON_COORDINATOR}/test_plan_checkpoints.py::test_commit_is_guarded_by_open_record_latest_and_absence",
    ),
    _mutant(
        "latest-goes-back",
        "I4: a checkpoint that is settled late becomes the newest one.",
        f"{CORE}/committing.py",
        ("    elif latest is None or latest.value.seq < record.seq:\n", "    elif True:\n"),
        f"{ON_COORDINATOR}/test_plan_checkpoints.py::test_latest_never_moves_back",
    ),
    _mutant(
        "final-checkpoint-not-awaited",
        "G2: ranks are let go before the checkpoint of their last step is committed.",
        f"{CORE}/outcomes.py",
        (
            "    if not draft.status.store or final_commit(draft) is not None or gave_up_final(draft):\n",
            "    if True:\n",
        ),
        f"{ON_COORDINATOR}/test_plan_end.py::test_end_of_training_is_checkpointed_before_ranks_may_exit",
    ),
    _mutant(
        "departed-machine-s-parts-forgotten",
        "G2: a machine lost after its upload wastes a durable checkpoint.",
        f"{CORE}/committing.py",
        (
            "    if not missing:\n        return False\n    by_rank",
            "    if missing:\n        return False\n    by_rank",
        ),
        f"{ON_COORDINATOR}/test_plan_checkpoints.py::"
        "test_parts_of_a_lost_machine_are_kept_and_still_make_a_commit",
    ),
    _mutant(
        "slot-used-again-before-the-outcome",
        "G2: a rank overwrites a snapshot that is still being uploaded.",
        f"{TRAINER}/session.py",
        (
            "            elif self._sealed is not None or self._taking is not None:\n",
            "            elif False:\n",
        ),
        "tests/unit/trainer/test_session.py::test_a_slot_whose_outcome_is_not_known_takes_no_other_snapshot",
    ),
    _mutant(
        "older-outcome-frees-the-slot",
        "G2: the outcome of an older checkpoint thaws a newer snapshot.",
        f"{TRAINER}/session.py",
        ("self._sealed.seq <= outcome.seq", "self._sealed.seq > 0"),
        "tests/unit/trainer/test_session.py::test_an_older_outcome_does_not_thaw_a_newer_snapshot",
    ),
    _mutant(
        "failed-upload-not-reported",
        "G10: a checkpoint whose upload failed stays open until its deadline, and nobody learns why.",
        f"{AGENT}/core/saving.py",
        (
            "    return problem(job, SaveProblem(seq, rank, False, saving.step, message[:PROBLEM_CHARS_MAX]))\n",
            "    return job\n",
        ),
        f"{ON_AGENT}/test_core_checkpoints.py::test_a_failed_upload_is_a_problem_and_training_goes_on",
    ),
    _mutant(
        "reported-digest-not-verified-at-commit",
        "G2: a rank manifest that is not the one reported goes into a commit.",
        f"{COORDINATOR}/work.py",
        ("        if hashlib.sha256(data).hexdigest() != part.digest:\n", "        if False:\n"),
        f"{ON_COORDINATOR}/test_work.py::test_a_rank_manifest_that_is_not_what_was_reported_is_refused",
    ),
    _mutant(
        "stored-blobs-not-verified-at-commit",
        "G2: blobs that the store does not hold as reported go into a commit.",
        f"{COORDINATOR}/work.py",
        ("            if found.size_bytes != blob.bytes:\n", "            if False:\n"),
        f"{ON_COORDINATOR}/test_work.py::test_a_blob_that_is_missing_or_another_is_refused",
    ),
    _mutant(
        "known-tensors-not-measured-against-blobs",
        "G2: a remembered form is committed although a blob is too short for its tensors.",
        f"{CORE}/forms.py",
        (
            "            and all(end <= blob.bytes for end, blob in zip(form.ends, blobs, strict=True))\n",
            "",
        ),
        f"{ON_COORDINATOR}/test_forms.py::test_what_is_known_is_no_excuse_for_what_does_not_fit",
    ),
    _mutant(
        "objects-read-as-text-not-compared",
        "G2: a value that differs between ranks is committed as the first rank has it.",
        f"{CORE}/forms.py",
        (
            "            if found.setdefault(name, item).known.crc != item.known.crc:\n",
            "            if found.setdefault(name, item) is None:\n",
        ),
        f"{ON_COORDINATOR}/test_forms.py::test_what_is_known_is_no_excuse_for_what_does_not_fit",
    ),
    _mutant(
        "tiling-not-checked",
        "G2: chunks that overlap or leave a gap are committed.",
        f"{CORE}/manifest.py",
        (
            "def tiling_problem(entry: TensorEntry) -> str:\n",
            'def tiling_problem(entry: TensorEntry) -> str:\n    return ""\n\n\ndef _was(entry: TensorEntry) -> str:\n',
        ),
        f"{ON_COORDINATOR}/test_manifest.py::test_parts_that_disagree_are_refused_by_name",
    ),
    _mutant(
        "chunk-digest-not-verified-on-restore",
        "G2: a flipped bit in the store goes into the weights.",
        f"{AGENT}/transfer_fetch.py",
        ("            if found == expected:\n", '            if found != "short":\n'),
        f"{ON_AGENT}/test_transfer.py::test_one_flipped_bit_is_found_and_named",
    ),
    _mutant(
        "rank-believes-what-it-has-read",
        "G2: bytes of an arena that changed after the agent told of it go into the weights.",
        f"{TRAINER}/checkpoint/reading.py",
        ('        return f"{value:08x}" == blob.chunks[number]\n', "        return True\n"),
        "tests/unit/trainer/test_reading.py::test_only_what_was_bad_is_said_and_read_again",
    ),
    _mutant(
        "manifest-digest-not-verified-on-restore",
        "G2: a manifest that is not the committed one is restored from.",
        f"{AGENT}/transfer_fetch.py",
        ("            if found == order.digest:\n", "            if True:\n"),
        f"{ON_AGENT}/test_transfer.py::test_a_good_manifest_that_is_not_the_committed_one_is_refused",
    ),
    _mutant(
        "quarantine-not-written",
        "G6: a damaged checkpoint is restored from again and again.",
        f"{CORE}/quarantine.py",
        ("    draft.put(draft.keys.bad(draft.job.name, seq), record, 0)\n", ""),
        f"{ON_COORDINATOR}/test_plan_failures.py::"
        "test_damaged_checkpoint_sends_all_ranks_to_the_one_before_without_budget",
    ),
    _mutant(
        "damaged-checkpoint-chosen-again",
        "G6: the checkpoint that has just been found damaged is the next restore point.",
        f"{CORE}/quarantine.py",
        ("    draft.quarantined.add(seq)\n", ""),
        f"{ON_COORDINATOR}/test_plan_failures.py::"
        "test_damaged_checkpoint_sends_all_ranks_to_the_one_before_without_budget",
    ),
    # Deleting -------------------------------------------------------------------------------
    _mutant(
        "retention-takes-the-newest",
        "G3: the only good checkpoint is retired.",
        f"{CORE}/retention.py",
        (
            "    return [c for c in stale + draft.commits() if c.value.seq not in kept]\n",
            "    return [c for c in stale + draft.commits() if c.value.seq not in kept] or draft.commits()[-1:]\n",
        ),
        f"{ON_COORDINATOR}/test_plan_retention.py::test_the_last_few_are_kept",
    ),
    _mutant(
        "retention-takes-the-restore-point",
        "G3: the checkpoint that ranks are restoring from is retired under them.",
        f"{CORE}/retention.py",
        (
            '        found[shelf.restore] = "what the current attempt started from"\n',
            "        pass\n",
        ),
        f"{ON_COORDINATOR}/test_plan_retention.py::test_pinned_and_restored_ones_stay",
    ),
    _mutant(
        "retention-takes-what-is-read",
        "G3: a checkpoint that somebody reads is retired.",
        f"{CORE}/retention.py",
        ('        found[seq] = "pinned"\n', "        pass\n"),
        f"{ON_COORDINATOR}/test_plan_retention.py::test_pinned_and_restored_ones_stay",
    ),
    _mutant(
        "tombstone-not-written",
        "G3: blobs of a retired checkpoint stay in the store for ever.",
        f"{CORE}/retention.py",
        (
            "    draft.put(\n        keys.garbage(name, record.seq),",
            "    (lambda *_: None)(\n        keys.garbage(name, record.seq),",
        ),
        f"{ON_COORDINATOR}/test_plan_retention.py::test_blobs_go_after_the_record_and_the_tombstone_goes_last",
    ),
    _mutant(
        "blobs-deleted-before-the-record",
        "G3: a reader that follows the commit record finds its blobs gone.",
        f"{CORE}/retention.py",
        (
            "        for commit in surplus(draft)[:RETIRED_AT_ONCE]:\n            retire(draft, commit)\n",
            "        for commit in surplus(draft)[:RETIRED_AT_ONCE]:\n            retire(draft, commit)\n"
            "            record = commit.value\n"
            "            doomed = Garbage(\n"
            '                draft.fleet.term, record.seq, record.manifest, record.digest, "", draft.status.store\n'
            "            )\n"
            "            draft.work(CollectGarbage(draft.job.name, draft.status.store, doomed))\n"
            "            draft._writes.clear()\n",
        ),
        f"{ON_COORDINATOR}/test_plan_retention.py::test_blobs_go_after_the_record_and_the_tombstone_goes_last",
    ),
    _mutant(
        "sweep-reads-etcd-before-it-lists",
        "G3: blobs of a checkpoint that is opened meanwhile look like nobody's.",
        f"{COORDINATOR}/work.py",
        (
            '        sizes = _ask(lambda: {info.key: info.size_bytes for info in store.list(f"{root}/")})\n'
            "        keys = list(sizes)\n"
            '        uploads = _ask(lambda: list(store.list_unfinished(f"{root}/")))\n'
            "        if not keys and not uploads:\n"
            "            return Orphans()\n"
            "        records = read_records(self._etcd, work.cluster, work.job)\n",
            "        records = read_records(self._etcd, work.cluster, work.job)\n"
            '        sizes = _ask(lambda: {info.key: info.size_bytes for info in store.list(f"{root}/")})\n'
            "        keys = list(sizes)\n"
            '        uploads = _ask(lambda: list(store.list_unfinished(f"{root}/")))\n'
            "        if not keys and not uploads:\n"
            "            return Orphans()\n",
        ),
        f"{ON_COORDINATOR}/test_work.py::test_what_is_opened_while_the_store_is_listed_stays[before_list]",
    ),
    _mutant(
        "sweep-trusts-an-etcd-that-went-back",
        "G3: after a restore of etcd from a backup the newer checkpoints are deleted as orphans.",
        f"{COORDINATOR}/work.py",
        ("        if newest > records.newest:\n", "        if False:\n"),
        f"{ON_COORDINATOR}/test_work.py::test_an_etcd_that_went_back_deletes_nothing",
    ),
    _mutant(
        "garbage-not-checked-against-its-digest",
        "G3: a tombstone that names another manifest deletes that one's blobs.",
        f"{COORDINATOR}/work.py",
        ("        if hashlib.sha256(data).hexdigest() != garbage.digest:\n", "        if False:\n"),
        f"{ON_COORDINATOR}/test_work.py::test_collecting_goes_by_the_tombstones_digest",
    ),
    _mutant(
        "store-of-another-etcd-swept",
        "G3: of two clusters with one name each deletes the other's checkpoints.",
        f"{COORDINATOR}/work.py",
        ("        if foreign:\n", "        if False:\n"),
        f"{ON_COORDINATOR}/test_work.py::test_a_store_marked_as_another_etcds_is_left_alone",
    ),
    _mutant(
        "delete-takes-what-must-stay",
        "G3: an operator deletes the checkpoint that the next restart needs.",
        f"{CORE}/orders.py",
        ("    kept = retention.untouchable(retention.shelf(draft)).get(seq)\n", '    kept = ""\n'),
        f"{ON_COORDINATOR}/test_plan_orders.py::test_what_must_stay_is_refused_with_the_reason[the newest]",
    ),
    _mutant(
        "pin-not-guarded-by-the-record",
        "G3: a reader is told that a checkpoint stays which is being deleted.",
        f"{COORDINATOR}/api/checkpoints.py",
        ("self._etcd.txn(Txn((guard,), (put,)))", "self._etcd.txn(Txn((), (put,)))"),
        f"{ON_COORDINATOR}/test_api_checkpoints.py::test_a_checkpoint_that_is_retired_meanwhile_is_not_pinned",
    ),
    _mutant(
        "attempt-starts-beside-an-import",
        "G2: a job begins from scratch while the checkpoint that it is to begin from is written.",
        f"{CORE}/phases.py",
        ("    if importing.follow(draft):\n", "    if importing.follow(draft) and not draft.fleet.agents:\n"),
        f"{ON_COORDINATOR}/test_plan_importing.py::test_a_job_that_waits_for_machines_takes_one_too_and_none_starts_meanwhile",
    ),
    _mutant(
        "import-outlives-its-maker",
        "G2: a checkpoint is open for ever because whoever wrote it was killed.",
        f"{CORE}/importing.py",
        ("    if order is None:\n", "    if order is None and draft.now < 0:\n"),
        f"{ON_COORDINATOR}/test_plan_importing.py::test_a_request_that_is_gone_aborts_what_was_opened_for_it",
    ),
    _mutant(
        "part-of-another-import",
        "G2: what was written for an aborted import is committed as the next one.",
        f"{CORE}/committing.py",
        ("if part is not None and _belongs(part, record) else {}", "if part is not None else {}"),
        f"{ON_COORDINATOR}/test_plan_importing.py::test_a_part_of_anything_else_is_not_looked_at",
    ),
    _mutant(
        "verify-believes-the-store",
        "G2: verify and export pass on whatever the store returns.",
        "storage/dtrain/storage/checkpoints/reading.py",
        ("        if found == expected:\n", '        if found != "short":\n'),
        "tests/unit/storage/test_checkpoints.py::test_a_flipped_bit_is_named_with_tensors_rank_blob_and_chunk",
    ),
    # Cut off from etcd ----------------------------------------------------------------------
    _mutant(
        "isolated-ranks-ended-at-once",
        "G5: an etcd that is away for a while stops training.",
        f"{AGENT}/core/isolation.py",
        ("    if due is None or now < due[0]:\n", "    if due is None:\n"),
        f"{ON_AGENT}/test_core_isolation.py::test_ranks_go_on_within_the_grace_and_are_ended_in_order_after_it",
    ),
    _mutant(
        "isolation-grace-without-end",
        "G4: a machine that is cut off trains on for ever beside its successor.",
        f"{AGENT}/core/isolation.py",
        ("max(link.since, job.started_at) + grace", "link.since + 10**9 + grace"),
        f"{ON_AGENT}/test_core_isolation.py::test_ranks_go_on_within_the_grace_and_are_ended_in_order_after_it",
    ),
    _mutant(
        "isolation-grace-of-the-attempt-before",
        "G5: ranks that a leader has just started are ended by an isolation that is over.",
        f"{AGENT}/core/isolation.py",
        ("max(link.since, job.started_at) + grace", "link.since + grace"),
        f"{ON_AGENT}/test_core_isolation.py::"
        "test_ranks_that_a_leader_starts_during_an_isolation_get_a_grace_of_their_own",
    ),
    _mutant(
        "isolated-ranks-that-stand-still-go-on",
        "G6: ranks whose peers are gone hold their machine for the whole grace.",
        f"{AGENT}/core/isolation.py",
        ("    return min(over, (quiet, text))\n", "    return over\n"),
        f"{ON_AGENT}/test_core_isolation.py::test_isolated_ranks_that_complete_no_steps_are_ended",
    ),
    _mutant(
        "superseded-ranks-go-on",
        "G4: ranks of an attempt that has been left behind go on although a coordinator says so.",
        f"{AGENT}/core/isolation.py",
        ("    if standing.attempt > standing.asked:\n", "    if False:\n"),
        f"{ON_AGENT}/test_core_isolation.py::test_a_newer_attempt_ends_the_ranks_at_once_however_old_the_news",
    ),
    _mutant(
        "mirror-that-is-behind-believed",
        "G5: a coordinator that has not heard of the attempt yet ends its ranks.",
        f"{AGENT}/core/isolation.py",
        ("    if standing.attempt < standing.asked:\n", "    if False:\n"),
        f"{ON_AGENT}/test_core_isolation.py::test_a_mirror_that_has_not_heard_of_the_attempt_yet_is_not_believed",
    ),
    _mutant(
        "losses-in-a-row-not-waited-out",
        "I9: when agents go one after another, each alone is acted on.",
        f"{CORE}/liveness.py",
        (
            "fleet.took_office_at + fleet.agent_ttl_s, fleet.losses_settle_at)",
            "fleet.took_office_at + fleet.agent_ttl_s, 0.0)",
        ),
        f"{ON_COORDINATOR}/test_plan_failures.py::test_losses_in_a_row_are_waited_out",
    ),
    _mutant(
        "released-with-the-first-return",
        "G5: etcd ends all leases; when the first agent is back, the others are called lost.",
        f"{COORDINATOR}/losses.py",
        ("len(gone) > 1 or any(self._is_just_back(agent, now, ttl_s) for agent in recent)", "len(gone) > 1"),
        f"{ON_COORDINATOR}/test_world.py::"
        "test_one_that_comes_back_shows_that_others_who_vanished_with_it_may_live",
    ),
    _mutant(
        "news-beside-bytes-is-no-news",
        "While a checkpoint is on its way, nobody looks at what else its machines tell.",
        f"{COORDINATOR}/known.py",
        ("    return told != told_now and rest == rest_now\n", "    return told != told_now\n"),
        f"{ON_COORDINATOR}/test_world.py::"
        "test_bytes_on_their_way_touch_nothing_and_whatever_comes_with_them_does",
    ),
    _mutant(
        "blocked-machine-used",
        "I6: ranks are started beside processes that cannot be killed.",
        f"{CORE}/placement.py",
        (
            "    return bool(view.node.problem) or (stored is not None and bool(stored.value.stuck))\n",
            "    return False\n",
        ),
        f"{ON_COORDINATOR}/test_plan_failures.py::"
        "test_a_machine_with_a_problem_is_not_used_by_any_job_until_it_is_well",
    ),
    # Who may do what ------------------------------------------------------------------------
    _mutant(
        "anybody-commands-agents",
        "An operator's or an agent's certificate is enough to stop ranks.",
        "common/dtrain/runtime/grpc_tls.py",
        ("        if peer.role not in rule.roles:\n", "        if False:\n"),
        "tests/security/test_grpc_roles.py::test_each_role_may_do_what_the_table_says_and_nothing_else",
    ),
    _mutant(
        "other-cluster-s-certificate-accepted",
        "A coordinator of another cluster commands the agents of this one.",
        "common/dtrain/runtime/grpc_tls.py",
        ("        if peer.cluster != self._tls.peer.cluster:\n", "        if False:\n"),
        "tests/security/test_grpc_roles.py::test_a_coordinator_of_another_cluster_commands_nobody_here",
    ),
    _mutant(
        "agent-speaks-for-another",
        "An agent consults coordinators in another agent's name.",
        "common/dtrain/runtime/grpc_tls.py",
        (
            "            if rule.own and peer is not None and getattr(request, rule.own) != peer.name:\n",
            "            if False:\n",
        ),
        "tests/security/test_grpc_roles.py::test_an_agent_may_consult_as_itself_only",
    ),
    _mutant(
        "no-certificate-asked-for",
        "Whoever reaches the port is served.",
        "common/dtrain/runtime/grpc_tls.py",
        ("fetch, require_client_authentication=True", "fetch, require_client_authentication=False"),
        "tests/security/test_grpc_roles.py::test_a_caller_without_a_certificate_gets_no_connection",
    ),
    _mutant(
        "record-size-not-bounded",
        "A record of any size is parsed.",
        "common/dtrain/protocol/codec.py",
        ("    if len(data) > bytes_max:\n", "    if False:\n"),
        "tests/security/test_parsing.py::test_json_that_could_hurt_is_refused_with_a_sentence",
    ),
    _mutant(
        "blob-keys-lead-anywhere",
        "A key from a manifest names a file outside the store.",
        "storage/dtrain/storage/blobs/port.py",
        (' or any(p[:1] in ("", ".") for p in key.split("/")):\n', ":\n"),
        "tests/security/test_parsing.py::test_no_blob_key_leaves_the_store",
    ),
    _mutant(
        "second-replica-of-an-id",
        "A replica campaigns although its id is another one's.",
        f"{COORDINATOR}/leadership/lease.py",
        (
            "            if view.lease == 0 or view.generation != self._registered:\n",
            "            if view.lease == 0:\n",
        ),
        f"{ON_COORDINATOR}/test_elector.py::test_a_replica_whose_id_is_another_s_does_not_campaign",
    ),
    # The auditor ----------------------------------------------------------------------------
    _mutant(
        "auditor-blind-to-terms",
        "I1: writes of a deposed leader pass the audit.",
        "common/dtrain/protocol/audit.py",
        ("        if term != self._term:\n", "        if False:\n"),
        "tests/unit/protocol/test_audit.py::test_the_auditor_names[a record of a term that does not lead]",
    ),
    _mutant(
        "auditor-blind-to-attempts",
        "I5: attempts that share or skip numbers pass the audit.",
        "common/dtrain/protocol/audit.py",
        (
            "        if record.attempt not in (last, last + 1) and not self._is_proven(place.job, record):\n",
            "        if False:\n",
        ),
        "tests/unit/protocol/test_audit.py::test_the_auditor_names[an attempt that skips a number]",
    ),
    # Who gets ranks, why attempts end, who waits: a module each ----------------------------
    *elasticity.MUTANTS,
    *goodput.MUTANTS,
    *telling.MUTANTS,
    *causes.MUTANTS,
    *counting.MUTANTS,
    *queueing.MUTANTS,
    # torchrun's agents ---------------------------------------------------------------------
    *meeting.MUTANTS,
)
