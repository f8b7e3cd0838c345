"""What a message may ask: the keys of both conventions, and one line for every mistake."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from hvd.configs import DataConfig, Experiment, KeyMap, NormConfig
from hvd.data.normalize import NormStats
from hvd.data.tokenizer import Tokenizer
from hvd.data.transforms import InputTransform
from hvd.errors import UserError
from hvd.models.chunking import Committed, Given, soft_mask
from hvd.robots import get_robot
from hvd.serve.observation import MAX_SEED, Refused, RequestReader
from hvd.serve.sampler import batch_of
from tests.train import factory

KEYMAP = KeyMap(
    images={"base_0_rgb": "observation.images.head", "left_wrist_0_rgb": "observation.images.cam_left"},
    state=("observation.state[0:3]", "observation.gripper", "observation.state[5]"),
)
STATE = 5


CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")


def make_reader(keys: KeyMap = KEYMAP, cameras=CAMERAS, prefix_max=0, **options):
    cfg = factory.experiment(
        Path("nowhere"),
        model=factory.model(cameras=cameras, image_size=28),
        policy={"prefix_max": prefix_max},
        optimal_data=DataConfig(repo_id="x", root="nowhere", keys=keys),
    )
    return RequestReader(cfg, transform_of(cfg), **{"max_rows": 4, "default_prompt": "carry the tote"} | options)


def transform_of(cfg: Experiment) -> InputTransform:
    def stats(dim):
        return NormStats(np.zeros(dim), np.ones(dim), -np.ones(dim), np.ones(dim))

    robot = get_robot(cfg.robot)
    by_name = {"state": stats(STATE), "actions": stats(robot.action_dim)}
    return InputTransform(cfg.model, NormConfig(), robot, by_name, Tokenizer(cfg.model))


IMAGE = np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3)
IMAGES = {"base_0_rgb": IMAGE, "left_wrist_0_rgb": IMAGE[::-1]}
GOOD = {"state": np.arange(5.0), "images": IMAGES, "prompt": "open the drawer"}
LEROBOT = {
    "observation.state": np.array([0.0, 1, 2, 9, 9, 4]),
    "observation.gripper": np.float32(3),
    "observation.images.head": IMAGE,
    "observation.images.cam_left": IMAGE[::-1],
    "task": "open the drawer",
}


def test_both_conventions_give_the_same_inputs():
    reader = make_reader()
    openpis, lerobots = reader.read(GOOD, 7), reader.read(LEROBOT, 7)
    np.testing.assert_array_equal(openpis.state, [[0, 1, 2, 3, 4]])
    for a, b in zip(
        (openpis.state, *leaves(openpis.observation)), (lerobots.state, *leaves(lerobots.observation)), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    assert (
        openpis.seeds.tolist() == [7] and openpis.noise is None and not openpis.batched and openpis.num_flow_steps == 10
    )
    masks = openpis.observation["image_masks"]
    assert {camera: mask.tolist() for camera, mask in masks.items()} == {
        "base_0_rgb": [True],
        "left_wrist_0_rgb": [True],
        "right_wrist_0_rgb": [False],  # not in the data: masked in training too
    }


def leaves(tree):
    return [leaf for value in tree.values() for leaf in (leaves(value) if isinstance(value, dict) else [value])]


def test_alpha_is_left_out():
    alpha = np.concatenate([IMAGE, np.full((20, 30, 1), 9, np.uint8)], axis=-1)
    made, plain = (make_reader().read(GOOD | {"images": IMAGES | {"base_0_rgb": x}}, 0) for x in (alpha, IMAGE))
    for a, b in zip(leaves(made.observation), leaves(plain.observation), strict=True):
        np.testing.assert_array_equal(a, b)


def test_images_by_the_datasets_short_names_and_channels_first():
    reader = make_reader()
    short = {"head": np.moveaxis(IMAGE, -1, 0), "cam_left": np.moveaxis(IMAGE[::-1], -1, 0)}
    found, expected = reader.read(GOOD | {"images": short}, 0), reader.read(GOOD, 0)
    for camera in IMAGES:
        np.testing.assert_array_equal(found.observation["images"][camera], expected.observation["images"][camera])


def test_prompts():
    reader = make_reader()

    def tokens(**changes):
        return reader.read({k: v for k, v in (GOOD | changes).items() if v is not None}, 0).observation[
            "tokenized_prompt"
        ]

    default = Tokenizer(reader.cfg.model).encode(["carry the tote"])[0]
    np.testing.assert_array_equal(tokens(prompt=None), default)
    np.testing.assert_array_equal(tokens(prompt=""), default)
    np.testing.assert_array_equal(tokens(prompt=np.array("carry the tote")), default)
    np.testing.assert_array_equal(tokens(prompt=None, task="carry the tote"), default)
    assert not np.array_equal(tokens(), default)
    with pytest.raises(Refused, match="prompt is missing, and this server has no default"):
        make_reader(default_prompt="").read({"state": GOOD["state"], "images": IMAGES}, 0)


def test_a_batch_is_its_rows_one_by_one():
    reader = make_reader()
    rng = np.random.default_rng(0)
    states, pictures = rng.normal(size=(3, STATE)), rng.integers(0, 256, (3, 20, 30, 3), np.uint8)
    prompts = ["open", "close", "carry"]
    images = dict.fromkeys(IMAGES, pictures)
    batch = reader.read({"state": states, "images": images, "prompt": prompts, "seed": MAX_SEED}, 0)
    assert batch.batched and batch.rows == 3 and batch.seeds.tolist() == [MAX_SEED, 0, 1]
    singles = [
        reader.read({"state": states[i], "images": dict.fromkeys(IMAGES, pictures[i]), "prompt": prompts[i]}, 0)
        for i in range(3)
    ]
    joined, state = batch_of(singles, 4)
    np.testing.assert_array_equal(state, batch_of([batch], 4)[1])
    for a, b in zip(leaves(joined), leaves(batch_of([batch], 4)[0]), strict=True):
        assert len(a) == 4
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a[3], a[2])


def test_noise_and_flow_steps():
    noise = np.random.default_rng(0).normal(size=(4, 32))
    found = make_reader().read(GOOD | {"noise": noise, "num_flow_steps": np.int64(3)}, 0)
    assert found.noise is not None and found.num_flow_steps == 3
    np.testing.assert_array_equal(found.noise, noise[None].astype(np.float32))
    assert make_reader(num_flow_steps=5).read(GOOD, 0).num_flow_steps == 5


def without(key):
    return {name: value for name, value in GOOD.items() if name != key}


def lerobot_without(key):
    return {name: value for name, value in LEROBOT.items() if name != key}


@pytest.mark.parametrize(
    "message, why",
    [
        ([1, 2], "the message is a list; an observation is a dict"),
        (GOOD | {"stat": 1}, "unknown key 'stat'; nearest: state"),
        (GOOD | {"actions": np.zeros(3)}, "unknown key 'actions'"),
        (GOOD | {b"state": 1}, "unknown key"),
        (without("state"), r"state is missing: send 'state' \[5\], or observation.state\[0:3\]"),
        (lerobot_without("observation.gripper"), "'observation.gripper' is missing"),
        (GOOD | {"observation.gripper": 1.0}, "state and 'observation.gripper' are both there"),
        (GOOD | {"state": np.zeros(4)}, r"state has shape \[4\]; expected \[5\]"),
        (GOOD | {"state": np.zeros((1, 1, 5))}, r"state has shape \[1, 1, 5\]"),
        (GOOD | {"state": np.float32(1)}, r"state has shape \[\]"),
        (GOOD | {"state": np.zeros((5, 5))}, "batch of 5; this server takes 1 to 4 rows"),
        (GOOD | {"state": np.zeros((0, 5))}, "batch of 0"),
        (GOOD | {"state": [0, 1, np.nan, 3, 4]}, r"state is NaN or infinite \(in float32\) at \[2\]"),
        (GOOD | {"state": [0, 1, 2, 3, 1e300]}, r"NaN or infinite \(in float32\) at \[4\]"),
        (GOOD | {"state": np.array(["a"] * 5)}, "an array of <U1; expected numbers"),
        (GOOD | {"state": [True] * 5}, "'state' holds a bool"),
        (GOOD | {"state": "00000"}, "'state' is a str"),
        (GOOD | {"state": None}, "'state' is a NoneType"),
        (GOOD | {"state": {"a": 1}}, "'state' is a dict"),
        (GOOD | {"state": [[1, 2], [3]]}, "rows of different lengths"),
        (GOOD | {"state": [10**400, 0, 0, 0, 0]}, "expected numbers"),
        (LEROBOT | {"observation.state": np.zeros(4)}, "'observation.state' has 4 dims; dim 5 is used"),
        (LEROBOT | {"observation.state": np.zeros((2, 6))}, "some have a batch axis"),
        (GOOD | {"images": {"base_0_rgb": IMAGE}}, "camera left_wrist_0_rgb is missing"),
        (without("images"), r"camera base_0_rgb is missing: send images\['base_0_rgb'\] or 'observation.images.head'"),
        (lerobot_without("observation.images.head"), "camera base_0_rgb is missing"),
        (GOOD | {"images": IMAGES | {"right_wrist_0_rgb": IMAGE}}, r"images\['right_wrist_0_rgb'\]: unknown camera"),
        (GOOD | {"images": IMAGES | {7: IMAGE}}, r"images\[7\]: unknown camera; expected base_0_rgb"),
        (GOOD | {"images": [IMAGE, IMAGE]}, "images is a list"),
        (GOOD | {"observation.images.head": IMAGE}, "'observation.images.head': camera base_0_rgb is there twice"),
        (GOOD | {"images": IMAGES | {"head": IMAGE}}, "is there twice"),
        (GOOD | {"images": IMAGES | {"base_0_rgb": IMAGE / 255.0}}, "is float64; expected uint8.*convert_to_uint8"),
        (GOOD | {"images": IMAGES | {"base_0_rgb": IMAGE.astype(np.int32)}}, "is int32; expected uint8"),
        (GOOD | {"images": IMAGES | {"base_0_rgb": IMAGE.tolist()}}, "is a list; expected an array"),
        (GOOD | {"images": IMAGES | {"base_0_rgb": IMAGE[..., 0]}}, r"has shape \[20, 30\]; expected uint8"),
        (GOOD | {"images": IMAGES | {"base_0_rgb": IMAGE[..., :2]}}, r"has shape \[20, 30, 2\]"),
        (GOOD | {"images": IMAGES | {"base_0_rgb": IMAGE[None]}}, r"has shape \[1, 20, 30, 3\]"),
        (GOOD | {"images": IMAGES | {"base_0_rgb": np.zeros((0, 30, 3), np.uint8)}}, "is 0 x 30; nothing"),
        (GOOD | {"images": IMAGES | {"base_0_rgb": np.zeros((1, 300, 3), np.uint8)}}, "is 1 x 300; nothing"),
        (GOOD | {"state": ["x" * 100_000, *[0] * 19_000]}, "'state' holds a str"),
        (GOOD | {"state": [np.array(["x" * 100_000]), *[0] * 19_000]}, "'state' is an array of <U100000"),
        (GOOD | {"prompt": np.arange(3)}, "prompt is a ndarray; expected a text"),
        (GOOD | {"prompt": np.array(["a", "b"])}, "prompt is a list; expected a text"),
        (GOOD | {"num_flow_steps": "1\nserving x\x1b[31m"}, r"num_flow_steps is '1\\nserving x\\x1b\[31m'"),
        (GOOD | {"x\n\x1b[31m": 1}, r"unknown key 'x\\n\\x1b\[31m'"),
        (GOOD | {"prompt": 3}, "prompt is a int; expected a text"),
        (GOOD | {"prompt": ["open"]}, "prompt is a list; expected a text"),
        (GOOD | {"prompt": "x" * 5_000}, "prompt has 5000 characters"),
        (GOOD | {"task": "close"}, "prompt and task are both there"),
        (GOOD | {"seed": -1}, "seed is -1; expected a whole number from 0 to 2147483647"),
        (GOOD | {"seed": 2**31}, "seed is 2147483648"),
        (GOOD | {"seed": True}, "seed is True"),
        (GOOD | {"seed": 1.5}, "seed is 1.5"),
        (GOOD | {"seed": np.arange(2)}, r"seed is array\(\[0, 1\]\)"),
        (GOOD | {"num_flow_steps": 0}, "num_flow_steps is 0; expected a whole number from 1 to 100"),
        (GOOD | {"num_flow_steps": 101}, "num_flow_steps is 101"),
        (GOOD | {"noise": np.zeros((4, 21))}, r"noise has shape \[4, 21\]; expected \[4, 32\]"),
        (GOOD | {"noise": np.full((4, 32), np.inf)}, "noise is NaN or infinite"),
        (GOOD | {"noise": np.zeros((4, 32)), "seed": 1}, "seed and noise are both there"),
    ],
)
def test_a_wrong_request_names_its_key(message, why):
    with pytest.raises(Refused, match=why) as refused:
        make_reader().read(message, 0)
    assert str(refused.value).isprintable() and len(str(refused.value)) < 400


@pytest.mark.parametrize(
    "sent, why",
    [
        ({"inference_delay": 2}, "inference_delay is there without prev_chunk_left_over"),
        ({"prev_chunk_left_over": np.zeros(21)}, r"prev_chunk_left_over has shape \[21\]; expected \[1 to 4, 21\]"),
        ({"prev_chunk_left_over": np.zeros((3, 20))}, r"has shape \[3, 20\]"),
        ({"prev_chunk_left_over": np.zeros((5, 21))}, "has 5 actions; expected 1 to 4"),
        ({"prev_chunk_left_over": np.full((3, 21), np.nan)}, "of finite numbers"),
        ({"prev_chunk_left_over": np.zeros((3, 21)), "inference_delay": 4}, "inference_delay is 4; .* from 0 to 3"),
    ],
)
def test_committed_actions_that_do_not_fit(sent, why):
    with pytest.raises(Refused, match=why):
        make_reader(chunking=True).read(GOOD | sent, 0)


def test_committed_actions():
    good = GOOD | {"prev_chunk_left_over": np.full((3, 21), 0.5), "inference_delay": 1}
    request = make_reader(chunking=True).read(good, 0)
    assert request.kind == (10, Committed) and make_reader(chunking=True).read(GOOD, 0).kind == (10, type(None))
    assert request.committed is not None
    actions, weights = request.committed
    assert actions.shape == (1, 4, 32) and not actions[0, 3].any()
    np.testing.assert_allclose(actions[0, :3, :21], 0.5, rtol=1e-5)
    np.testing.assert_array_equal(weights[0], soft_mask(3, 1, 4))
    trained_so = make_reader(chunking=True, prefix_max=2)
    request = trained_so.read(good, 0)
    assert request.kind == (10, Given) and request.committed is not None
    np.testing.assert_array_equal(request.committed[0], actions)
    assert request.committed[1].tolist() == [[True, False, False, False]]
    assert trained_so.read(good | {"inference_delay": 3}, 0).kind == (10, Committed)  # longer than it is trained for
    with pytest.raises(Refused, match="started without --real-time-chunking"):
        make_reader().read(good, 0)
    with pytest.raises(UserError, match="at most 100; give --num-flow-steps"):
        make_reader(num_flow_steps=200)


def test_a_wrong_batch_names_its_key():
    reader, states = make_reader(), np.zeros((2, STATE))
    images = dict.fromkeys(IMAGES, np.stack([IMAGE] * 3))
    with pytest.raises(Refused, match=r"has shape \[3, 20, 30, 3\]; expected uint8 .* for each of 2 rows"):
        reader.read({"state": states, "images": images}, 0)
    images = dict.fromkeys(IMAGES, np.stack([IMAGE] * 2))
    with pytest.raises(Refused, match="prompt has 3 texts for 2 rows"):
        reader.read({"state": states, "images": images, "prompt": ["a", "b", "c"]}, 0)
    with pytest.raises(Refused, match=r"noise has shape \[4, 32\]; expected \[2, 4, 32\]"):
        reader.read({"state": states, "images": images, "noise": np.zeros((4, 32))}, 0)


def test_a_state_that_overflows_when_normalised():
    reader = make_reader()
    stats = reader._transform.stats["state"]
    reader._transform.stats["state"] = dataclasses.replace(stats, std=np.full(STATE, 1e-9))
    with pytest.raises(Refused, match="its normalised form is not finite"):
        reader.read(GOOD | {"state": np.full(STATE, 1e38)}, 0)


def test_a_policy_without_cameras_takes_no_image():
    reader = make_reader(cameras=())
    assert reader.read(without("images"), 0).observation["images"] == {}
    with pytest.raises(Refused, match="unknown camera; expected none, this policy sees no image"):
        reader.read(GOOD, 0)


def test_keys_come_from_the_data_that_the_policy_was_trained_on():
    other = KeyMap(state=("state_of_the_other",), images={})
    cfg = factory.experiment(
        Path("nowhere"),
        policy={"suboptimal_share": 1.0},
        suboptimal_data=DataConfig(repo_id="y", root="nowhere", keys=other),
    )
    assert RequestReader(cfg, transform_of(cfg)).state_keys == ("state_of_the_other",)
