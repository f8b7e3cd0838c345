"""The policy compiled beforehand for a few batch sizes, so that no request ever waits for a compilation."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, UInt32

from hvd.data.transforms import Observation
from hvd.models import acting
from hvd.models.chunking import Committed, Given
from hvd.runtime import preemption
from hvd.serve.observation import MAX_FLOW_STEPS, Request
from hvd.train.inference import Policy


class Sampler:
    """Actions for several requests at once.

    A row's noise depends on its own seed alone, and is that of `Policy.act` for one row with key(seed): a reply does
    not depend on which other requests were answered with it, but for the last bits of the matrix products.

    Args:
        sizes: batch sizes to compile, ascending; a batch is filled up to the next one.
        chunking: compile each for requests with committed actions too; for given ones where the policy is trained so.
    """

    def __init__(self, policy: Policy, sizes: Sequence[int], chunking: bool = False):
        assert acting.MAX_STEPS >= MAX_FLOW_STEPS
        self._policy, self.sizes = policy, tuple(sizes)
        self._forms: list[type] = [type(None)]
        if chunking:
            self._forms += [Committed, Given] if policy.cfg.policy.prefix_max else [Committed]
        model = policy.cfg.model
        self._chunk = (model.action_horizon, model.action_dim)

        def sample(
            params: Any,
            observation: Observation,
            seeds: UInt32[Array, "b"],
            noise: Float[Array, "b k a"],
            given: Bool[Array, "b"],
            num_steps: Int[Array, ""],
            committed: Committed | Given | None,
        ) -> Float[Array, "b k a"]:
            drawn = jax.vmap(lambda seed: jax.random.normal(jax.random.key(seed), (1, *self._chunk))[0])(seeds)
            noise = jnp.where(given[:, None, None], noise, drawn)
            return policy.denoise(params, observation, noise, num_steps, committed)

        self._jitted = jax.jit(sample)
        self._compiled: dict[tuple[int, type], Any] = {}

    @property
    def max_rows(self) -> int:
        return self.sizes[-1]

    def size_for(self, rows: int) -> int:
        """The smallest compiled batch that holds `rows`."""
        return next(size for size in self.sizes if size >= rows)

    def warm(self, request: Request) -> None:
        """Compile every size, with the shapes of `request`, and run it once."""
        chunk = np.zeros((request.rows, *self._chunk), np.float32)
        for size, form in itertools.product(self.sizes, self._forms):
            preemption.check("before the server was ready")
            committed = None
            if form is not type(None):
                committed = form(chunk, chunk[..., 0].astype(bool if form is Given else np.float32))
            inputs = self._inputs([dataclasses.replace(request, committed=committed)], size)
            compiled = self._compiled[size, form] = self._jitted.lower(self._policy.params, *inputs).compile()
            jax.block_until_ready(compiled(self._policy.params, *inputs))

    def __call__(self, requests: Sequence[Request]) -> list[Float32[np.ndarray, "b k a"]]:
        """Raw absolute actions of each request, which are of one kind; together at most `max_rows` rows."""
        size = self.size_for(sum(request.rows for request in requests))
        inputs = self._inputs(requests, size)
        compiled = self._compiled[size, type(requests[0].committed)]
        normalised = jax.device_get(compiled(self._policy.params, *inputs))
        with np.errstate(over="ignore", invalid="ignore"):  # who asks for the impossible is told so by the caller
            actions = self._policy.transform.actions_out(normalised, batch_of(requests, size)[1])
        ends = np.cumsum([request.rows for request in requests])
        return [actions[end - request.rows : end] for request, end in zip(requests, ends, strict=True)]

    def _inputs(self, requests: Sequence[Request], size: int) -> tuple[Any, ...]:
        observation, _ = batch_of(requests, size)
        seeds, given = np.zeros(size, np.uint32), np.zeros(size, bool)
        noise = np.zeros((size, *self._chunk), np.float32)
        at = 0
        for request in requests:
            rows = slice(at, at + request.rows)
            seeds[rows] = request.seeds
            if request.noise is not None:
                noise[rows], given[rows] = request.noise, True
            at += request.rows
        parts = [request.committed for request in requests if request.committed is not None]
        committed = None
        if len(parts) == len(requests):
            joined = (
                np.concatenate([*x, np.zeros((size - at, *x[0].shape[1:]), x[0].dtype)])
                for x in zip(*parts, strict=True)
            )
            committed = type(parts[0])(*joined)
        return observation, seeds, noise, given, np.int32(requests[0].num_flow_steps), committed


def sizes_up_to(max_batch: int) -> tuple[int, ...]:
    """1, 2, 4, ... and max_batch itself."""
    powers = [2**i for i in range(max_batch.bit_length()) if 2**i < max_batch]
    return (*powers, max_batch)


def batch_of(requests: Sequence[Request], size: int) -> tuple[Observation, Float32[np.ndarray, "b s"]]:
    """Observations and raw states of the requests as one batch of `size` rows, filled up with the last row."""
    rows = sum(request.rows for request in requests)
    pick = np.minimum(np.arange(size), rows - 1)

    def joined(parts: Sequence[Any]) -> Any:
        if isinstance(parts[0], dict):
            return {name: joined([part[name] for part in parts]) for name in parts[0]}
        return np.concatenate(parts)[pick]

    state = np.concatenate([request.state for request in requests])[pick]
    return joined([request.observation for request in requests]), state
