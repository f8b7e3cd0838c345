"""Does the hierarchy blame the level at fault? For simulated data, whose sidecars know each mistake's level and frames.

A_i(t) judges the actions t .. t+K-1 of levels <= i against what V expects of the state. An advantage speaks when a
mistake begins: later the state itself tells that things went wrong, V is low and A is near 0 again. So the frames asked
about are those at a mistake's onset, from K/2 before its first frame to K/4 after; beside them all its frames ("whole":
at least half of the chunk's real actions lie in it). "The rest" are frames whose chunk touches no mistake. Two
questions, each answered by an area under the ROC curve (0.5 = chance) of -A_i, with a bootstrap interval over episodes:

    rest    does A_i single out the frames of that level's mistakes from frames without any?
    other   does it tell them from frames of mistakes at other levels?

A_i knows the actions of all levels up to i, so it also sees its parents' mistakes; the marginal advantage Q_i - Q_{i-1}
(V for the root) is what level i adds. Both are judged.

The labels come from `<dataset>/labels`; training never reads their mistakes.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from etils import epath
from jaxtyping import Bool, Float, Float32, Int

from hvd.configs import Experiment
from hvd.data.labels import chunk_shares, episode_path, load_labels
from hvd.evaluate.results import print_rows, write_json
from hvd.evaluate.statistics import Estimate
from hvd.method.table import Advantages
from hvd.robots import get_robot

_RESAMPLES = 200
KINDS = {
    "auc": "where a mistake begins",
    "auc_marginal": "where a mistake begins, by the marginal advantages M_i = Q_i - Q_i-1",
    "auc_whole": "all frames of a mistake",
}


@dataclass(frozen=True)
class Frames:
    """Frames of the table that have labels: advantages and weights of each level, and what was wrong.

    Attributes:
        marginal: Q_i - Q_{i-1}, with V for Q_{-1}.
        onset: [n, robot levels] whether a mistake of that level is about to begin or has just begun.
        share: [n, robot levels] share of the chunk's real actions that lie in a mistake of that level.
        clean: [n] whether no action of the chunk lies in any mistake.
        success: [n] whether the episode succeeded.
        at: [n] which of the set's rows of the table.
        waiting: [n, robot levels] share of the chunk's real actions in which that level waits for another's mistake.
    """

    episode: Int[np.ndarray, " n"]
    a: Float32[np.ndarray, "n l"]
    marginal: Float32[np.ndarray, "n l"]
    omega: Float32[np.ndarray, "n l"]
    onset: Bool[np.ndarray, "n m"]
    share: Float[np.ndarray, "n m"]
    clean: Bool[np.ndarray, " n"]
    success: Bool[np.ndarray, " n"]
    at: Int[np.ndarray, " n"]
    waiting: Float[np.ndarray, "n m"]


def main(cfg: Experiment) -> dict | None:
    """Print the tables and write `<exp_dir>/evaluation/credit.json`; None where there is no table or no label file."""
    frames = read_frames(cfg)
    if frames is None:
        return None
    result = tables(frames, get_robot(cfg.robot).level_names, cfg.level_names())
    if not result["mistake_frames"]:
        return None
    write_json(epath.Path(cfg.exp_dir) / "evaluation" / "credit.json", result)
    print("\ncredit: AUC of low advantage, against frames without mistakes | against mistakes at other levels")
    for kind, title in KINDS.items():
        if kind in result:
            print(f"{title}:")
            print_rows(rows(result, kind))
    return result


def rows(result: dict, kind: str) -> list[tuple[str, ...]]:
    """One of the AUC tables as text: a row per level at fault, a column per advantage, and the level's mean weight."""
    columns = list(next(iter(result[kind].values())))
    lines: list[tuple[str, ...]] = [("mistakes at", "frames", *columns, "weight", "elsewhere")]
    for level, pairs in result[kind].items():
        cells = []
        for pair in pairs.values():
            cells.append(" | ".join("-" if e is None else f"{e['mean']:.2f}" for e in (pair["rest"], pair["other"])))
        weight = result["omega"][level]
        count = result["whole_frames" if kind == "auc_whole" else "mistake_frames"][level]
        here = weight["whole" if kind == "auc_whole" else "mistakes"]
        lines.append((level, str(count), *cells, f"{here:.2f}", f"{weight['rest']:.2f}"))
    return lines


def tables(frames: Frames, robot_levels: tuple[str, ...], levels: tuple[str, ...]) -> dict:
    """The AUCs of every advantage (`levels`) on every level's mistakes (`robot_levels`), and mean weights."""
    onset = {name: frames.onset[:, m] for m, name in enumerate(robot_levels)}
    whole = {name: frames.share[:, m] >= 0.5 for m, name in enumerate(robot_levels)}
    present = [name for name in robot_levels if onset[name].any() and whole[name].any()]
    result: dict = {
        "levels": list(levels),
        "clean_frames": int(frames.clean.sum()),
        "mistake_frames": {name: int(onset[name].sum()) for name in present},
        "whole_frames": {name: int(whole[name].sum()) for name in present},
        "omega": {},
    }
    scores = {"auc": ("A", frames.a, onset), "auc_whole": ("A", frames.a, whole)}
    if len(levels) > 1:
        scores["auc_marginal"] = ("M", frames.marginal, onset)
    for kind, (letter, score, at_fault) in scores.items():
        result[kind] = {}
        for level in present:
            positive = at_fault[level]
            others = np.any([mask for name, mask in at_fault.items() if name != level], axis=0) & ~positive
            result[kind][level] = {
                f"{letter}_{name}": {
                    "rest": separation(-score[:, i], frames.episode, positive, frames.clean),
                    "other": separation(-score[:, i], frames.episode, positive, others),
                }
                for i, name in enumerate(levels)
            }
    for level in present:
        own = frames.omega[:, levels.index(level) if level in levels else 0]
        masks = {"mistakes": onset[level], "whole": whole[level], "rest": frames.clean}
        result["omega"][level] = {name: float(own[mask].mean()) for name, mask in masks.items() if mask.any()}
    return result


def separation(
    score: Float32[np.ndarray, " n"],
    episode: Int[np.ndarray, " n"],
    positive: Bool[np.ndarray, " n"],
    negative: Bool[np.ndarray, " n"],
) -> dict | None:
    """AUC of `score`, `positive` against `negative` frames, as an Estimate's dict; None without both kinds."""
    chosen = positive | negative
    if not positive.any() or not negative.any():
        return None
    truth, (_, rank) = positive[chosen], np.unique(score[chosen], return_inverse=True)
    numbers, member = np.unique(episode[chosen], return_inverse=True)

    def area(times: np.ndarray) -> float:
        """The AUC with the frames of each episode so many times: pairs whose positive is above, ties half."""
        above, below = (np.bincount(rank, times[member] * kind) for kind in (truth, ~truth))
        pairs = above.sum() * below.sum()
        return float((above * (np.cumsum(below) - below / 2)).sum() / pairs) if pairs else float("nan")

    rng, n = np.random.default_rng(0), len(numbers)
    drawn = np.asarray([area(np.bincount(rng.integers(0, n, n), minlength=n)) for _ in range(_RESAMPLES)])
    valid = drawn[np.isfinite(drawn)]
    low, high = np.quantile(valid, [0.025, 0.975]) if len(valid) else (float("nan"),) * 2
    return Estimate(area(np.ones(n)), float(low), float(high), int(truth.sum())).as_dict()


def read_frames(cfg: Experiment) -> Frames | None:
    """The suboptimal set's rows of the advantages table, joined with its label files."""
    data, table = dict(cfg.datasets()).get("suboptimal"), Advantages.find(cfg.advantages_dir)
    if table is None or data is None:
        return None
    labels_dir = Path(data.labels_dir) if data.labels_dir else data.path() / "labels"
    table = table.of("suboptimal")
    episode, frame, a, omega = table.episode, table.frame, table.a, table.omega
    marginal = np.diff(table.q, axis=1, prepend=table.v[:, None])
    level_names, horizon = get_robot(cfg.robot).level_names, cfg.model.action_horizon
    n = len(frame)
    onset = np.zeros((n, len(level_names)), bool)
    share, waiting = np.zeros((n, len(level_names))), np.zeros((n, len(level_names)))
    clean, found, success = np.zeros(n, bool), np.zeros(n, bool), np.zeros(n, bool)
    for number in np.unique(episode):
        path = episode_path(labels_dir, int(number))
        if not path.exists():
            continue
        mine = np.flatnonzero(episode == number)
        labels = load_labels(path)
        at, mistakes, success[mine] = frame[mine], labels.mistakes, labels.success
        by_level, anywhere = chunk_shares(mistakes, level_names, int(at.max()) + 1, horizon)
        found[mine], clean[mine], share[mine] = True, anywhere[at] == 0, by_level[at]
        waiting[mine] = chunk_shares(labels.waiting, level_names, int(at.max()) + 1, horizon)[0][at]
        for mistake in mistakes:
            if mistake.level in level_names:
                near = (at >= mistake.start - horizon // 2) & (at <= mistake.start + horizon // 4) & (at < mistake.end)
                onset[mine[near], level_names.index(mistake.level)] = True
    if not found.any():
        return None
    return Frames(
        *(x[found] for x in (episode, a, marginal, omega, onset, share, clean, success, np.arange(n), waiting))
    )
