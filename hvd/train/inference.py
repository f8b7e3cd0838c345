"""Using trained runs: a policy that acts, a value function that judges. For rollouts, reports and serving.

Everything comes from the run's own folder: config.yaml, norm_stats.json and the parameters of the checkpoint that
complete.json names (rule 1: a run that is not complete is not used).
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Float, Float32, Int, UInt8

from hvd.configs import Experiment
from hvd.data import normalize
from hvd.data.transforms import InputTransform, Observation
from hvd.errors import UserError
from hvd.method import condition, extraction
from hvd.models import acting, precision
from hvd.models.chunking import Committed, Given, commit
from hvd.models.pi0 import Pi0
from hvd.models.separate import separate
from hvd.models.value import ValueModel
from hvd.train import checkpoints, compilation, complete, mesh, state, steering
from hvd.train import run_dir as runs
from hvd.train.mesh import Devices
from hvd.train.state import Graph, Tree


class Policy:
    """A trained policy, from parameters that it takes over. `act` compiles once per batch size.

    Attributes:
        cfg: the config the run was trained with.
        transform: raw numbers <-> the model's.
        params: the model's parameters on its devices, in the form that acts (hvd.models.separate).
        kept: the type of the large matrices in it: the model's, or int8.
        acts_by: of hvd.train.steering.STEERED: how it asks the critic; "" = it does not.
        denoise: (params, observation, noise [b,K,action_dim], flow steps, Committed, Given or None) -> normalised
            actions [b,K,action_dim]; pure, for callers that compile it themselves (hvd.serve.sampler).
    """

    def __init__(
        self,
        cfg: Experiment,
        transform: InputTransform,
        params: Tree,
        noisy: Float32[np.ndarray, " a"] | None = None,
        critic: steering.Critic | None = None,
        int8: bool = False,
    ):
        entry, p = extraction.extractor(cfg)
        if entry.conditioned:
            transform = transform.telling(condition.texts(cfg)[-1], without=p["guidance"] != 1)
        self.cfg, self.transform = cfg, transform
        self.kept, self.acts_by = "int8" if int8 else cfg.model.dtype, entry.acts
        self.params = separate(cfg.model, params, int8) | ({"critic": critic.params} if critic else {})
        # Padded dims are never trained: they were 0 in training and stay 0 here
        noisy = pad_mask(cfg) if noisy is None else noisy

        def denoise(
            params: Tree,
            observation: Observation,
            noise: Float[Array, "b k a"],
            num_steps: int | Int[Array, ""],
            committed: Committed | Given | None = None,
            steer: acting.Steer | None = None,
        ) -> Float[Array, "b k a"]:
            noise = noise * noisy[None, None]
            return acting.sample_actions(cfg.model, params, observation, noise, num_steps, committed, steer)

        if critic:
            denoise = steering.STEERED[entry.acts](denoise, critic, p)
        if entry.conditioned and p["guidance"] != 1:
            denoise = steering.by_words(denoise, p["guidance"])

        def sample(
            params: Tree, observation: Observation, key: jax.Array, committed: Committed | Given | None
        ) -> Float[Array, "b k a"]:
            b = observation["state"].shape[0]
            noise = jax.random.normal(key, (b, cfg.model.action_horizon, cfg.model.action_dim))
            return denoise(params, observation, noise, cfg.policy.num_flow_steps, committed)

        self.denoise = denoise
        self._sample = jax.jit(sample)

    @property
    def weight_bytes(self) -> int:
        """Of `params`, the critic's with them."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.params))

    def act(
        self,
        state: Float32[np.ndarray, "b s"],
        images: Mapping[str, UInt8[np.ndarray, "b h w 3"]],
        prompts: Sequence[str],
        key: jax.Array,
        left: tuple[Float32[np.ndarray, "b n a"], int] | None = None,
        guided: bool = False,
    ) -> Float32[np.ndarray, "b k a"]:
        """A chunk of raw absolute actions.

        Args:
            state: raw state, as in the dataset.
            images: by the model's camera names; a camera that is missing is masked.
            key: of the initial noise; the same key gives the same actions.
            left: raw actions of the last chunk that are not executed yet, and how many of them will be over when this
                chunk is: it goes on from them (hvd.models.chunking).
            guided: by guidance also where the policy is trained to be given them (policy.prefix_max).
        """
        observation = self.transform.observation(state, images, prompts)
        committed = None
        if left is not None:
            normalised = self.transform.actions_in(left[0], state)
            prefix_max = 0 if guided else self.cfg.policy.prefix_max
            committed = commit(normalised, left[1], self.cfg.model.action_horizon, prefix_max)
        actions = jax.device_get(self._sample(self.params, observation, key, committed))
        return self.transform.actions_out(actions, state)


class ValueFunction:
    """A trained value model on the mesh it was loaded onto; `seen`: `evaluate` also gives what V is read from."""

    def __init__(
        self,
        cfg: Experiment,
        transform: InputTransform,
        graph: Graph,
        params: Tree,
        devices: Devices,
        seen: bool = False,
    ):
        self.cfg, self.transform, self.levels = cfg, transform, cfg.levels()
        self.graph, self.params = graph, params

        def evaluate(params: Tree, batch: Mapping[str, Any], flags: Array) -> tuple[Array, ...]:
            model = graph.module(params)
            judge = model.judge if seen else model
            return jnp.max(flags), *judge(batch["observation"], batch["actions"], batch["action_mask"])

        self._evaluate = jax.jit(devices.ambient(evaluate), out_shardings=devices.replicated)

    def evaluate(self, batch: Mapping[str, Any], flags: Array) -> tuple[Array, ...]:
        """Whether any process was asked to stop, V [b], twin Q [b,l,2] and, with `seen`, what V is read from [b,d], of
        a batch of the loader; not waited for."""
        return self._evaluate(self.params, batch, flags)

    def __call__(
        self, observation: Observation, actions: np.ndarray, action_mask: np.ndarray
    ) -> tuple[Float32[np.ndarray, "b"], Float32[np.ndarray, "b l"]]:
        """V and Q_i (minimum of the twins) of normalised inputs as the loader makes them."""
        batch = {"observation": observation, "actions": actions, "action_mask": action_mask}
        v, q = jax.device_get(self.evaluate(batch, jnp.zeros(1, jnp.int32))[1:3])
        return v, q.min(axis=-1)

    def ask(
        self,
        state: Float32[np.ndarray, "b s"],
        images: Mapping[str, UInt8[np.ndarray, "b h w 3"]],
        prompts: Sequence[str],
        actions: Float32[np.ndarray, "b k a"],
    ) -> tuple[Float32[np.ndarray, "b"], Float32[np.ndarray, "b l"]]:
        """V and Q_i (minimum of the twins) of raw observations and of raw absolute chunks, as `Policy.act` has them."""
        observation = self.transform.observation(state, images, prompts)
        return self(observation, self.transform.actions_in(actions, state), np.ones(actions.shape[:2], bool))


def load_policy(
    run: Experiment | os.PathLike | str,
    *,
    devices: Devices | None = None,
    num_flow_steps: int = 0,
    value_run: os.PathLike | str = "",
    extractor: str = "trained",
    extractor_params: Mapping[str, float] | None = None,
    int8: bool = False,
) -> Policy:
    """The policy of a run folder, or of an experiment (its policy_dir). UserError unless the run is complete.

    Args:
        num_flow_steps: Euler steps of `act`; 0 = the run's.
        value_run: of a policy that acts by a critic: one that fits; "" = the one that it was trained beside.
        extractor, extractor_params: act so (names of hvd.train.steering.STEERED, or "none": by no critic), whatever
            the policy was trained for.
        int8: keep the large matrices of the policy, not of its critic, in 8 bits (hvd.models.int8).
    """
    cfg, transform, step, folder = _open(run, "policy")
    cfg = _acting(cfg, folder, extractor, extractor_params or {})
    value_dir = _value_run(run, cfg, folder, value_run)
    own = dataclasses.replace(cfg.policy, num_flow_steps=num_flow_steps or cfg.policy.num_flow_steps)
    cfg = dataclasses.replace(cfg, policy=own)
    graph = Graph(lambda rngs: Pi0(cfg.model, rngs), dtype_of=precision.inference(cfg.model.dtype))
    params = _params(graph, folder, step, devices or _local())
    # The velocity of padded dims has no meaning: without it they keep the noise they start from, which is 0
    keep = pad_mask(cfg)
    head = params["action_out_proj"]
    params["action_out_proj"] = {
        name: leaf * keep.reshape((1,) * (leaf.ndim - 1) + keep.shape) for name, leaf in head.items()
    }
    critic = load_value(value_dir, devices=devices) if value_dir else None
    critic = critic and steering.Critic(critic.graph, critic.params)
    return Policy(cfg, transform, params, critic=critic, int8=int8)


def _acting(cfg: Experiment, folder: os.PathLike | str, how: str, numbers: Mapping[str, float]) -> Experiment:
    """The config of a policy that acts by `how`, if that is not as it was trained; UserError where it cannot."""
    if how == "trained":
        return cfg
    if extraction.extractor(cfg)[0].conditioned:
        raise UserError(
            f"--extractor {how}: the policy {folder} was trained with policy.extractor {cfg.policy.extractor}, which "
            "tells it how good its actions are to be; leave --extractor out"
        )
    name = "weighted" if how == "none" else how  # which needs no critic to act
    policy = dataclasses.replace(cfg.policy, extractor=name, extractor_params=dict(numbers))
    cfg = dataclasses.replace(cfg, policy=policy)
    extraction.extractor(cfg)
    return cfg


def _value_run(
    run: Experiment | os.PathLike | str, cfg: Experiment, folder: os.PathLike | str, named: os.PathLike | str
) -> os.PathLike | str:
    """The value run that the policy acts by, complete and fitting; "" for a policy that acts by none."""
    if not extraction.extractor(cfg)[0].acts:
        if named:
            raise UserError(
                f"value run {named}: the policy {folder} acts by none (policy.extractor {cfg.policy.extractor}); leave "
                f"it out, or take a policy with policy.extractor {' or '.join(steering.STEERED)}"
            )
        return ""
    given = run.value_run_dir if isinstance(run, Experiment) else cfg.policy.value_run
    value_dir = named or given or os.path.join(os.path.dirname(os.fspath(folder)), "value")
    value, ours = complete.check_complete(value_dir, stage="value"), complete.read_complete(folder)
    if "value" not in ours.inputs and not named:
        raise UserError(f"{folder} was trained beside no value run: name the one to act by (hvd serve --value-run)")
    if value.digest != ours.inputs.get("value") and not named:
        raise UserError(
            f"{folder} acts by the value run that it was trained beside, and {value_dir} is another one: name the one "
            "to take (hvd serve --value-run)"
        )
    record = runs.read(value_dir)
    assert record is not None, "a complete run has it"
    extraction.check_judges(cfg, record.config, value_dir)
    if value.inputs.get("norm_stats") != ours.inputs.get("norm_stats"):
        raise UserError(f"value run {value_dir} does not fit the policy: it has other norm stats than {folder}")
    return value_dir


def load_value(
    run: Experiment | os.PathLike | str, *, devices: Devices | None = None, seen: bool = False
) -> ValueFunction:
    """The value function of a run folder, or of an experiment (its value_dir). UserError unless the run is complete."""
    cfg, transform, step, folder = _open(run, "value")
    dtype_of = precision.inference(cfg.model.dtype)
    graph = Graph(lambda rngs: ValueModel(cfg.model, cfg.levels(), rngs), dtype_of=dtype_of)
    devices = devices or _local()
    return ValueFunction(cfg, transform, graph, _params(graph, folder, step, devices), devices, seen)


def pad_mask(cfg: Experiment) -> Float32[np.ndarray, " a"]:
    """1 for the model's action dims that belong to the robot, 0 for padding."""
    mask = np.zeros(cfg.model.action_dim, np.float32)
    mask[[dim for level in cfg.levels() for dim in level]] = 1.0
    return mask


def _local() -> Devices:
    compilation.use_cache()
    return mesh.make_devices(1, jax.local_devices()[:1])


def _open(
    run: Experiment | os.PathLike | str, stage: runs.Stage
) -> tuple[Experiment, InputTransform, int, os.PathLike | str]:
    """The run's own config (with the present folders), its transform, its final step, its folder."""
    given = run if isinstance(run, Experiment) else None
    folder: os.PathLike | str = getattr(run, f"{stage}_dir") if isinstance(run, Experiment) else run
    found = complete.check_complete(folder, stage=stage, cfg=given)
    record = runs.read(folder)
    if record is None:
        raise UserError(f"{folder} has no {runs.CONFIG}: it is not a run directory")
    cfg = record.config
    stats, _ = normalize.load_for(cfg, epath.Path(folder) / runs.NORM_STATS)
    if given is not None:
        cfg = dataclasses.replace(cfg, runs_dir=given.runs_dir, assets_dir=given.assets_dir)
    return cfg, InputTransform.from_config(cfg, stats), found.step, folder


def _params(graph: Graph, folder: os.PathLike | str, step: int, devices: Devices) -> Tree:
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=devices.parameter(x.shape, x.dtype)), graph.shapes
    )
    params = checkpoints.restore_params(folder, step, like)
    if not jax.device_get(jax.jit(state.all_finite, out_shardings=devices.replicated)(params)):
        raise UserError(f"{folder}: the parameters of step {step} are not finite: train the run again")
    return params
