"""Advantages in the report: their distribution and that of the weights per level, and the values along an episode."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from hvd.configs import Experiment
from hvd.data.dataset import Dataset, Episode
from hvd.data.labels import Labels, episode_path, load_labels
from hvd.errors import UserError
from hvd.method.table import Advantages
from hvd.report.page import BASELINE, INK, LEVELS, POLICY, Section, axes, beside, log_scale

FRAMES = 9  # of an episode, above its values
_PIXELS = 128


def distributions(cfg: Experiment, table: Advantages | None) -> Section:
    """Histograms of A_i and omega_i per level."""
    out = Section("Advantages and weights")
    if table is None:
        out.missing.append(f"advantages and weights: there is no table in {cfg.advantages_dir} (hvd advantages).")
        return out
    out.text(
        "A level's weight multiplies only the error of that level's action dimensions. "
        f"{len(table.v):,} frames of the set(s): {', '.join(sorted(set(table.dataset)))}."
    )
    out.figure(_histograms(table), "distribution of advantages and of weights per level")
    rows = []
    for i, name in enumerate(table.levels):
        a, w = table.a[:, i], table.omega[:, i]
        low, mid, high = np.quantile(w, [0.05, 0.5, 0.95])
        effective = w.sum() ** 2 / max(np.square(w).sum(), 1e-30) / len(w)  # Kish's effective share of the samples
        rows.append(
            [name, f"{a.mean():+.3f}", f"{a.std():.3f}", f"{(a > 0).mean():.0%}"]
            + [f"{low:.2f}", f"{mid:.2f}", f"{high:.2f}", f"{effective:.0%}"]
        )
    header = ["level", "A mean", "A std", "A > 0", "weight 5%", "median", "95%", "effective samples"]
    out.table(header, rows)
    return out


def _histograms(table: Advantages):
    figure, grid = axes(2)
    advantage, weight = grid[0]
    span = np.quantile(np.abs(table.a), 0.995) or 1.0
    bins = np.linspace(-span, span, 61)
    positive = np.maximum(table.omega, 1e-6)
    log_bins = np.geomspace(np.quantile(positive, 0.001) * 0.9, positive.max() * 1.1, 61)
    for i, name in enumerate(table.levels):
        colour = LEVELS[i % len(LEVELS)]
        clipped = np.clip(table.a[:, i], -span, span)
        advantage.hist(clipped, bins, histtype="step", color=colour, linewidth=1.4, label=name, density=True)
        weight.hist(positive[:, i], log_bins, histtype="step", color=colour, linewidth=1.4, label=name)
    advantage.axvline(0, color=INK, linewidth=0.8)
    advantage.set_title("advantage A = Q - V by level")
    advantage.set_xlabel("A")
    weight.set_title("weight by level (log scale)")
    weight.set_xlabel("weight")
    log_scale(weight, "x")
    advantage.legend()
    return figure


def along_episodes(cfg: Experiment, table: Advantages | None, episodes: int = 2) -> Section:
    """V and the advantages along one successful and one failed episode, with frames of the head camera above."""
    out = Section("Values along an episode")
    if table is None:
        out.missing.append("values along an episode: there is no table of advantages.")
        return out
    role = "suboptimal" if "suboptimal" in table.dataset else str(table.dataset[0])
    data = dict(cfg.datasets()).get(role)
    if data is None:
        out.missing.append(f"values along an episode: the table is of {role}, which is no set of this experiment.")
        return out
    camera = next(iter(data.keys.images), None)
    try:
        dataset = Dataset.open(data, cameras=())
    except UserError as error:
        out.missing.append(f"values along an episode: {error}.")
        return out
    try:
        dataset = Dataset.open(data, cameras=(camera,)) if camera else dataset
    except UserError as error:  # a policy without cameras needs none
        out.text(f"There are no frames: {error}.", "quiet")
        camera = None
    labels_dir = Path(data.labels_dir) if data.labels_dir else dataset.root / "labels"
    for episode in choose(dataset, table, role, labels_dir, episodes):
        rows = np.flatnonzero((table.dataset == role) & (table.episode == episode.index))
        rows = rows[np.argsort(table.frame[rows])]
        held_out = bool((table.split[rows] == "val").all())
        labels = _labels(labels_dir, episode)
        how = "success" if episode.success else "failure"
        out.heading(
            f"Episode {episode.index} of the {role} set: {how}" + (", held out from training" if held_out else "")
        )
        frames = _frames(dataset, camera, episode) if camera else []
        out.figure(_episode_figure(table, rows, labels, frames), f"values along episode {episode.index}")
    if table is not None and not (labels_dir / "episode_000000.labels.json").exists():
        out.text("The dataset has no label files, so sub-tasks and mistakes are not marked.", "quiet")
    return out


def choose(dataset: Dataset, table: Advantages, role: str, labels_dir: Path, count: int) -> list[Episode]:
    """A success first, then a failure; held-out ones and, of the failures, those with a known mistake are preferred."""
    here = table.dataset == role
    known = set(table.episode[here].tolist())
    held_out = set(table.episode[here & (table.split == "val")].tolist())

    def rank(episode: Episode) -> tuple:
        labels = _labels(labels_dir, episode)
        return (not (labels and labels.mistakes), episode.index not in held_out, episode.index)

    present = [episode for episode in dataset.all_episodes if episode.index in known]
    successes = sorted((e for e in present if e.success), key=lambda e: (e.index not in held_out, e.index))
    failures = sorted((e for e in present if not e.success), key=rank)
    chosen = successes[:1] + failures[:1]
    return (chosen + successes[1:])[:count]


def _labels(labels_dir: Path, episode: Episode) -> Labels | None:
    path = episode_path(labels_dir, episode.index)
    return load_labels(path, episode.length) if path.exists() else None


def _frames(dataset: Dataset, camera: str, episode: Episode) -> list[np.ndarray]:
    """Frames from the middles of equal parts of the episode, small."""
    at = ((np.arange(FRAMES) + 0.5) * episode.length / FRAMES).astype(int)
    pictures = [Image.fromarray(frame) for frame in dataset.frames(camera, episode.start + at)]
    size = (_PIXELS, round(_PIXELS * pictures[0].height / pictures[0].width))
    return [np.asarray(picture.resize(size, Image.Resampling.LANCZOS)) for picture in pictures]


def _episode_figure(table: Advantages, rows: np.ndarray, labels: Labels | None, frames: Sequence[np.ndarray]):
    """Under the frames, each above the part of the episode that it is from: V and Q, and the advantages."""
    shape = frames[0].shape[0] / frames[0].shape[1] if frames else 0.0
    heights = [8.6 / FRAMES * shape, 2.1, 2.1] if frames else [2.1, 2.1]
    figure, grid = axes(1, height=(sum(heights) + 0.7) / len(heights), rows=len(heights), height_ratios=heights)
    value, advantage = grid[-2:, 0]
    frame = table.frame[rows]
    end = max(int(frame[-1]) + 1, 1)
    for i, picture in enumerate(frames):
        gap = 0.008 * end
        extent = (i * end / FRAMES + gap / 2, (i + 1) * end / FRAMES - gap / 2, 0, 1)
        grid[0, 0].imshow(picture, extent=extent, aspect="auto", interpolation="none")
    if frames:
        grid[0, 0].axis("off")
    value.plot(frame, table.v[rows], color=POLICY, linewidth=1.6, label="V")
    for i, name in enumerate(table.levels):
        colour = LEVELS[i % len(LEVELS)]
        value.plot(frame, table.q[rows, i], color=colour, linewidth=0.8, alpha=0.8, label=f"Q {name}")
        advantage.plot(frame, table.a[rows, i], color=colour, linewidth=1.3, label=f"A {name}")
    advantage.axhline(0, color=INK, linewidth=0.8)
    value.set_ylabel("value")
    advantage.set_ylabel("advantage")
    advantage.set_xlabel("frame")
    if labels is not None:
        _mark(value, advantage, labels, table.levels, end)
    for ax in grid[:, 0]:
        ax.set_xlim(0, end)
    for ax in (value, advantage):
        beside(ax)
    return figure


def _mark(value, advantage, labels: Labels, levels: Sequence[str], end: int) -> None:
    """Sub-tasks end at a dotted line; a mistake is a band in its level's colour."""
    for subtask in labels.subtasks:
        at = subtask.end - 1
        value.axvline(at, color=BASELINE, linewidth=0.8, linestyle=":")
        _write(value, at, 0.98, subtask.name, end, color="#57606a", va="top")
    for mistake in labels.mistakes:
        colour = LEVELS[list(levels).index(mistake.level) % len(LEVELS)] if mistake.level in levels else BASELINE
        for ax in (value, advantage):
            ax.axvspan(mistake.start, mistake.end, color=colour, alpha=0.13, linewidth=0)
        words = f"{mistake.level}: {mistake.kind.replace('_', ' ')}"
        _write(advantage, mistake.start, 0.03, words, end, color=colour, va="bottom")


def _write(ax, at: float, height: float, words: str, end: int, **style: str) -> None:
    """Small words beside the frame `at`, on the side where the axes go on."""
    right = at < 0.85 * end
    text = f" {words}" if right else f"{words} "
    ax.text(
        at, height, text, transform=ax.get_xaxis_transform(), fontsize=7.5, ha="left" if right else "right", **style
    )
