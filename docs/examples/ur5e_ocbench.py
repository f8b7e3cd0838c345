"""OCBench (Park and Levine 2026; a UR5e with a gripper) as recordings for hvd, and as a place to try a policy out.

In a Python of its own, 3.12 or later:

    python3 -m venv oc && oc/bin/pip install ocbench==1.0.2 h5py etils jaxtyping msgpack msgspec websockets
    export MUJOCO_GL=disable PYTHONPATH=PATH/OF/hvd
    oc/bin/python docs/examples/ur5e_ocbench.py record raw/expert --episodes 10 --seed 0
    oc/bin/python docs/examples/ur5e_ocbench.py record raw/mixed --episodes 200 --seed 1000 --mistakes 0.3

then with hvd, whose robot `ur5e` has the levels arm and gripper:

    hvd convert --raw-dirs raw/expert --robot ur5e --repo-id oc/optimal --root data/optimal --cameras
    hvd convert --raw-dirs raw/mixed --robot ur5e --repo-id oc/mixed --root data/mixed --cameras
    FIELDS="--config demo --sim.task= --exp_name oc --robot ur5e --model.action_dim 64 --evaluate.baselines false
        --optimal_data.root data/optimal --suboptimal_data.root data/mixed
        --model.action_horizon 5 --evaluate.execute_steps 5 --policy.batch_size 64
        --policy.num_train_steps 6000 --policy.lr_schedule.decay_steps 6000"
    hvd norm-stats $FIELDS && hvd train-value $FIELDS && hvd train-policy $FIELDS
    hvd rollouts $FIELDS --task blocks -- oc/bin/python docs/examples/ur5e_ocbench.py play

The operators are OCBench's own: with --mistakes P each subgoal is a wrong one with that chance, and is labelled as the
arm's mistake. --environment names a lite task, in which the hand points down. Actions are steps of the hand and the
gripper in units of the largest one, as the operators think; OCBench's inverse kinematics makes joint steps of them.
"""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ENVIRONMENT = "block-cpu-lite-double-task1-v0"
OPERATORS = {
    "block": "BlockController",
    "chamber": "ChamberController",
    "hanoi": "HanoiController",
    "switch": "SwitchController",
}
RATE = 10  # control steps a second of the lite tasks


class Hand:
    """An environment of OCBench whose actions [5] are steps of the hand (x, y, z, yaw) and of the gripper."""

    def __init__(self, name: str):
        import ocbench  # pyright: ignore[reportMissingImports]

        self.env = ocbench.make(name)
        self.inner = self.env.unwrapped
        if not self.inner._lite:
            raise SystemExit(f"{name}: its operator tilts the hand; choose a lite task")
        self.size = self.inner._ee_action_delta  # m, rad and openings that an action of 1 is
        self._joints = self.inner.joint_position_action
        self.inner.joint_position_action = self._asked

    def _asked(self, pos: Any, yaw: Any, opening: Any, effector_rotation: Any = None) -> np.ndarray:
        """OCBench's operators ask here for the joint steps to a target, which is kept."""
        turned = yaw if effector_rotation is None else effector_rotation.compute_yaw_radians()
        self.target = np.array([*pos, turned, opening])
        return self._joints(pos, yaw, opening, effector_rotation)

    def wanted(self, info: dict[str, Any]) -> np.ndarray:
        """The action that leads to the operator's last target."""
        step = self.target - pose(info)
        step[3] = (step[3] + np.pi) % (2 * np.pi) - np.pi
        return step / self.size

    def reset(self, seed: int) -> tuple[np.ndarray, dict[str, Any]]:
        seen, self.info = self.env.reset(seed=seed)
        return seen, self.info

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        target = pose(self.info) + action * self.size
        *ended, self.info = self.env.step(self._joints(target[:3], target[3], target[4]))
        return (*ended, self.info)


def pose(info: dict[str, Any]) -> np.ndarray:
    """The hand's position and yaw, and the gripper's opening [5]."""
    return np.concatenate([info[f"proprio/{part}"] for part in ("effector_pos", "effector_yaw", "gripper_opening")])


def around(info: dict[str, Any]) -> np.ndarray:
    """What is around the hand, from where it is: positions in units of 0.1 m, how things are turned (in quarters too:
    a gripper does not tell the sides of a block apart), what buttons, drawers and windows say, and touch."""
    hand, yaw = info["proprio/effector_pos"], info["proprio/effector_yaw"][0]
    found = [[np.cos(yaw), np.sin(yaw)], info["proprio/gripper_contact"]]
    for name, value in info.items():
        kind = name.rpartition("_")[2] if name.startswith("privileged/") else "vel"
        if kind == "yaw":
            turned = np.asarray(value) - yaw
            found += [f(n * turned) for n in (1, 4) for f in (np.cos, np.sin)]
        elif kind == "pos" and np.size(value) == 3:
            found.append(10 * (value - hand))
        elif kind not in ("quat", "vel"):
            found.append(np.ravel(value))
    return np.concatenate(found)


def observed(info: dict[str, Any]) -> dict[str, np.ndarray]:
    """The hand's pose [5], and what is around it."""
    own, rest = pose(info).astype(np.float32), around(info).astype(np.float32)
    return {"observation.state": own, "observation.environment_state": rest}


def episode(env: Any, seed: int, act: Callable[[np.ndarray, dict[str, Any]], np.ndarray], begin: Any) -> dict[str, Any]:
    """One episode: what was observed before each action [T,...] and at the end, the actions [T,5], whether it succeeded
    and whether the environment ended it (by success or failure, not because its time was up)."""
    np.random.seed(seed)  # noqa: NPY002  # OCBench's operators draw from numpy's own stream
    seen, info = env.reset(seed=seed)
    begin(seen, info)
    steps: list[dict[str, np.ndarray]] = []
    terminated = over = False
    while not over:
        action = np.clip(act(seen, info), -1, 1).astype(np.float32)
        steps.append({**observed(info), "action": action})
        seen, _, terminated, truncated, info = env.step(action)
        over = terminated or truncated
    ended = {"success": bool(info["success"]), "terminal": bool(terminated), "last": observed(info)}
    return ended | {name: np.stack([step[name] for step in steps]) for name in steps[0]}


def record(folder: Path, name: str, episodes: int, seed: int, mistakes: float) -> None:
    """Recordings with label files, for `hvd convert`."""
    import h5py
    from ocbench.oracles import controllers  # pyright: ignore[reportMissingImports]

    env = Hand(name)
    kind = getattr(controllers, OPERATORS[name.split("-")[0]])
    chance = {"p_mistake_range": (mistakes, mistakes)} if name.startswith("switch") else {"p_mistake": mistakes}
    operator = kind(env.env, **chance)

    def act(seen: np.ndarray, info: dict[str, Any]) -> np.ndarray:
        operator.select_action(seen, info)
        return env.wanted(info)

    folder.mkdir(parents=True, exist_ok=True)
    won = 0
    for number in range(episodes):
        done = episode(env, seed + number, act, operator.reset)
        length = len(done["action"])
        operator.finish_episode(length - 1, env.inner.get_step_info())
        with h5py.File(folder / f"episode_{number:05d}.hdf5", "w") as file:
            file.attrs["recording_freq"] = RATE
            file["action/arm"], file["action/gripper"] = done["action"][:, :4], done["action"][:, 4:]
            file["obs/hand_state/arm/pose"] = done["observation.state"][:, :4]
            file["obs/gripper_state/gripper/gripper_position"] = done["observation.state"][:, 4:]
            file["obs/sim/environment_state"] = done["observation.environment_state"]
            file["obs/sim/last_observation"] = np.concatenate(list(done["last"].values()))
        wrong = [
            {"level": "arm", "start": part["start"], "end": min(part["end"] + 1, length), "kind": part["subtask_name"]}
            for part in operator.segments
            if part["is_potential_high_level_mistake"] and part["start"] < min(part["end"] + 1, length)
        ]
        labels = {"task": name, "success": done["success"], "mistakes": wrong, "terminal": done["terminal"]}
        (folder / f"episode_{number:05d}.labels.json").write_text(json.dumps(labels))
        won += done["success"]
    print(f"{folder}: {episodes} episodes of {name}, {won} succeeded")


def play(name: str) -> None:
    """The episodes that `hvd rollouts` asks for."""
    from hvd.client import connect

    env = Hand(name)
    first, count, execute = (int(os.environ[f"HVD_{what}"]) for what in ("FIRST_SEED", "EPISODES", "EXECUTE"))
    with connect(os.environ["HVD_URL"]) as server:
        for seed in range(first, first + count):
            chunk: list[np.ndarray] = []

            def act(seen: np.ndarray, info: dict[str, Any], chunk: list[np.ndarray] = chunk) -> np.ndarray:
                if not chunk:
                    actions = server.ask({**observed(info), "prompt": name})["actions"]
                    chunk.extend(actions[:execute])
                return chunk.pop(0)

            done = episode(env, seed, act, lambda *_: None)
            ended = {"seed": seed, "success": done["success"], "steps": len(done["action"])}
            print(json.dumps(ended), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--environment", default=ENVIRONMENT)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="write recordings")
    recording.add_argument("folder", type=Path)
    recording.add_argument("--episodes", type=int, default=10)
    recording.add_argument("--seed", type=int, default=0, help="of the first episode")
    recording.add_argument("--mistakes", type=float, default=0.0, help="chance that a subgoal is a wrong one")
    commands.add_parser("play", help="play the episodes that hvd rollouts asks for")
    options = parser.parse_args()
    if options.command == "record":
        record(options.folder, options.environment, options.episodes, options.seed, options.mistakes)
    else:
        play(options.environment)


if __name__ == "__main__":
    main()
