"""Meta-World (Yu et al. 2019; a Sawyer with a gripper) as recordings for hvd, and as a place to try a policy out.

In a Python of its own:

    python3 -m venv mw && mw/bin/pip install metaworld==3.1.1 packaging h5py etils jaxtyping msgpack msgspec websockets
    export MUJOCO_GL=disable PYTHONPATH=PATH/OF/hvd
    mw/bin/python docs/examples/sawyer_metaworld.py record raw/expert --episodes 10 --seed 0
    mw/bin/python docs/examples/sawyer_metaworld.py record raw/mixed --episodes 200 --seed 1000 --mistakes 0.6

then with hvd, whose robot `sawyer` has the levels arm and gripper, as in ur5e_ocbench.py.

--environment names any of Meta-World's 50 tasks, of which its own operators do each. With --mistakes P a mistake begins
with that chance every half second, at one level, while the other goes on: the hand is pushed aside, or the gripper
opens where it should close and closes where it should open. The frames in which that level's action is another one
than without the mistake are labelled. An episode ends when the task is done, or after 300 steps.
"""

import argparse
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ENVIRONMENT = "shelf-place-v3"
RATE = 80  # control steps a second
LIMIT = 300  # steps of an episode
EVERY = 40  # steps from one chance of a mistake to the next
LASTS = (10, 31)  # steps of a mistake
ASIDE = (0.5, 1.0)  # of the largest step: how hard the hand is pushed
LEVELS = {"arm": slice(0, 3), "gripper": slice(3, 4)}


def make(name: str) -> Any:
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE  # pyright: ignore[reportMissingImports]

    if f"{name}-goal-observable" not in ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE:
        raise SystemExit(f"{name}: no task of Meta-World's; one is {ENVIRONMENT}")
    env = ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE[f"{name}-goal-observable"]()
    env._freeze_rand_vec, env.seeded_rand_vec = False, True  # things lie elsewhere in each episode, by its seed
    return env


class Operator:
    """Meta-World's own operator and its mistakes. `wrong`: for each step the level that erred, "" where none did."""

    def __init__(self, clean: Callable[[np.ndarray], np.ndarray], mistakes: float):
        self.clean, self.mistakes = clean, mistakes

    def begin(self, seed: int) -> None:
        self.rng, self.wrong, self.left = np.random.default_rng(seed), [], 0
        self.level, self.push = "", np.zeros(3)

    def act(self, seen: np.ndarray) -> np.ndarray:
        """The action [4] for what is seen [39]."""
        with warnings.catch_warnings():  # Meta-World's operators ask for steps that are too long, and say so
            warnings.simplefilter("ignore")
            right = np.clip(self.clean(seen), -1, 1)
        if len(self.wrong) % EVERY == 0 and self.rng.random() < self.mistakes:
            self.level, self.left = self.rng.choice(list(LEVELS)), self.rng.integers(*LASTS)
            self.push = self.rng.normal(size=3)
            self.push *= self.rng.uniform(*ASIDE) / np.linalg.norm(self.push)
        done = right.copy()
        if self.left > 0 and self.level == "arm":
            done[:3] = np.clip(right[:3] + self.push, -1, 1)
        elif self.left > 0:
            done[3] = -1 if right[3] > 0 else 1
        self.left -= 1
        self.wrong.append(self.level if np.abs(done - right).max() > 0.01 else "")
        return done

    def labels(self) -> list[dict[str, Any]]:
        """The mistakes as label files have them."""
        found: list[dict[str, Any]] = []
        for frame, level in enumerate(self.wrong):
            if level and found and found[-1]["end"] == frame and found[-1]["level"] == level:
                found[-1]["end"] = frame + 1
            elif level:
                kind = "push" if level == "arm" else "turn"
                found.append({"level": level, "start": frame, "end": frame + 1, "kind": kind})
        return found


def observed(seen: np.ndarray) -> dict[str, np.ndarray]:
    """The hand's position and the gripper's opening [4]; where the goal and two things are from the hand, in units of
    0.1 m, and how the things are turned (zeros where there is no second thing)."""
    hand = seen[:3]
    rest = [10 * (seen[-3:] - hand)]
    for start in (4, 11):
        there, turned = seen[start : start + 3], seen[start + 3 : start + 7]
        rest += [10 * (there - hand) if there.any() else there, turned]
    return {
        "observation.state": seen[:4].astype(np.float32),
        "observation.environment_state": np.concatenate(rest).astype(np.float32),
    }


def episode(env: Any, seed: int, act: Callable[[np.ndarray], np.ndarray]) -> dict[str, Any]:
    """One episode: what was observed before each action [T,...], the actions [T,4], and whether it succeeded."""
    env.seed(seed)
    seen, _ = env.reset()
    steps: list[dict[str, np.ndarray]] = []
    success = False
    while not success and len(steps) < LIMIT:
        action = np.clip(act(seen), -1, 1).astype(np.float32)
        steps.append({**observed(seen), "action": action})
        seen, _, _, _, info = env.step(action)
        success = info["success"] > 0
    return {"success": bool(success), **{name: np.stack([step[name] for step in steps]) for name in steps[0]}}


def record(folder: Path, name: str, episodes: int, seed: int, mistakes: float) -> None:
    """Recordings with label files, for `hvd convert`."""
    import h5py
    from metaworld.policies import ENV_POLICY_MAP  # pyright: ignore[reportMissingImports]

    env = make(name)
    operator = Operator(ENV_POLICY_MAP[name]().get_action, mistakes)
    folder.mkdir(parents=True, exist_ok=True)
    won = 0
    for number in range(episodes):
        operator.begin(seed + number)
        done = episode(env, seed + number, operator.act)
        with h5py.File(folder / f"episode_{number:05d}.hdf5", "w") as file:
            file.attrs["recording_freq"] = RATE
            for level, dims in LEVELS.items():
                file[f"action/{level}"] = done["action"][:, dims]
            file["obs/hand_state/arm/pose"] = done["observation.state"][:, :3]
            file["obs/gripper_state/gripper/gripper_position"] = done["observation.state"][:, 3:]
            file["obs/sim/environment_state"] = done["observation.environment_state"]
        labels = {"task": name, "success": done["success"], "mistakes": operator.labels(), "terminal": done["success"]}
        (folder / f"episode_{number:05d}.labels.json").write_text(json.dumps(labels))
        won += done["success"]
    print(f"{folder}: {episodes} episodes of {name}, {won} succeeded")


def play(name: str) -> None:
    """The episodes that `hvd rollouts` asks for."""
    from hvd.client import connect

    env = make(name)
    first, count, execute = (int(os.environ[f"HVD_{what}"]) for what in ("FIRST_SEED", "EPISODES", "EXECUTE"))
    with connect(os.environ["HVD_URL"]) as server:
        for seed in range(first, first + count):
            chunk: list[np.ndarray] = []

            def act(seen: np.ndarray, chunk: list[np.ndarray] = chunk) -> np.ndarray:
                if not chunk:
                    chunk.extend(server.ask({**observed(seen), "prompt": name})["actions"][:execute])
                return chunk.pop(0)

            done = episode(env, seed, act)
            print(json.dumps({"seed": seed, "success": done["success"], "steps": len(done["action"])}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--environment", default=ENVIRONMENT)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="write recordings")
    recording.add_argument("folder", type=Path)
    recording.add_argument("--episodes", type=int, default=10)
    recording.add_argument("--seed", type=int, default=0, help="of the first episode")
    recording.add_argument("--mistakes", type=float, default=0.0, help="chance of a mistake every half second")
    commands.add_parser("play", help="play the episodes that hvd rollouts asks for")
    options = parser.parse_args()
    if options.command == "record":
        record(options.folder, options.environment, options.episodes, options.seed, options.mistakes)
    else:
        play(options.environment)


if __name__ == "__main__":
    main()
