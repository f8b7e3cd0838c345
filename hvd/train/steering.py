"""Policies whose flow is steered while they act: by the critic (the best of several chunks by Q, or a flow that climbs
Q), or by the words before the prompt.

Q is that of the last level, which sees the actions of all levels, and the smaller of the twins. Nothing is trained for
it: the policy is imitation, the value run is the one that stood beside it. Names of hvd.method.extraction.EXTRACTORS.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hvd.data.transforms import Observation
from hvd.models.value import ValueModel
from hvd.train.state import Graph, Tree

Denoise = Callable[..., Float[Array, "b k a"]]
"""(params, observation, noise, flow steps, committed, steer) -> normalised actions; `steer` as of
hvd.models.acting.sample_actions."""


@dataclass(frozen=True)
class Critic:
    """The value model of a policy that acts by it; its parameters travel as params["critic"]."""

    graph: Graph
    params: Tree

    def q(self, params: Tree, observation: Observation, actions: Float[Array, "b k a"]) -> Float[Array, "b"]:
        """Q of normalised chunks."""
        model = self.graph.module(params["critic"])
        assert isinstance(model, ValueModel)
        _, q = model(observation, actions, jnp.ones(actions.shape[:2], bool))
        return q[:, -1].min(axis=-1)


def best_of_n(denoise: Denoise, critic: Critic, p: Mapping[str, float]) -> Denoise:
    """Of `n` chunks from independent noise the one with the highest Q. The first noise is the one that was asked for:
    n = 1 is the policy itself."""
    n = int(p["n"])

    def best(params: Tree, observation: Observation, noise: Array, num_steps: Any, committed: Any = None) -> Array:
        def several(x: Any) -> Any:
            return jax.tree.map(lambda leaf: jnp.repeat(jnp.asarray(leaf), n, axis=0), x)

        many, all_noise = several(observation), _more(noise, n)
        chunks = denoise(params, many, all_noise, num_steps, several(committed), None)
        q = critic.q(params, many, chunks).reshape(-1, n)
        chunks = chunks.reshape(-1, n, *chunks.shape[1:])
        return jnp.take_along_axis(chunks, q.argmax(axis=1)[:, None, None, None], axis=1)[:, 0]

    return best


def q_guided(denoise: Denoise, critic: Critic, p: Mapping[str, float]) -> Denoise:
    """A flow that climbs Q: in each step the final actions, as estimated from there, are moved along dQ/da. The
    gradient has length 1 in the mean over a chunk's numbers, so `strength` is the whole way that they are moved, in
    standard deviations of the actions."""

    def guided(params: Tree, observation: Observation, noise: Array, num_steps: Any, committed: Any = None) -> Array:
        def steer(x: Array, t: Array, velocity: Array) -> Array:
            gradient = jax.grad(lambda a: critic.q(params, observation, a).sum())(x - t * velocity)
            size = jnp.sqrt(jnp.square(gradient).mean(axis=(1, 2), keepdims=True))
            return velocity - p["strength"] * gradient / jnp.maximum(size, 1e-12)  # time runs from 1 to 0

        return denoise(params, observation, noise, num_steps, committed, steer)

    return guided


STEERED: Mapping[str, Callable[[Denoise, Critic, Mapping[str, float]], Denoise]] = {
    "best_of_n": best_of_n,
    "q_guided": q_guided,
}


def by_words(denoise: Denoise, guidance: float) -> Denoise:
    """Classifier-free guidance (Ho and Salimans 2022): v = v_plain + guidance (v_told - v_plain), where `plain` lacks
    the words before the prompt. Both come of one batch of twice the size."""

    def guided(params: Tree, observation: Observation, noise: Array, num_steps: Any, committed: Any = None) -> Array:
        told = {name: part for name, part in observation.items() if name != "plain"}
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), told, told | observation["plain"])
        twice = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), (noise, committed))

        def steer(x: Array, t: Array, velocity: Array) -> Array:
            of_told, of_plain = jnp.split(velocity, 2)
            mixed = of_plain + guidance * (of_told - of_plain)
            return jnp.concatenate([mixed, mixed])

        return denoise(params, both, twice[0], num_steps, twice[1], steer)[: len(noise)]

    return guided


def _more(noise: Float[Array, "b k a"], n: int) -> Float[Array, "bn k a"]:
    """Each row's noise and n - 1 further ones, which it alone decides: a row's actions do not depend on others'."""

    def of_one(row: Float[Array, "k a"]) -> Float[Array, "n k a"]:
        seed = jax.lax.bitcast_convert_type(row, jnp.uint32).sum(dtype=jnp.uint32)
        further = jax.random.normal(jax.random.key(seed), (n - 1, *row.shape), row.dtype)
        return jnp.concatenate([row[None], further])

    return jax.vmap(of_one)(noise).reshape(-1, *noise.shape[1:])
