"""Draws the README's figures: `python docs/figures/draw.py [RUN]`, RUN = the folder of a demo run (default runs/demo).

stages.svg needs no run. episode.png is the first failed episode of the mixed set that was held out from training, has a
mistake (which the simulator knows) and reached a sub-task.
"""

import sys
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

import hvd
from hvd import overrides
from hvd.data.labels import Labels, episode_path, load_labels
from hvd.method import extraction
from hvd.method.extraction import Outcomes

HERE = Path(__file__).parent
INK, GREY = "#1f2328", "#57606a"
LEVELS = {"base": "#d9480f", "torso": "#2f9e44", "arms": "#7048e8"}
V = "#1f6feb"
matplotlib.rcParams.update({"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "hvd", "legend.frameon": False})


def stages() -> Figure:
    """Recordings -> value stage -> one weight a frame and level -> policy stage."""
    figure = Figure(figsize=(9.0, 2.9))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, 90), ylim=(0, 29))
    ax.axis("off")

    def box(x: float, y: float, w: float, h: float, title: str, text: str = "", edge: str = GREY) -> None:
        style = "round,pad=0.2,rounding_size=0.8"
        ax.add_patch(FancyBboxPatch((x, y), w, h, boxstyle=style, facecolor="white", edgecolor=edge, linewidth=1.2))
        ax.text(x + w / 2, y + h - 1.5, title, ha="center", va="center", color=INK, weight="bold")
        ax.text(x + w / 2, y + (h - 3) / 2, text, ha="center", va="center", color=GREY, fontsize=8, linespacing=1.4)

    def arrow(start: tuple[float, float], end: tuple[float, float]) -> None:
        ax.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": INK, "linewidth": 1.2})

    box(1, 17, 17, 10, "optimal set", "expert demonstrations")
    box(1, 2, 17, 10, "mixed set", "teleoperation and rollouts,\ngood and bad, with rewards\nat sub-tasks")
    box(25, 2, 19, 25, "1  value stage", "", V)
    ax.text(34.5, 21.6, "V(s)", ha="center", color=V)
    for i, (name, text) in enumerate(
        (("base", "Q(s, base)"), ("torso", "Q(s, base, torso)"), ("arms", "Q(s, base, torso, arms)"))
    ):
        ax.text(34.5, 17.6 - 4 * i, text, ha="center", color=LEVELS[name])
    ax.text(
        34.5, 4.2, "advantage A = Q - V of each\nlevel, expert ratio of chunks", ha="center", color=GREY, fontsize=8
    )
    box(50, 2, 15, 25, "weights", "")
    ax.text(57.5, 21.6, "0 = left out; for each\nframe and level", ha="center", color=GREY, fontsize=8)
    widths = {"base": (6, 2, 8, 7), "torso": (7, 6, 3, 8), "arms": (4, 8, 7, 1)}
    for row, (name, heights) in enumerate(widths.items()):
        for column, height in enumerate(heights):
            ax.bar(53 + 3 * column, height * 0.38, 2, 14.5 - 5 * row, color=LEVELS[name], alpha=0.85)
    box(71, 2, 18, 25, "2  policy stage", "", V)
    ax.text(80, 18.5, "pi0: flow matching on\nimages, prompt and state", ha="center", color=GREY, fontsize=8)
    ax.text(80, 13.4, "E base + E torso + E arms", ha="center", color=INK, fontsize=8)
    for i, colour in enumerate(LEVELS.values()):
        ax.bar(75.4 + 4.6 * i, 0.5, 3.6, 11.6, color=colour, alpha=0.85)
    ax.text(80, 5.0, "each level's error counts\nby that level's weight", ha="center", color=GREY, fontsize=8)
    arrow((18.6, 22), (24.4, 20))
    arrow((18.6, 7), (24.4, 9))
    arrow((44.6, 14.5), (49.4, 14.5))
    arrow((65.6, 14.5), (70.4, 14.5))
    return figure


def episode(run: Path) -> Figure:
    """Weights of the published method and the expert ratio along an episode, under frames of the head camera."""
    data = run / "datasets" / "mixed"
    dataset = hvd.open_dataset(data, cameras=("observation.images.head",))
    cfg = overrides.experiment(["--config-file", str(run / "policy" / "config.yaml")])
    whole = hvd.read_advantages(run)
    kept = extraction.extract(cfg, whole, {"suboptimal": Outcomes.of(dataset)})["suboptimal"].keep
    chosen, labels = _chosen(dataset, data, set(whole.episode[whole.split == "val"]))
    table = whole.where(whole.episode == chosen.index)
    figure = Figure(figsize=(9.0, 4.6), layout="constrained")
    pictures, weight, ratio = figure.subplots(3, 1, sharex=True, height_ratios=(1.15, 2, 2))
    count = 8
    rows = chosen.start + ((np.arange(count) + 0.5) * chosen.length / count).astype(int)
    for i, picture in enumerate(dataset.frames("observation.images.head", rows)):
        extent = ((i + 0.02) * chosen.length / count, (i + 0.98) * chosen.length / count, 0, 1)
        pictures.imshow(picture, extent=extent, aspect="auto")
    pictures.axis("off")
    for i, (name, colour) in enumerate(LEVELS.items()):
        weight.plot(table.frame, table.omega[:, i], color=colour, label=name, linewidth=1.2)
    weight.axhline(1, color=GREY, linewidth=0.6)
    weight.set_ylabel("weight, published")
    weight.legend(ncols=3, loc="upper right", fontsize=8)
    joint, learnt = table.ratio[:, -1], kept[table.row]
    ratio.plot(table.frame, joint, color=GREY, linewidth=1.0)
    ratio.plot(table.frame[learnt], joint[learnt], ".", color=V, markersize=4, label="the policy learns from these")
    ratio.set(ylabel="expert ratio", xlabel="frame (10 a second)", xlim=(0, chosen.length))
    ratio.legend(loc="lower left", fontsize=8)
    told = -np.inf
    for subtask in labels.subtasks:
        ratio.axvline(subtask.end - 1, color=GREY, linewidth=0.8, linestyle=":")
        style = {"transform": ratio.get_xaxis_transform(), "fontsize": 8, "color": GREY, "ha": "right"}
        if subtask.end > told + 0.07 * chosen.length:
            ratio.text(subtask.end - 1, 0.9, f"{subtask.name} ", **style)
            told = subtask.end
    for mistake in labels.mistakes:
        colour = LEVELS[mistake.level]
        for ax in (weight, ratio):
            ax.axvspan(mistake.start, mistake.end, color=colour, alpha=0.13, linewidth=0)
        late = mistake.start > 0.8 * chosen.length
        words = f" {mistake.level}: {mistake.kind.replace('_', ' ')}"
        style = {"transform": weight.get_xaxis_transform(), "fontsize": 8, "color": colour}
        weight.text(mistake.start, 0.06, f"{words} " if late else words, ha="right" if late else "left", **style)
    for ax in (weight, ratio):
        ax.spines[["top", "right"]].set_visible(False)
    return figure


def _chosen(dataset, data: Path, known: set) -> tuple:
    """The first failure with a mistake and at least one sub-task reached, and its labels."""
    for candidate in dataset.all_episodes:
        labels: Labels = load_labels(episode_path(data / "labels", candidate.index))
        if candidate.index in known and labels.mistakes and labels.subtasks and not candidate.success:
            return candidate, labels
    raise SystemExit(f"{data}: no failure with a mistake")


if __name__ == "__main__":
    stages().savefig(HERE / "stages.svg", metadata={"Date": None})
    run = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo")
    if run.is_dir():
        episode(run).savefig(HERE / "episode.png", dpi=110)
