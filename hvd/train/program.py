"""What a stage compiles: built from the config and the mesh alone, so that `hvd plan` compiles the very step that a run
takes, without data.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float

from hvd.train.state import Graph, TrainState

type Batch = dict[str, Any]
type Metrics = dict[str, Float[Array, ""]]


@dataclasses.dataclass(frozen=True)
class Program:
    """The functions of a stage's run, not yet compiled.

    Attributes:
        graph: the model, and which of its parameters are trained.
        init: key -> the state before the first step.
        step: (state, batch) -> (next state, metrics). Pure; randomness comes from state.step alone.
        evaluate: (state, batch, key) -> metrics of a validation batch; the i-th batch always gets the i-th key.
    """

    graph: Graph
    init: Callable[[jax.Array], TrainState]
    step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    evaluate: Callable[[TrainState, Batch, jax.Array], Metrics]
