"""The expert ratio: how much likelier is a chunk among the demonstrations than among the mixed data? (docs/method.md)

A classifier tells chunks of the optimal sets from chunks of the weighted ones twice, from (s, a) and from s alone.
Their logits are log p_E(s, a) / p_M(s, a) and log p_E(s) / p_M(s), and the whole difference log p_E(a | s) - log
p_M(a | s). Where the demonstrations act as pi_E ~ p_M exp(A / alpha), that is A / alpha: an advantage that no reward
is needed for. A mistake that goes on leads to states which experts never visit, and there the difference is blind: so
only OF_STATE of the state's logit is taken out. Kin: the discriminators that weigh imitation in DWBC (Xu et al.
2022), the density ratios of DemoDICE (Kim et al. 2022) and ISW-BC (Li et al. 2023), which take out none of it; the
chain over levels and the self-training are of this project.

Letters in shapes: n rows, l levels, m networks of an ensemble, k actions of a chunk, p patches of it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Float32, Int, Shaped

FOLDS, REPEATS, ROUNDS = 3, 2, 2
OF_STATE = 0.5  # 1: the ratio of actions given the state; 0: that of states and actions (BENCHMARKS.md compares)
_PATCH, _WIDTH, _STEPS, _BATCH, _CALL = 4, 64, 1_200, 128, 100
_STATE_NOISE, _ACTION_NOISE, _SMOOTHING, _WEIGHT_DECAY = 0.2, 0.1, 0.05, 0.05
_TRUSTED, _DOUBTED = 0.8, 0.5  # quantiles of the first round's ratio: of the candidates above, of all rows below
_ROWS = 8_192


@dataclass(frozen=True)
class Rows:
    """What the classifiers see.

    Attributes:
        state: whatever says where the robot is; each number is standardised over all rows.
        seen: what a model says about its images and prompt, or nothing (d 0). It tells apart episodes that the model
            has learned by heart, so all of it together varies as much as one number of the state (BENCHMARKS.md).
        actions, real: of `patches`; likewise.
        episode: one number an episode, over all sets: no network judges an episode that it was trained on.
        expert: the row is of an optimal set.
        candidate: a weighted row that the second round may take for an expert's (of an episode that succeeded).
    """

    state: Float32[np.ndarray, "n s"]
    seen: Float32[np.ndarray, "n d"]
    actions: Float32[np.ndarray, "n p a"]
    real: Float32[np.ndarray, "n p"]
    episode: Int[np.ndarray, " n"]
    expert: Bool[np.ndarray, " n"]
    candidate: Bool[np.ndarray, " n"]


@dataclass(frozen=True)
class Ratio:
    """log p_E(s, a) / p_M(s, a) - OF_STATE log p_E(s) / p_M(s) of each row, calibrated on unseen episodes.

    Attributes:
        prefix: of the actions of levels 0..i; the last is that of the whole chunk, and differences of neighbours are
            log p_E(a_i | s, a_<i) - log p_M(a_i | s, a_<i), whose sum it is.
        alone: of the actions of level i without the others.
        episodes: effective number of episodes among the trusted fifth of the candidates, as a share of their episodes
            (1: all alike; near 0: the ratio has learned the behaviour of a few episodes).
        overlap: share of the other rows whose ratio is above the lowest tenth of the experts'. Near 0: everything looks
            unlike an expert's, be it right or wrong.
    """

    prefix: Float32[np.ndarray, "n l"]
    alone: Float32[np.ndarray, "n l"]
    episodes: float
    overlap: float


def fit(rows: Rows, levels: Sequence[Sequence[int]], seed: int, progress: Callable[[], None] = lambda: None) -> Ratio:
    """Train the classifiers and judge every row. `progress` is called often, and may raise to stop."""
    rows = _standard(rows)
    prefixes = [sorted(d for level in levels[: i + 1] for d in level) for i in range(len(levels))]
    dims = [*prefixes, *(list(level) for level in levels[1:])]  # level 0 alone is its prefix
    positive, negative = rows.expert, ~rows.expert
    logits = _round(rows, dims, positive, negative, seed, progress)
    for number in range(1, ROUNDS):
        joint = logits[:, len(levels)] - OF_STATE * logits[:, 0]
        trusted = np.quantile(joint[rows.candidate], _TRUSTED) if rows.candidate.any() else np.inf
        positive = rows.expert | (rows.candidate & (joint > trusted))
        negative = ~rows.expert & (joint < np.quantile(joint[~rows.expert], _DOUBTED))
        logits = _round(rows, dims, positive, negative, seed + number, progress)
    ratios = (logits[:, 1:] - OF_STATE * logits[:, :1]).astype(np.float32)
    prefix = ratios[:, : len(levels)]
    alone = np.concatenate([prefix[:, :1], ratios[:, len(levels) :]], axis=1)
    joint = prefix[:, -1]
    overlap = float(np.mean(joint[~rows.expert] > np.quantile(joint[rows.expert], 0.1)))
    return Ratio(prefix, alone, _effective_episodes(rows, joint), overlap)


def patches(
    actions: Float32[np.ndarray, "n k a"], mask: Bool[np.ndarray, "n k"]
) -> tuple[Float32[np.ndarray, "n p a"], Float32[np.ndarray, "n p"]]:
    """Means of neighbouring real actions of chunks, and which share of each patch is real."""
    n, k, a = actions.shape
    count = -(-k // _PATCH)
    padded, real = np.zeros((n, count * _PATCH, a), np.float32), np.zeros((n, count * _PATCH), np.float32)
    padded[:, :k], real[:, :k] = np.where(mask[..., None], actions, 0), mask
    total = real.reshape(n, count, _PATCH).sum(axis=2)
    means = padded.reshape(n, count, _PATCH, a).sum(axis=2) / np.maximum(total, 1)[..., None]
    return means, total / _PATCH


def _standard(rows: Rows) -> Rows:
    """State and actions with mean 0 and deviation 1 over all rows, within +-10; a constant becomes 0. `seen`, scaled
    down, is appended to the state."""

    def normal(x: np.ndarray, of: np.ndarray) -> np.ndarray:
        return np.clip((x - of.mean(0)) / np.maximum(of.std(0), 1e-3), -10, 10)

    saw = normal(rows.seen, rows.seen) / max(rows.seen.shape[1], 1) ** 0.5
    state = np.concatenate([normal(rows.state, rows.state), saw], axis=1)
    actions = normal(rows.actions, rows.actions[rows.real > 0])
    actions = np.where(rows.real[..., None] > 0, actions, 0)
    return dataclasses.replace(rows, state=state, seen=rows.seen[:, :0], actions=actions)


def _round(
    rows: Rows,
    dims: Sequence[Sequence[int]],
    positive: Bool[np.ndarray, " n"],
    negative: Bool[np.ndarray, " n"],
    seed: int,
    progress: Callable[[], None],
) -> Float[np.ndarray, "n nets"]:
    """Calibrated logits of every row, first those of s alone, then one for each entry of `dims`; each the mean of the
    networks that saw nothing of the row's episode."""
    rng = np.random.default_rng([seed, 11])
    held_out = [fold == f for fold in (_folds(rng, rows) for _ in range(REPEATS)) for f in range(FOLDS)]
    drawn = [_draw(rng, out, positive, negative) for out in held_out]
    params = _train(rows, dims, np.stack(drawn, axis=1), seed, progress)
    total, judges = np.zeros((len(rows.state), 1 + len(dims))), np.zeros(len(rows.state))
    judge = jax.jit(lambda params, *x: _logits(params, dims, *x))
    for m, out in enumerate(held_out):
        of_member = jax.tree.map(lambda leaf, m=m: leaf[m], params)
        at = np.flatnonzero(out)
        for start in range(0, len(at), _ROWS):
            some = at[start : start + _ROWS]
            total[some] += np.asarray(judge(of_member, rows.state[some], rows.actions[some], rows.real[some]))
            progress()
        judges[at] += 1
    logits = total / judges[:, None]
    labelled = positive | negative
    for j in range(logits.shape[1]):
        scale, shift = _platt(logits[labelled, j], positive[labelled])
        logits[:, j] = scale * logits[:, j] + shift
    return logits


def _folds(rng: np.random.Generator, rows: Rows) -> Int[np.ndarray, " n"]:
    """The fold of each row: that of its episode; experts' episodes and the others are dealt out apart."""
    fold = np.zeros(len(rows.episode), np.int64)
    for chosen in (rows.expert, ~rows.expert):
        numbers, position = np.unique(rows.episode[chosen], return_inverse=True)
        fold[chosen] = (rng.permutation(len(numbers)) % FOLDS)[position]
    return fold


def _draw(
    rng: np.random.Generator, out: np.ndarray, positive: np.ndarray, negative: np.ndarray
) -> Int[np.ndarray, "steps batch"]:
    """Rows of every step, half of each class and none held `out`; a class of one episode is in every fold."""
    halves = [np.flatnonzero(chosen & ~out if (chosen & ~out).any() else chosen) for chosen in (positive, negative)]
    return np.concatenate([rng.choice(half, (_STEPS, _BATCH // 2)) for half in halves], axis=1)


def _train(
    rows: Rows,
    dims: Sequence[Sequence[int]],
    drawn: Int[np.ndarray, "steps m batch"],
    seed: int,
    progress: Callable[[], None],
) -> Any:
    """The parameters of all networks of the ensemble, trained beside each other: every leaf has a leading axis m."""
    schedule = optax.cosine_decay_schedule(1e-3, _STEPS)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=_WEIGHT_DECAY))
    sizes = rows.state.shape[1], rows.actions.shape[1]
    keys = jax.random.split(jax.random.key(seed), drawn.shape[1])
    params = jax.vmap(lambda key: _init(key, *sizes, dims))(keys)
    moments = jax.vmap(optimizer.init)(params)
    y = jnp.repeat(jnp.asarray([1 - _SMOOTHING, _SMOOTHING]), _BATCH // 2)[:, None]

    def loss(params: Any, state: Array, actions: Array, real: Array, key: Array) -> Array:
        state_key, action_key = jax.random.split(key)
        state = state + _STATE_NOISE * jax.random.normal(state_key, state.shape)
        # A patch is a mean of _PATCH actions, whose noise is independent
        actions = actions + _ACTION_NOISE * _PATCH**-0.5 * jax.random.normal(action_key, actions.shape)
        return jnp.mean(optax.sigmoid_binary_cross_entropy(_logits(params, dims, state, actions, real), y))

    def step(params: Any, moments: Any, *batch: Array) -> tuple[Any, Any]:
        updates, moments = optimizer.update(jax.grad(loss)(params, *batch), moments, params)
        return optax.apply_updates(params, updates), moments

    @jax.jit
    def several(params: Any, moments: Any, at: Array, key: Array, data: tuple[Array, ...]) -> tuple[Any, Any]:
        def one(carry: tuple[Any, Any], now: tuple[Array, Array]) -> tuple[tuple[Any, Any], None]:
            at, key = now
            batch = [x[at] for x in data]
            return jax.vmap(step)(*carry, *batch, jax.random.split(key, at.shape[0])), None

        keys = jax.random.split(key, at.shape[0])
        return jax.lax.scan(one, (params, moments), (at, keys))[0]

    data = tuple(jnp.asarray(x) for x in (rows.state, rows.actions, rows.real))
    for call, start in enumerate(range(0, _STEPS, _CALL)):
        key = jax.random.fold_in(jax.random.key(seed + 1), call)
        params, moments = several(params, moments, jnp.asarray(drawn[start : start + _CALL]), key, data)
        jax.block_until_ready(params)
        progress()
    return params


def _init(key: Array, state: int, patches: int, dims: Sequence[Sequence[int]]) -> list[list[dict[str, Array]]]:
    """Perceptrons of two hidden layers: one for s, one for s and the actions of each entry of `dims`."""
    inputs = [state, *(state + patches * (len(d) + 1) for d in dims)]
    nets = []
    for net_key, size in zip(jax.random.split(key, len(inputs)), inputs, strict=True):
        sizes = (size, _WIDTH, _WIDTH, 1)
        scales = (size**-0.5, _WIDTH**-0.5, 0.1 * _WIDTH**-0.5)
        layers = zip(jax.random.split(net_key, 3), sizes, sizes[1:], scales, strict=False)
        nets.append([{"w": s * jax.random.normal(k, (i, o)), "b": jnp.zeros(o)} for k, i, o, s in layers])
    return nets


def _logits(
    nets: Sequence[Sequence[dict[str, Array]]],
    dims: Sequence[Sequence[int]],
    state: Float[Array, "b s"],
    actions: Float[Array, "b p a"],
    real: Float[Array, "b p"],
) -> Float[Array, "b nets"]:
    """Logits of "this chunk is an expert's", from s alone and from s with the actions of each entry of `dims`."""
    chosen = [actions[..., jnp.asarray(d)].reshape(len(state), -1) for d in dims]
    inputs = [state, *(jnp.concatenate([state, a, real], axis=1) for a in chosen)]
    outputs = []
    for net, x in zip(nets, inputs, strict=True):
        for layer in net[:-1]:
            x = x @ layer["w"] + layer["b"][None]
            x = x - x.mean(axis=-1, keepdims=True)
            x = jax.nn.swish(x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5))
        outputs.append((x @ net[-1]["w"] + net[-1]["b"][None])[:, 0])
    return jnp.stack(outputs, axis=1)


def _platt(logit: Float[np.ndarray, " n"], truth: Shaped[np.ndarray, " n"]) -> tuple[float, float]:
    """(scale, shift) of Platt's calibration on held-out logits, both classes counting alike, by Newton's steps."""
    weight = np.where(truth, 0.5 / max(truth.sum(), 1), 0.5 / max((~truth).sum(), 1))
    design = np.stack([logit, np.ones_like(logit)], axis=1)
    found = np.zeros(2)  # from 0 Newton's steps converge; from 1 they may overshoot
    for _ in range(20):
        p = 1 / (1 + np.exp(-np.clip(design @ found, -30, 30)))
        gradient = design.T @ (weight * (p - truth)) + 1e-6 * (found - [1, 0])
        hessian = (design * (weight * p * (1 - p))[:, None]).T @ design + 1e-6 * np.eye(2)
        found = found - np.linalg.solve(hessian, gradient)
    return (float(found[0]), float(found[1])) if 0 < found[0] < 10 else (1.0, 0.0)


def _effective_episodes(rows: Rows, joint: Float32[np.ndarray, " n"]) -> float:
    if not rows.candidate.any():
        return 1.0
    at = np.flatnonzero(rows.candidate)
    top = at[joint[at] > np.quantile(joint[at], _TRUSTED)]
    counts = np.unique(rows.episode[top], return_counts=True)[1] if len(top) else np.ones(1)
    share = counts / counts.sum()
    return float(1 / np.square(share).sum() / len(np.unique(rows.episode[at])))
