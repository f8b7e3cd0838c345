"""pi0 and pi0.5 as they act, for serving and rollouts: the numbers of hvd.models.pi0, in the form that is fastest.

What is different from a model in training:

- every layer's weights are arrays of their own: a loop over stacked ones copies each layer's out of them first;
- LoRA updates are added to the weights; products of one input (queries, keys and values; gate and value of the
  feed-forward) are one product; what the last layer of the first expert does not need is left out;
- what depends on the flow's time alone is computed for many steps at once, before them;
- keys and values of the suffix are written behind the prefix's, in one buffer a layer: nothing is concatenated.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from hvd.configs import ModelConfig
from hvd.models import attention, gemma, int8, siglip
from hvd.models.chunking import Committed, Given
from hvd.models.int8 import dense
from hvd.models.pi0 import posemb_sincos
from hvd.models.trunk import Observation, attention_mask, embed_prefix, token_positions

GUIDANCE = 5.0  # the most that an error of the committed actions counts in a step
STEPS_AT_ONCE = 10  # flow steps whose times are embedded together
MAX_STEPS = 100  # of the flow where their number is known only when the program runs

type Tree = dict[str, Any]
type Steer = Callable[[Float[Array, "b k a"], Float[Array, ""], Float[Array, "b k a"]], Float[Array, "b k a"]]
Buffers = tuple[Array, Array]  # keys and values of one layer [b, prefix + suffix + padding, kv_heads, head_dim]


class Suffix(NamedTuple):
    """Where the suffix's tokens stand: behind how many, at which angles (sin, cos), and what each may see."""

    begin: int
    angles: tuple[Array, Array]
    mask: Bool[Array, "b t s"]


def sample_actions(
    cfg: ModelConfig,
    weights: Tree,
    obs: Observation,
    noise: Float[Array, "b k a"],
    num_steps: int | Int[Array, ""] = 10,
    committed: Committed | Given | None = None,
    steer: Steer | None = None,
) -> Float[Array, "b k a"]:
    """Actions (normalised, padded) by `num_steps` Euler steps from `noise`, as Pi0.sample_actions.

    Args:
        cfg: of the model.
        weights: by hvd.models.separate.
        num_steps: a traced one is at most MAX_STEPS.
        committed: guide every step of the flow towards these actions; it costs a backward pass of the expert a step.
            Given ones, to a model that is trained so, stay as they are, and cost nothing.
        steer: (x, t, velocity) -> the velocity that is taken; the actions as estimated from there are x - t velocity.
    """
    prefix = embed_prefix(
        obs,
        cfg.cameras,
        (lambda images: _encode(cfg, weights["PaliGemma"]["img"], images)) if cfg.cameras else None,
        lambda tokens: _embed(weights["PaliGemma"]["llm"]["embedding"], tokens),
        jnp.dtype(cfg.dtype),
    )
    tokens = cfg.action_horizon + (cfg.family == "pi0")
    buffers = _prefill(cfg, weights["PaliGemma"]["llm"]["trunk"], prefix.x, prefix.valid, tokens)
    starts = np.zeros(tokens, bool)
    starts[: 1 if cfg.family == "pi05" else 2] = True
    valid = jnp.ones((len(noise), tokens), bool)
    to_prefix = jnp.broadcast_to(prefix.valid[:, None, :], (*valid.shape, prefix.x.shape[1]))
    padding = buffers[0][0].shape[1] - to_prefix.shape[2] - tokens
    mask = jnp.concatenate([to_prefix, attention_mask(valid, starts)], axis=2)
    mask = jnp.pad(mask, ((0, 0), (0, 0), (0, padding)))
    positions = jnp.sum(prefix.valid.astype(jnp.int32), axis=1)[:, None] + token_positions(valid)
    angles = gemma.rope_angles(positions, gemma.get_config(cfg.paligemma_variant).head_dim)
    state = None if cfg.family == "pi05" else _linear(weights["state_proj"], obs["state"])[:, None]
    free: Any = True  # which actions the flow moves
    done = None  # what depends on the time, at its end
    if isinstance(committed, Given):
        free = jnp.logical_not(committed.where)[..., None]
        noise = jnp.where(free, noise, committed.actions)
        done = jax.tree.map(lambda leaf: leaf[0], _of_times(cfg, weights, jnp.zeros(1)))

    def velocity(x: Array, of_time: Tree, buffers: list[Buffers]) -> tuple[Array, list[Buffers]]:
        actions, of_time = _linear(weights["action_in_proj"], x), _of_tokens(of_time, done, free)
        if state is not None:
            mixed = actions @ weights["action_time_mlp_in"]["kernel"][: actions.shape[-1]] + of_time["mlp"]
            mixed = _linear(weights["action_time_mlp_out"], jax.nn.swish(mixed))
            actions = jnp.concatenate([state, mixed], axis=1)
        suffix = Suffix(prefix.x.shape[1], angles, mask)
        out, buffers = _expert(cfg, weights["PaliGemma"]["llm"], actions, of_time, suffix, buffers)
        v = _linear(weights["action_out_proj"], out[:, -cfg.action_horizon :].astype(jnp.float32))
        return jnp.where(free, v, 0.0), buffers

    guided = isinstance(committed, Committed)
    flow = _guided(velocity, committed) if guided else lambda x, _, *rest: velocity(x, *rest)
    return _integrate(cfg, weights, _steered(flow, steer, free) if steer else flow, noise, buffers, num_steps)


def _steered(flow: Any, steer: Steer, free: Any) -> Any:
    def steered(x: Array, t: Array, of_time: Tree, buffers: Any) -> tuple[Array, Any]:
        v, after = flow(x, t, of_time, buffers)
        return jnp.where(free, steer(x, t, v), 0.0), after

    return steered


def _guided(velocity: Any, committed: Committed) -> Any:
    """The velocity whose final actions, as estimated from here, are drawn towards the committed ones.

    Real-time chunking's guidance with time running from 1 to 0: the error of the estimate x - t * v goes back through
    the model to x, and counts min(GUIDANCE, (t^2 + (1 - t)^2) / (t * (1 - t))) times.
    """

    def guided(x: Array, t: Array, of_time: Tree, buffers: Any) -> tuple[Array, Any]:
        def estimate(x: Array) -> tuple[Array, Any]:
            v, after = velocity(x, of_time, buffers)
            return x - t * v, (v, after)

        estimated, back, (v, after) = jax.vjp(estimate, x, has_aux=True)
        (towards,) = back((committed.actions - estimated) * committed.weights[..., None])
        strength = (t**2 + (1 - t) ** 2) / jnp.maximum(t * (1 - t), 1e-6)
        return v - jnp.minimum(GUIDANCE, strength) * towards, after

    return guided


def _integrate(cfg: ModelConfig, weights: Tree, velocity: Any, x: Array, buffers: Any, num_steps: Any) -> Array:
    """Euler steps from t = 1 to 0; what depends on the time alone is computed for STEPS_AT_ONCE of them together."""
    dt = -1.0 / jnp.asarray(num_steps, jnp.float32)
    times = _times(num_steps)

    def several(carry: Any) -> Any:
        begin, x, buffers = carry
        of_times = _of_times(cfg, weights, jax.lax.dynamic_slice(times, (begin,), (STEPS_AT_ONCE,)))

        def one(i: Any, carry: Any) -> Any:
            x, buffers = carry
            of_time = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False), of_times)
            v, buffers = velocity(x, times[begin + i], of_time, buffers)
            return x + dt * v, buffers

        x, buffers = jax.lax.fori_loop(0, jnp.minimum(num_steps - begin, STEPS_AT_ONCE), one, (x, buffers))
        return begin + STEPS_AT_ONCE, x, buffers

    if isinstance(num_steps, int) and num_steps <= STEPS_AT_ONCE:
        return several((0, x, buffers))[1]
    return jax.lax.while_loop(lambda carry: carry[0] < num_steps, several, (jnp.int32(0), x, buffers))[1]


def _times(num_steps: int | Int[Array, ""]) -> Float[Array, "n"]:
    """The time of each step, added up in float32 as openpi does, and some more."""
    counts = [num_steps] if isinstance(num_steps, int) else range(1, MAX_STEPS + 1)
    length = -(-max(counts) // STEPS_AT_ONCE) * STEPS_AT_ONCE
    table = np.ones((len(counts), length), np.float32)
    for row, count in zip(table, counts, strict=True):
        row[1:count] = np.float32(-1.0) / np.float32(count)
        row[:count] = np.cumsum(row[:count], dtype=np.float32)
    return jnp.asarray(table)[0 if isinstance(num_steps, int) else num_steps - 1]


def _of_times(cfg: ModelConfig, weights: Tree, times: Float[Array, "n"]) -> Tree:
    """Per step: pi0's half of the layer on [action, time]; of pi0.5 the scale, shift and gate of every norm."""
    embedded = posemb_sincos(times, weights["action_in_proj"]["bias"].shape[0])
    if cfg.family == "pi0":
        layer = weights["action_time_mlp_in"]
        return {"mlp": embedded @ layer["kernel"][embedded.shape[-1] :] + layer["bias"][None]}
    condition = jax.nn.swish(_linear(weights["time_mlp_in"], embedded))
    condition = jax.nn.swish(_linear(weights["time_mlp_out"], condition)).astype(cfg.dtype)

    def modulation(norm: Tree) -> Array:  # [n, ..., 3 width]: stacked over the layers, but for the last norm
        products = jnp.moveaxis(condition @ norm["kernel"].astype(cfg.dtype), -2, 0)
        return products + norm["bias"].astype(cfg.dtype)[None]

    return {name: modulation(norm) for name, norm in weights["PaliGemma"]["llm"]["modulation"].items()}


def _of_tokens(of_time: Tree, done: Tree | None, free: Any) -> Tree:
    """What depends on the time, for each token of the suffix: leaves [..., n] become [..., 1, 1, n], or [..., b, t, n]
    where given actions, which are not `free`, are `done`."""
    of_time = jax.tree.map(lambda leaf: leaf[..., None, None, :], of_time)
    if done is None:
        return of_time

    def chosen(step: Array, end: Array) -> Array:
        return jnp.where(free.reshape(*[1] * (step.ndim - 3), *free.shape), step, end[..., None, None, :])

    return jax.tree.map(chosen, of_time, done)


def _linear(layer: Tree, x: Float[Array, "*rows i"]) -> Float[Array, "*rows o"]:
    return x @ layer["kernel"] + jnp.broadcast_to(layer["bias"], (*x.shape[:-1], layer["bias"].shape[0]))


def _embed(table: int8.Matrix, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
    x = int8.rows(table, tokens)
    return x * jnp.sqrt(jnp.asarray(x.shape[-1], x.dtype))


def _encode(cfg: ModelConfig, img: Tree, images: Float[Array, "n h w 3"]) -> Float[Array, "n t d"]:
    """Tokens of images, as siglip.SigLIP."""
    heads = siglip.get_config(cfg.siglip_variant).num_heads
    x = siglip.patches(images, img["embedding"]["kernel"], img["embedding"]["bias"], img["pos_embedding"])
    x = x.astype(cfg.dtype)
    for w in img["layers"]:
        y = siglip.layer_norm(x, w["norm_0"]["scale"], w["norm_0"]["bias"])
        qkv = (dense(y, w["qkv"]) + w["qkv_bias"][None, None]).reshape(*x.shape[:2], 3, heads, -1)
        q, k, v = (qkv[:, :, i] for i in range(3))
        form = attention.choose(cfg.attention, "images", q.dtype, q.shape[-1])
        attend = attention.attend_all if form == "xla" else attention.attend_all_cudnn
        y = attend(q * q.shape[-1] ** -0.5, k, v).reshape(x.shape)
        x = x + (dense(y, w["out"]) + w["out_bias"][None, None])
        y = siglip.layer_norm(x, w["norm_1"]["scale"], w["norm_1"]["bias"])
        y = jax.nn.gelu(dense(y, w["up"]) + w["up_bias"][None, None])
        x = x + (dense(y, w["down"]) + w["down_bias"][None, None])
    x = siglip.layer_norm(x, img["norm"]["scale"], img["norm"]["bias"])
    return dense(x, img["head"]["kernel"].astype(x.dtype)) + img["head"]["bias"].astype(x.dtype)[None, None]


def _prefill(
    cfg: ModelConfig, layers: Any, x: Float[Array, "b p d"], valid: Bool[Array, "b p"], room: int
) -> list[Buffers]:
    """Keys and values of the prefix in all layers, in buffers with room for that many further tokens."""
    sizes = gemma.get_config(cfg.paligemma_variant)
    angles = gemma.rope_angles(token_positions(valid), sizes.head_dim)
    mask = attention_mask(valid, np.zeros(x.shape[1], bool))
    length = -(-(x.shape[1] + room) // 8) * 8  # GPUs' matrix products are slow where rows are not 16 bytes apart
    buffers: list[Buffers] = []
    for w in layers:
        y, _ = _normed(x, w["norm_0"], None)
        q, k, v = _heads(sizes, dense(y, w["qkv"] if "qkv" in w else w["kv"]))
        k = gemma.rotate(k, *angles)
        rest = ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0))
        buffers.append((jnp.pad(k, rest), jnp.pad(v, rest)))
        if "qkv" in w:  # all but the last layer
            y = _attend(cfg, gemma.rotate(q, *angles), k, v, mask)
            x = x + dense(y, w["out"])
            x = x + _feed_forward(w, _normed(x, w["norm_1"], None)[0])
    return buffers


def _expert(
    cfg: ModelConfig, llm: Tree, x: Float[Array, "b t d"], of_time: Tree, suffix: Suffix, buffers: list[Buffers]
) -> tuple[Float[Array, "b t d"], list[Buffers]]:
    """The expert's outputs for the suffix x, and the buffers with its keys and values behind the prefix's."""
    sizes = gemma.get_config(cfg.action_expert_variant)
    x = x.astype(cfg.dtype)
    after: list[Buffers] = []
    for i, (w, (keys, values)) in enumerate(zip(llm["expert"], buffers, strict=True)):
        of_layer = {name: of_time[name][i] for name in ("norm_0", "norm_1") if name in of_time}
        y, gate = _normed(x, w.get("norm_0"), of_layer.get("norm_0"))
        q, k, v = _heads(sizes, dense(y, w["qkv"]))
        at = (0, suffix.begin, 0, 0)
        keys = jax.lax.dynamic_update_slice(keys, gemma.rotate(k, *suffix.angles), at)
        values = jax.lax.dynamic_update_slice(values, v, at)
        after.append((keys, values))
        y = dense(_attend(cfg, gemma.rotate(q, *suffix.angles), keys, values, suffix.mask), w["out"])
        x = gemma.residual(x, y, gate)
        y, gate = _normed(x, w.get("norm_1"), of_layer.get("norm_1"))
        x = gemma.residual(x, _feed_forward(w, y), gate)
    return _normed(x, llm.get("norm"), of_time.get("norm"))[0], after


def _normed(
    x: Float[Array, "b t d"], scale: Float[Array, "d"] | None, modulation: Float[Array, "#b #t d3"] | None
) -> tuple[Float[Array, "b t d"], Float[Array, "#b #t d"] | None]:
    """gemma.RMSNorm: with its own scale, or modulated by the time; and the residual's gate."""
    if modulation is None:
        assert scale is not None
        return (gemma.unit_rms(x) * (1 + scale)[None, None]).astype(x.dtype), None
    by, shift, gate = jnp.split(modulation, 3, axis=-1)
    normed = gemma.unit_rms(x) * (1 + by.astype(jnp.float32)) + shift.astype(jnp.float32)
    return normed.astype(x.dtype), gate


def _heads(sizes: gemma.Config, x: Float[Array, "b t n"]) -> tuple[Array, Array, Array]:
    """Queries (of no head where x holds keys and values alone), keys and values."""
    x = x.reshape(*x.shape[:2], -1, sizes.head_dim)
    queries = x.shape[2] - 2 * sizes.num_kv_heads
    q, k, v = jnp.split(x, (queries, queries + sizes.num_kv_heads), axis=2)
    return q, k, v


def _attend(cfg: ModelConfig, q: Array, k: Array, v: Array, mask: Array) -> Float[Array, "b t nh"]:
    form = attention.choose(cfg.attention, "language", q.dtype, q.shape[-1])
    out = attention.FORMS[form](q * q.shape[-1] ** -0.5, k, v, mask)
    return out.reshape(*out.shape[:2], -1)


def _feed_forward(w: Tree, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
    gate, value = jnp.split(dense(x, w["gate_up"]), 2, axis=-1)
    return dense(jax.nn.gelu(gate) * value, w["down"])
