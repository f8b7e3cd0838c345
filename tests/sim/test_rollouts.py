"""Rollouts: policies act on several environments in step; the same seeds give the same result."""

from pathlib import Path

import av
import numpy as np
import pytest

from hvd.errors import UserError
from hvd.sim import scene
from hvd.sim.env import Env, Step
from hvd.sim.rollouts import RolloutSpec, roll_out_group
from hvd.sim.tasks import get_task


def hold(state, images, prompts, noise):
    chunk = np.repeat(state[:, None, :21], 5, axis=1)
    chunk[..., scene.BASE] = 0
    return chunk


class Twin:
    """The teleoperator as a policy: it acts in environments of its own that run in step with the rolled-out ones."""

    def __init__(self, task: str, seeds, execute: int):
        self.envs = [Env(task) for _ in seeds]
        for env, seed in zip(self.envs, seeds, strict=True):
            env.reset(seed)
        self.operators = [env.task.operator(env, seed) for env, seed in zip(self.envs, seeds, strict=True)]
        self.execute, self.calls = execute, []

    def __call__(self, state, images, prompts, noise):
        self.calls.append(noise)
        for env, seen in zip(self.envs, state, strict=True):
            np.testing.assert_allclose(seen, np.concatenate([env.state(), env.environment_state()]), atol=1e-4)
        chunks = np.zeros((len(state), self.execute, 21))
        for i, (env, operator) in enumerate(zip(self.envs, self.operators, strict=True)):
            for k in range(self.execute):
                chunks[i, k] = operator.act()
                if not (env.success or env.dropped):
                    env.step(chunks[i, k])
        return chunks


KEYS = ("observation.state", "observation.environment_state")


def test_a_policy_that_acts_like_the_operator_succeeds():
    seeds = [1_000_000, 1_000_001]
    twin = Twin("tote", seeds, 4)
    rollouts = roll_out_group(RolloutSpec("tote", 200, 4, KEYS), seeds, twin)
    assert [r.seed for r in rollouts] == seeds
    assert all(r.success and r.stage == 4 and not r.dropped and 60 < r.steps < 200 for r in rollouts)
    assert twin.calls == [(1_000_000, i) for i in range(len(twin.calls))]


def test_doing_nothing_ends_with_time_and_stage_0():
    (rollout,) = roll_out_group(RolloutSpec("pick", 12, 5), [7], hold)
    assert (rollout.success, rollout.stage, rollout.steps) == (False, 0, 12)


def test_the_policy_gets_what_it_observes():
    seen = []

    def act(state, images, prompts, noise):
        seen.append((state, dict(images), list(prompts)))
        return hold(state, images, prompts, noise)

    spec = RolloutSpec("pick", 10, 5, KEYS, {"base_0_rgb": "head", "left_wrist_0_rgb": "left_wrist"}, 32)
    roll_out_group(spec, [1, 2, 3], act)
    assert len(seen) == 2
    state, images, prompts = seen[0]
    assert state.shape == (3, 32) and state.dtype == np.float32
    assert {name: image.shape for name, image in images.items()} == {
        "base_0_rgb": (3, 32, 32, 3),
        "left_wrist_0_rgb": (3, 32, 32, 3),
    }
    assert not np.array_equal(images["base_0_rgb"][0], images["base_0_rgb"][1])
    assert prompts == [get_task("pick").prompt] * 3
    for i, seed in enumerate((1, 2, 3)):
        env = Env("pick")
        env.reset(seed)
        np.testing.assert_array_equal(state[i], np.concatenate([env.state(), env.environment_state()]))


@pytest.mark.parametrize("backend", ["opengl", "rays"])
def test_videos_show_every_step(tmp_path, backend):
    path = tmp_path / "videos" / "rollout_5.mp4"
    from hvd.sim.render import available_backend

    if backend == "opengl" and available_backend() != "opengl":
        pytest.skip("no OpenGL on this machine")
    roll_out_group(RolloutSpec("tote", 6, 3, backend=backend, videos={5: path}), [4, 5], hold)
    assert [p.name for p in path.parent.iterdir()] == ["rollout_5.mp4"]
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert stream.codec_context.name == "h264" and stream.average_rate == 10
    assert len(frames) == 6
    assert frames[0].shape[1] == frames[0].shape[0] * 4 // 3 and frames[0].std() > 20


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"state_keys": ("observation.joints",)}, "'observation.joints': the simulator observes observation.state"),
        ({"cameras": {"base_0_rgb": "chest"}}, "no camera 'chest'"),
    ],
)
def test_what_the_simulator_cannot_observe_is_said(changes, line):
    with pytest.raises(UserError, match=line):
        RolloutSpec("tote", 10, 5, **changes)


def test_a_chunk_must_be_long_enough():
    with pytest.raises(UserError, match="execute_steps 6 and delay 0 are more than the 5"):
        roll_out_group(RolloutSpec("pick", 10, 6), [1], hold)


def test_paths_of_videos_are_not_made_before_they_are_needed(tmp_path):
    spec = RolloutSpec("pick", 3, 1, videos={99: Path(tmp_path / "videos" / "x.mp4")})
    roll_out_group(spec, [1], hold)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------- chunks that come late


class Numbers:
    """A policy whose chunks say who made them: action k of the n-th chunk is 100 n + k in each dim."""

    def __init__(self, actions: int = 8):
        self.actions, self.left = actions, []

    def __call__(self, state, images, prompts, noise, left=None):
        self.left.append(left)
        return np.tile(100.0 * noise[1] + np.arange(self.actions)[:, None], (len(state), 1, 21))


def executed(monkeypatch, policy, steps=13, **spec) -> list[float]:
    """What a robot is told in the first control steps."""
    done = []

    def step(self, action):
        done.append(float(action[0]))
        self.time += 1
        return Step(0.0, False, False, self.time >= self.horizon, "")

    monkeypatch.setattr(Env, "step", step)
    roll_out_group(RolloutSpec("tote", steps, 4, **spec), [1], policy)
    return done


def test_the_old_chunk_goes_on_until_the_new_one_is_there(monkeypatch):
    assert executed(monkeypatch, Numbers()) == [0, 1, 2, 3, 100, 101, 102, 103, 200, 201, 202, 203, 300]
    late = executed(monkeypatch, Numbers(), delay=2)
    assert late == [0, 1, 2, 3, 4, 5, 102, 103, 104, 105, 202, 203, 204]
    assert executed(monkeypatch, Numbers(), delay=4) == [0, 1, 2, 3, 4, 5, 6, 7, 104, 105, 106, 107, 204]


def test_an_ensemble_is_the_mean_of_what_is_there(monkeypatch):
    told = executed(monkeypatch, Numbers(), chunking="ensemble")
    weights = np.exp([0, -0.01])
    mean = [np.average([4 + k, 100 + k], weights=weights) for k in range(4)]
    np.testing.assert_allclose(told[:8], [0, 1, 2, 3, *mean])
    late = executed(monkeypatch, Numbers(), chunking="ensemble", delay=2)
    np.testing.assert_allclose(
        late[:8], [0, 1, 2, 3, 4, 5, *(np.average([k, 96 + k], weights=weights) for k in (6, 7))]
    )


@pytest.mark.parametrize("way", ["guided", "prefix"])
def test_a_policy_is_told_what_is_left(monkeypatch, way):
    policy = Numbers()
    told = executed(monkeypatch, policy, chunking=way, delay=2)
    assert told == executed(monkeypatch, Numbers(), delay=2) and policy.left[0] is None
    (actions, delay), (later, _) = policy.left[1:3]
    assert actions.shape == (1, 4, 21) and actions[0, :, 0].tolist() == [4, 5, 6, 7] and delay == 2
    assert later[0, :, 0].tolist() == [104, 105, 106, 107]


def test_a_chunk_must_outlast_its_follower_s_delay():
    with pytest.raises(UserError, match="execute_steps 5 and delay 4 are more than the 8 of a chunk"):
        roll_out_group(RolloutSpec("tote", 10, 5, delay=4), [1], Numbers())
