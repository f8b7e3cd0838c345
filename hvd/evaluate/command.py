"""`hvd evaluate`: how good is the policy? Rollouts in the simulator where the experiment has one, else action errors on
held-out episodes. Writes `<exp_dir>/evaluation/<policy run>/results.json` (last, atomically) and prints a table.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from etils import epath
from tqdm import tqdm

from hvd.configs import Experiment
from hvd.evaluate import credit as evaluate_credit
from hvd.evaluate import offline as evaluate_offline
from hvd.evaluate import scores as evaluate_scores
from hvd.evaluate.policies import Loader, nothing, trained
from hvd.evaluate.results import (
    NOTHING,
    cameras_of,
    folder,
    observes,
    observes_text,
    print_rows,
    read_results,
    write_json,
)
from hvd.evaluate.statistics import bootstrap, wilson
from hvd.method import extraction
from hvd.method.value_run import needed
from hvd.train.complete import check_complete

GROUP = 10  # rollouts that share a policy call; fixed, so that results do not depend on the number of workers


def main(cfg: Experiment, load: Loader | None = None) -> None:
    """Evaluate the policy run of `cfg` (cfg.policy_dir), which must be complete. `load` stands in for it in tests."""
    if not cfg.sim.task:
        evaluate_offline.main(cfg, load)
        return
    run = {"digest": "", "step": 0}
    if load is None:
        found = check_complete(cfg.policy_dir, stage="policy", cfg=cfg)
        run = {"digest": found.digest, "step": found.step}
    results = roll_out(cfg, cfg.policy.run_name, load or trained, run)
    print_table([results, _control(cfg)] if cfg.evaluate.checks else [results])
    credit_checks(cfg)


def credit_checks(cfg: Experiment) -> None:
    """Whether the advantages and scores find the mistakes, where evaluate.checks asks for it and labels know them."""
    if cfg.evaluate.checks and needed(cfg):
        evaluate_credit.main(cfg)
        evaluate_scores.main(cfg)


def roll_out(
    cfg: Experiment, run_name: str, load: Loader, run: dict[str, Any], videos: int | None = None, out: str = ""
) -> dict:
    """Run cfg.evaluate.num_rollouts rollouts and write results.json (into `out`); returns its content."""
    from hvd.sim.render import available_backend
    from hvd.sim.rollouts import RolloutSpec
    from hvd.sim.workers import run_jobs

    settings, started = cfg.evaluate, time.monotonic()
    control = run_name == NOTHING
    target = epath.Path(out) if out else folder(cfg, run_name)
    seeds = [settings.seed + i for i in range(settings.num_rollouts)]
    filmed = seeds[: settings.videos if videos is None else videos]
    cameras = {} if control else cameras_of(cfg)
    spec = RolloutSpec(
        task=cfg.sim.task,
        horizon=cfg.sim.horizon,
        execute_steps=settings.execute_steps,
        delay=0 if control else settings.delay,
        chunking="replace" if control else settings.chunking,
        state_keys=("observation.state",) if control else cfg.optimal_data.keys.state,
        cameras=cameras,
        image_size=cfg.sim.image_size,
        backend=available_backend() if cameras or filmed else "rays",
        videos={seed: target / "videos" / f"rollout_{seed}.mp4" for seed in filmed},
    )
    groups = [seeds[i : i + GROUP] for i in range(0, len(seeds), GROUP)]
    _loaded.clear()
    done: dict[int, list] = {}
    with tqdm(total=len(seeds), desc=f"rollouts {run_name}", unit="rollout", mininterval=0.5) as bar:
        for i, rollouts in run_jobs(_group, [(cfg, spec, group, load) for group in groups], settings.workers):
            done[i] = rollouts
            bar.update(len(rollouts))
    results = _results(cfg, run_name, run, [rollout for i in range(len(groups)) for rollout in done[i]], filmed)
    results["wall_s"] = round(time.monotonic() - started, 1)
    write_json(target / "results.json", results)
    return results


def _results(
    cfg: Experiment, run_name: str, run: dict[str, Any], rollouts: Sequence[Any], filmed: Sequence[int]
) -> dict:
    """The content of results.json."""
    from hvd.sim.tasks import get_task

    settings, task, control = cfg.evaluate, get_task(cfg.sim.task), run_name == NOTHING
    return {
        **summary(cfg, cfg.sim.task, task.prompt, task.subtasks, [(r.success, r.stage) for r in rollouts]),
        "run_name": run_name,
        "weighting": "" if control else extraction.label(cfg),
        "observes": None if control else observes(cfg),
        "horizon": cfg.sim.horizon,
        "delay": settings.delay,
        "chunking": settings.chunking,
        "policy_digest": run["digest"],
        "policy_step": run["step"],
        "episodes": [
            {**asdict(r), "video": f"videos/rollout_{r.seed}.mp4" if r.seed in filmed else ""} for r in rollouts
        ],
    }


def summary(cfg: Experiment, task: str, prompt: str, subtasks: Sequence[str], ends: Sequence[tuple[bool, int]]) -> dict:
    """What results.json says of rollouts that ended with (success, sub-tasks done)."""
    stages, won = np.array([stage for _, stage in ends], np.float64), sum(success for success, _ in ends)
    return {
        "kind": "rollouts",
        "config": cfg.name,
        "task": task,
        "prompt": prompt,
        "seeds": [cfg.evaluate.seed, cfg.evaluate.num_rollouts],
        "num_rollouts": len(ends),
        "execute_steps": cfg.evaluate.execute_steps,
        "action_horizon": cfg.model.action_horizon,
        "success": {**wilson(won, len(ends)).as_dict(), "count": won},
        "stage": bootstrap(stages).as_dict(),
        "subtasks": {name: float(np.mean(stages > i)) for i, name in enumerate(subtasks)},
    }


def print_table(results: Sequence[dict]) -> None:
    """Success and stage score of rollouts, one row a policy."""
    stages = f"stage 0-{len(results[0]['subtasks'])}"
    rows = [("task", "policy", "observes", "success", "95% interval", stages, "95% interval")]
    for r in results:
        success, stage = r["success"], r["stage"]
        name = r["run_name"] + (f" (weights: {r['weighting']})" if r["weighting"] else "")
        rows.append(
            (
                r["task"],
                name.replace("_", " "),
                observes_text(r["observes"]),
                f"{success['count']}/{success['n']} = {success['mean']:.2f}",
                f"{success['low']:.2f} - {success['high']:.2f}",
                f"{stage['mean']:.2f}",
                f"{stage['low']:.2f} - {stage['high']:.2f}",
            )
        )
    print_rows(rows)


def _control(cfg: Experiment) -> dict:
    """Results of doing nothing on the same seeds; they are computed once an experiment."""
    path = folder(cfg, NOTHING) / "results.json"
    wanted = {
        "task": cfg.sim.task,
        "seeds": [cfg.evaluate.seed, cfg.evaluate.num_rollouts],
        "horizon": cfg.sim.horizon,
        "execute_steps": cfg.evaluate.execute_steps,
    }
    if path.exists():
        known = read_results(path)
        if all(known.get(name) == value for name, value in wanted.items()):
            return known
    return roll_out(cfg, NOTHING, nothing, {"digest": "", "step": 0}, videos=0)


_loaded: dict[tuple[str, str], Any] = {}  # of this process: a policy is loaded and compiled once


def _group(cfg: Experiment, spec, seeds: Sequence[int], load: Loader) -> list:
    from hvd.sim.rollouts import roll_out_group

    key = (cfg.policy_dir, f"{load.__module__}.{load.__qualname__}")
    if key not in _loaded:
        _loaded[key] = load(cfg)
    return roll_out_group(spec, seeds, _loaded[key])
