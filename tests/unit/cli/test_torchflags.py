"""torchrun's flags: what they become here."""

from pathlib import Path
from typing import Any

import pytest

from dtrain.cli import running, torchflags
from dtrain.cli.verbs.run import command
from dtrain.protocol.errors import Refused
from dtrain.protocol.job import EntryKind


def given(program: str, *args: str, **more: Any) -> dict[str, Any]:
    flags: dict[str, Any] = {
        "program": program, "args": args, "module": False, "no_python": False, "changes": (), "nnodes": "1",
        "nproc_per_node": "1", "max_restarts": None, "shutdown_timeout": None, "name": None, "rdzv_id": None,
        "folder": None,
    }  # fmt: skip
    return flags | more


def test_a_torchrun_line_becomes_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").touch()
    flags = given(
        "train.py", "--lr", "1e-3", nnodes="2:4", nproc_per_node="8", max_restarts=3, rdzv_id="job7"
    )
    spec = running.build_spec(flags, set(), here=False)
    assert (spec.name, spec.nnodes_min, spec.nnodes_max, spec.nproc_per_node) == ("job7", 2, 4, 8)
    assert (spec.entry.target, spec.entry.args) == ("train.py", ("--lr", "1e-3"))
    assert (spec.restarts.max_restarts, spec.working_dir) == (3, str(tmp_path))


def test_modules_and_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    spec = running.build_spec(given("pkg.train", module=True), set(), here=True)
    assert (spec.entry.kind, spec.entry.target) == (EntryKind.MODULE, "pkg.train")
    spec = running.build_spec(given("./a b.sh", "x", no_python=True), set(), here=True)
    assert (spec.entry.kind, spec.entry.target, spec.entry.args) == (EntryKind.COMMAND, "./a b.sh", ("x",))


def test_flags_beside_a_job_file_override_it(tmp_path: Path) -> None:
    (tmp_path / "train.py").touch()
    path = tmp_path / "job.yaml"
    path.write_text("name: digits\nscript: train.py\nnnodes: 4\nrestarts: {max: 1}\n")
    flags = given(str(path), nnodes="2", max_restarts=5)
    spec = running.build_spec(flags, {"nnodes", "max_restarts"}, here=True)
    assert (spec.nnodes_max, spec.restarts.max_restarts) == (2, 5)
    assert running.build_spec(given(str(path)), set(), here=True).nnodes_max == 4
    with pytest.raises(Refused):
        running.build_spec(given(str(path), "--lr"), set(), here=True)


def test_words_for_processes_are_resolved_only_on_this_machine() -> None:
    assert torchflags.local_nproc("auto", here=True, gpus=0, cpus=6) == 6
    assert torchflags.local_nproc("auto", here=True, gpus=4, cpus=6) == 4
    assert torchflags.local_nproc("gpu", here=True, gpus=4, cpus=6) == 4
    assert torchflags.local_nproc("auto", here=False, gpus=0, cpus=6) == 0  # as many as a machine has slots
    for text, here in (("cpu", False), ("gpu", True), ("0", True), ("many", True)):
        with pytest.raises(Refused):
            torchflags.local_nproc(text, here=here, gpus=0, cpus=6)


def test_flags_without_a_meaning_here_are_explained() -> None:
    lines = running.explanations({"rdzv_endpoint": "host:29400", "redirects": "3", "role": None})
    assert lines == [
        "--rdzv-endpoint has no effect: the replicas are found by --coordinators, etcd or the context file",
        "--redirects has no effect: output is always kept in files: dtrain logs",
    ]


@pytest.mark.parametrize("flag", torchflags.REFUSED)
def test_flags_that_change_what_ranks_see_are_refused_with_what_to_use_instead(flag: str) -> None:
    with pytest.raises(Refused) as caught:
        torchflags.check({flag.replace("-", "_"): "x"})
    assert caught.value.message == f"--{flag} is not supported"
    assert caught.value.fix


def test_a_launch_on_each_machine_is_refused_before_it_becomes_several_jobs() -> None:
    torchflags.check({"node_rank": "0"})
    torchflags.check({"node_rank": None})
    with pytest.raises(Refused, match="given once"):
        torchflags.check({"node_rank": "1"})


def test_every_flag_of_torchrun_is_known() -> None:
    run_ = pytest.importorskip("torch.distributed.run")
    ours = {word for option in command.params for word in option.opts}
    theirs = {
        word.replace("_", "-") for action in run_.get_args_parser()._actions for word in action.option_strings
    }
    assert theirs - {"-h", "--help"} <= ours


def test_the_environment_of_torchrun_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PET_NPROC_PER_NODE", "3")
    monkeypatch.setenv("PET_NUMA_BINDING", "node")
    given_ = command.make_context("run", ["--max_restarts=2", "train.py"]).params
    assert (given_["nproc_per_node"], given_["max_restarts"], given_["numa_binding"]) == ("3", 2, "node")


def test_names_are_made_from_programs() -> None:
    assert torchflags.job_name("my/Train_GPT.py", "") == "train-gpt"
    assert torchflags.job_name("my/Train_GPT.py", "ab12") == "train-gpt-ab12"
    assert torchflags.job_name("pkg.train", "ab12") == "pkg-train-ab12"
    assert torchflags.job_name("/bin/_", "ab12") == "job-ab12"


def test_tee_and_filters_are_read() -> None:
    assert torchflags.tees("3")
    assert torchflags.tees("0:3,1:1")
    assert not torchflags.tees("0")
    assert torchflags.local_ranks("0,2") == {0, 2}
    for text in ("x", "4"):
        with pytest.raises(Refused):
            torchflags.tees(text)
    with pytest.raises(Refused):
        torchflags.local_ranks("a")
