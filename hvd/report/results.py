"""Results in the report and in the launcher's last lines: success of rollouts, action errors, credit assignment.

Reads `<exp_dir>/evaluation/<run>/results.json` and `<exp_dir>/evaluation/credit.json` (hvd.evaluate writes them).
Imports neither jax nor matplotlib before a figure is drawn.
"""

from collections.abc import Sequence
from typing import Annotated, Any

from etils import epath
from msgspec import Meta, Struct

from hvd import documents
from hvd.configs import Experiment
from hvd.documents import Count
from hvd.errors import UserError
from hvd.evaluate.offline import rank_text
from hvd.evaluate.results import NOTHING, Number, observes_text, read_results
from hvd.tables import aligned

Results = dict[str, Any]


class _Complete(Struct):
    digest: str = ""


class _Area(Struct):
    mean: float
    low: float  # NaN where no resample has both kinds of frames
    high: float


class _Pair(Struct):
    rest: _Area | None
    other: _Area | None


_Table = dict[str, Annotated[dict[str, _Pair], Meta(min_length=1)]]
_KINDS = ("auc", "auc_whole", "auc_marginal")


class _Credit(Struct):
    clean_frames: Count
    mistake_frames: dict[str, Count]
    whole_frames: dict[str, Count]
    omega: dict[str, dict[str, Number]]
    auc: _Table = {}
    auc_whole: _Table = {}
    auc_marginal: _Table = {}


def read(cfg: Experiment) -> list[Results]:
    """The results of every evaluated run, those that succeed most first, doing nothing last."""
    root = epath.Path(cfg.exp_dir) / "evaluation"
    found = [read_results(path) for path in sorted(root.glob("*/results.json"))] if root.exists() else []

    def order(result: Results) -> tuple:
        name = result["run_name"]
        return name == NOTHING, -result.get("success", {}).get("mean", 0), name != cfg.policy.run_name, name

    return sorted(found, key=order)


def stale(cfg: Experiment, results: Results) -> bool:
    """True when the run was trained on since it was evaluated."""
    path = epath.Path(cfg.exp_dir) / results["run_name"] / "complete.json"
    if not results.get("policy_digest") or not path.exists():
        return False
    return documents.read(path, _Complete).digest != results["policy_digest"]


def name_of(results: Results) -> str:
    words = results["run_name"].replace("_", " ")
    return f"{words} (weights: {results['weighting']})" if results.get("weighting") not in ("", "none", None) else words


def success_rows(found: Sequence[Results]) -> list[list[str]]:
    """Header and one row a policy: success and stage score of rollouts with their 95% intervals."""
    stages = f"stage 0-{len(found[0]['subtasks'])}"
    rows = [["policy", "observes", "success", "95% interval", stages, "95% interval"]]
    for results in found:
        success, stage = results["success"], results["stage"]
        rows.append(
            [
                name_of(results),
                observes_text(results["observes"]),
                f"{success['count']}/{success['n']} = {success['mean']:.2f}",
                f"{success['low']:.2f} - {success['high']:.2f}",
                f"{stage['mean']:.2f}",
                f"{stage['low']:.2f} - {stage['high']:.2f}",
            ]
        )
    return rows


def error_rows(found: Sequence[Results]) -> list[list[str]]:
    """Header and one row per policy, dataset and guess: mean absolute action errors on held-out episodes."""
    rows = [["policy", "held-out data", "actions", "error / std", "error (raw units)"]]
    for results in found:
        for role, dataset in results["datasets"].items():
            for guess, error in dataset["action_error"].items():
                rows.append([name_of(results), role, guess, f"{error['normalised']:.3f}", f"{error['raw']:.4f}"])
    return rows


def rank_lines(found: Sequence[Results]) -> list[str]:
    """How V rises along held-out episodes, one line a dataset (V does not depend on the policy)."""
    lines = {}
    for results in found:
        for role, dataset in results["datasets"].items():
            lines.setdefault(role, f"V along held-out {role} episodes: {rank_text(dataset['value_rank'])}")
    return list(lines.values())


def read_credit(cfg: Experiment) -> dict[str, Any] | None:
    """The AUC tables of credit assignment, or None."""
    path = epath.Path(cfg.exp_dir) / "evaluation" / "credit.json"
    if not path.exists():
        return None
    found = documents.read_with_nan(path, dict[str, Any])
    documents.convert(found, _Credit, str(path))
    for kind in _KINDS:
        if len({tuple(row) for row in found.get(kind, {}).values()}) > 1:
            raise UserError(f"{path}: the rows of {kind} have other columns each: run `hvd evaluate` again")
    return found


def summary(cfg: Experiment) -> str:
    """The results as text, for the launcher's last lines."""
    found = read(cfg)
    if not found:
        return f"no results in {cfg.exp_dir}/evaluation"
    lines = []
    rollouts = [results for results in found if results["kind"] == "rollouts"]
    if rollouts:
        first = rollouts[0]
        lines.append(f"task {first['task']}: {first['num_rollouts']} rollouts from unseen starts each")
        lines += aligned(success_rows(rollouts))
    offline = [results for results in found if results["kind"] == "offline"]
    if offline:
        lines += aligned(error_rows(offline)) + rank_lines(offline)
    return "\n".join(lines)
