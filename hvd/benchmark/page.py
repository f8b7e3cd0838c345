"""The tables of a benchmark as text, Markdown and a page with plots; all from the same rows."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from hvd.benchmark import analysis
from hvd.benchmark.analysis import Difference, Results
from hvd.benchmark.matrix import Matrix, names
from hvd.benchmark.work import Done
from hvd.tables import aligned

Table = tuple[str, list[list[str]]]  # title, header and rows


def tables(matrix: Matrix, done: Sequence[Done]) -> list[Table]:
    """All tables: success, comparisons (of each task too where it has several data sets), scores, cost."""
    results = Results.of(done)
    tasks = [task for task in matrix.tasks if any(d.cell and d.cell["task"] == task for d in done)]
    found: list[Table] = [(_over("Success", matrix, tasks), _success(matrix, results, tasks))]
    found.append(("Differences; units are data sets", _differences(analysis.differences(matrix, results))))
    for task in tasks if len(tasks) > 1 and len(matrix.data_seeds) > 1 else ():
        found.append((f"Differences in {task}", _differences(analysis.differences(matrix, results, task))))
    if any(d.scores for d in done):
        found.append(("Which chunks a score finds wrong; means over data sets", _scores(done)))
    found.append(("Cost", _cost(done)))
    return [(title, rows) for title, rows in found if len(rows) > 1]


def text(matrix: Matrix, done: Sequence[Done]) -> str:
    """The tables for a terminal."""
    parts = [f"{title}\n" + "\n".join(aligned(rows)) for title, rows in tables(matrix, done)]
    return "\n\n".join(parts)


def markdown(matrix: Matrix, done: Sequence[Done], command: str) -> str:
    """The tables as a Markdown page that says how it was made."""
    parts = [f"# {matrix.title}", f"Made by `{command}`. {_about(matrix)}"]
    for title, rows in tables(matrix, done):
        lines = ["| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows]
        parts.append(f"## {title}\n\n" + "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]]))
    return "\n\n".join(parts) + "\n"


def html(matrix: Matrix, done: Sequence[Done]) -> str:
    """report.html: the tables and two figures."""
    from hvd.report.page import Section, page

    drawn, sections = figures(matrix, done), []
    for title, rows in tables(matrix, done):
        section = Section(title)
        if title.startswith("Success"):
            section.figure(drawn["success"], "success of each policy, one point a data set")
        if title.startswith("Differences;"):
            section.figure(drawn["differences"], "differences with their intervals")
        section.table(rows[0], rows[1:])
        sections.append(section)
    return page(matrix.title, _about(matrix), sections)


def figures(matrix: Matrix, done: Sequence[Done]) -> dict[str, Any]:
    """Matplotlib's figures: success of each policy, and the comparisons over all tasks."""
    results = Results.of(done)
    forest = _forest(analysis.differences(matrix, results))
    return {"success": _points(matrix, results), "differences": forest}


def _about(matrix: Matrix) -> str:
    seeds = ", ".join(map(str, matrix.data_seeds))
    last = matrix.first_start + matrix.rollouts - 1
    return (
        f"Config {matrix.config}; tasks {', '.join(matrix.tasks)}; data seeds {seeds}; {matrix.rollouts} rollouts a "
        f"policy and data set from the starts {matrix.first_start} to {last}, the same for all policies."
    )


def _over(title: str, matrix: Matrix, tasks: Sequence[str]) -> str:
    return f"{title} in {tasks[0]}" if len(tasks) == 1 else f"{title} over {', '.join(tasks)}"


def _success(matrix: Matrix, results: Results, tasks: Sequence[str]) -> list[list[str]]:
    several = tasks if len(tasks) > 1 else ()
    of = {task: {row.policy: row for row in analysis.rows(matrix, results, task)} for task in several}
    whole = analysis.rows(matrix, results)
    way = _way(matrix, {row.policy: row.success.mean for row in whole})
    lines = [["policy", "success", "95 % (rollouts)", "n", "data sets", "sd between them", *way.pop("", []), *several]]
    for row in whole:
        s = row.success
        each = [f"{of[task][row.policy].success.mean:.3f}" if row.policy in of[task] else "-" for task in several]
        interval = f"{s.low:.3f} - {s.high:.3f}"
        own = [row.policy, f"{s.mean:.3f}", interval, str(s.n), str(row.units), _number(row.spread)]
        lines.append([*own, *way.get(row.policy, []), *each])
    return lines


def _way(matrix: Matrix, success: dict[str, float]) -> dict[str, list[str]]:
    """A column where the matrix has a gate: each policy's share of the way between the best policies of its two sides.
    Key "": the column's title."""
    gates = [c for c in matrix.comparisons if c.kind == "gate" and success.keys() >= {*names(c.better), *names(c.than)}]
    if not gates:
        return {}
    high, low = (max(success[name] for name in names(side)) for side in (gates[0].better, gates[0].than))
    return {"": ["of the gate's way"]} | {
        name: [f"{(mean - low) / (high - low):.0%}" if high > low else "-"] for name, mean in success.items()
    }


def _differences(found: Sequence[Difference]) -> list[list[str]]:
    head = ["comparison", "kind", "difference", "95 % (data sets)", "p", "p Holm", "+/-", "McNemar p", "asked", "there"]
    lines = [head]
    for d in found:
        e, asked = d.difference, d.comparison.at_least
        interval = "-" if math.isnan(e.low) else f"{e.low:+.3f} .. {e.high:+.3f}"
        corrected = "-" if d.corrected is None else _p(d.corrected)
        name = f"{d.better} - {d.than}"
        line = [name, d.comparison.kind, f"{e.mean:+.3f}", interval, _p(d.p), corrected, f"{d.higher}/{d.lower}"]
        lines.append([*line, _p(d.mcnemar), f">= {asked:g}" if asked else "-", "yes" if d.reached else "no"])
    return lines


def _scores(done: Sequence[Done]) -> list[list[str]]:
    """Mean AUCs of scores.json over the data sets that have them; those within successes by task too."""
    found: dict[str, dict[str, list[float]]] = {}
    known = [(d.cell["task"], d.scores) for d in done if d.scores and d.cell]
    tasks = list(dict.fromkeys(task for task, _ in known))
    for of_task, scores in known:
        for name, columns in scores["scores"].items():
            who = {f"{level}, who": of for level, of in scores["levels"].get(name, {}).items()}
            own = {f"success in {task}": columns["success"] if task == of_task else None for task in tasks}
            for column, value in {**columns, **who, **(own if len(tasks) > 1 else {})}.items():
                if value is not None:
                    found.setdefault(name, {}).setdefault(column, []).append(value["mean"])
    head = list(dict.fromkeys(column for columns in found.values() for column in columns))
    lines = [["score", *head, "data sets"]]
    for name, columns in found.items():
        means = [f"{np.mean(columns[column]):.3f}" if column in columns else "-" for column in head]
        lines.append([name, *means, str(max(map(len, columns.values())))])
    return lines


def _cost(done: Sequence[Done]) -> list[list[str]]:
    """CPU minutes by kind of work."""
    kinds: dict[str, list[Done]] = {}
    for d in done:
        kinds.setdefault("policy and rollouts" if d.cell else d.name.rpartition("-")[2], []).append(d)
    lines = [["work", "items", "CPU-min each", "min each", "CPU-min"]]
    for kind, of in kinds.items():
        cpu, wall = sum(d.cpu_s for d in of) / 60, sum(d.wall_s for d in of) / 60
        lines.append([kind, str(len(of)), f"{cpu / len(of):.2f}", f"{wall / len(of):.2f}", f"{cpu:.1f}"])
    lines.append(["all", str(len(done)), "", "", f"{sum(d.cpu_s for d in done) / 60:.1f}"])
    return lines


def _points(matrix: Matrix, results: Results) -> Any:
    from hvd.report import page

    rows = analysis.rows(matrix, results)
    figure, grid = page.axes(1, height=max(2.0, 0.32 * len(rows) + 0.8))
    ax = grid[0, 0]
    for place, row in enumerate(reversed(rows)):
        rates = [results.rate(row.policy, unit) for unit in results.units([row.policy])]
        ax.plot(rates, [place] * len(rates), "|", color=page.BASELINE, markersize=9)
        error = [[row.success.mean - row.success.low], [row.success.high - row.success.mean]]
        ax.errorbar(row.success.mean, place, xerr=error, fmt="o", color=page.POLICY, capsize=3)
    ax.set_yticks(range(len(rows)), [row.policy for row in reversed(rows)])
    ax.set_xlabel("success; a line is one data set, the point is their mean with Wilson's interval")
    return figure


def _forest(found: Sequence[Difference]) -> Any:
    from hvd.report import page

    figure, grid = page.axes(1, height=max(2.0, 0.32 * len(found) + 0.8))
    ax = grid[0, 0]
    for place, d in enumerate(reversed(found)):
        e = d.difference
        error = None if math.isnan(e.low) else [[e.mean - e.low], [e.high - e.mean]]
        ax.errorbar(e.mean, place, xerr=error, fmt="o", color=page.POLICY if d.reached else page.BASELINE, capsize=3)
    ax.axvline(0, color=page.INK, linewidth=1)
    ax.set_yticks(range(len(found)), [f"{d.better} - {d.than}" for d in reversed(found)])
    ax.set_xlabel("difference of success; interval over data sets")
    return figure


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def _p(value: float) -> str:
    return "-" if math.isnan(value) else "<.0001" if value < 1e-4 else f"{value:.4f}"
