"""The value model: V(s) and one Q per kinematic level in a single forward pass (docs/method.md).

The suffix is a sequence of blocks under block-causal attention, after the prefix of images and prompt:

    [state, V]   [level 0's actions, Q_0]   [level 1's actions, Q_1]   ...

so the V token sees no action, and Q_i sees the actions of levels 0..i and never a child's.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from hvd.configs import ModelConfig
from hvd.models.lora import param
from hvd.models.stack import Remat
from hvd.models.trunk import Observation, Prefix, Tokens, Trunk

TWINS = 2


def trunk_variant(cfg: ModelConfig) -> str:
    """Name of the sizes of the value model's first expert."""
    return cfg.value_paligemma_variant or cfg.paligemma_variant


class Heads(nnx.Module):
    """`n` independent two-layer perceptrons width -> width -> 1, float32. The last layer starts near zero."""

    def __init__(self, n: int, width: int, rngs: nnx.Rngs):
        self.hidden_kernel = param(rngs, (n, width, width), width**-0.5)
        self.hidden_bias = param(rngs, (n, width), 0.0)
        self.out_kernel = param(rngs, (n, width), 0.1 * width**-0.5)
        self.out_bias = param(rngs, (n,), 0.0)

    def __call__(self, x: Float[Array, "b m d"]) -> Float[Array, "b n"]:
        """Head j reads token j // (n / m): consecutive heads share a token."""
        x = jnp.repeat(x.astype(jnp.float32), self.out_bias.shape[0] // x.shape[1], axis=1)
        hidden = jnp.einsum("bnd,ndh->bnh", x, self.hidden_kernel[...]) + self.hidden_bias[...][None]
        return jnp.einsum("bnh,nh->bn", nnx.swish(hidden), self.out_kernel[...]) + self.out_bias[...][None]


class ValueModel(nnx.Module):
    """V and twin Q of every level.

    Args:
        cfg: sizes, which hvd.checks has looked at; the second expert of the trunk is cfg.value_expert_variant.
        levels: action dims per level, root first (Experiment.levels()).
        remat: what the backward pass computes again (StageConfig.remat).
    """

    def __init__(self, cfg: ModelConfig, levels: tuple[tuple[int, ...], ...], rngs: nnx.Rngs, remat: Remat = "none"):
        self.levels = tuple(tuple(level) for level in levels)
        self.patch = cfg.action_patch
        self.PaliGemma = Trunk(cfg, trunk_variant(cfg), cfg.value_expert_variant, rngs, remat)
        width = self.PaliGemma.expert_width
        self.state_proj = nnx.Linear(cfg.action_dim, width, rngs=rngs)
        self.v_token = param(rngs, (width,), 1.0)
        self.q_tokens = param(rngs, (len(levels), width), 1.0)
        # per level: a patch of its actions, and which of them are real
        self.level_proj = nnx.List([nnx.Linear(self.patch * (len(level) + 1), width, rngs=rngs) for level in levels])
        self.v_head = Heads(1, width, rngs)
        self.q_heads = Heads(len(levels) * TWINS, width, rngs)

    def _state_block(self, obs: Observation) -> Tokens:
        state = self.state_proj(obs["state"])[:, None]
        v = jnp.broadcast_to(self.v_token[...][None, None], state.shape)
        x = jnp.concatenate([state, v], axis=1)
        return Tokens(x, jnp.ones(x.shape[:2], bool), np.array([True, False]))

    def _level_block(self, i: int, actions: Float[Array, "b k a"], action_mask: Bool[Array, "b k"]) -> Tokens:
        batch, horizon, _ = actions.shape
        mask = action_mask.astype(actions.dtype)[:, :, None]
        level = actions[:, :, np.asarray(self.levels[i])]
        level = jnp.where(action_mask[:, :, None], level, 0)  # where, not *: a masked NaN must not get through
        patches = jnp.concatenate([level, mask], axis=-1).reshape(batch, horizon // self.patch, -1)
        tokens = self.level_proj[i](patches)
        q = jnp.broadcast_to(self.q_tokens[i][None, None], (batch, 1, tokens.shape[-1]))
        x = jnp.concatenate([tokens, q], axis=1)
        starts = np.zeros(x.shape[1], bool)
        starts[0] = True
        return Tokens(x, jnp.ones(x.shape[:2], bool), starts)

    def _read(self, obs: Observation, suffix: Tokens, prefix: Prefix | None) -> Float[Array, "b t d"]:
        if prefix is None:
            return self.PaliGemma.joint(self.PaliGemma.embed_prefix(obs), suffix)
        return self.PaliGemma.decode(prefix, suffix)

    def encode(self, *observations: Observation) -> list[Prefix]:
        """The prefixes of several batches of observations, in one pass through PaliGemma."""
        n = len(observations)
        parts = [{name: x for name, x in obs.items() if name != "state"} for obs in observations]
        # Row by row beside each other, so that rows stay on their devices
        both = jax.tree.map(lambda *xs: jnp.stack(xs, axis=1).reshape(-1, *xs[0].shape[1:]), *parts)
        (k, v), valid = self.PaliGemma.prefill(self.PaliGemma.embed_prefix(both))
        k, v = (x.reshape(x.shape[0], -1, n, *x.shape[2:]) for x in (k, v))
        valid = valid.reshape(-1, n, valid.shape[-1])
        return [Prefix((k[:, :, i], v[:, :, i]), valid[:, i]) for i in range(n)]

    def judge(
        self,
        obs: Observation,
        actions: Float[Array, "b k a"],
        action_mask: Bool[Array, "b k"],
        prefix: Prefix | None = None,
    ) -> tuple[Float[Array, "b"], Float[Array, "b l 2"], Float[Array, "b d"]]:
        """V [b], the twin Q of every level [b, levels, 2], and what V is read from (s, as the model sees it), float32.

        Args:
            obs: a batch of observations (hvd.models.trunk.Observation).
            actions: chunk of K actions, normalised and padded.
            action_mask: False for steps after the end of the episode; their actions have no influence.
            prefix: of `encode`; then of the observation only the state is read.
        """
        blocks = [self._state_block(obs)]
        blocks += [self._level_block(i, actions, action_mask) for i in range(len(self.levels))]
        suffix = Tokens(
            jnp.concatenate([b.x for b in blocks], axis=1),
            jnp.concatenate([b.valid for b in blocks], axis=1),
            np.concatenate([b.starts for b in blocks]),
        )
        out = self._read(obs, suffix, prefix)
        ends = np.cumsum([b.starts.size for b in blocks]) - 1  # the read-out token is each block's last
        v = self.v_head(out[:, ends[:1]])[:, 0]
        q = self.q_heads(out[:, ends[1:]])
        return v, q.reshape(-1, len(self.levels), TWINS), out[:, ends[0]].astype(jnp.float32)

    def __call__(
        self,
        obs: Observation,
        actions: Float[Array, "b k a"],
        action_mask: Bool[Array, "b k"],
        prefix: Prefix | None = None,
    ) -> tuple[Float[Array, "b"], Float[Array, "b l 2"]]:
        """V [b] and the twin Q of every level [b, levels, 2], float32 (arguments as of `judge`)."""
        return self.judge(obs, actions, action_mask, prefix)[:2]

    def state_value(self, obs: Observation, prefix: Prefix | None = None) -> Float[Array, "b"]:
        """V [b] alone: the same as that of the full call, without any action token."""
        out = self._read(obs, self._state_block(obs), prefix)
        return self.v_head(out[:, 1:2])[:, 0]
