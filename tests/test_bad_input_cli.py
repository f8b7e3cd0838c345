"""The user's mistakes on a command line: one clear line, exit code 2, nothing changed on disk."""

import hashlib
from pathlib import Path

import pytest

from hvd import cli
from hvd.launch import submit


def snapshot(folder: Path) -> dict[str, str]:
    """Path -> kind and digest of everything below the folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        found[str(path.relative_to(folder))] = digest
    return found


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with things in it that must stay as they are, as the working folder; no datasets anywhere else."""
    (tmp_path / "runs" / "demo" / "keep").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / "keep" / "notes.txt").write_text("mine")
    (tmp_path / "a_file").write_text("not a folder")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_LEROBOT_HOME", str(tmp_path / "empty"))
    return tmp_path


def refused(run, argv, place, capsys) -> str:
    before = snapshot(place)
    assert run(argv) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1, printed.err
    assert "Traceback" not in printed.err + printed.out
    assert snapshot(place) == before
    return printed.err


HVD = [
    ("", "error: "),
    ("trian-value --config demo", "unknown step 'trian-value'; nearest: train-value"),
    ("train-value", "--config NAME is missing; `hvd configs` lists the names"),
    ("train-value --config demoo", "unknown config 'demoo'; nearest: demo"),
    ("train-value --config demo --value.batchsize 4", "unknown field --value.batchsize; nearest: --value.batch_size"),
    ("train-value --config demo --value.batch_size 0", "value.batch_size 0 must be at least 1"),
    ("train-value --config demo --resume --overwrite", "--resume and --overwrite contradict each other"),
    ("report --config demo --overwrite", "--overwrite: report keeps no run directory"),
    ("norm-stats --config g1", "g1_bottle"),
    ("norm-stats --config g1 --data a_file", "--data a_file: no LeRobot dataset there"),
    ("train-policy --config g1", "value"),
    ("advantages --config demo", "no run at runs/demo/value: train it first"),
    ("verify --config g1", "no run in runs/g1"),
    ("verify --config demo --exp_name ../../etc", "exp_name '../../etc' is not the name of a folder"),
]


@pytest.mark.parametrize("command, line", HVD[1:], ids=[command for command, _ in HVD[1:]])
def test_hvd(place, capsys, command, line):
    assert line in refused(cli.main, command.split(), place, capsys)


def test_hvd_without_a_step_shows_how_it_is_used(place, capsys):
    before = snapshot(place)
    assert cli.main([]) == 2
    assert capsys.readouterr().out.startswith("usage: hvd <step>")
    assert snapshot(place) == before


SUBMIT = [
    ("--stage polcy", "--stage: 'polcy' is not one of all, value, policy, evaluate; nearest: policy"),
    ("--stage", "--stage: the value is missing"),
    ("--config demo2", "unknown config 'demo2'; nearest: demo"),
    ("--config g1", "optimal_data: no LeRobot dataset at"),
    ("--config g1 --data nowhere", "--data nowhere: no LeRobot dataset there"),
    ("--nodes 0", "--nodes 0 must be at least 1"),
    ("--nodes 3", "value.batch_size 64 is not divisible by the 3 devices of this run"),
    ("--nodes 2 --policy.batch_size 33", "policy.batch_size 33 is not divisible by the 2 devices of this run"),
    ("--fsdp_devices 4", "fsdp_devices 4 does not divide the 1 device(s) of this run"),
    ("--cluster moon", "--cluster: unknown cluster 'moon'; known: auto, kubernetes, local, slurm"),
    ("--cluster slurm --slurm.partion x", "unknown field --slurm.partion; nearest: --slurm.partition"),
    ("--cluster slurm --slurm.mem 64GB", "slurm.mem '64GB' is not a size such as 64G"),
    ("--cluster slurm --after soon", "--after 'soon' is not the id of a job"),
    ("--slurm.mem 64G --cluster local", "--slurm.mem is for --cluster slurm, this is local"),
    ("--cluster kubernetes --kubernetes.memory lots", "kubernetes.memory 'lots' is not a size such as 64Gi"),
    ("--stage policy", "no run at runs/demo/value: train it first"),
    ("--stage policy --dry-run", "no run at runs/demo/value: train it first"),
    ("--stage policy --detach", "no run at runs/demo/value: train it first"),
    ("--runs_dir a_file", "a_file is no folder; set --runs_dir"),
    ("--stage value --resume --overwrite", "--resume and --overwrite contradict each other"),
]


@pytest.mark.parametrize("command, line", SUBMIT, ids=[command for command, _ in SUBMIT])
def test_submit(place, monkeypatch, capsys, command, line):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    assert line in refused(submit.main, command.split(), place, capsys)


def test_the_policy_stage_does_not_start_on_a_half_trained_value_run(place, capsys):
    checkpoint = place / "runs" / "demo" / "value" / "checkpoints" / "500"
    checkpoint.mkdir(parents=True)
    line = refused(submit.main, ["--stage", "policy"], place, capsys)
    assert "runs/demo/value is not complete" in line and "its last checkpoint is at step 500" in line


def test_overwrite_deletes_no_folder_that_is_not_a_run(place, capsys):
    folder = place / "runs" / "demo" / "value"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    line = refused(cli.main, ["train-value", "--config", "demo", "--overwrite"], place, capsys)
    assert "is not a run directory" in line
