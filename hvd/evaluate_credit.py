"""Does the hierarchy blame the level at fault? For simulated data, whose sidecars know each mistake's level and frames.

A_i(t) judges the actions t .. t+K-1 of levels <= i. A frame belongs to a level's mistakes when at least half of its
chunk's real actions lie in one; to "the rest" when none of them lies in any mistake; frames between are left out. Two
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
from hvd.data.labels import Mistake, episode_path, load_labels
from hvd.evaluate_results import print_rows, write_json
from hvd.evaluate_statistics import Estimate, auc
from hvd.robots import get_robot

_RESAMPLES = 200


@dataclass(frozen=True)
class Frames:
    """Frames of the table that have labels: advantages and weights of each level, and what was wrong.

    Attributes:
        marginal: Q_i - Q_{i-1}, with V for Q_{-1}.
        share: [n, robot levels] share of the chunk's real actions that lie in a mistake of that level.
        any_share: [n] share that lies in any mistake.
    """

    episode: Int[np.ndarray, " n"]
    a: Float32[np.ndarray, "n l"]
    marginal: Float32[np.ndarray, "n l"]
    omega: Float32[np.ndarray, "n l"]
    share: Float[np.ndarray, "n m"]
    any_share: Float[np.ndarray, " n"]


def main(cfg: Experiment) -> dict | None:
    """Print the tables and write `<exp_dir>/evaluation/credit.json`; None where there is no table or no label file."""
    frames = read_frames(cfg)
    if frames is None:
        return None
    result = tables(frames, get_robot(cfg.robot).level_names, cfg.level_names())
    if not result["mistake_frames"]:
        return None
    write_json(epath.Path(cfg.exp_dir) / "evaluation" / "credit.json", result)
    print("\ncredit: AUC of low advantage against frames without mistakes | against mistakes at other levels")
    print_rows(rows(result, "auc", "A"))
    if "auc_marginal" in result:
        print("\nthe same of the marginal advantages M_i = Q_i - Q_i-1")
        print_rows(rows(result, "auc_marginal", "M"))
    return result


def rows(result: dict, kind: str, letter: str) -> list[tuple[str, ...]]:
    """An AUC table ("auc" or "auc_marginal") as text: one row a level at fault, one column an advantage."""
    names = [f"{letter}_{name}" for name in result["levels"]]
    lines: list[tuple[str, ...]] = [("mistakes at", "frames", *names, "weight on them", "elsewhere")]
    for level, count in result["mistake_frames"].items():
        cells = []
        for name in names:
            pair = result[kind][level][name]
            cells.append(" | ".join("-" if e is None else f"{e['mean']:.2f}" for e in (pair["rest"], pair["other"])))
        weight = result["omega"][level]
        lines.append((level, str(count), *cells, f"{weight['mistakes']:.2f}", f"{weight['rest']:.2f}"))
    return lines


def tables(frames: Frames, robot_levels: tuple[str, ...], levels: tuple[str, ...]) -> dict:
    """The AUCs of every advantage (`levels`) on every level's mistakes (`robot_levels`), and mean weights."""
    clean = frames.any_share == 0
    result: dict = {"levels": list(levels), "clean_frames": int(clean.sum())}
    result |= {"mistake_frames": {}, "auc": {}, "omega": {}}
    scores = {"auc": ("A", frames.a)}
    if len(levels) > 1:
        scores["auc_marginal"] = ("M", frames.marginal)
        result["auc_marginal"] = {}
    at_fault = {name: frames.share[:, m] >= 0.5 for m, name in enumerate(robot_levels)}
    for level, positive in at_fault.items():
        if not positive.any():
            continue
        others = np.any([mask for name, mask in at_fault.items() if name != level], axis=0) & ~positive
        result["mistake_frames"][level] = int(positive.sum())
        for kind, (letter, score) in scores.items():
            result[kind][level] = {
                f"{letter}_{name}": {
                    "rest": _separation(-score[:, i], frames.episode, positive, clean),
                    "other": _separation(-score[:, i], frames.episode, positive, others),
                }
                for i, name in enumerate(levels)
            }
        own = levels.index(level) if level in levels else 0
        result["omega"][level] = {
            "mistakes": float(frames.omega[positive, own].mean()),
            "rest": float(frames.omega[clean, own].mean()),
        }
    return result


def _separation(
    score: Float32[np.ndarray, " n"],
    episode: Int[np.ndarray, " n"],
    positive: Bool[np.ndarray, " n"],
    negative: Bool[np.ndarray, " n"],
) -> dict | None:
    """AUC of `score`, `positive` against `negative` frames, as an Estimate's dict; None without both kinds."""
    chosen = positive | negative
    if not positive.any() or not negative.any():
        return None
    score, truth, episode = score[chosen].astype(np.float64), positive[chosen], episode[chosen]
    members = [np.flatnonzero(episode == e) for e in np.unique(episode)]
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(_RESAMPLES):
        at = np.concatenate([members[k] for k in rng.integers(0, len(members), len(members))])
        drawn.append(auc(score[at], truth[at]))
    valid = np.asarray(drawn)[np.isfinite(drawn)]
    low, high = np.quantile(valid, [0.025, 0.975]) if len(valid) else (float("nan"),) * 2
    return Estimate(auc(score, truth), float(low), float(high), int(truth.sum())).as_dict()


def read_frames(cfg: Experiment) -> Frames | None:
    """The suboptimal set's rows of the advantages table, joined with its label files."""
    from hvd.train import advantage_table

    if advantage_table.read_meta(cfg.advantages_dir) is None:
        return None
    data = dict(cfg.datasets()).get("suboptimal")
    if data is None:
        return None
    labels_dir = Path(data.labels_dir) if data.labels_dir else data.path() / "labels"
    table = advantage_table.read(cfg.advantages_dir)
    here = table["dataset"].to_numpy(zero_copy_only=False) == "suboptimal"
    episode, frame = table["episode"].to_numpy()[here], table["frame"].to_numpy()[here]
    count = sum(name.startswith("A_") for name in table.column_names)
    a, q, omega = (
        np.stack([table[f"{letter}_{i}"].to_numpy()[here] for i in range(count)], 1) for letter in ("A", "Q", "omega")
    )
    marginal = np.diff(q, axis=1, prepend=table["V"].to_numpy()[here][:, None])
    level_names = get_robot(cfg.robot).level_names
    share, any_share = np.zeros((len(frame), len(level_names))), np.zeros(len(frame))
    found = np.zeros(len(frame), bool)
    for number in np.unique(episode):
        path = episode_path(labels_dir, int(number))
        if not path.exists():
            continue
        mine = np.flatnonzero(episode == number)
        length = int(frame[mine].max()) + 1
        found[mine] = True
        by_level, anywhere = chunk_shares(load_labels(path).mistakes, level_names, length, cfg.model.action_horizon)
        share[mine], any_share[mine] = by_level[frame[mine]], anywhere[frame[mine]]
    if not found.any():
        return None
    return Frames(episode[found], a[found], marginal[found], omega[found], share[found], any_share[found])


def chunk_shares(
    mistakes: tuple[Mistake, ...], levels: tuple[str, ...], length: int, horizon: int
) -> tuple[Float[np.ndarray, "length m"], Float[np.ndarray, " length"]]:
    """For the chunk of `horizon` actions that begins at each frame of an episode (cut at its end): the share of its
    actions that lie in a mistake of each level, and in any."""
    wrong = np.zeros((length, len(levels) + 1))
    for mistake in mistakes:
        span = slice(mistake.start, mistake.end)
        wrong[span, -1] = 1
        if mistake.level in levels:
            wrong[span, levels.index(mistake.level)] = 1
    summed = np.concatenate([np.zeros((1, wrong.shape[1])), np.cumsum(wrong, 0)])
    starts = np.arange(length)
    ends = np.minimum(starts + horizon, length)
    shares = (summed[ends] - summed[starts]) / (ends - starts)[:, None]
    return shares[:, :-1], shares[:, -1]
