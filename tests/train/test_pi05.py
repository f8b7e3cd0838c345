"""pi0.5 through both stages: trained, stopped and resumed, asked, exported and read back; what does not fit."""

import dataclasses
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from hvd import export, overrides
from hvd.checks import check_config
from hvd.configs import EvaluateConfig, NormConfig
from hvd.errors import Stopped, UserError
from hvd.export import Export
from hvd.method import advantages, policy, value
from hvd.models import weights
from hvd.models.pi0 import Pi0
from hvd.train import inference, state
from hvd.train import run_dir as runs
from tests.train import factory
from tests.train.compare import assert_same_run
from tests.train.test_stages import signalled

TOKENS = 32


def model(**changes):
    return factory.model(family="pi05", max_token_len=TOKENS, vocab_size=512, **changes)


def changes(**more):
    evaluated = EvaluateConfig(execute_steps=4)
    return {"model": model(), "norm": NormConfig("quantile", std_floor=0.01), "evaluate": evaluated} | more


@pytest.fixture(scope="module")
def pi05(data_folder, tmp_path_factory):
    """The tiny experiment with pi0.5, both stages complete; read only."""
    cfg = factory.experiment(data_folder, runs_dir=str(tmp_path_factory.mktemp("pi05")), **changes())
    value.main(cfg)
    advantages.main(cfg)
    policy.main(cfg)
    return cfg


@pytest.mark.slow
def test_the_stopped_and_resumed_run_is_the_same(pi05, data_folder, tmp_path, at_step, monkeypatch):
    own = dataclasses.replace(pi05.policy, value_run=pi05.value_dir)
    cfg = dataclasses.replace(pi05, runs_dir=str(tmp_path / "runs"), policy=own)
    at_step(6, signalled(signal.SIGTERM))
    with pytest.raises(Stopped):
        policy.main(cfg)
    monkeypatch.undo()
    policy.main(cfg)
    assert_same_run(cfg.policy_dir, pi05.policy_dir, 12)


@pytest.mark.slow
def test_it_acts_on_the_state_in_the_prompt(pi05):
    trained = inference.load_policy(pi05)
    assert "state_proj" not in trained.params and "time_mlp_in" in trained.params
    states = np.array([[0.0, 0.0, 0.0, 0.0], [0.9, 0.9, 0.9, 0.9]], np.float32)
    observation = trained.transform.observation(states, {}, ["carry the tote"] * 2)
    prompts, real = observation["tokenized_prompt"], observation["tokenized_prompt_mask"]
    assert (prompts[0] != prompts[1]).any() and real.sum(axis=1).max() < TOKENS
    noise = np.random.default_rng(0).normal(size=(2, 4, 32)).astype(np.float32)
    act = jax.jit(trained.denoise)
    actions = act(trained.params, observation, noise, 4)
    assert actions.shape == (2, 4, 32) and np.isfinite(actions).all()
    elsewhere = act(trained.params, observation | {"state": observation["state"] + 1}, noise, 4)
    np.testing.assert_array_equal(elsewhere, actions)  # the tensor itself is not read
    other = observation | {"tokenized_prompt": prompts[::-1].copy(), "tokenized_prompt_mask": real[::-1].copy()}
    assert np.abs(act(trained.params, other, noise, 4) - actions).max() > 1e-6


@pytest.mark.slow
def test_an_export_is_a_checkpoint_of_pi05(pi05, tmp_path, capsys):
    to = export.export(pi05, Export(to=str(tmp_path / "out")))
    assert "Pi0Config(pi05=True, " in capsys.readouterr().out
    opened = weights.open_checkpoint(to)
    shapes = {
        family: state.named(nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda f=family: Pi0(f, nnx.Rngs(0))))))
        for family in (pi05.model, dataclasses.replace(pi05.model, family="pi0"))
    }
    found = weights.match(opened, shapes[pi05.model])
    assert not found.initialised and not found.left
    with pytest.raises(UserError, match=r"a checkpoint of pi05, the model is pi0: set model\.family pi05"):
        weights.match(opened, shapes[dataclasses.replace(pi05.model, family="pi0")])


@pytest.mark.slow
def test_a_value_model_stands_on_either_trunk(pi05, tmp_path):
    to = export.export(pi05, Export(to=str(tmp_path / "out")))
    opened = weights.open_checkpoint(to)
    found = weights.match(opened, state.named(value.make_graph(pi05).shapes))
    assert found.loaded and all(weights.is_trunk(name) for name in found.loaded)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"norm": NormConfig("z_score")}, r"norm\.mode z_score: with pi05 the state is spelled in the prompt"),
        ({"policy": {"state_noise": 0.1}}, r"policy\.state_noise: pi05 reads the state from the prompt only"),
    ],
)
def test_what_does_not_fit(fields, message):
    with pytest.raises(UserError, match=message):
        check_config(factory.experiment(Path("nowhere"), **changes(**fields)))
    plain = model(state_in_prompt="no")
    check_config(factory.experiment(Path("nowhere"), **changes(**fields) | {"policy": {}, "model": plain}))


def test_older_runs_are_the_same_runs():
    """The fields of pi0.5 are part of a run once they are set."""
    cfg = factory.experiment(Path("nowhere"))
    assert not {"model.family", "model.state_in_prompt"} & runs.identity(cfg, "policy").keys()
    assert runs.identity(dataclasses.replace(cfg, model=model()), "value")["model.family"] == "pi05"


@pytest.mark.parametrize("name", ["pi05_r1", "pi05_r1_lora", "pi05_r1pro", "value_pi05_r1", "value_pi05_r1pro"])
def test_the_configs_share_what_their_stages_need(name):
    cfg = overrides.experiment(["--config", name])
    check_config(cfg)
    assert cfg.model.spells_state and cfg.model.max_token_len == 200 and "pi05_base" in cfg.policy.weight_loader
    twin = overrides.experiment(["--config", f"value_{name.removeprefix('value_').removesuffix('_lora')}"])
    assert runs.identity(cfg, "value") == runs.identity(twin, "value")
