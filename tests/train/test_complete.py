"""complete.json: a whole run passes, every kind of damage is found and named."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from hvd import export
from hvd.errors import UserError
from hvd.method import value_run
from hvd.train import complete, inference


def tree(folder: str) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def edit(path: Path, **fields) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def parameter_file(folder: Path) -> Path:
    """The largest file of the final checkpoint's parameters."""
    return max((folder / "checkpoints/12/params").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)


def test_complete_run(trained):
    found = complete.check_complete(trained.value_dir, stage="value", cfg=trained)
    assert (found.stage, found.step, found.finite) == ("value", 12, True)
    assert set(found.inputs) == {"optimal", "suboptimal", "norm_stats"}
    on_disk = {str(p.relative_to(trained.value_dir)) for p in Path(trained.value_dir, "checkpoints/12").rglob("*")}
    assert set(found.files) <= on_disk and found.bytes > 100_000
    policy = complete.check_complete(trained.policy_dir, stage="policy", cfg=trained)
    assert policy.inputs["value"] == found.digest


def flip_byte(folder: Path):
    path = parameter_file(folder)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(folder: Path):
    path = parameter_file(folder)
    path.write_bytes(path.read_bytes()[:-1])


def one_digit(folder: Path):
    """The first digit after the point of an action's spread."""
    path = folder / "norm_stats.json"
    data = json.loads(path.read_text())
    data["norm_stats"]["actions"]["std"][0] *= 1.25
    path.write_text(json.dumps(data))


def settings(folder: Path, old: str, new: str):
    path = folder / "config.yaml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def of_an_older_version(folder: Path):
    """complete.json as it was before config.yaml and norm_stats.json were part of it."""
    data = json.loads((folder / "complete.json").read_text())
    data.pop("settings", None)
    (folder / "complete.json").write_text(json.dumps(data))


def file_outside(folder: Path):
    from hvd.train import manifest

    data = json.loads((folder / "complete.json").read_text())
    data["files"]["../../../../etc/passwd"] = {"bytes": 1, "sha256": "0" * 64}
    listed = {name: (file["bytes"], file["sha256"]) for name, file in data["files"].items()}
    edit(folder / "complete.json", files=data["files"], digest=manifest.digest(listed))


DAMAGE = {
    "one digit of the norm stats": (one_digit, r"norm_stats\.json has|norm_stats\.json is corrupted"),
    "other settings": (
        lambda f: settings(f, "num_flow_steps: 10", "num_flow_steps: 1"),
        r"config\.yaml has \d+ bytes|config\.yaml is corrupted",
    ),
    "norm stats gone": (lambda f: (f / "norm_stats.json").unlink(), r"norm_stats\.json is missing"),
    "config gone": (lambda f: (f / "config.yaml").unlink(), r"config\.yaml is missing"),
    "norm stats, older version": (
        lambda f: (of_an_older_version(f), one_digit(f)),
        r"norm_stats\.json is not what the run was trained with",
    ),
    "config, older version": (
        lambda f: (of_an_older_version(f), settings(f, "std_floor: 0.01", "std_floor: 5.0")),
        r"config\.yaml is not the config that the run was trained with",
    ),
    "a file outside": (file_outside, "is not the name of a file below its folder"),
    "nested deeply": (lambda f: (f / "complete.json").write_text("[" * 100_000), "complete.json is damaged"),
    "a size that is no number": (
        lambda f: edit(f / "complete.json", files={"checkpoints/12/params/x": {"bytes": None, "sha256": "0" * 64}}),
        r"complete.json is damaged: .*bytes",
    ),
    "no complete.json": (lambda f: (f / "complete.json").unlink(), "is not complete.*last checkpoint is at step 12"),
    "flipped byte": (flip_byte, r"params/.* is corrupted: its sha256"),
    "truncated file": (truncate, r"params/.* has \d+ bytes instead of \d+"),
    "missing file": (lambda f: parameter_file(f).unlink(), r"params/.* is missing"),
    "non-finite": (lambda f: edit(f / "complete.json", finite=False), "parameters are not finite"),
    "finite not said": (lambda f: edit(f / "complete.json", finite=None), "parameters are not finite"),
    "wrong step": (lambda f: edit(f / "complete.json", step=11), "complete at step 11, but the config asks for 12"),
    "edited manifest": (lambda f: edit(f / "complete.json", digest="0" * 64), "list of files does not have the digest"),
    "empty manifest": (lambda f: edit(f / "complete.json", files={}), "complete.json is damaged"),
    "not JSON": (lambda f: (f / "complete.json").write_text("{"), "complete.json is damaged"),
    "other stage": (lambda f: edit(f / "complete.json", stage="policy"), "holds a policy run, not a value run"),
    "other config": (
        lambda f: edit(f / "complete.json", config_hash="0" * 64),
        "trained with another config",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_and_nothing_is_touched(copied, damage):
    make, message = DAMAGE[damage]
    make(Path(copied.value_dir))
    before = tree(copied.exp_dir)
    with pytest.raises(UserError, match=message) as error:
        complete.check_complete(copied.value_dir, stage="value", cfg=copied)
    assert copied.value_dir in str(error.value) and "\n" not in str(error.value)
    assert tree(copied.exp_dir) == before


def test_no_run(fresh):
    cfg = fresh()
    with pytest.raises(UserError, match=r"no run at .*value: train it first \(hvd train-value\)"):
        complete.check_complete(cfg.value_dir, stage="value", cfg=cfg)
    assert not Path(cfg.runs_dir).exists()


def test_other_config_names_the_field(trained):
    cfg = dataclasses.replace(trained, value=dataclasses.replace(trained.value, gamma=0.5))
    with pytest.raises(UserError, match=r"another config \(value\.gamma: 0\.99 -> 0\.5\)"):
        complete.check_complete(cfg.value_dir, stage="value", cfg=cfg)


def test_a_run_of_an_older_version_is_still_complete(copied):
    of_an_older_version(Path(copied.value_dir))
    assert complete.check_complete(copied.value_dir, stage="value", cfg=copied).settings == {}


def test_nobody_uses_a_run_whose_norm_stats_are_others(copied, tmp_path):
    """Not verify, not the next stage, not inference, not export."""
    one_digit(Path(copied.value_dir))
    one_digit(Path(copied.policy_dir))
    uses = (
        lambda: complete.main(copied),
        lambda: value_run.check(copied),
        lambda: inference.load_policy(copied.policy_dir),
        lambda: inference.load_value(copied),
        lambda: export.export(copied, export.Export(to=str(tmp_path / "out"))),
    )
    for use in uses:
        with pytest.raises(UserError, match=r"norm_stats\.json"):
            use()


def test_moved_run_is_still_complete(copied):
    complete.check_complete(copied.value_dir, stage="value", cfg=copied)


def test_verify_prints_a_line_a_run(copied, capsys):
    complete.main(copied)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["complete", "complete"]
    flip_byte(Path(copied.policy_dir))
    with pytest.raises(UserError, match="corrupted"):
        complete.main(copied)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["BAD", "complete"]


def test_verify_names_a_run_that_has_lost_its_config(copied):
    (Path(copied.policy_dir) / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"policy/config\.yaml is missing"):
        complete.main(copied)


def test_verify_without_runs(fresh):
    with pytest.raises(UserError, match="no run in"):
        complete.main(fresh())


def test_imports_no_jax():
    code = "import sys, hvd.train.complete, hvd.train.run_dir, hvd.runtime.preemption; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
