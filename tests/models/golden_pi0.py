"""A golden case of the whole pi0 or pi0.5, ready to run: the module's parts, its inputs, and its compiled gradient."""

from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from flax import nnx

from hvd.configs import ModelConfig
from hvd.models import gemma, siglip
from hvd.models.pi0 import Pi0, freeze_filter
from tests.models.golden import Arrays, below, build, gemma_config, load, siglip_config


@dataclass(frozen=True, eq=False)
class Pi0Case:
    """`trainable` and `frozen` are nested dicts; `a` are all arrays of the file."""

    a: Arrays
    config: ModelConfig
    graphdef: Any
    trainable: Any
    frozen: Any
    obs: dict
    actions: jax.Array
    variants: dict[str, gemma.Config]
    towers: dict[str, siglip.Config]

    @contextmanager
    def sizes(self):
        """The case's sizes under its variants' names."""
        with mock.patch.dict(gemma.VARIANTS, self.variants), mock.patch.dict(siglip.VARIANTS, self.towers):
            yield

    def model(self) -> Pi0:
        return nnx.merge(self.graphdef, self.frozen, self.trainable)

    @cached_property
    def loss_and_grad(self):
        """(mean loss, (loss [B, K], x_t, u_t, v_t)), gradients: of the trainable parameters, noise and time."""

        def loss(trainable, noise, time):
            t = time[:, None, None]
            x_t, u_t = t * noise + (1 - t) * self.actions, noise - self.actions
            v_t = nnx.merge(self.graphdef, self.frozen, trainable).velocity(self.obs, x_t, time)
            each = jnp.mean(jnp.square(v_t - u_t), axis=-1)
            return jnp.mean(each), (each, x_t, u_t, v_t)

        return jax.jit(jax.value_and_grad(loss, has_aux=True))


@cache
def pi0_case(case: Path) -> Pi0Case:
    """Sizes are read off the arrays; "lora" in an expert's parameter names makes its variant a LoRA one."""
    a = load(case)
    params = below(a, "p/")
    llm = below(params, "PaliGemma/llm/")
    experts = [gemma_config(case, llm, i) for i in range(2)]
    names = [f"golden_{i}{'_lora' if c.lora else ''}" for i, c in enumerate(experts)]
    images = {name: jnp.asarray(x) for name, x in below(a, "images/").items()}
    tower = below(params, "PaliGemma/img/")
    _, horizon, action_dim = a["actions"].shape
    config = ModelConfig(
        family="pi05" if any(name.startswith("time_mlp") for name in params) else "pi0",
        action_dim=action_dim,
        action_horizon=horizon,
        max_token_len=a["tokens"].shape[1],
        vocab_size=llm["embedder/input_embedding"].shape[0],
        dtype="bfloat16" if "bf16" in case.stem else "float32",
        paligemma_variant=names[0],
        action_expert_variant=names[1],
        siglip_variant="golden",
        cameras=tuple(images),
        image_size=next(iter(images.values())).shape[1] if images else 0,
    )
    variants = dict(zip(names, experts, strict=True))
    towers = {"golden": siglip_config(tower)} if tower else {}
    with mock.patch.dict(gemma.VARIANTS, variants), mock.patch.dict(siglip.VARIANTS, towers):
        model = build(lambda rngs: Pi0(config, rngs), params)
    obs = {
        "state": jnp.asarray(a["state"]),
        "images": images,
        "image_masks": {name: jnp.asarray(x) for name, x in below(a, "image_masks/").items()},
        "tokenized_prompt": jnp.asarray(a["tokens"], jnp.int32),
        "tokenized_prompt_mask": jnp.asarray(a["token_mask"]),
    }
    graphdef, frozen, trainable = nnx.split(model, freeze_filter(config), ...)
    pure = nnx.to_pure_dict
    actions = jnp.asarray(a["actions"])
    return Pi0Case(a, config, graphdef, pure(trainable), pure(frozen), obs, actions, variants, towers)
