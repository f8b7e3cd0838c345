"""The statistics of a benchmark: success of each policy, and paired differences with the data seed as the unit.

A unit is one task with one data seed: its data, and everything trained on them, are drawn anew. Rollouts of one unit
share their training, so the interval of a difference comes from the units' differences (paired t); McNemar's test over
the rollouts from common starts stands beside it, and says less: it knows nothing of other data.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hvd.benchmark.matrix import Comparison, Matrix, names
from hvd.benchmark.work import Done
from hvd.evaluate.statistics import Estimate, wilson

Unit = tuple[str, int]  # task, data seed
Rollouts = Mapping[tuple[int, int], bool]  # (policy seed, start) -> success


@dataclass(frozen=True)
class Results:
    """Every rollout that is done: policy -> unit -> rollouts."""

    success: Mapping[str, Mapping[Unit, Rollouts]]

    @classmethod
    def of(cls, done: Sequence[Done]) -> "Results":
        found: dict[str, dict[Unit, dict[tuple[int, int], bool]]] = {}
        for one in done:
            if one.cell is not None:
                unit = (one.cell["task"], one.cell["data_seed"])
                rollouts = found.setdefault(one.cell["policy"], {}).setdefault(unit, {})
                rollouts |= {(one.cell["policy_seed"], e.seed): e.success for e in one.episodes}
        return cls(found)

    def rate(self, policy: str, unit: Unit) -> float:
        return float(np.mean(list(self.success[policy][unit].values())))

    def units(self, policies: Sequence[str], task: str = "") -> list[Unit]:
        """The units that all of `policies` have (of one task)."""
        common = set.intersection(*(set(self.success.get(policy, {})) for policy in policies))
        return sorted(unit for unit in common if not task or unit[0] == task)


@dataclass(frozen=True)
class Row:
    """Success of one policy, over all tasks or one.

    Attributes:
        success: over all rollouts, Wilson's interval (which knows nothing of other data).
        spread: standard deviation between units; NaN for one.
    """

    policy: str
    success: Estimate
    units: int
    spread: float


@dataclass(frozen=True)
class Difference:
    """Success of `better` minus success of `than`.

    Attributes:
        difference: mean over units; its 95 % interval by t, NaN for a single unit.
        p: of the paired t-test; NaN for a single unit.
        corrected: p after Holm's correction, of primary comparisons.
        higher, lower: units in which `better` is above or below.
        mcnemar: p over the rollouts from common starts (exact).
    """

    comparison: Comparison
    better: str
    than: str
    task: str
    difference: Estimate
    p: float
    corrected: float | None
    higher: int
    lower: int
    mcnemar: float

    @property
    def reached(self) -> bool:
        """Above 0 and at least what was named beforehand; a primary one also with p < .05 after its correction."""
        enough = self.difference.mean > 0 and self.difference.mean >= self.comparison.at_least
        return enough and (self.comparison.kind != "primary" or (self.corrected is not None and self.corrected < 0.05))


def rows(matrix: Matrix, results: Results, task: str = "") -> list[Row]:
    """One row a policy that has results, the best first."""
    found = []
    for policy in matrix.policies:
        units = results.units([policy], task)
        if units:
            outcomes = [won for unit in units for won in results.success[policy][unit].values()]
            rates = [results.rate(policy, unit) for unit in units]
            spread = float(np.std(rates, ddof=1)) if len(units) > 1 else float("nan")
            found.append(Row(policy, wilson(sum(outcomes), len(outcomes)), len(units), spread))
    return sorted(found, key=lambda row: -row.success.mean)


def differences(matrix: Matrix, results: Results, task: str = "") -> list[Difference]:
    """The matrix's comparisons as far as they have results, over all tasks or for one; Holm's over the primary ones."""
    found = [made for c in matrix.comparisons if (made := _difference(c, results, task)) is not None]
    primary = sorted((d.p, i) for i, d in enumerate(found) if d.comparison.kind == "primary" and np.isfinite(d.p))
    highest = 0.0
    for rank, (p, i) in enumerate(primary):
        highest = max(highest, min(1.0, p * (len(primary) - rank)))
        found[i] = dataclasses.replace(found[i], corrected=highest)
    return found


def _difference(comparison: Comparison, results: Results, task: str) -> Difference | None:
    from scipy.stats import binomtest, t

    candidates = [*names(comparison.better), *names(comparison.than)]
    units = results.units(candidates, task)
    if not units:
        return None
    better, than = (
        max(names(side), key=lambda policy: np.mean([results.rate(policy, unit) for unit in units]))
        for side in (comparison.better, comparison.than)
    )
    each = np.round([results.rate(better, unit) - results.rate(than, unit) for unit in units], 12)  # .3 - .1 is .6 - .4
    mean, half, p = float(each.mean()), float("nan"), float("nan")
    if len(each) > 1:
        error = each.std(ddof=1) / np.sqrt(len(each))
        half = float(t.ppf(0.975, len(each) - 1) * error)
        p = float(2 * t.sf(abs(mean) / error, len(each) - 1)) if error > 0 else float(mean == 0)
    ours, theirs = (results.success[policy] for policy in (better, than))
    pairs = [(ours[u][key], theirs[u][key]) for u in units for key in ours[u].keys() & theirs[u].keys()]
    only_ours, only_theirs = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
    discordant = only_ours + only_theirs
    mcnemar = float(binomtest(only_ours, discordant).pvalue) if discordant else 1.0
    estimate = Estimate(mean, mean - half, mean + half, len(each))
    higher, lower = int((each > 0).sum()), int((each < 0).sum())
    return Difference(comparison, better, than, task, estimate, p, None, higher, lower, mcnemar)


def table(done: Sequence[Done]) -> Any:
    """Every rollout as a pyarrow table: task, data_seed, policy, policy_seed, start, success, stage, steps."""
    import pyarrow as pa

    cells = sorted((d for d in done if d.cell), key=lambda d: tuple(map(str, (d.cell or {}).values())))
    lines = [
        {**(d.cell or {}), "start": e.seed, "success": e.success, "stage": e.stage, "steps": e.steps}
        for d in cells
        for e in sorted(d.episodes, key=lambda e: e.seed)
    ]
    whole, text = pa.int64(), pa.string()
    kinds = {"task": text, "data_seed": whole, "policy": text, "policy_seed": whole, "start": whole}
    kinds |= {"success": pa.bool_(), "stage": whole, "steps": whole}
    return pa.Table.from_pylist(lines, pa.schema(list(kinds.items())))
