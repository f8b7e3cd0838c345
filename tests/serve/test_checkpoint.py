"""A policy from a checkpoint of openpi's form alone."""

import dataclasses
import json
import shutil
import weakref
from pathlib import Path

import jax
import numpy as np
import pytest

from hvd import cli, export
from hvd.errors import EXIT_USER, UserError
from hvd.models import gemma
from hvd.models.lora import LoraConfig
from hvd.serve import checkpoint
from hvd.serve import command as serve
from hvd.serve.checkpoint import load_checkpoint, stats_for
from hvd.train import inference
from hvd.train.inference import load_policy
from tests import served


@pytest.fixture(scope="module")
def cfg(served_experiment):
    return served_experiment


@pytest.fixture(scope="module")
def exported(cfg, tmp_path_factory) -> Path:
    return export.export(cfg, export.Export(to=str(tmp_path_factory.mktemp("export") / "policy")))


def act(policy):
    observation = served.observation(np.random.default_rng(0))
    images = {camera: image[None] for camera, image in observation["images"].items()}
    return policy.act(observation["state"][None], images, [observation["prompt"]], jax.random.key(0))


@pytest.mark.parametrize("given", [".", "params"])
def test_an_export_acts_as_its_run_does(cfg, exported, given):
    """Also with noise in the dims that the robot does not have: the export's weights of those are 0."""
    moved = dataclasses.replace(cfg, runs_dir="nowhere", assets_dir="nowhere")
    for int8 in (False, True):
        found, want = load_checkpoint(moved, str(exported / given), int8), load_policy(cfg, int8=int8)
        np.testing.assert_allclose(act(found), act(want), atol=1e-5)
        assert found.kept == want.kept == ("int8" if int8 else "float32")


def test_loading_keeps_no_second_copy(cfg, exported, monkeypatch):
    """When the policy has its weights, the arrays that were read and have another form there are gone."""
    read, refs = checkpoint.weights.read, []

    def watched(*args):
        arrays = read(*args)
        refs.extend(weakref.ref(x) for name, x in arrays.items() if "/layers/" in name or "encoderblock" in name)
        return arrays

    class Made(inference.Policy):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.left = [ref for ref in refs if ref() is not None]

    monkeypatch.setattr(checkpoint.weights, "read", watched)
    monkeypatch.setattr(inference, "Policy", Made)
    made = load_checkpoint(cfg, str(exported), int8=True)
    assert isinstance(made, Made) and len(refs) > 10 and not made.left


def test_noise_reaches_the_padded_dims_of_openpi_s_own(cfg, exported, tmp_path):
    """Without the zeros of an export, the initial noise of those dims changes the actions, as it does in openpi."""
    whole = export.export(cfg, export.Export(to=str(tmp_path / "whole"), keep_padding=True))
    assert not np.allclose(act(load_checkpoint(cfg, str(whole))), act(load_policy(cfg)), atol=1e-5)


def test_without_stats_beside_it_the_experiment_s_are_used(cfg, exported, tmp_path):
    (tmp_path / "alone").symlink_to(exported / "params")
    found = stats_for(cfg, str(tmp_path / "alone"))["state"]
    np.testing.assert_array_equal(found.mean, load_policy(cfg).transform.stats["state"].mean)


def test_what_does_not_fit(cfg, exported, tmp_path, monkeypatch):
    with_lora = dataclasses.replace(gemma.VARIANTS["dummy"], lora=LoraConfig(rank=2, alpha=2.0))
    monkeypatch.setattr(gemma, "VARIANTS", {**gemma.VARIANTS, "dummy_lora": with_lora})
    model = dataclasses.replace(cfg.model, action_expert_variant="dummy_lora")
    with pytest.raises(UserError, match=r"it lacks \d+ parameters of the model, PaliGemma/.*lora"):
        load_checkpoint(dataclasses.replace(cfg, model=model), str(exported))
    with pytest.raises(UserError, match="no Orbax checkpoint there"):
        load_checkpoint(cfg, str(tmp_path))
    with pytest.raises(UserError, match=r"norm stats of another robot \(21 action dims, r1_pro has 23\)"):
        load_checkpoint(dataclasses.replace(cfg, robot="r1_pro"), str(exported))
    other = tmp_path / "assets" / "other"
    other.mkdir(parents=True)
    (tmp_path / "assets" / "norm_stats.json").write_text("{}")
    (other / "norm_stats.json").write_text(json.dumps({}))
    with pytest.raises(UserError, match="both lie beside it"):
        load_checkpoint(cfg, str(tmp_path))


def test_an_export_says_how_it_was_trained(cfg, exported, tmp_path, capsys):
    policy = dataclasses.replace(cfg.policy, prefix_max=2, extractor="best_of_n", weighting="none")
    other = dataclasses.replace(cfg, policy=policy)
    assert load_checkpoint(other, str(exported)).cfg.policy.prefix_max == 0
    assert "it acts without the critic of best_of_n" in capsys.readouterr().out
    shutil.copytree(exported, tmp_path / "copy")
    mark = tmp_path / "copy" / export.MARK
    mark.write_text(json.dumps(json.loads(mark.read_text()) | {"prefix_max": 3}))
    assert load_checkpoint(cfg, str(tmp_path / "copy/params")).cfg.policy.prefix_max == 3
    mark.write_text("[]")
    with pytest.raises(UserError, match=export.MARK):
        load_checkpoint(cfg, str(tmp_path / "copy"))


def test_it_is_built_into_a_server(cfg, exported):
    options = serve.ServeOptions(checkpoint=str(exported), max_batch=1)
    (server, batcher), _, line = serve.build(cfg, options, "", None)
    batcher.stop(10)
    assert str(exported) in line and not server.ready


def test_it_needs_a_config(capsys):
    assert cli.main(["serve", "--run", "x", "--checkpoint", "y"]) == EXIT_USER
    assert "--checkpoint needs --config NAME" in capsys.readouterr().err
    assert cli.main(["serve", "--config", "demo", "--checkpoint", "y", "--value-run", "z"]) == EXIT_USER
    assert "--value-run: a --checkpoint of openpi's form" in capsys.readouterr().err
    assert cli.main(["serve", "--config", "demo", "--checkpoint", "y", "--extractor", "best_of_n"]) == EXIT_USER
    assert "--extractor: a --checkpoint of openpi's form" in capsys.readouterr().err
