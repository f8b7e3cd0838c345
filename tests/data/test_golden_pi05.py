"""pi0.5's inputs against openpi's arrays: prompts with a state, quantile normalisation, the whole chain."""

import json

import numpy as np
import pytest
from etils import epath
from numpy.testing import assert_allclose, assert_array_equal

from hvd.configs import ModelConfig, NormConfig
from hvd.data import normalize
from hvd.data.tokenizer import Tokenizer
from hvd.data.transforms import InputTransform
from hvd.robots import Level, Robot
from tests.models.golden import cases, load

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def tokenizer(case, vocabulary: str, length: int) -> Tokenizer:
    """`vocabulary`: "FILE of somewhere"; the file lies beside the case."""
    return Tokenizer(ModelConfig(tokenizer_path=str(case.parent / vocabulary.split()[0]), max_token_len=length))


def check(ids, mask, expected: dict):
    real = expected["real"]
    assert_array_equal(ids[0, :real], expected["ids"])
    assert not ids[0, real:].any()
    assert_array_equal(mask[0], np.arange(ids.shape[1]) < real)


@cases("*_tokenization.json")
def test_prompts_with_a_state(case):
    golden = json.loads(case.read_text())
    for each in golden["cases"]:
        state = np.array(each["state"], np.float64)[None]
        for length, expected in each["ids"].items():
            check(*tokenizer(case, golden["vocabulary"], int(length)).encode([each["prompt"]], state), expected)
        for length, expected in each["without_state"]["ids"].items():
            check(*tokenizer(case, golden["vocabulary"], int(length)).encode([each["prompt"]]), expected)


@cases("normalize_quantile_pi05*.npz")
def test_quantile_normalisation(case):
    a = load(case)
    stats = normalize.NormStats(*(a[name].astype(np.float64) for name in ("mean", "std", "q01", "q99")))
    names = [name.removeprefix("q_") for name in a if name.startswith("q_") and not name.endswith("_stats")]
    assert names
    for name in names:
        normalised = normalize.normalize(a[name], stats, "quantile")
        assert_array_equal(normalised, a[f"q_{name}"])
        if f"uq_q_{name}" in a:
            assert_allclose(normalize.unnormalize(normalised, stats, "quantile"), a[f"uq_q_{name}"], **CLOSE)
        if f"bins_{name}" in a:
            assert_array_equal(np.digitize(normalised, np.linspace(-1, 1, 257)[:-1]) - 1, a[f"bins_{name}"])
    for name in [name for name in a if name.startswith("model_")]:
        known = a[name][..., : stats.dim]  # we cut the padding, openpi carries it along
        expected = a[f"uq_{name}"][..., : stats.dim]
        assert_allclose(normalize.unnormalize(known, stats, "quantile"), expected, **CLOSE)


@pytest.mark.parametrize("count", [2, 4])
def test_a_floor_under_the_width(count):
    """With a floor the middle of the quantiles stays at 0."""
    zeros = np.zeros(count)
    stats = normalize.NormStats(zeros, zeros, zeros - 0.01, zeros + 0.01)
    assert_allclose(normalize.normalize(np.full((1, count), 0.5), stats, "quantile", 0.5), 1.0, rtol=1e-4)


@cases("*_chain.npz")
def test_robot_to_model_and_back(case):
    a, about = load(case), json.loads(case.with_suffix(".json").read_text())
    dims, mask = a["state"].shape[-1], about["delta_mask"]
    robot = Robot(
        "golden",
        tuple(f"joint_{i}" for i in range(dims)),
        (Level("arm", tuple(range(dims))),),
        tuple(i for i, relative in enumerate(mask) if relative),
    )
    cameras = tuple(name.removeprefix("images/") for name in a if name.startswith("images/"))
    model = ModelConfig(
        family="pi05",
        action_dim=about["model_action_dim"],
        action_horizon=a["actions"].shape[1],
        max_token_len=about["max_token_len"],
        tokenizer_path=str(case.parent / about["vocabulary"].split()[0]),
        cameras=cameras,
        image_size=about["image_size"],
    )
    stats = normalize.load(epath.Path(case.parent / about["stats"]))
    transform = InputTransform(model, NormConfig("quantile", delta_actions=True), robot, stats, Tokenizer(model))
    prompts = [about["default_prompt"] if prompt is None else prompt for prompt in about["prompts"]]
    observation = transform.observation(a["state"], {camera: a[f"images/{camera}"] for camera in cameras}, prompts)
    assert_allclose(observation["state"], a["out/state"], **CLOSE)
    assert_array_equal(observation["tokenized_prompt"], a["out/tokens"])
    assert_array_equal(observation["tokenized_prompt_mask"], a["out/token_mask"])
    for camera in cameras:
        assert_array_equal(observation["images"][camera], a[f"out/images/{camera}"])
    assert_allclose(transform.actions_in(a["actions"], a["state"]), a["out/actions"], **CLOSE)
    assert_allclose(transform.actions_out(a["model_actions"], a["state"]), a["served/actions"][..., :dims], **CLOSE)
