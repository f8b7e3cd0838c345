"""hvd export: a run in openpi's form. What is written is what was trained; nothing else is overwritten."""

import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import traverse_util

from hvd import experiments, export
from hvd.configs import NormConfig
from hvd.data import normalize
from hvd.data.normalize import NormStats
from hvd.errors import UserError
from hvd.export import Export, params
from hvd.method import policy
from hvd.models import weights
from hvd.train import inference
from tests.train import factory
from tests.train.compare import arrays


def exported(folder: Path) -> dict[str, np.ndarray]:
    """Every array of an export, by the model's name, read as the weights of a run are."""
    opened = weights.open_checkpoint(folder)
    assert all(x.path[0] == "params" and x.path[-1] == "value" for x in opened.arrays.values())
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for name, x in opened.arrays.items()}
    return {name: np.asarray(x) for name, x in weights.read(opened, wanted).items()}


def trained_arrays(run_dir: str, step: int = 12) -> dict[str, np.ndarray]:
    found = arrays(run_dir, step)
    return {name.removeprefix("params/params/"): x for name, x in found.items() if name.startswith("params/")}


@pytest.mark.parametrize("stage", ["policy", "value"])
def test_every_bit(trained, tmp_path, stage):
    to = export.export(trained, Export(to=str(tmp_path / "out"), stage=stage, keep_padding=True))
    ours, theirs = exported(to), trained_arrays(getattr(trained, f"{stage}_dir"))
    assert ours.keys() == theirs.keys()
    for name, x in theirs.items():
        assert ours[name].dtype == x.dtype and ours[name].tobytes() == x.tobytes(), name


def test_padding_reaches_nothing(trained, tmp_path):
    """openpi gives noise to all 32 action dims; of an exported policy those that the robot lacks change nothing."""
    to = export.export(trained, Export(to=str(tmp_path / "out")))
    ours, theirs = exported(to), trained_arrays(trained.policy_dir)
    real = inference.pad_mask(trained) > 0
    assert real.sum() == 21 and len(real) == 32
    for name, x in theirs.items():
        if name == "action_in_proj/kernel":
            assert not ours[name][~real].any()
            np.testing.assert_array_equal(ours[name][real], x[real])
        elif name.startswith("action_out_proj/"):
            assert not ours[name][..., ~real].any()
            np.testing.assert_array_equal(ours[name][..., real], x[..., real])
        else:
            np.testing.assert_array_equal(ours[name], x)
    model = policy.make_graph(trained).module(jax.tree.map(jnp.asarray, traverse_util.unflatten_dict(ours, sep="/")))
    observation = {
        "state": jnp.ones((2, 32)),
        "images": {},
        "image_masks": {},
        "tokenized_prompt": jnp.ones((2, 4), jnp.int32),
        "tokenized_prompt_mask": jnp.ones((2, 4), bool),
    }
    noise = jax.random.normal(jax.random.key(0), (2, 4, 32))
    act = jax.jit(model.sample_actions)
    as_hvd = act(observation, noise * jnp.asarray(real)[None, None], jnp.int32(3))
    as_openpi = act(observation, noise, jnp.int32(3))
    np.testing.assert_array_equal(as_openpi[..., real], as_hvd[..., real])


def test_norm_stats(trained, tmp_path, golden):
    """The form of openpi's own file; the floor of hvd is in the numbers."""
    to = export.export(trained, Export(to=str(tmp_path / "out"), asset_id="galaxea/r1"))
    path = to / "assets" / "galaxea" / "r1" / "norm_stats.json"
    ours = json.loads(path.read_text())
    theirs = json.loads((golden / "norm_stats.json").read_text())
    assert ours.keys() == theirs.keys() | {"made_of"}  # openpi ignores what it does not know
    assert ours["norm_stats"].keys() == {"state", "actions"}
    assert ours["norm_stats"]["state"].keys() == theirs["norm_stats"]["state"].keys()
    stats = normalize.load(epath.Path(path))
    assert stats["actions"].dim == 21 and trained.norm.std_floor == 0.01


@pytest.mark.parametrize("mode", ["z_score", "quantile"])
def test_the_floor_of_the_spread(mode):
    """openpi, which knows no floor, normalises with the exported numbers as hvd does with its own."""
    rng = np.random.default_rng(0)
    mean, std = rng.normal(size=6), np.array([1.0, 1e-4, 0.0, 0.3, 0.02, 2.0])
    stats = {"state": NormStats(mean, std, mean - 2 * std, mean + 2.5 * std)}
    x = rng.normal(size=(5, 6))
    want = normalize.normalize(x, stats["state"], mode, std_floor=0.05)
    out = params.openpi_stats(stats, NormConfig(mode=mode, std_floor=0.05))["state"]
    assert out.q01 is not None and out.q99 is not None
    # as openpi's Normalize does
    z_score = (x - out.mean) / (out.std + 1e-6)
    quantile = (x - out.q01) / (out.q99 - out.q01 + 1e-6) * 2 - 1
    np.testing.assert_allclose({"z_score": z_score, "quantile": quantile}[mode], want, rtol=1e-6, atol=1e-9)
    np.testing.assert_array_equal(params.openpi_stats(stats, NormConfig(mode=mode))["state"].q99, stats["state"].q99)


@pytest.mark.slow
def test_lora(fresh, trained, tmp_path, capsys):
    """A LoRA run on the weights of a full one: exported with its updates, and merged into a plain model's tree."""
    model = factory.model(paligemma_variant="dummy_lora", action_expert_variant="dummy_lora")
    cfg = fresh(
        model=model,
        policy={
            "weighting": "none",
            "suboptimal_share": 0.0,
            "num_train_steps": 3,
            "weight_loader": trained.policy_dir + "/checkpoints/12",
        },
    )
    policy.main(cfg)
    assert "initialised: " in capsys.readouterr().out
    plain = exported(export.export(cfg, Export(to=str(tmp_path / "lora"), keep_padding=True)))
    stored = trained_arrays(cfg.policy_dir, 3)
    assert plain.keys() == stored.keys() and any("lora" in name for name in plain)
    assert all(plain[name].tobytes() == x.tobytes() for name, x in stored.items())
    merged = exported(export.export(cfg, Export(to=str(tmp_path / "merged"), merge_lora=True)))
    full = trained_arrays(trained.policy_dir)
    assert {name: x.shape for name, x in merged.items()} == {name: x.shape for name, x in full.items()}
    assert "paligemma_variant='dummy', action_expert_variant='dummy'" in capsys.readouterr().out
    changed = [name for name in merged if "attn" in name and not np.array_equal(merged[name], full[name])]
    assert changed, "the updates are in"


def test_the_same_export_is_made_once(trained, tmp_path, capsys):
    options = Export(to=str(tmp_path / "out"))
    export.export(trained, options)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}
    export.export(trained, options)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")} == before
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"holds another export \(other digest, run, stage\); delete it"):
        export.export(trained, dataclasses.replace(options, stage="value"))
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")} == before


def test_nothing_else_is_overwritten(trained, fresh, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("")
    for name, line in (("mine", "holds something else"), ("file", "is a file"), ("file/below", "cannot be written")):
        with pytest.raises(UserError, match=rf"--to .*{name}.* ?{line}|is no folder; set --to"):
            export.export(trained, Export(to=str(tmp_path / name)))
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    with pytest.raises(UserError, match="no run at"):
        export.export(fresh(), Export(to=str(tmp_path / "out")))
    with pytest.raises(UserError, match="--merge-lora: the policy run has no LoRA updates"):
        export.export(trained, Export(to=str(tmp_path / "out"), merge_lora=True))
    with pytest.raises(UserError, match=r"--asset-id '\.\./up' is not the name"):
        export.export(trained, Export(to=str(tmp_path / "out"), asset_id="../up"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "mine"], "nothing half done is left"


KILLED = """
import os, signal, sys
from pathlib import Path
from hvd import export
from tests.train import factory
cfg = factory.experiment(Path(sys.argv[1]), runs_dir=sys.argv[2])
from hvd.data import normalize
normalize.save = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
export.export(cfg, export.Export(to=sys.argv[3]))
"""


def test_what_a_killed_export_left_is_removed(trained, data_folder, tmp_path):
    to = tmp_path / "out"
    (tmp_path / ".other.0123456789abcdef.tmp").mkdir()
    command = [sys.executable, "-c", KILLED, str(data_folder), trained.runs_dir, str(to)]
    assert subprocess.run(command, check=False, capture_output=True).returncode == -signal.SIGKILL
    assert not to.exists() and len(list(tmp_path.iterdir())) > 1
    export.export(trained, Export(to=str(to)))
    assert {p.name for p in tmp_path.iterdir()} == {"out", ".other.0123456789abcdef.tmp"}


def test_the_command(trained, tmp_path, monkeypatch, capsys):
    small = dataclasses.replace(trained, evaluate=dataclasses.replace(trained.evaluate, execute_steps=4))
    monkeypatch.setitem(experiments.CONFIGS, "tiny", lambda: small)
    assert export.main(["--config", "tiny", "--to", str(tmp_path / "out"), "--keep-padding"]) == 0
    assert "AssetsConfig(asset_id='test/optimal')" in capsys.readouterr().out
    assert (tmp_path / "out" / "assets" / "test" / "optimal" / "norm_stats.json").is_file()
    with pytest.raises(UserError, match="--to FOLDER is missing"):
        export.main(["--config", "tiny"])
    assert export.main(["--help"]) == 0 and "--merge-lora" in capsys.readouterr().out
