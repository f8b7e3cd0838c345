"""A tiny experiment with numbers only: two small datasets, their norm stats, models that compile in seconds.

`python -m tests.train.factory STEP SETTINGS` runs one step of it as `hvd` would, in a process of its own: SETTINGS is
the JSON of `Settings`. That is what the tests of signals and of several processes start.
"""

import dataclasses
import importlib
import json
import os
import sys
import time
from pathlib import Path

import numpy as np

from hvd.configs import DataConfig, Experiment, LrSchedule, ModelConfig, NormConfig, PolicyConfig, ValueConfig
from hvd.data.lerobot_writer import Feature, LeRobotWriter
from hvd.models import gemma
from hvd.models.lora import LoraConfig

STATE, ACTIONS = 4, 21

gemma.VARIANTS["dummy_2"] = dataclasses.replace(gemma.VARIANTS["dummy"], depth=2)
gemma.VARIANTS["dummy_2_lora"] = dataclasses.replace(gemma.VARIANTS["dummy_2"], lora=LoraConfig(rank=4, alpha=4.0))
gemma.VARIANTS["dummy_lora"] = dataclasses.replace(gemma.VARIANTS["dummy"], lora=LoraConfig(rank=4, alpha=4.0))


def write_dataset(root: Path, *, episodes: int, length: int, seed: int) -> None:
    """A LeRobot v3.0 dataset without cameras: noise around a slope, reward at the end, every third a failure."""
    rng = np.random.default_rng(seed)
    features = {
        "observation.state": Feature("float32", (STATE,)),
        "action": Feature("float32", (ACTIONS,)),
        "next.reward": Feature("float32", (1,)),
        "terminal": Feature("bool", (1,)),
        "truncated": Feature("bool", (1,)),
    }
    with LeRobotWriter(root, fps=10, robot_type="r1", features=features) as writer:
        for episode in range(episodes):
            success = episode % 3 != 2
            frames = length + int(rng.integers(0, 5))
            slope = np.linspace(0.0, 1.0, frames)[:, None]
            last = np.arange(frames) == frames - 1
            columns = {
                "observation.state": (slope + 0.1 * rng.normal(size=(frames, STATE))).astype(np.float32),
                "action": (slope + 0.3 * rng.normal(size=(frames, ACTIONS))).astype(np.float32),
                "next.reward": np.where(last & success, 1.0, 0.0).astype(np.float32),
                "terminal": last & success,
                "truncated": last & (not success),
            }
            quality = "expert" if success else "teleop"
            writer.add_episode(columns, task="carry the tote", extra={"success": success, "quality": quality})


def model(**changes) -> ModelConfig:
    fields = {
        "action_horizon": 4,
        "max_token_len": 4,
        "vocab_size": 64,
        "tokenizer": "words",
        "dtype": "float32",
        "paligemma_variant": "dummy",
        "action_expert_variant": "dummy",
        "value_expert_variant": "dummy",
        "cameras": (),
        "action_patch": 2,
    }
    return ModelConfig(**fields | changes)


def experiment(folder: Path, **changes) -> Experiment:
    """The experiment below `folder`; `changes` are its fields, "value" and "policy" may be dicts of the stage's."""
    lr = LrSchedule(warmup_steps=5, peak_lr=1e-3, decay_steps=200, decay_lr=1e-4)
    stage = {
        "num_train_steps": 12,
        "batch_size": 8,
        "lr_schedule": lr,
        "log_interval": 4,
        "val_interval": 6,
        "val_batches": 2,
        "save_interval": 5,
        "keep_period": 0,
        "trace_samples": True,
    }
    value, policy = changes.pop("value", {}), changes.pop("policy", {})
    if isinstance(value, dict):
        value = ValueConfig(**stage | {"data": "both"} | value)
    if isinstance(policy, dict):
        policy = PolicyConfig(**stage | {"ema_decay": 0.9} | policy)
    sets = {
        f"{role}_data": DataConfig(repo_id=f"test/{role}", root=str(folder / "data" / role))
        for role in ("optimal", "suboptimal")
    }
    fields = {
        "runs_dir": str(folder / "runs"),
        "assets_dir": str(folder / "assets"),
        "num_workers": 1,
        "model": model(),
        "norm": NormConfig(std_floor=0.01),
    }
    return Experiment(name="tiny", value=value, policy=policy, **fields | sets | changes)


def make_data(folder: Path) -> None:
    """Both datasets and their norm stats."""
    from hvd.data import normalize

    write_dataset(folder / "data" / "optimal", episodes=4, length=20, seed=1)
    write_dataset(folder / "data" / "suboptimal", episodes=6, length=20, seed=2)
    normalize.main(experiment(folder))


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a subprocess needs to know."""

    folder: str
    changes: dict
    slow_s: float = 0.0  # sleep before each step, so that signals find the run in all of its phases
    overwrite: bool = False
    split_from: int = 0  # bytes from which fsdp splits an array; 0 = as in production, which is more than any has here


def main(argv: list[str]) -> int:
    step, settings = argv[0], Settings(**json.loads(argv[1]))
    cfg = experiment(Path(settings.folder), **settings.changes)
    return run_step(step, cfg, settings)


def run_step(step: str, cfg: Experiment, settings: Settings) -> int:
    """One step with the exit codes of the command line."""
    from hvd.cli import STEPS, stopped_by_signals, told
    from hvd.errors import EXIT_COMPLETE, Failed, Stopped, UserError
    from hvd.train import parameter_rules, stage_data

    if settings.split_from:
        (dims, _, place), *rest = parameter_rules.PARAMETER_RULES
        parameter_rules.PARAMETER_RULES = ((dims, settings.split_from, place), *rest)
    if settings.slow_s:
        slow(stage_data, settings.slow_s)
    try:
        with stopped_by_signals():
            main = importlib.import_module(STEPS[step].module).main
            main(cfg, **({"overwrite": True} if settings.overwrite else {}))
    except (UserError, Failed, Stopped) as error:
        end = told(error)
        assert end is not None
        print(end.line, file=sys.stderr)
        return end.code
    return EXIT_COMPLETE


def slow(stage_data, seconds: float) -> None:
    """Let the consumer of a loader wait `seconds` for each batch."""

    class Slow(stage_data.Loader):
        def __next__(self):
            time.sleep(seconds)
            return super().__next__()

    stage_data.Loader = Slow


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.exit(main(sys.argv[1:]))
