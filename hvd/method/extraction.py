"""EXTRACTORS: from the value run's table to the rows and weights that a policy trains on; SCORES: what they go by.

Imports no jax. Letters in shapes: n rows of a dataset, l levels.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float32

from hvd.configs import Experiment
from hvd.errors import UserError
from hvd.fields import AT_LEAST_1, POSITIVE, SHARE
from hvd.method import weights
from hvd.method.parameters import Parameter, Parameters, choose, resolve
from hvd.method.table import Advantages
from hvd.robots import get_robot


@dataclass(frozen=True)
class Outcomes:
    """How the frames of a dataset went on.

    Attributes:
        success: the frame's episode is known to have succeeded.
        rewarded: a reward follows in its episode, at the frame itself or later.
        wrong: (robot's levels, horizon, waiting) -> what the labels call wrong: hvd.data.dataset.Dataset.wrong_shares.
    """

    success: Bool[np.ndarray, " n"]
    rewarded: Bool[np.ndarray, " n"]
    wrong: Callable[[tuple[str, ...], int, bool], np.ndarray] | None = None

    @classmethod
    def of(cls, data: Any) -> "Outcomes":
        """Those of an open hvd.data.dataset.Dataset."""
        starts, lengths = (np.asarray([getattr(e, x) for e in data.all_episodes]) for x in ("start", "length"))
        success = np.asarray([e.success for e in data.all_episodes], bool)[data.episode_of]
        paid = np.concatenate([[0], np.cumsum(data.rewards > 0)])
        rewarded = np.repeat(paid[starts + lengths], lengths) > paid[:-1]
        return cls(success, rewarded, getattr(data, "wrong_shares", None))

    @property
    def frames(self) -> int:
        return len(self.success)


@dataclass(frozen=True)
class Extracted:
    """What the policy trains on of one set.

    Attributes:
        weights: of each row of the dataset and each level, float32; NaN in rows that are not trained on.
        keep: rows of the dataset that are trained on; None = all that have a whole chunk.
        good: which levels of a row its prompt calls good (hvd.method.condition); None = prompts say nothing of it.
    """

    weights: Float32[np.ndarray, "n l"]
    keep: Bool[np.ndarray, " n"] | None = None
    good: Bool[np.ndarray, "n l"] | None = None


@dataclass(frozen=True)
class Extractor:
    """What --policy.extractor chooses.

    Attributes:
        rows: (cfg, parameters, the table's rows of one set, outcomes of its frames) -> what the policy trains on of it.
            The table is None where the policy needs no value run.
        parameters: by name, set by --policy.extractor_params.NAME.
        needs_value: whether this config's policy needs a value run and its table at all.
        scored: it goes by --policy.score.
        labelled: it goes by the labels of simulated data: an upper bound for experiments.
        acts: of hvd.train.steering.STEERED: the policy asks the critic while it acts; "" = it does not.
        conditioned: its prompts say how good the action is (hvd.method.condition).
    """

    rows: Callable[[Experiment, Parameters, Any, Outcomes], Extracted]
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    needs_value: Callable[[Experiment], bool] = lambda cfg: True
    scored: bool = False
    labelled: bool = False
    acts: str = ""
    conditioned: bool = False


# ------------------------------------------------------------------------------------------------------- the scores


def score(cfg: Experiment, table: Advantages) -> Float[np.ndarray, "t l"]:
    """The score of each row of the table and each level, higher is better (policy.score, policy.score_levels)."""
    kind = cfg.policy.score
    if kind == "both":
        return sum(_ranks(_levels(cfg, table, part)) for part in ("td", "ratio")) / 2  # pyright: ignore[reportReturnType]
    return _levels(cfg, table, kind)


def _levels(cfg: Experiment, table: Advantages, kind: str) -> Float[np.ndarray, "t l"]:
    """One score a level: by itself, given its parents, or the same for all."""
    how = cfg.policy.score_levels
    if kind == "td":
        own, prefix = table.q - table.v[:, None], table.q - table.v[:, None]
    else:
        if table.ratio is None or table.alone is None:
            raise UserError(f"{cfg.advantages_dir}: its table has no expert ratio: run `hvd advantages` again")
        own, prefix = table.alone, table.ratio
    if how == "own":
        return own
    if how == "chain":
        return np.diff(prefix, axis=1, prepend=np.float32(0))
    one = prefix[:, -1:] if how == "joint" else own.mean(axis=1, keepdims=True)
    return np.repeat(one, own.shape[1], axis=1)


def _ranks(x: Float[np.ndarray, "t l"]) -> Float[np.ndarray, "t l"]:
    """Ranks within each column, 0 to 1."""
    return x.argsort(axis=0).argsort(axis=0) / max(len(x) - 1, 1)


def needs_ratio(cfg: Experiment) -> bool:
    """Does the table need the expert ratio?"""
    return extractor(cfg)[0].scored and cfg.policy.score != "td"


# ------------------------------------------------------------------------------------- a critic beside the policy


def check_judges(cfg: Experiment, critic: Experiment, folder: Any) -> None:
    """UserError unless a value run of the config `critic` reads observations and actions as the policy of `cfg` does:
    a policy that acts by it hands over its own, normalised."""
    check_same(_inputs(critic), _inputs(cfg), f"value run {folder} does not fit the policy", "the policy's")


def check_same(theirs: Mapping[str, object], ours: Mapping[str, object], what: str, whose: str) -> None:
    """UserError that names the first field in which they differ."""
    for name, value in ours.items():
        if theirs[name] != value:
            raise UserError(f"{what}: its {name} is {theirs[name]!r}, {whose} {value!r}")


def of_actions(cfg: Experiment) -> dict[str, object]:
    """What a chunk of actions and its images mean to a run of this config, by field."""
    fields = {"robot": cfg.robot, "levels": cfg.levels(), "norm": cfg.norm}
    return fields | {f"model.{name}": getattr(cfg.model, name) for name in ("action_horizon", "cameras")}


_OF_MODEL = ("action_dim", "image_size", "max_token_len", "tokenizer", "vocab_size")


def _inputs(cfg: Experiment) -> dict[str, object]:
    """What the inputs of a model of this config mean, by field."""
    of_model = {f"model.{name}": getattr(cfg.model, name) for name in _OF_MODEL}
    return of_actions(cfg) | {"state_in_prompt": cfg.model.spells_state} | of_model


# ----------------------------------------------------------------------------------------------------- the extractors


def weighted(cfg: Experiment, p: Parameters, table: Advantages, outcomes: Outcomes) -> Extracted:
    """Every row, each level with its weight (docs/method.md: value-weighted flow matching)."""
    gate = _gate(cfg, outcomes)
    return Extracted(table.by_row("omega", outcomes.frames), gate if cfg.policy.gate != "none" else None)


def normalised(cfg: Experiment, p: Parameters, table: Advantages, outcomes: Outcomes) -> Extracted:
    """`weighted`, and each level's weights divided by their mean: bc_lambda means the same for every weighting."""
    return _normalised(table.by_row("omega", outcomes.frames), _gate(cfg, outcomes), table)


def filtered(cfg: Experiment, p: Parameters, table: Advantages, outcomes: Outcomes) -> Extracted:
    """Of the rows behind the gate, each level those whose score is above a quantile of it; all alike."""
    scores, gate = _scores(cfg, table, outcomes)
    behind = gate & np.isfinite(scores[:, 0])
    kept = behind[:, None] & (scores >= np.quantile(scores[behind], p["quantile"], axis=0))
    return _normalised(kept.astype(np.float32), behind, table)


def soft(cfg: Experiment, p: Parameters, table: Advantages, outcomes: Outcomes) -> Extracted:
    """Of the rows behind the gate, exp(score / temperature), clipped: with the expert ratio at temperature 1, the
    mixed data weighted as the experts act."""
    scores, gate = _scores(cfg, table, outcomes)
    behind = gate & np.isfinite(scores[:, 0])
    raised = scores / p["temperature"]
    raised = raised - np.log(np.mean(np.exp(np.clip(raised[behind], -20, 20)), axis=0))
    return _normalised(np.minimum(np.exp(np.minimum(raised, 20)), p["clip"]), behind, table)


def oracle(cfg: Experiment, p: Parameters, table: Advantages | None, outcomes: Outcomes) -> Extracted:
    """Of the rows behind the gate, each level those whose chunk has hardly a labelled mistake of its own; with
    policy.score_levels joint or mean, of any level."""
    robot = get_robot(cfg.robot)
    if outcomes.wrong is None:
        raise UserError("policy.extractor oracle: the dataset's label files name no mistakes")
    wrong = outcomes.wrong(robot.level_names, cfg.model.action_horizon, cfg.policy.oracle_waiting) > _WRONG
    if cfg.policy.score_levels in ("joint", "mean"):
        wrong = np.repeat(wrong.any(axis=1, keepdims=True), wrong.shape[1], axis=1)
    own = [[not set(dims).isdisjoint(level) for dims in robot.level_dims] for level in cfg.levels()]
    clean = np.stack([~wrong[:, mask].any(axis=1) for mask in own], axis=1)
    return _normalised(clean.astype(np.float32), _gate(cfg, outcomes), table)


def even(cfg: Experiment, p: Parameters, table: Advantages, outcomes: Outcomes) -> Extracted:
    """The rows behind the gate, all alike: imitation, by a policy that asks the critic while it acts."""
    ones = np.ones((outcomes.frames, len(table.levels)), np.float32)
    return Extracted(ones, _gate(cfg, outcomes) if cfg.policy.gate != "none" else None)


def conditioned(cfg: Experiment, p: Parameters, table: Advantages, outcomes: Outcomes) -> Extracted:
    """The rows behind the gate, all alike, each told of which levels the score is at or above a quantile of it."""
    scores, gate = _scores(cfg, table, outcomes)
    behind = gate & np.isfinite(scores[:, 0])
    good = np.nan_to_num(scores, nan=-np.inf) >= np.quantile(scores[behind], p["quantile"], axis=0)
    return dataclasses.replace(even(cfg, p, table, outcomes), good=good)


EXTRACTORS: dict[str, Extractor] = {
    "weighted": Extractor(weighted, needs_value=lambda cfg: weights.weighting(cfg).needs_value),
    "normalised": Extractor(normalised),
    "filter": Extractor(filtered, {"quantile": Parameter(0.5, SHARE)}, scored=True),
    "soft": Extractor(soft, {"temperature": Parameter(1.0, POSITIVE), "clip": Parameter(5.0, POSITIVE)}, scored=True),
    "condition": Extractor(
        conditioned,
        {"quantile": Parameter(0.7, SHARE), "drop": Parameter(0.3, SHARE), "guidance": Parameter(1.0, POSITIVE)},
        scored=True,
        conditioned=True,
    ),
    "oracle": Extractor(oracle, needs_value=lambda cfg: False, labelled=True),
    "best_of_n": Extractor(even, {"n": Parameter(8.0, AT_LEAST_1)}, acts="best_of_n"),
    "q_guided": Extractor(even, {"strength": Parameter(0.2, POSITIVE)}, acts="q_guided"),
}
_WRONG = 0.1  # share of a chunk from which on it counts as wrong


def _gate(cfg: Experiment, outcomes: Outcomes) -> Bool[np.ndarray, " n"]:
    """The rows that policy.gate lets through; UserError where it lets none."""
    gates = {"none": np.ones(outcomes.frames, bool), "success": outcomes.success, "reward": outcomes.rewarded}
    chosen = gates[cfg.policy.gate]
    if not chosen.any():
        raise UserError(f"policy.gate {cfg.policy.gate!r} lets no frame of the weighted sets through: set it to none")
    return chosen


def _scores(
    cfg: Experiment, table: Advantages, outcomes: Outcomes
) -> tuple[Float[np.ndarray, "n l"], Bool[np.ndarray, " n"]]:
    """Scores in the order of the dataset's rows, NaN where the table has none; and the gate."""
    scores = np.full((outcomes.frames, len(table.levels)), np.nan)
    table.by_row("v", outcomes.frames)  # refuses rows that the dataset has not
    scores[table.row] = score(cfg, table)
    return scores, _gate(cfg, outcomes)


def _normalised(raw: Float[np.ndarray, "n l"], behind: Bool[np.ndarray, " n"], table: Advantages | None) -> Extracted:
    """Rows with a weight above 0, each level's weights divided by their mean over these rows."""
    keep = behind & (np.nan_to_num(raw) > 0).any(axis=1)
    mean = raw[keep].mean(axis=0) if keep.any() else np.ones(raw.shape[1])
    known = np.full(len(raw), table is None)
    if table is not None:
        known[table.row] = True
    scaled = np.where(behind[:, None], raw, 0) / np.maximum(mean, 1e-12)
    return Extracted(np.where(known[:, None], scaled, np.nan).astype(np.float32), keep)


def extractor(cfg: Experiment) -> tuple[Extractor, dict[str, float]]:
    """The experiment's and its parameters, of weighting none (imitation) none that goes by a score; UserError for an
    unknown extractor or parameter."""
    entry, name = f"extractor {cfg.policy.extractor!r}", "policy.extractor_params"
    chosen = choose(EXTRACTORS, cfg.policy.extractor, "policy.extractor")
    p = resolve(chosen.parameters, cfg.policy.extractor_params, cfg, name, entry)
    return (EXTRACTORS["weighted"], {}) if chosen.scored and cfg.policy.weighting == "none" else (chosen, p)


def extract(cfg: Experiment, table: Advantages | None, outcomes: Mapping[str, Outcomes]) -> dict[str, Extracted]:
    """What the policy trains on of each set in `outcomes`; the other sets are imitated whole. Without a table (the
    policy needs no value run) the rows behind the gate, all alike."""
    chosen, p = extractor(cfg)
    if table is None and not chosen.labelled:
        ones = {name: np.ones((of.frames, len(cfg.levels())), np.float32) for name, of in outcomes.items()}
        return {name: Extracted(ones[name], _gate(cfg, of)) for name, of in outcomes.items()}
    return {name: chosen.rows(cfg, p, table and table.of(name), of) for name, of in outcomes.items()}


def label(cfg: Experiment) -> str:
    """How the policy's rows are chosen and weighted, in a word or two for tables."""
    own = cfg.policy
    chosen, _ = extractor(cfg)
    named = chosen.labelled or chosen.acts
    how = f"{own.extractor} {own.score}" if chosen.scored else own.extractor if named else own.weighting
    if (chosen.scored or chosen.labelled) and own.score_levels != "own":
        how += f" {own.score_levels}"
    return how if own.gate == "none" else f"{how}, {own.gate} only"
