"""The policy: pi0, a flow-matching expert beside PaliGemma (Black et al. 2024), or pi0.5 (Physical Intelligence 2025),
equal to openpi's in names and numbers.

pi0.5 differs in the suffix: no state token (the state stands in the prompt, hvd.data.tokenizer), and the time does not
join the action tokens but conditions the expert's norms.

Flow convention (openpi's): x_t = t * noise + (1 - t) * actions, velocity u = noise - actions; acting integrates from
t = 1 (noise) to t = 0.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from hvd.configs import ModelConfig
from hvd.models import sharding
from hvd.models.gemma import expert_of
from hvd.models.stack import Remat
from hvd.models.trunk import Observation, Tokens, Trunk


def posemb_sincos(
    pos: Float[Array, "b"], dim: int, min_period: float = 4e-3, max_period: float = 4.0
) -> Float[Array, "b d"]:
    """Sine-cosine embedding of a time in [0, 1], float32; `dim` is even, periods are spaced logarithmically."""
    # Angles reach 1.6e3, where another rounding of a period shows in the fourth digit: float32 in this order, and a
    # barrier so that XLA does not fold the power at compile time, where it rounds otherwise.
    fraction = jax.lax.optimization_barrier(jnp.linspace(0.0, 1.0, dim // 2, dtype=jnp.float32))
    period = min_period * (max_period / min_period) ** fraction
    angle = pos.astype(jnp.float32)[:, None] * (1.0 / period * 2 * jnp.pi)[None, :]
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


class Pi0(nnx.Module):
    """pi0, or pi0.5 where cfg.family says so, with the sizes of `cfg`. Parameters are float32, the trunk computes in
    cfg.dtype.

    Args:
        remat: what the backward pass computes again (StageConfig.remat).
        frozen_trunk: nothing of PaliGemma is trained, so `velocity` encodes the prefix outside of the gradient.
    """

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs, remat: Remat = "none", frozen_trunk: bool = False):
        self.action_dim, self.action_horizon = cfg.action_dim, cfg.action_horizon
        self.frozen_trunk = frozen_trunk
        self.pi05 = cfg.family == "pi05"
        variants = cfg.paligemma_variant, cfg.action_expert_variant
        self.PaliGemma = Trunk(cfg, *variants, rngs, remat, conditioned=self.pi05)
        width = self.PaliGemma.expert_width
        # In this order: the layers draw their first values from one stream, and a seed keeps its model
        if not self.pi05:
            self.state_proj = nnx.Linear(cfg.action_dim, width, rngs=rngs)
        self.action_in_proj = nnx.Linear(cfg.action_dim, width, rngs=rngs)
        if self.pi05:
            self.time_mlp_in = nnx.Linear(width, width, rngs=rngs)
            self.time_mlp_out = nnx.Linear(width, width, rngs=rngs)
        else:
            self.action_time_mlp_in = nnx.Linear(2 * width, width, rngs=rngs)
            self.action_time_mlp_out = nnx.Linear(width, width, rngs=rngs)
        self.action_out_proj = nnx.Linear(width, cfg.action_dim, rngs=rngs)

    def embed_prefix(self, obs: Observation) -> Tokens:
        """Image and prompt tokens, their validity, and block starts (one block)."""
        return self.PaliGemma.embed_prefix(obs)

    def embed_suffix(
        self, obs: Observation, x_t: Float[Array, "b k a"], time: Float[Array, "b"] | Float[Array, "b k"]
    ) -> tuple[Tokens, Float[Array, "b *k d"] | None]:
        """The expert's tokens, and what conditions its norms.

        pi0: one state token (a block), then one token per noisy action, mixed with the time (a block); no condition.
        pi0.5: one token per noisy action (a block); the condition is the time's embedding.
        """
        actions = self.action_in_proj(x_t)
        embedded = posemb_sincos(time.reshape(-1), actions.shape[-1]).reshape(*time.shape, -1)
        if self.pi05:
            starts = np.arange(actions.shape[1]) == 0
            condition = nnx.swish(self.time_mlp_out(nnx.swish(self.time_mlp_in(embedded))))
            return Tokens(actions, jnp.ones(actions.shape[:2], bool), starts), condition
        return self._state_and_actions(obs, actions, embedded), None

    def _state_and_actions(
        self, obs: Observation, actions: Float[Array, "b k d"], embedded: Float[Array, "b *t d"]
    ) -> Tokens:
        state = self.state_proj(obs["state"])[:, None]
        width = actions.shape[-1]
        # A dense layer on [action, time] in two halves: mostly the time is the same for every action of the chunk.
        kernel = sharding.weight(self.action_time_mlp_in.kernel[...], jnp.dtype("float32"))
        bias = self.action_time_mlp_in.bias
        assert bias is not None
        of_time = (embedded @ kernel[width:]).reshape(len(actions), -1, width) + bias[...][None, None]
        mixed = self.action_time_mlp_out(nnx.swish(actions @ kernel[:width] + of_time))
        x = jnp.concatenate([state, mixed], axis=1)
        starts = np.zeros(x.shape[1], bool)
        starts[:2] = True
        return Tokens(x, jnp.ones(x.shape[:2], bool), starts)

    def _head(self, out: Float[Array, "b t d"]) -> Float[Array, "b k a"]:
        return self.action_out_proj(out[:, -self.action_horizon :].astype(jnp.float32))

    def velocity(
        self, obs: Observation, x_t: Float[Array, "b k a"], time: Float[Array, "b"] | Float[Array, "b k"]
    ) -> Float[Array, "b k a"]:
        """Predicted velocity d x_t / d t, float32; `time` of each row, or of each action (given ones are at 0)."""
        prefix, (suffix, condition) = self.embed_prefix(obs), self.embed_suffix(obs, x_t, time)
        if not self.frozen_trunk:
            return self._head(self.PaliGemma.joint(prefix, suffix, condition))
        encoded = jax.lax.stop_gradient(self.PaliGemma.prefill(prefix))
        return self._head(self.PaliGemma.decode(encoded, suffix, condition))

    def sample_actions(
        self, obs: Observation, noise: Float[Array, "b k a"], num_steps: int | Int[Array, ""] = 10
    ) -> Float[Array, "b k a"]:
        """Actions (normalised, padded) by `num_steps` Euler steps from `noise`; the prefix is encoded once.

        A traced `num_steps` lets one compiled function serve any number of steps.
        """
        prefix = self.PaliGemma.prefill(self.embed_prefix(obs))
        dt = -1.0 / jnp.asarray(num_steps, jnp.float32)

        def step(_, carry):
            x_t, time = carry
            suffix, condition = self.embed_suffix(obs, x_t, jnp.broadcast_to(time, x_t.shape[:1]))
            v = self._head(self.PaliGemma.decode(prefix, suffix, condition))
            return x_t + dt * v, time + dt

        return jax.lax.fori_loop(0, num_steps, step, (noise, jnp.float32(1.0)))[0]


def freeze_filter(
    cfg: ModelConfig,
    expert_variant: str | None = None,
    kind: Literal["auto", "trunk"] = "auto",
    trunk_variant: str | None = None,
) -> Callable[..., bool]:
    """Which parameters are frozen: a predicate on the path, usable as an nnx filter.

    With a LoRA variant of an expert, that expert's own weights are frozen and its LoRA updates train, as in openpi
    (the image tower and everything outside the language model always train). Without LoRA nothing is frozen.

    Args:
        cfg: names the variants.
        expert_variant: of the second expert; default cfg.action_expert_variant (the value model passes its own).
        kind: "trunk" freezes all of PaliGemma besides: image tower, embedder, first expert with its LoRA updates.
        trunk_variant: of the first expert; default cfg.paligemma_variant (the value model passes its own).
    """
    lora = ["lora" in (trunk_variant or cfg.paligemma_variant), "lora" in (expert_variant or cfg.action_expert_variant)]

    def frozen(path: tuple[str | int, ...], value: object = None) -> bool:
        if "llm" not in path:
            return kind == "trunk" and "img" in path
        expert = expert_of(path)
        if kind == "trunk" and expert == 0:
            return True
        return lora[expert] and not any("lora" in str(part) for part in path)

    return frozen
