"""The parameters and statistics of a run as `hvd export` writes them."""

import os
from collections.abc import Mapping
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32

from hvd.configs import Experiment, NormConfig
from hvd.data import normalize
from hvd.errors import UserError
from hvd.method import policy, value
from hvd.models import weights
from hvd.train import checkpoints, inference, mesh
from hvd.train.state import Graph, Tree


def exported(cfg: Experiment, stage: str, params: Tree, *, keep_padding: bool, merge_lora: bool) -> Tree:
    """The parameters as they are written: merged and with padding cut where that is asked for."""
    if stage == "policy" and not keep_padding:
        params = without_padding(params, inference.pad_mask(cfg))
    if merge_lora:
        model = cfg.model
        variants = (
            (model.paligemma_variant, model.action_expert_variant)
            if stage == "policy"
            else (model.value_paligemma_variant or model.paligemma_variant, model.value_expert_variant)
        )
        if not any("lora" in variant for variant in variants):
            raise UserError(f"--merge-lora: the {stage} run has no LoRA updates ({', '.join(variants)}); leave it out")
        params = weights.merge_lora(params, variants)
    return params


def without_padding(params: Tree, real: Float32[np.ndarray, " a"]) -> Tree:
    """A policy whose padded action dims (where `real` is 0) neither act nor are acted on.

    hvd gives those dims no noise, in training and in acting; openpi gives them noise. With these weights at 0 that
    noise reaches nothing, and openpi samples what hvd samples. They are never trained and never used here.
    """
    keep = jnp.asarray(real)
    first, last = params["action_in_proj"], params["action_out_proj"]
    return params | {
        "action_in_proj": first | {"kernel": first["kernel"] * keep[:, None].astype(first["kernel"].dtype)},
        "action_out_proj": {
            name: x * keep.reshape((1,) * (x.ndim - 1) + keep.shape).astype(x.dtype) for name, x in last.items()
        },
    }


def openpi_stats(stats: Mapping[str, normalize.NormStats], norm: NormConfig) -> normalize.Stats:
    """Statistics that give in openpi, which knows no floor, what hvd computes with norm.std_floor."""
    if not norm.std_floor:
        return dict(stats)
    found = {}
    for name, s in stats.items():
        if s.q01 is None or s.q99 is None:
            found[name] = replace(s, std=np.maximum(s.std, norm.std_floor))
            continue
        half = (s.q99 - s.q01 + normalize.EPSILON) / 2  # hvd.data.normalize: shift q01 + half, scale max(half, floor)
        wide = np.maximum(half, norm.std_floor)
        low = np.where(wide > half, s.q01 + half - wide, s.q01)
        high = np.where(wide > half, low + 2 * wide - normalize.EPSILON, s.q99)
        found[name] = replace(s, std=np.maximum(s.std, norm.std_floor), q01=low, q99=high)
    return found


def restored(cfg: Experiment, stage: str, run: os.PathLike | str, step: int) -> Tree:
    """The run's parameters for inference in the types it keeps them in, spread over the devices of this machine."""
    devices = mesh.make_devices(jax.local_device_count(), jax.local_devices())
    graph: Graph = policy.make_graph(cfg) if stage == "policy" else value.make_graph(cfg)
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=devices.parameter(x.shape, x.dtype)), graph.shapes
    )
    return checkpoints.restore_params(run, step, like)
