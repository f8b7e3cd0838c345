"""Evaluation in the report: success bars and table, rollout videos, credit assignment, action errors."""

import os
from collections.abc import Sequence

import numpy as np
from etils import epath

from hvd import documents
from hvd.configs import Experiment
from hvd.evaluate.credit import KINDS
from hvd.evaluate.results import NOTHING
from hvd.report.page import BASELINE, GREY, INK, POLICY, Section, axes
from hvd.report.results import Results, error_rows, name_of, rank_lines, read_credit, stale, success_rows
from hvd.stages import baselines


def success(cfg: Experiment, found: Sequence[Results]) -> Section:
    """Success of every policy, as bars with intervals and as a table."""
    out = Section("Success")
    rollouts = [results for results in found if results["kind"] == "rollouts"]
    names = [results["run_name"] for results in rollouts]
    if not cfg.sim.task and not rollouts:
        return out
    expected = (cfg.policy.run_name, *(baselines(cfg) if cfg.evaluate.baselines else ()), NOTHING)
    for name in expected if cfg.sim.task else ():
        if name not in names:
            out.missing.append(f"rollouts of {name.replace('_', ' ')}: not evaluated (hvd evaluate).")
    for results in rollouts:
        if stale(cfg, results):
            out.missing.append(f"rollouts of {name_of(results)} as it is now: it was trained on after its evaluation.")
    if not rollouts:
        return out
    first = rollouts[0]
    out.text(
        f"Task {first['task']}{': ' * bool(first['prompt'])}{first['prompt']}. {first['num_rollouts']} rollouts each, "
        f"from starts that no data was recorded from, at most {first['horizon']} steps; {first['execute_steps']} of a "
        f"chunk's {first['action_horizon']} actions are executed before the next chunk. Intervals are 95 %: "
        f"Wilson's for success, bootstrap for the stage score (sub-tasks completed, 0 to {len(first['subtasks'])})."
    )
    if len({tuple(results["seeds"]) for results in rollouts}) > 1:
        out.missing.append("a fair comparison: the policies were evaluated on different starts.")
    out.figure(_bars(cfg, rollouts), "success and stage score of every policy with 95% intervals")
    header, *rows = success_rows(rollouts)
    ours = [i for i, results in enumerate(rollouts) if results["run_name"] == cfg.policy.run_name]
    out.table(header, rows, ours)
    stages = list(first["subtasks"])
    out.heading("How far they get")
    reached = [[name_of(r), *(f"{r['subtasks'].get(stage, float('nan')):.0%}" for stage in stages)] for r in rollouts]
    out.table(["policy", *stages], reached, ours)
    return out


def _bars(cfg: Experiment, rollouts: Sequence[Results]):
    figure, grid = axes(2, height=0.7 + 0.42 * len(rollouts), sharey=True)
    labels = [results["run_name"].replace("_", " ") for results in rollouts]
    colours = [
        POLICY if r["run_name"] == cfg.policy.run_name else GREY if r["run_name"] == NOTHING else BASELINE
        for r in rollouts
    ]
    stages = len(rollouts[0]["subtasks"])
    for ax, kind, limit in zip(grid[0], ("success", "stage"), (1.0, float(stages)), strict=True):
        for row, (results, colour) in enumerate(zip(rollouts, colours, strict=True)):
            value = results[kind]
            ax.barh(row, value["mean"], color=colour, height=0.62)
            ax.plot([value["low"], value["high"]], [row, row], color=INK, linewidth=1.2)
            for end in (value["low"], value["high"]):
                ax.plot([end, end], [row - 0.12, row + 0.12], color=INK, linewidth=1.2)
            ax.text(limit * 1.02, row, f"{value['mean']:.2f}", va="center", fontsize=9, color=INK)
        ax.set_xlim(0, limit)
        ax.grid(axis="y", visible=False)
    grid[0][0].set_title("success rate")
    grid[0][1].set_title(f"stage score (0 to {stages})")
    grid[0][0].set_yticks(range(len(labels)), labels)
    grid[0][0].invert_yaxis()
    return figure


def videos(cfg: Experiment, found: Sequence[Results]) -> Section:
    """The filmed rollouts of the experiment's policy, and one of each baseline."""
    out = Section("Rollouts")
    root = epath.Path(cfg.exp_dir) / "evaluation"
    shown: list[tuple[bytes, str]] = []
    filmed = 0
    for results in found:
        if results["kind"] != "rollouts" or results["run_name"] == NOTHING:
            continue
        limit = None if results["run_name"] == cfg.policy.run_name else 1
        for episode in [episode for episode in results["episodes"] if episode["video"]][:limit]:
            filmed += 1
            path = root / results["run_name"] / episode["video"]
            if not path.exists() or os.path.islink(path):
                out.missing.append(f"a video: {path} is not there.")
                continue
            how = "success" if episode["success"] else "dropped" if episode.get("dropped") else "no success"
            reached = f"{episode['stage']} of {len(results['subtasks'])} stages"
            caption = f"{results['run_name']}, seed {episode['seed']}: {how}, {reached}, {episode['steps']} steps"
            shown.append((documents.read_bytes(path), caption))
    if shown:
        out.text("Left the room, right what the robot's three cameras see (the policy need not see them).", "quiet")
        out.videos(shown)
    elif cfg.sim.task and not filmed:
        out.missing.append("rollout videos: none was filmed (evaluate.videos).")
    return out


def credit(cfg: Experiment) -> Section:
    """How well each level's advantage finds the frames of each level's mistakes (simulated data only)."""
    out = Section("Credit assignment")
    result = read_credit(cfg)
    if result is None:
        if cfg.sim.task:
            out.missing.append("credit assignment: there is no evaluation/credit.json (hvd evaluate writes it).")
        return out
    out.text(
        "The simulator knows which level was at fault and when; training never sees it. Each number is the probability "
        "that the advantage is lower at such a mistake than at frames without any mistake (left) or at mistakes of "
        "other levels (right): 0.5 is chance, 1 is perfect. A level also knows the actions of the levels above it, so "
        "it sees their mistakes too; what it adds by itself is the marginal advantage."
    )
    for kind, title in KINDS.items():
        if result.get(kind):
            out.heading(title[0].upper() + title[1:])
            out.figure(_auc(result[kind]), f"area under the curve, {title}")
            out.table(*_auc_table(result, kind))
    out.text(
        f"{result['clean_frames']:,} frames have no mistake in their chunk. In brackets: 95 % bootstrap intervals over "
        "episodes. Weight: the mean weight of the level at fault, there and at frames without mistakes.",
        "quiet",
    )
    return out


def _auc_table(result: dict, kind: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows, two a level at fault."""
    whole = kind == "auc_whole"
    counts = result["whole_frames" if whole else "mistake_frames"]
    rows = []
    for level, by_advantage in result[kind].items():
        weight = result["omega"].get(level, {})
        weights = [f"{weight[w]:.2f}" if w in weight else "-" for w in ("whole" if whole else "mistakes", "rest")]
        for against, words in (("rest", "no mistake"), ("other", "other levels' mistakes")):
            first = against == "rest"
            cells = [_estimate(pair[against]) for pair in by_advantage.values()]
            count = f"{counts.get(level, 0):,}" if first else ""
            rows.append([level if first else "", words, count, *cells, *(weights if first else ("", ""))])
    names = [name.replace("_", " ", 1) for name in next(iter(result[kind].values()))]
    return ["mistakes at", "against frames with", "frames", *names, "weight", "elsewhere"], rows


def _estimate(value: dict | None) -> str:
    return "-" if value is None else f"{value['mean']:.2f} [{value['low']:.2f}, {value['high']:.2f}]"


def _auc(table: dict):
    """The AUCs of one table ({level at fault: {advantage: {"rest", "other"}}}) as two coloured squares."""
    faults, columns = list(table), list(next(iter(table.values())))
    figure, grid = axes(2, width=8.6, height=1.0 + 0.45 * len(faults), sharey=True)
    for ax, kind, title in zip(
        grid[0], ("rest", "other"), ("against frames without mistakes", "against mistakes at other levels"), strict=True
    ):
        pairs = [[table[fault][column][kind] for column in columns] for fault in faults]
        values = np.array([[np.nan if pair is None else pair["mean"] for pair in row] for row in pairs])
        ax.imshow(values, cmap="RdBu", vmin=0, vmax=1, aspect="auto")
        for (i, j), value in np.ndenumerate(values):
            dark = abs(value - 0.5) > 0.33
            text = "-" if np.isnan(value) else f"{value:.2f}"
            ax.text(j, i, text, ha="center", va="center", fontsize=10, color="white" if dark else INK)
        ax.set_xticks(range(len(columns)), [column.replace("_", " ", 1) for column in columns])
        ax.set_yticks(range(len(faults)), [f"mistakes at {fault}" for fault in faults])
        ax.grid(visible=False)
        ax.set_title(title)
    return figure


def offline(cfg: Experiment, found: Sequence[Results]) -> Section:
    """Without a simulator: action errors on held-out episodes, and whether V rises along them."""
    out = Section("Held-out episodes")
    results = [result for result in found if result["kind"] == "offline"]
    if cfg.sim.task:
        return out
    if not results:
        out.missing.append("action errors on held-out episodes: not evaluated (hvd evaluate).")
        return out
    header, *rows = error_rows(results)
    out.text(
        "Mean absolute error of the actions of whole chunks, divided by each dimension's standard deviation over the "
        "training episodes, and in raw units; beside it two guesses that know nothing about the task."
    )
    out.figure(_errors(results), "action errors of the policy and of two guesses")
    out.table(header, rows, [i for i, row in enumerate(rows) if row[2] == "policy"])
    for line in rank_lines(results):
        out.text(line)
    for result in results:
        if stale(cfg, result):
            out.missing.append(f"errors of {name_of(result)} as it is now: it was trained on after its evaluation.")
    return out


def _errors(results: Sequence[Results]):
    bars = [
        (f"{name_of(result)}, {role}" if guess == "policy" else f"{guess}, {role}", error["normalised"], guess)
        for result in results
        for role, dataset in result["datasets"].items()
        for guess, error in dataset["action_error"].items()
    ]
    figure, grid = axes(1, width=8.6, height=0.6 + 0.34 * len(bars))
    ax = grid[0][0]
    ax.barh(range(len(bars)), [bar[1] for bar in bars], color=[POLICY if b[2] == "policy" else GREY for b in bars])
    for row, bar in enumerate(bars):
        ax.text(bar[1], row, f" {bar[1]:.3f}", va="center", fontsize=9, color=INK)
    ax.set_yticks(range(len(bars)), [bar[0] for bar in bars])
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.set_title("action error / standard deviation")
    return figure
