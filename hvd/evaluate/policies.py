"""Policies as `hvd evaluate` calls them: hvd.sim.rollouts.Act, made in the process that uses it."""

from collections.abc import Callable, Sequence
from typing import Any

from hvd.configs import Experiment

Loader = Callable[[Experiment], Any]
"""cfg -> hvd.sim.rollouts.Act. Called in each worker process, so it must be a top-level function."""


def trained(cfg: Experiment, int8: bool = False):
    """The trained policy of cfg.policy_dir as an Act, with the flow steps of `cfg`; `int8`: as load_policy's."""
    import jax

    from hvd.train.inference import load_policy

    policy = load_policy(cfg, num_flow_steps=cfg.policy.num_flow_steps, int8=int8)

    def act(state, images, prompts: Sequence[str], noise: tuple[int, int], left=None):
        key = jax.random.fold_in(jax.random.key(noise[0]), noise[1])
        return policy.act(state, images, prompts, key, left, guided=cfg.evaluate.chunking == "guided")

    return act


def nothing(cfg: Experiment):
    """An Act that holds the robot's pose and does not drive."""
    from hvd.sim.scene import BASE

    def act(state, images, prompts: Sequence[str], noise: tuple[int, int]):
        hold = state[:, None, :21].repeat(cfg.model.action_horizon, axis=1)
        hold[..., BASE] = 0
        return hold

    return act
