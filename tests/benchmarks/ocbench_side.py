"""OCBench's own agents (Park and Levine 2026), trained on recordings of docs/examples/ur5e_ocbench.py and played.

    pip install ocbench==1.0.2 h5py jax flax optax distrax ml_collections      # in a Python of its own
    MUJOCO_GL=disable python ocbench_side.py --impls IMPLS --agent ifql raw/expert raw/mixed

IMPLS is the folder `impls` of its sdist. Agents, sampling, normalised actions, action chunks and the evaluation are its
own (agents/, utils/, envs/env_utils.py), as its main.py puts them together. Ours are the recordings with the adapter's
observations and steps of the hand, the size of the networks, and the seed that an episode starts from, as in `hvd
rollouts`: one line of JSON an episode, then one for all of them with Wilson's interval.

Rewards and masks are OCBench's: 1 in the step that succeeds, which is an episode's last one, else 0; the mask is 0
where the environment ended the episode (success or failure), 1 where its time was up.
"""

import argparse
import ast
import importlib
import json
import math
import os
import random
import sys
import time
import types
from pathlib import Path
from typing import Any

import gymnasium  # pyright: ignore[reportMissingImports]
import h5py
import numpy as np

ADAPTER = Path(__file__).parents[2] / "docs/examples/ur5e_ocbench.py"
ACTIONS = ("action/arm", "action/gripper")
SEEN = ("obs/hand_state/arm/pose", "obs/gripper_state/gripper/gripper_position", "obs/sim/environment_state")
LAST = "obs/sim/last_observation"
SIMULTANEOUS = 25  # episodes that are played side by side, each in an environment of its own


def recorded(folders: list[Path]) -> tuple[str, dict[str, np.ndarray]]:
    """The environment's name, and what ocbench.load_dataset would give of these recordings, in their order: T steps of
    N episodes, of which the observations have T + N."""
    names, parts = set(), []
    for path in [path for folder in folders for path in sorted(folder.glob("*.hdf5"))]:
        labels = json.loads(path.with_suffix(".labels.json").read_text())
        names.add(labels["task"])
        with h5py.File(path) as file:
            actions, seen = (np.concatenate([file[name] for name in names], axis=1) for names in (ACTIONS, SEEN))
            seen = np.concatenate([seen, np.asarray(file[LAST])[None]])
        last = np.arange(1, len(actions) + 1) == len(actions)
        parts.append(
            {
                "observations": seen,
                "actions": actions,
                "rewards": (last & labels["success"]).astype(np.float32),
                "masks": 1 - (last & labels["terminal"]).astype(np.float32),
                "terminals": last,
            }
        )
    if len(names) != 1:
        sys.exit(f"{', '.join(map(str, folders))}: recordings of one environment are needed, found {sorted(names)}")
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return names.pop(), whole | {"observation_interval": np.asarray(1, np.int32)}


def trained(options: argparse.Namespace, name: str, raw: dict[str, np.ndarray]) -> tuple[Any, Any, Any]:
    """The agent after its training, its config, and the normaliser of its actions: main.py without its logs."""
    from agents import agents  # pyright: ignore[reportMissingImports]
    from envs.env_utils import ActionNormalizer, postprocess_datasets  # pyright: ignore[reportMissingImports]
    from utils.training_utils import setup_agent_config, setup_datasets  # pyright: ignore[reportMissingImports]

    config = importlib.import_module(f"agents.{options.agent}").get_config()
    config.batch_size = options.batch
    for field in {"actor_hidden_dims", "value_hidden_dims"} & set(config.keys()):
        config[field] = (options.hidden,) * options.layers
    for field, value in (pair.split("=", 1) for pair in options.set):
        config[field] = ast.literal_eval(value)
    common: dict[str, Any] = {"action_chunk_length": options.chunk, "online_steps": 0, "frame_stack": None}
    flags = types.SimpleNamespace(success_only=options.success_only, p_aug=None, **common)
    normaliser = ActionNormalizer.fit(raw["actions"], 1.0, 5.0)
    data, _ = postprocess_datasets(raw, None, normaliser)
    n_step = setup_agent_config(config=config, env_name=name, train_dataset=data, **common)
    random.seed(options.seed)
    np.random.seed(options.seed)  # noqa: NPY002  # its batches are drawn from numpy's own stream
    data, _, _ = setup_datasets(data, None, flags, config, n_step)
    kind = agents[options.agent]
    keys = getattr(kind, "sample_kwargs", {})
    example = data.sample(1, **keys)
    agent, info = kind.create(options.seed, example["observations"], example["actions"], config), {}
    for step in range(1, options.steps + 1):
        agent, info = agent.update(data.sample(config["batch_size"], **keys))
        if step % max(1, options.steps // 10) == 0:
            losses = {field: round(float(value), 4) for field, value in info.items() if field.endswith("loss")}
            print(f"step {step}, {time.process_time():.2f} s of CPU: {losses}", file=sys.stderr, flush=True)
    return agent, config, normaliser


class Hand(gymnasium.Env):
    """The adapter's environment. Its evaluation resets without a seed: this one starts the episode of `seed`."""

    seed: int

    def __init__(self, name: str, observations: int, actions: int):
        sys.path.insert(0, str(ADAPTER.parent))
        self.adapter = importlib.import_module(ADAPTER.stem)
        self.hand = self.adapter.Hand(name)
        self.spec = self.hand.env.spec  # its evaluation asks for the limit of steps
        self.action_space = gymnasium.spaces.Box(-1, 1, (actions,), np.float32)
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (observations,), np.float32)

    def _seen(self, info: dict[str, Any]) -> np.ndarray:
        return np.concatenate(list(self.adapter.observed(info).values()))

    def reset(self, **_: Any) -> Any:
        _, info = self.hand.reset(self.seed)
        return self._seen(info), info

    def step(self, action: np.ndarray) -> Any:
        _, *ended, info = self.hand.step(action)
        return (self._seen(info), *ended, dict(info))


def played(
    options: argparse.Namespace, name: str, width: int, agent: Any, config: Any, normaliser: Any
) -> list[dict[str, Any]]:
    """How the episodes ended; each chunk is executed whole before the next one."""
    from envs.env_utils import wrap_env  # pyright: ignore[reportMissingImports]
    from utils.evaluation import evaluate  # pyright: ignore[reportMissingImports]

    seeds = range(options.first_seed, options.first_seed + options.episodes)
    made = [Hand(name, width, len(normaliser.q_low)) for _ in seeds[:SIMULTANEOUS]]
    ended = []
    for start in range(0, len(seeds), SIMULTANEOUS):
        part = seeds[start : start + SIMULTANEOUS]
        for env, seed in zip(made, part, strict=False):
            env.seed = seed
        envs = [wrap_env(env, action_normalizer=normaliser) for env in made[: len(part)]]
        _, episodes, _ = evaluate(agent, envs, config, len(part), action_chunk_length=options.chunk)
        for seed, episode in zip(part, episodes, strict=True):
            success = bool(episode["info"][-1]["success"])
            ended.append({"seed": seed, "success": success, "steps": len(episode["action"])})
            print(json.dumps(ended[-1]), flush=True)
    return ended


def wilson(won: int, n: int) -> list[float]:
    """Wilson's score interval, 95 %."""
    z, share = 1.959964, won / n
    middle, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return [round((middle + sign * half) / (1 + z * z / n), 4) for sign in (-1, 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+", help="recordings with their label files")
    parser.add_argument("--impls", type=Path, required=True, help="the folder impls of OCBench's sdist")
    parser.add_argument("--agent", choices=("bc", "fbc", "ifql", "binary_advc"), required=True)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=256, help="width of all networks")
    parser.add_argument("--layers", type=int, default=4, help="of a network, an even number")
    parser.add_argument("--chunk", type=int, default=3, help="actions of a chunk; 3 is its own number for lite tasks")
    parser.add_argument("--success-only", action="store_true", help="train on the episodes that succeeded alone")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="of the agent's config")
    parser.add_argument("--seed", type=int, default=0, help="of the training")
    parser.add_argument("--first-seed", type=int, default=1_000_000, help="of the first episode that is played")
    parser.add_argument("--episodes", type=int, default=100)
    options = parser.parse_args()
    sys.path.insert(0, str(options.impls.resolve()))
    os.environ.setdefault("TQDM_DISABLE", "1")
    name, raw = recorded(options.folders)
    learnt = trained(options, name, raw)
    train_cpu = time.process_time()
    ended = played(options, name, raw["observations"].shape[1], *learnt)
    won, n = sum(episode["success"] for episode in ended), len(ended)
    found = {"agent": options.agent, "task": name, "episodes": n, "success": won / n, "wilson": wilson(won, n)}
    cpu = {"train_cpu_s": round(train_cpu, 1), "play_cpu_s": round(time.process_time() - train_cpu, 1)}
    print(json.dumps(found | cpu))


if __name__ == "__main__":
    main()
