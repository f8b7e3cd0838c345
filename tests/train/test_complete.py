"""complete.json: a whole run passes, every kind of damage is found and named."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from hvd.errors import UserError
from hvd.train import complete


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


DAMAGE = {
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


def test_verify_without_runs(fresh):
    with pytest.raises(UserError, match="no run in"):
        complete.main(fresh())


def test_imports_no_jax():
    code = "import sys, hvd.train.complete, hvd.train.run_dir, hvd.runtime.preemption; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
