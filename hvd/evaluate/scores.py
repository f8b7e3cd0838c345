"""Which chunks does a score trust, and which does the policy learn from? For simulated data, whose labels know.

A chunk is wrong where more than a tenth of its real actions lie in a mistake of some level, clean where none does and
no level waits for another's mistake; waiting chunks, those that are not wrong and wait in more than a tenth, are
counted apart. Of every score that the table has: the area under the ROC curve of wrong against clean chunks, over all
episodes and within those that succeeded, where an outcome tells nothing; and, level by level at a mistake's onset,
against the onsets of other levels' mistakes (who erred?). Of the weights that the policy trains with: their share on
wrong, onset and waiting chunks, and how many chunks they leave in effect. Intervals: bootstrap over episodes.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float

from hvd.configs import Experiment
from hvd.evaluate.credit import Frames, read_frames, separation
from hvd.evaluate.results import print_rows, write_json
from hvd.method import extraction
from hvd.method.table import Advantages
from hvd.robots import get_robot
from hvd.train import stage_data

_WRONG = 0.1


def main(cfg: Experiment) -> dict | None:
    """Print the tables and write `<exp_dir>/evaluation/scores.json`; None where there is no table or no label file."""
    frames = read_frames(cfg)
    if frames is None or not frames.onset.any():
        return None
    table = Advantages.read(cfg.advantages_dir).of("suboptimal")
    names = get_robot(cfg.robot).level_names
    result = {"scores": {}, "levels": {}, "weights": weights(cfg, frames, table, names)}
    for name, score in scores(cfg, table.where(frames.at)):
        result["scores"][name] = judged(frames, score)
        if score.shape[1] == len(names):
            result["levels"][name] = {
                level: separation(-score[:, i], frames.episode, frames.onset[:, i], _others(frames, i))
                for i, level in enumerate(names)
                if frames.onset[:, i].any()
            }
    write_json(epath.Path(cfg.exp_dir) / "evaluation" / "scores.json", result)
    print("\nscores: AUC of wrong chunks against clean ones | at onset against other levels' mistakes")
    print_rows(rows(result, names))
    print(f"\nwhat {extraction.label(cfg)} leaves: weight on wrong, onset and waiting chunks, effective share")
    print_rows(
        [("level", "wrong", "before", "onset", "before", "waiting", "before", "effective")]
        + [(level, *(f"{found[key]:.2f}" for key in found)) for level, found in result["weights"].items()]
    )
    return result


def scores(cfg: Experiment, table: Advantages) -> Iterator[tuple[str, Float[np.ndarray, "n l"]]]:
    """(name, score) of every way to score the table's rows; one column where all levels have the same."""
    for kind in ("td",) if table.ratio is None else ("td", "ratio", "both"):
        for how in ("own", "chain", "joint", "mean"):
            policy = dataclasses.replace(cfg.policy, score=kind, score_levels=how)
            score = extraction.score(dataclasses.replace(cfg, policy=policy), table)
            yield f"{kind} {how}", score if how in ("own", "chain") else score[:, :1]


def judged(frames: Frames, score: Float[np.ndarray, "n l"]) -> dict[str, Any]:
    """AUCs of a low score (the lowest level's) for wrong against clean chunks, over all and within successes; and for
    chunks of waiting against clean ones."""
    wrong, lowest = frames.share.max(axis=1) > _WRONG, score.min(axis=1)
    waiting = (frames.waiting.max(axis=1) > _WRONG) & ~wrong
    clean = frames.clean & (frames.waiting.max(axis=1) == 0)
    masks = {"all": wrong, "success": wrong & frames.success, "waiting": waiting}
    behind = {"success": clean & frames.success}
    return {name: separation(-lowest, frames.episode, m, behind.get(name, clean)) for name, m in masks.items()}


def weights(cfg: Experiment, frames: Frames, table: Advantages, names: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """By level: the share of the policy's weight on wrong, onset and waiting chunks, beside that of even weights, and
    the effective share of chunks, (sum w)^2 / (n sum w^2)."""
    data = stage_data.open_dataset(cfg, "suboptimal")
    extracted = extraction.extract(cfg, table, {"suboptimal": extraction.Outcomes.of(data)})["suboptimal"]
    rows = table.row[frames.at]
    kept = np.ones(len(rows), bool) if extracted.keep is None else extracted.keep[rows]
    found = {}
    for i, level in enumerate(names):
        own = np.where(kept, extracted.weights[rows, i if extracted.weights.shape[1] == len(names) else 0], 0.0)
        wrong, onset, total = frames.share[:, i] > _WRONG, frames.onset[:, i], max(own.sum(), 1e-12)
        waiting = (frames.waiting[:, i] > _WRONG) & ~wrong
        found[level] = {
            "wrong": float(own[wrong].sum() / total),
            "wrong_even": float(wrong.mean()),
            "onset": float(own[onset].sum() / total),
            "onset_even": float(onset.mean()),
            "waiting": float(own[waiting].sum() / total),
            "waiting_even": float(waiting.mean()),
            "effective": float(total**2 / (len(own) * max(np.square(own).sum(), 1e-12))),
        }
    return found


def rows(result: dict, names: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The scores' AUCs as text, one row a score."""

    def text(found: dict | None) -> str:
        return "-" if found is None else f"{found['mean']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"

    titles = ("score", "all", "within successes", "waiting")
    lines: list[tuple[str, ...]] = [(*titles, *(f"{name}, who" for name in names))]
    for score, found in result["scores"].items():
        levels = result["levels"].get(score, {})
        cells = (text(found[key]) for key in ("all", "success", "waiting"))
        lines.append((score, *cells, *(text(levels.get(n)) for n in names)))
    return lines


def _others(frames: Frames, i: int) -> np.ndarray:
    """Onsets of other levels' mistakes alone."""
    return np.delete(frames.onset, i, axis=1).any(axis=1) & ~frames.onset[:, i]
