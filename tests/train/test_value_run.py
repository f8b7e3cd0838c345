"""The value run that a policy takes: its own or another one's, checked to fit, and read through once."""

import dataclasses
import shutil
from pathlib import Path

import pytest

from hvd import stages
from hvd.errors import UserError
from hvd.method import advantages, policy, value_run
from hvd.plan import command as plan
from hvd.train import complete, inference, manifest


def change(cfg, group: str, **fields):
    return dataclasses.replace(cfg, **{group: dataclasses.replace(getattr(cfg, group), **fields)})


@pytest.fixture
def other(trained, tmp_path):
    """An experiment without a value run of its own, whose policy takes the trained one's by path."""
    cfg = dataclasses.replace(trained, runs_dir=str(tmp_path / "runs"))
    return change(cfg, "policy", value_run=trained.value_dir)


def test_another_run_s_values_are_taken(other, trained, capsys):
    assert value_run.check(other).digest == complete.read_complete(trained.value_dir).digest
    shutil.copytree(Path(trained.advantages_dir) / "shards", Path(other.advantages_dir) / "shards")
    advantages.main(other)  # the same values: nothing is computed
    assert "129 frames" in capsys.readouterr().out and not Path(other.value_dir).exists()


@pytest.mark.parametrize(
    "changed, line",
    [
        (("model", {"network_type": "q"}), "levels"),
        (("model", {"action_horizon": 8}), r"model\.action_horizon is 4, here 8"),
        (("model", {"cameras": ("base_0_rgb",)}), r"model\.cameras"),
        (("norm", {"std_floor": 0.5}), "norm"),
        (("model", {"method": "expectile"}), r"model\.method is 'exponential', here 'expectile'"),
        (("model", {"alpha": 2.0}), r"objective's alpha is 1\.0, here 2\.0"),
    ],
)
def test_a_run_that_does_not_fit_is_refused(other, changed, line):
    group, fields = changed
    with pytest.raises(UserError, match=rf"policy\.value_run .* does not fit: its {line}"):
        policy.main(change(other, group, **fields))
    assert not Path(other.policy_dir).exists()


def test_a_critic_reads_what_the_policy_reads(other):
    """Its prompts are cut at another length, which matters only to a policy that hands its own to it."""
    asking = change(change(other, "policy", extractor="best_of_n"), "model", max_token_len=9)
    with pytest.raises(UserError, match=r"value run .* does not fit the policy: its model\.max_token_len is \d+, the"):
        policy.main(asking)


def test_what_is_no_complete_value_run_is_refused(other, trained, tmp_path):
    with pytest.raises(UserError, match="holds a policy run, not a value run"):
        value_run.check(change(other, "policy", value_run=trained.policy_dir))
    with pytest.raises(UserError, match="no run there"):
        value_run.check(change(other, "policy", value_run=str(tmp_path)))
    shutil.copytree(trained.value_dir, tmp_path / "half")
    (tmp_path / "half" / "complete.json").unlink()
    with pytest.raises(UserError, match="half is not complete"):
        value_run.check(change(other, "policy", value_run=str(tmp_path / "half")))


def test_the_path_is_no_part_of_the_run_s_identity(other, trained):
    from hvd.train import run_dir

    assert run_dir.config_hash(other, "policy") == run_dir.config_hash(trained, "policy")


def test_launcher_and_planner_leave_the_value_stage_out(other, trained):
    def steps(cfg, stage):
        return [step.step for groups in stages.parts(cfg, stage).values() for group in groups for step in group]

    assert "train-value" in steps(trained, "all") and "train-value" not in steps(other, "all")
    assert steps(other, "all")[:3] == ["prepare", "advantages", "train-policy"]
    assert "train-value" in steps(other, "value")  # asked for by name
    assert plan.stages(trained, "both") == ["value", "policy"] and plan.stages(other, "both") == ["policy"]


def test_weights_without_a_weighted_set_are_refused(trained):
    alone = change(trained, "policy", suboptimal_share=0.0)
    for step in (advantages, policy):
        with pytest.raises(UserError, match=r"policy\.weighting 'hvd' weighs the rows of mixed and rollouts sets"):
            step.main(alone)
    assert not value_run.needed(change(alone, "policy", weighting="none"))


def test_a_run_is_hashed_once_a_process(copied, monkeypatch):
    hashed = []
    original = manifest._hash

    def counted(path):
        hashed.extend([path] if "checkpoints" in path.parts else [])
        return original(path)

    monkeypatch.setattr(manifest, "_hash", counted)
    files = len(complete.read_complete(copied.value_dir).files)
    value_run.check(copied, digests=False)
    assert not hashed
    value_run.check(copied)
    inference.load_value(copied)
    value_run.check(copied)
    assert len(hashed) == files


def test_a_file_that_changes_is_read_again(copied):
    value_run.check(copied)
    path = max(Path(copied.value_dir, "checkpoints").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="is corrupted"):
        value_run.check(copied)
