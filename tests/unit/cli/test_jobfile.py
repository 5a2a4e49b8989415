"""Job files: what is accepted, and every error with its place."""

from pathlib import Path

import pytest

from dtrain.cli import jobfile
from dtrain.cli.jobfile import BadJobFile
from dtrain.protocol.errors import ErrorCode, NotFound
from dtrain.protocol.job import (
    EntryKind,
    FailureRule,
    HangPolicy,
    JobSpec,
    NonFiniteAction,
    NonFinitePolicy,
    RuleAction,
)

MINIMAL = "name: digits\nscript: train.py\n"


def parse(text: str, *changes: str) -> JobSpec:
    return jobfile.parse(text, "job.yaml", Path("/jobs"), changes)


def errors(text: str, *changes: str) -> list[str]:
    with pytest.raises(BadJobFile) as caught:
        parse(text, *changes)
    assert caught.value.code is ErrorCode.BAD_JOB_FILE
    return list(caught.value.details)


def test_a_minimal_file_gets_the_defaults_of_the_protocol() -> None:
    spec = parse(MINIMAL)
    assert (spec.nnodes_min, spec.nnodes_max, spec.nproc_per_node) == (1, 1, 1)
    assert spec.working_dir == "/jobs"
    assert spec.grow_cooldown_s == JobSpec.__dataclass_fields__["grow_cooldown_s"].default
    assert spec.restarts == JobSpec.__dataclass_fields__["restarts"].default
    assert spec.checkpoint == JobSpec.__dataclass_fields__["checkpoint"].default


def test_every_field_reaches_the_spec() -> None:
    spec = parse(
        """
name: digits
nnodes: 2:4
nproc_per_node: 8
spares: 1
module: mypackage.train
args: --lr 1e-3 --name "two words"
env: {OMP_NUM_THREADS: 1, MODE: on, DEBUG: true, RATE: 1e-3}
working_dir: ../elsewhere
preload: [torch, mypackage.data]
checkpoint: {store: s3://bucket/prefix, every_steps: 50, every_seconds: 10m, keep_last: 5, timeout: 90,
             bandwidth_mb_s: 250}
restarts: {max: 3, window: 1h30m}
hang: {timeout: 2m, startup: 1h}
failure_rules:
  - {reasons: [exit, user-error], exit_codes: 3, action: fail}
  - {reasons: signal, signals: [SIGBUS, 11, segv], action: elsewhere, cordon: 2h}
  - message: "CUDA error: .*"
    action: rollback
    back: 2
shutdown_grace: 500ms
isolation_grace: 30m
reschedule_grace: 20
priority: -5
grow_cooldown: 5m
"""
    )
    assert (spec.nnodes_min, spec.nnodes_max, spec.nproc_per_node, spec.spares) == (2, 4, 8, 1)
    assert (spec.entry.kind, spec.entry.target) == (EntryKind.MODULE, "mypackage.train")
    assert spec.entry.args == ("--lr", "1e-3", "--name", "two words")
    assert spec.env == {"OMP_NUM_THREADS": "1", "MODE": "on", "DEBUG": "true", "RATE": "1e-3"}
    assert spec.working_dir == "/elsewhere"
    assert spec.failure_rules == (
        FailureRule(RuleAction.FAIL, ("exit", "user-error"), (3,)),
        FailureRule(RuleAction.ELSEWHERE, ("signal",), (), (7, 11, 11), cordon_s=7200.0),
        FailureRule(RuleAction.ROLLBACK, message="CUDA error: .*", back=2),
    )
    assert spec.preload == ("torch", "mypackage.data")
    assert spec.checkpoint.every_seconds == 600.0
    assert (spec.checkpoint.keep_last, spec.checkpoint.timeout_s) == (5, 90.0)
    assert spec.checkpoint.bandwidth_mb_s == 250.0
    assert (spec.restarts.max_restarts, spec.restarts.window_s) == (3, 5400.0)
    assert spec.hang == HangPolicy(True, 120.0, 3600.0)
    assert spec.shutdown_grace_s == 0.5
    assert (spec.isolation_grace_s, spec.reschedule_grace_s) == (1800.0, 20.0)
    assert (spec.priority, spec.grow_cooldown_s) == (-5, 300.0)


def test_what_follows_from_numbers_that_are_not_finite() -> None:
    spec = parse(MINIMAL + "nonfinite: {action: rollback, metrics: [loss, norm], back: 2}")
    assert spec.nonfinite == NonFinitePolicy(NonFiniteAction.ROLLBACK, ("loss", "norm"), 2)
    assert parse(MINIMAL).nonfinite == NonFinitePolicy()
    (found,) = errors(MINIMAL + "nonfinite: {action: ignore}")
    assert "nonfinite.action: 'ignore' is none of warn, rollback, fail" in found


def test_a_range_of_nodes_is_not_read_as_a_sexagesimal_number() -> None:
    assert parse(MINIMAL + "nnodes: 1:30").nnodes_max == 30


def test_numbers_among_arguments_stay_as_they_were_typed() -> None:
    assert parse(MINIMAL + "args: [--lr, 1e-3, 007, 0x10, true, 1.50]").entry.args == (
        ("--lr", "1e-3", "007", "0x10", "true", "1.50")
    )


def test_a_command_may_be_one_line_or_a_list() -> None:
    assert parse("name: a\ncommand: nice -n 5 ./train").entry.args == ("-n", "5", "./train")
    spec = parse("name: a\ncommand: [nice, -n, 5]\nargs: [x]")
    assert (spec.entry.kind, spec.entry.target, spec.entry.args) == (
        EntryKind.COMMAND,
        "nice",
        ("-n", "5", "x"),
    )


def test_as_many_ranks_as_a_machine_has_slots_are_no_number() -> None:
    assert parse("name: digits\nscript: train.py\nnproc_per_node: auto\n").nproc_per_node == 0


def test_all_errors_are_listed_at_once_with_line_and_column() -> None:
    found = errors(
        """name: Digits
nnodes: 4:2
nproc_per_node: gpu
script: train.py
module: foo
restarts:
  max: -1
  windw: 10m
every_step: 3
checkpoint:
  timeout: 0
  store: gs://x
"""
    )
    starts = [line.split(": ")[0:2] for line in found]
    assert starts == [
        ["job.yaml:1:7", "name"],
        ["job.yaml:2:9", "nnodes"],
        ["job.yaml:3:17", "nproc_per_node"],
        ["job.yaml:5:1", "module"],
        ["job.yaml:7:8", "restarts.max"],
        ["job.yaml:8:3", "restarts.windw"],
        ["job.yaml:9:1", "every_step"],
        ["job.yaml:11:12", "checkpoint.timeout"],
        ["job.yaml:12:10", "checkpoint.store"],
    ]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("nnodes: 0", "job.yaml:3:9: nnodes: at least one machine is needed"),
        ("nnodes: two", "neither a number of machines nor a range"),
        ("nnodes: 1.5", "neither a number"),
        ("nproc_per_node: 0", "out of range: 1 to 1024"),
        ("nproc_per_node: gpu", "cannot be resolved here"),
        ("nproc_per_node: yes", "'yes' is not a number of processes"),
        ("nproc: 4", "did you mean nproc_per_node?"),
        ("max_restarts: 4", "did you mean restarts.max?"),
        ("zebra: 1", "known here: name, nnodes,"),
        ("script:", "one of script, module, command is missing"),
        ("script: ''", "is empty"),
        ("env: [A]", "env: a list is not a list of NAME: value"),
        ("env: {A-B: x}", "'A-B' cannot name an environment variable"),
        ("env: {A: }", 'A is nothing, not text; for an empty value write ""'),
        ("env: {A: [1]}", "A is a list, not text"),
        ("args: {a: b}", "neither a list nor one line of words"),
        ("args: 'a \"b'", "cannot be split into words: No closing quotation"),
        ("preload: [torch, a-b]", "'a-b' is not the name of a Python module"),
        ("restarts: 3", "restarts: is not a mapping of settings"),
        ("restarts: {max: 2.5}", "2.5 is not a whole number"),
        ("restarts: {max: true}", "true is not a whole number"),
        ("restarts: {window: 0}", "must be longer than 0"),
        ("restarts: {window: soon}", "'soon' is not a duration"),
        ("shutdown_grace: -5", "it is negative or not finite"),
        ("shutdown_grace: .inf", "it is negative or not finite"),
        ("checkpoint: {keep_last: 0}", "0 is out of range: 1 to"),
        ("checkpoint: {bandwidth_mb_s: 0.01}", "0.01 is out of range: 0.1 to"),
        ("checkpoint: {bandwidth_mb_s: fast}", "'fast' is not a number of megabytes"),
        ("checkpoint: {every: 5}", "did you mean every_s"),
        ("checkpoint: {store: memory://x}", "lives in one process only"),
        ("checkpoint: {store: relative/folder}", "is not a store"),
        ("checkpoint: {store: 's3://key:secret@bucket'}", "credentials do not belong"),
        ("name: again", "given twice, first on line 1"),
        ("<<: {a: b}", "merge keys (<<) are not supported"),
        ("working_dir: !!python/object:os.system x", "the tag !!python/object:os.system is not accepted"),
        ("env: {A: 1, A: 2}", "env.A: given twice"),
        ("? [a, b]\n: c", "a key must be a word"),
    ],
)
def test_each_mistake_has_its_sentence(line: str, expected: str) -> None:
    text = MINIMAL.replace("script: train.py\n", "") if line.startswith("script") else MINIMAL
    assert any(expected in found for found in errors(text + line)), errors(text + line)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (
            "{action: pray}",
            "5:14: failure_rules[0].action: 'pray' is no action: write one of restart, restart-free",
        ),
        ("{reasons: [exit]}", "failure_rules[0].action: is missing"),
        ("{action: fail, reasons: [exits]}", "'exits' is no reason: write some of signal, exit"),
        ("{action: fail, signals: [SIGNO]}", "'SIGNO' is no signal"),
        ("{action: fail, exit_codes: [0]}", "0 is not a number from 1 to 255"),
        ("{action: fail, message: '(a+)+'}", "'(a+)+' repeats a group"),
        ("{action: fail, exit_code: 3}", "is not a setting; did you mean exit_codes?"),
        ("{action: rollback, back: 0}", "0 is out of range: 1 to 1000"),
        ("fail", "is not a mapping of settings"),
    ],
)
def test_each_mistake_in_a_rule_has_its_place_and_sentence(rule: str, expected: str) -> None:
    (found,) = errors(f"{MINIMAL}# the rules\nfailure_rules:\n  - {rule}\n")
    assert expected in found
    assert found.startswith("job.yaml:")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "the file is empty"),
        ("# only a comment\n", "the file is empty"),
        ("- a\n- b\n", "a job file is a mapping"),
        ("just words", "a job file is a mapping"),
        ("name: a\n  script: b\n", "job.yaml:2:9: not valid YAML"),
        ("name: [a\n", "not valid YAML"),
        ("name: a\n---\nname: b\n", "not valid YAML"),
        ("name: *nowhere\n", "not valid YAML: found undefined alias"),
        ("name: \x01\n", "not valid YAML"),
        ("name: a\n\tscript: b", "job.yaml:2:1: not valid YAML"),
        ("a: " * 3, "not valid YAML"),
    ],
)
def test_what_is_no_job_file_at_all_is_said(text: str, expected: str) -> None:
    assert any(expected in found for found in errors(text)), errors(text)


def test_aliases_cannot_blow_up() -> None:
    layers = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    layers += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    assert any("more than 10000 values" in found for found in errors("\n".join(layers)))


def test_an_alias_in_itself_and_deep_nesting_are_refused() -> None:
    assert any("nested deeper" in found for found in errors("name: &a [*a]"))
    assert any("nested" in found for found in errors("name: " + "[" * 40 + "]" * 40))
    assert any("nested" in found for found in errors("name: " + "[" * 20_000 + "]" * 20_000))


def test_a_huge_file_is_refused_unread() -> None:
    assert "larger than 256 KiB" in errors("name: " + "a" * 300_000)[0]


def test_small_aliases_are_fine() -> None:
    spec = parse("name: a\nscript: t.py\nargs: &words [x, y]\npreload: *words\n")
    assert spec.preload == spec.entry.args == ("x", "y")


def test_set_changes_one_setting_and_its_errors_name_it() -> None:
    assert parse(MINIMAL, "nnodes=2:4", "restarts.max=7", "env.A=1e3").nnodes_max == 4
    assert parse(MINIMAL, "restarts.max=7").restarts.max_restarts == 7
    assert parse(MINIMAL, "env.A=1e3").env == {"A": "1e3"}
    assert parse(MINIMAL + "restarts: {max: -1}", "restarts.max=2").restarts.max_restarts == 2
    assert errors(MINIMAL, "restarts.max=x") == ["--set restarts.max: 'x' is not a whole number"]
    assert "write it as key=value" in errors(MINIMAL, "nonsense")[0]
    assert "did you mean nnodes?" in errors(MINIMAL, "nnode=2")[0]


def test_a_script_that_is_missing_here_is_refused_but_a_missing_folder_only_warned_of(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(MINIMAL)
    with pytest.raises(NotFound) as caught:
        jobfile.read(path)
    assert caught.value.code is ErrorCode.SCRIPT_NOT_FOUND
    (tmp_path / "train.py").touch()
    assert jobfile.read(path).warnings == ()
    path.write_text(MINIMAL + "working_dir: /nowhere/at/all\n")
    (warning,) = jobfile.read(path).warnings
    assert "/nowhere/at/all does not exist on this machine" in warning


def test_a_relative_working_dir_starts_from_the_job_files_folder(tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "train.py").touch()
    path = tmp_path / "job.yaml"
    path.write_text(MINIMAL + "working_dir: code\n")
    assert jobfile.read(path).spec.working_dir == str(tmp_path / "code")


def test_bytes_that_are_no_text_have_a_line(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(b"name: a\nscript: \xff\n")
    with pytest.raises(BadJobFile) as caught:
        jobfile.read(path)
    assert caught.value.details == (f"{path}:2:1: is not UTF-8 text",)


def test_differences_name_fields_and_both_values() -> None:
    assert jobfile.differences({"a": 1, "b": {"c": [1, 2]}}, {"a": 1, "b": {"c": [1, 3]}, "d": 4}) == [
        "b.c[1]: 2 -> 3",
        "d: (unset) -> 4",
    ]
