"""Learning curves of the report: what metrics.jsonl of every run says."""

from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath

from hvd.configs import Experiment
from hvd.report.page import BASELINE, INK, LEVELS, POLICY, Section, axes, log_scale
from hvd.train.metrics import read_metrics

Curve = tuple[np.ndarray, np.ndarray]  # steps, values


def section(cfg: Experiment, policies: Sequence[str]) -> Section:
    """Curves of the value run and of every policy run; the throughput of each."""
    out = Section("Training")
    value = read_metrics(cfg.value_dir)
    if value:
        out.heading("Value stage")
        out.figure(_value(value, cfg.level_names()), "losses, values and advantages over the value stage's steps")
    else:
        out.missing.append(f"the value stage's curves: there is no {cfg.value_dir}/metrics.jsonl.")
    runs = {name: found for name in policies if (found := read_metrics(epath.Path(cfg.exp_dir) / name))}
    if runs:
        out.heading("Policy stage")
        out.figure(_policies(runs, cfg), "losses of the policy runs")
    else:
        out.missing.append("the policy stage's curves: no policy run has a metrics.jsonl.")
    rows = [_throughput(name, found) for name, found in {"value": value, **runs}.items() if found.get("train")]
    if rows:
        out.heading("Throughput")
        out.table(["run", "steps", "samples/s", "data wait", "minutes", "restarts", "memory"], rows)
    return out


def _value(metrics: Mapping[str, Mapping[str, Curve]], levels: Sequence[str]):
    figure, grid = axes(3)
    losses, values, spread = grid[0]
    _lines(losses, metrics, {"loss_q": ("Q", POLICY), "loss_v": ("V", "#d9480f")})
    losses.set_title("losses (dashed: held-out episodes)")
    log_scale(losses, "y")
    _lines(values, metrics, {"v_mean": ("V", INK), "td_target": ("target", BASELINE)})
    _lines(values, metrics, {f"q/{name}": (f"Q {name}", LEVELS[i % len(LEVELS)]) for i, name in enumerate(levels)})
    values.set_title("mean values")
    _lines(spread, metrics, {f"advantage_std/{n}": (n, LEVELS[i % len(LEVELS)]) for i, n in enumerate(levels)})
    spread.set_title("spread of the advantages (std)")
    for ax in grid[0]:
        _finish(ax)
    return figure


def _policies(runs: Mapping[str, Mapping[str, Mapping[str, Curve]]], cfg: Experiment):
    figure, grid = axes(3)
    error, by_level, weight = grid[0]
    greys = iter(("#57606a", "#8b949e", "#b1bac4", "#d0d7de"))
    for name, metrics in runs.items():
        colour = POLICY if name == cfg.policy.run_name else next(greys, "#d0d7de")
        _lines(error, metrics, {"flow_error": (name, colour)})
    error.set_title("flow error, unweighted (dashed: held-out)")
    log_scale(error, "y")
    ours = runs.get(cfg.policy.run_name, {})
    for i, name in enumerate(cfg.level_names()):
        _lines(by_level, ours, {f"flow_error/{name}": (name, LEVELS[i % len(LEVELS)])})
        _lines(weight, ours, {f"weight/{name}": (name, LEVELS[i % len(LEVELS)])}, splits=("train",))
    by_level.set_title(f"{cfg.policy.run_name}: flow error by level")
    log_scale(by_level, "y")
    weight.set_title(f"{cfg.policy.run_name}: mean weight by level")
    for ax in grid[0]:
        _finish(ax)
    return figure


def _lines(
    ax, metrics: Mapping[str, Mapping[str, Curve]], which: Mapping[str, tuple[str, str]], splits=("train", "val")
):
    for name, (label, colour) in which.items():
        for split in splits:
            steps, values = metrics.get(split, {}).get(name, (np.zeros(0), np.zeros(0)))
            if len(steps):
                dashed = split == "val"
                ax.plot(
                    steps,
                    values,
                    color=colour,
                    linewidth=1.3,
                    linestyle="--" if dashed else "-",
                    label=None if dashed else label,
                )


def _finish(ax) -> None:
    ax.set_xlabel("step")
    if ax.get_legend_handles_labels()[0]:
        ax.legend()
    else:
        ax.text(0.5, 0.5, "not logged", ha="center", va="center", transform=ax.transAxes, color=BASELINE)


def _throughput(name: str, metrics: Mapping[str, Mapping[str, Curve]]) -> list[str]:
    train = metrics["train"]

    def median(metric: str, form: str) -> str:
        return form.format(np.median(train[metric][1])) if metric in train else "-"

    def last(metric: str, form: str, scale: float = 1.0) -> str:
        return form.format(train[metric][1][-1] * scale) if metric in train else "-"

    steps = max(int(steps[-1]) for steps, _ in train.values())
    return [
        name,
        f"{steps:,}",
        median("time/samples_per_s", "{:,.0f}"),
        _share(train),
        last("time/busy_s", "{:.1f}", 1 / 60),
        last("time/restarts", "{:.0f}"),
        last("memory/rss_mb", "{:,.0f} MB"),
    ]


def _share(train: Mapping[str, Curve]) -> str:
    """Part of a step that the trainer waited for data."""
    names = ("time/data_wait_s", "time/step_s")
    waited, took = (dict(zip(*train.get(name, ((), ())), strict=True)) for name in names)
    shares = [waited[step] / took[step] for step in waited.keys() & took.keys() if took[step] > 0]
    return f"{np.median(shares):.1%}" if shares else "-"
