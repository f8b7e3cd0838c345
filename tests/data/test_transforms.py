"""Input and output transforms: openpi's numbers, inverses, and masked cameras."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd.configs import Experiment, ModelConfig, NormConfig
from hvd.data import normalize
from hvd.data.normalize import NormStats
from hvd.data.tokenizer import Tokenizer
from hvd.data.transforms import InputTransform, resize_with_pad
from hvd.errors import UserError
from hvd.robots import get_robot
from tests.folders import golden_files

MODEL = ModelConfig(action_dim=32, tokenizer="words", vocab_size=64, max_token_len=8, image_size=28)
NORM = NormConfig()


def make_transform(norm=NORM, model=MODEL, state_dim=21):
    rng = np.random.default_rng(0)

    def stats(dims):
        mean, std = rng.normal(size=dims), rng.uniform(0.5, 2, dims)
        return NormStats(mean, std, mean - 2 * std, mean + 2 * std)

    return InputTransform(
        model, norm, get_robot("r1"), {"state": stats(state_dim), "actions": stats(21)}, Tokenizer(model)
    )


@pytest.mark.parametrize("path", golden_files("transforms.npz"), ids=lambda p: p.name)
def test_golden_transforms(path):
    golden = np.load(path)
    state, actions, mask = golden["state"], golden["actions"], golden["mask"]
    np.testing.assert_allclose(normalize.delta(actions, state, mask), golden["delta"], atol=1e-5)
    np.testing.assert_allclose(normalize.absolute(golden["delta"], state, mask), golden["absolute"], atol=1e-5)
    for name in ("state", "actions"):
        padded, dims = golden[f"padded_{name}"], golden[name].shape[-1]
        plain = NormStats(np.zeros(dims), np.ones(dims), -np.ones(dims), np.ones(dims))
        model = dataclasses.replace(MODEL, action_dim=padded.shape[-1])
        transform = InputTransform(model, NORM, get_robot("r1"), {"state": plain, "actions": plain}, Tokenizer(model))
        given = golden[name][None]
        ours = transform.state(given) if name == "state" else transform.actions_in(given, state[None])
        np.testing.assert_allclose(ours[0], padded, rtol=1e-5)


def resize_cases():
    return [
        (path, key[3:]) for path in golden_files("resize_with_pad*.npz") for key in np.load(path) if key[:3] == "u8_"
    ]


@pytest.mark.parametrize(("path", "case"), [c for c in resize_cases() if c[1].isdigit()])
def test_golden_resize_with_pad(path, case):
    golden = np.load(path)
    height, width = golden[f"size_{case}"].tolist()
    ours = resize_with_pad(golden[f"u8_{case}"], height, width).astype(int)
    assert np.abs(ours - golden[f"u8_pil_{case}"]).max() <= 1


@settings(deadline=None, max_examples=40)
@given(st.booleans(), st.sampled_from(["z_score", "quantile"]), st.integers(1, 4), st.integers(0, 1000))
def test_actions_out_is_the_inverse_of_actions_in(delta, mode, b, seed):
    rng = np.random.default_rng(seed)
    transform = make_transform(NormConfig(mode=mode, delta_actions=delta))
    actions = rng.normal(size=(b, 5, 21)).astype(np.float32)
    state = rng.normal(size=(b, 21)).astype(np.float32)
    inwards = transform.actions_in(actions, state)
    assert inwards.shape == (b, 5, 32) and not inwards[..., 21:].any()
    np.testing.assert_allclose(transform.actions_out(inwards, state), actions, atol=1e-5)


def test_delta_leaves_velocities_alone():
    transform = make_transform(NormConfig(delta_actions=True))
    plain = make_transform()
    actions, state = np.zeros((1, 5, 21), np.float32), np.ones((1, 21), np.float32)
    difference = transform.actions_in(actions, state) - plain.actions_in(actions, state)
    moved = np.flatnonzero(difference[0, 0])
    np.testing.assert_array_equal(moved, np.flatnonzero(get_robot("r1").delta_mask()))


def test_observation():
    transform = make_transform()
    rng = np.random.default_rng(1)
    state = rng.normal(size=(2, 21)).astype(np.float32)
    images = {"base_0_rgb": rng.integers(0, 255, (2, 30, 40, 3), np.uint8)}
    got = transform.observation(state, images, ["open the drawer", "close"])
    assert got["state"].shape == (2, 32) and got["state"].dtype == np.float32
    np.testing.assert_array_equal(got["images"]["base_0_rgb"], resize_with_pad(images["base_0_rgb"], 28, 28))
    assert {k: v.all() for k, v in got["image_masks"].items()} == {
        "base_0_rgb": True,
        "left_wrist_0_rgb": False,
        "right_wrist_0_rgb": False,
    }
    assert not got["images"]["left_wrist_0_rgb"].any() and not got["image_masks"]["left_wrist_0_rgb"].any()
    assert got["tokenized_prompt"].shape == got["tokenized_prompt_mask"].shape == (2, 8)
    numbers_only = make_transform(model=dataclasses.replace(MODEL, cameras=()))
    assert numbers_only.observation(state, images, ["a", "b"])["images"] == {}


def test_from_config_reads_the_shared_statistics(tmp_path):
    cfg = Experiment(name="test", assets_dir=str(tmp_path), model=MODEL)
    cfg = dataclasses.replace(cfg, optimal_data=dataclasses.replace(cfg.optimal_data, repo_id="a"))
    with pytest.raises(UserError, match="hvd norm-stats"):
        InputTransform.from_config(cfg)
    stats = make_transform().stats
    normalize.save(normalize.path_for(cfg, "a"), stats)
    np.testing.assert_array_equal(InputTransform.from_config(cfg).stats["state"].mean, stats["state"].mean)


def test_wrong_widths():
    with pytest.raises(UserError, match="state has 20 dims but its norm stats 21: those of another robot"):
        make_transform().state(np.zeros((1, 20), np.float32))
    with pytest.raises(UserError, match=r"model\.action_dim 20 is smaller than the 21 dims"):
        make_transform(model=dataclasses.replace(MODEL, action_dim=20))
    with pytest.raises(UserError, match=r"norm\.delta_actions needs a state"):
        make_transform(NormConfig(delta_actions=True), state_dim=11)
