"""Deliberate bugs in what is counted and shown to a monitoring."""

from tests.mutants.mutant import COORDINATOR, CORE, ON_COORDINATOR, Mutant, mutant

SHOWN = f"{COORDINATOR}/job_series.py"

MUTANTS: tuple[Mutant, ...] = (
    mutant(
        "commit-not-counted",
        "Checkpoints are committed and the monitoring says that none are.",
        f"{CORE}/committing.py",
        ("        tally=tally.committed(status, verdict.size_bytes),\n", ""),
        f"{ON_COORDINATOR}/test_tally.py::test_a_commit_counts_once_with_its_bytes",
    ),
    mutant(
        "failed-checkpoint-not-counted",
        "Checkpoints fail all night and no alert comes.",
        f"{CORE}/committing.py",
        ("    draft.set(tally=tally.aborted(status, Cause.LATE if late else cause))\n", ""),
        f"{ON_COORDINATOR}/test_tally.py::test_a_checkpoint_that_fails_is_counted_by_its_cause",
    ),
    mutant(
        "attempts-counted-from-the-new-one",
        "A failure is taken for a planned restart: a crash loop raises no alert.",
        f"{CORE}/tally.py",
        ("failure.attempt == status.attempt:", "failure.attempt == status.attempt + 1:"),
        f"{ON_COORDINATOR}/test_tally.py::test_the_first_attempt_and_one_after_a_failure_are_told_apart",
    ),
    mutant(
        "standbys-show-jobs",
        "Every replica shows each job: what is added up counts three times.",
        SHOWN,
        (
            "        if not leads:\n            self._progress.clear()\n",
            "        if False:\n            self._progress.clear()\n",
        ),
        f"{ON_COORDINATOR}/test_job_series.py::test_only_a_leader_shows_single_jobs",
    ),
    mutant(
        "former-submission-s-commit-shown",
        "A job that has never committed shows the checkpoint of the one that had its name before.",
        SHOWN,
        ("if commit is not None and commit.uid == status.uid:", "if commit is not None:"),
        f"{ON_COORDINATOR}/test_job_series.py::test_a_commit_and_when_the_next_one_is_due",
    ),
    mutant(
        "scrapes-read-everything",
        "Each scrape of a leader of 10,000 agents reads for seconds, and probes find nobody.",
        SHOWN,
        ("        first = status.members[: self._members]\n", "        first = status.members\n"),
        f"{ON_COORDINATOR}/test_job_series.py::test_snapshots_are_read_within_a_budget_and_those_of_stragglers_beyond_it",
    ),
)
