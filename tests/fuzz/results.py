"""Doors of the report: results of evaluations, and metrics."""

import dataclasses
import json
import random
from pathlib import Path

from tests.fuzz.door import Door, experiment, now_and_then, spoil


def results(good: Path) -> Door:
    from hvd.report import evaluation
    from hvd.report import results as report

    estimate = {"mean": 0.5, "low": 0.25, "high": 0.75, "n": 4}
    episode = {"seed": 3, "success": True, "stage": 2, "steps": 70, "dropped": False, "video": "videos/rollout_3.mp4"}
    rollouts = {"kind": "rollouts", "run_name": "policy", "task": "tote", "prompt": "carry", "weighting": "none"}
    rollouts |= {"observes": {"proprioception": True, "object_pose": False, "images": ["a"]}, "seeds": [3, 4]}
    rollouts |= {"num_rollouts": 4, "horizon": 90, "execute_steps": 4, "action_horizon": 4, "policy_digest": "d"}
    rollouts |= {"success": estimate | {"count": 2}, "stage": estimate, "subtasks": {"a": 0.5, "b": 0.25}}
    rollouts |= {"episodes": [episode, episode | {"video": "", "seed": 4}]}
    error = {"policy": {"normalised": 0.5, "raw": 0.1}, "mean": {"normalised": 1.0, "raw": 0.2}}
    offline = {"kind": "offline", "run_name": "policy", "weighting": "none", "policy_digest": "d"}
    offline |= {"datasets": {"optimal": {"action_error": error, "value_rank": estimate}}}
    pair = {"rest": estimate, "other": None}
    credit = {"clean_frames": 9, "mistake_frames": {"arms": 3}, "whole_frames": {"arms": 5}}
    credit |= {"omega": {"arms": {"mistakes": 0.5, "rest": 1.0}}, "auc": {"arms": {"A_base": pair, "A_arms": pair}}}
    folder = good / "e/evaluation/policy"
    (folder / "videos").mkdir(parents=True)
    (folder / "videos/rollout_3.mp4").write_bytes(b"film")
    (good / "offline.json").write_text(json.dumps(offline))
    (folder / "results.json").write_text(json.dumps(rollouts))
    (folder.parent / "credit.json").write_text(json.dumps(credit))
    (good / "e/policy").mkdir()
    (good / "e/policy/complete.json").write_text(json.dumps({"digest": "d"}))

    draw = now_and_then(20)

    def damage(folder: Path, rng: random.Random) -> str:
        own = folder / "e/evaluation/policy/results.json"
        if rng.random() < 0.4:
            (folder / "offline.json").rename(own)
        which = rng.choice(("policy/results.json",) * 3 + ("credit.json",))
        return spoil(f"e/evaluation/{which}")(folder, rng)

    def read(folder: Path) -> str:
        cfg = experiment(folder)
        if (folder / "offline.json").exists():
            cfg = dataclasses.replace(cfg, sim=dataclasses.replace(cfg.sim, task="tote"))
        found = report.read(cfg)
        report.summary(cfg)
        evaluation.videos(cfg, found)
        if draw():
            for section in (evaluation.success, evaluation.offline):
                section(cfg, found)
            evaluation.credit(cfg)
        return ""

    return Door(damage, read)


def metrics(good: Path) -> Door:
    from hvd.report import curves
    from hvd.train import metrics as reader

    rows = [
        {"step": step, "split": split, "flow_error": 1 / step, "weight/arms": 1.0, "time/data_wait_s": 0.1}
        | {"time/step_s": 0.2, "time/samples_per_s": 40.0, "time/busy_s": 3.0, "loss_q": 0.1}
        for step in range(1, 9)
        for split in ("train", "val")
    ]
    for run in ("value", "policy"):
        (good / "e" / run).mkdir(parents=True)
        (good / "e" / run / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")

    def damage(folder: Path, rng: random.Random) -> str:
        return spoil(f"e/{rng.choice(('value', 'policy'))}/metrics.jsonl", lines=True)(folder, rng)

    draw = now_and_then(60)

    def read(folder: Path) -> str:
        if draw():
            section = curves.section(experiment(folder), ["policy"])
            return "" if section.body or section.missing else "nothing was said"
        for run in ("value", "policy"):
            lines = (folder / "e" / run / "metrics.jsonl").read_bytes().count(b"\n")
            for split, found in reader.read_metrics(folder / "e" / run).items():
                for name, (steps, values) in found.items():
                    if len(steps) != len(values) or len(steps) > lines + 1:
                        return f"{split} {name}: {len(values)} values at {len(steps)} steps"
        return ""

    return Door(damage, read)
