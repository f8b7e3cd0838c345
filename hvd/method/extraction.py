"""EXTRACTORS: from the value run's table to the rows and weights that a policy trains on. Imports no jax."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float32

from hvd.configs import Experiment
from hvd.method import weights
from hvd.method.parameters import Parameter, Parameters, choose, resolve
from hvd.method.table import Advantages


@dataclass(frozen=True)
class Extracted:
    """What the policy trains on of one set.

    Attributes:
        weights: omega of each row of the dataset and each level, float32; NaN in rows that are not trained on.
        keep: rows of the dataset that are trained on; None = all that have a whole chunk.
    """

    weights: Float32[np.ndarray, "n l"]
    keep: Bool[np.ndarray, " n"] | None = None


@dataclass(frozen=True)
class Extractor:
    """What --policy.extractor chooses.

    Attributes:
        rows: (cfg, parameters, the table's rows of one set, frames of its dataset) -> what the policy trains on of it.
        parameters: by name, set by --policy.extractor_params.NAME.
        needs_value: whether this config's policy needs a value run and its table at all.
    """

    rows: Callable[[Experiment, Parameters, Advantages, int], Extracted]
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    needs_value: Callable[[Experiment], bool] = lambda cfg: True


def weighted(cfg: Experiment, p: Parameters, table: Advantages, frames: int) -> Extracted:
    """Every row, each level with its weight (docs/method.md: value-weighted flow matching)."""
    return Extracted(table.by_row("omega", frames))


EXTRACTORS: dict[str, Extractor] = {
    "weighted": Extractor(weighted, needs_value=lambda cfg: weights.weighting(cfg).needs_value),
}


def extractor(cfg: Experiment) -> tuple[Extractor, dict[str, float]]:
    """The experiment's and its parameters; UserError for an unknown extractor or parameter."""
    entry, name = f"extractor {cfg.policy.extractor!r}", "policy.extractor_params"
    chosen = choose(EXTRACTORS, cfg.policy.extractor, "policy.extractor")
    return chosen, resolve(chosen.parameters, cfg.policy.extractor_params, cfg, name, entry)


def extract(cfg: Experiment, table: Advantages, frames: Mapping[str, int]) -> dict[str, Extracted]:
    """What the policy trains on of each set in `frames` (rows of its dataset); the other sets are imitated whole."""
    chosen, p = extractor(cfg)
    return {name: chosen.rows(cfg, p, table.of(name), count) for name, count in frames.items()}
