"""KinDER (RSS 2026; TidyBot, a wheeled base with an arm) as recordings for hvd, and as a place to try a policy out.

In a Python of its own, 3.12 or earlier:

    python3.12 -m venv kinder
    kinder/bin/pip install kindergarden==0.2.5 h5py etils jaxtyping msgpack msgspec websockets
    export PYTHONPATH=PATH/OF/hvd
    kinder/bin/python docs/examples/tidybot_kinder.py record raw/expert --episodes 10 --seed 0
    kinder/bin/python docs/examples/tidybot_kinder.py record raw/mixed --episodes 200 --seed 1000 --mistakes 0.3

then with hvd, whose robot `tidybot` has the levels base, arm and gripper:

    hvd convert --raw-dirs raw/expert --robot tidybot --repo-id kinder/optimal --root data/optimal --cameras
    hvd convert --raw-dirs raw/mixed --robot tidybot --repo-id kinder/mixed --root data/mixed --cameras
    FIELDS="--config demo --sim.task= --exp_name kinder --robot tidybot --model.action_dim 64 --evaluate.baselines false
        --optimal_data.root data/optimal --suboptimal_data.root data/mixed
        --model.action_horizon 5 --evaluate.execute_steps 5 --policy.batch_size 64
        --policy.num_train_steps 6000 --policy.lr_schedule.decay_steps 6000"
    hvd norm-stats $FIELDS && hvd train-value $FIELDS && hvd train-policy $FIELDS
    hvd rollouts $FIELDS --task shelf -- kinder/bin/python docs/examples/tidybot_kinder.py play

--environment names one of KinDER's kinematic tasks: KinematicShelf3D-oN and KinematicCylinderShelf3D-oN (N things from
the floor onto a shelf), or Transport3D-oN (a box and N cubes from the floor onto a table).

KinDER has no operators; this one is ours. With --mistakes P each pick and each place goes wrong with that chance, at
one level, while the others go on: the base stops short, the arm stays too high or turns aside, or the gripper is late.
The frames in which that level's action is another one than without the mistake are labelled. Actions are steps of the
base in the world and of the joints, so they are no positions.

Of 50 episodes of shelf, cylinder and transport (N = 1) 50, 50 and 48 succeed without mistakes (--seed 0), and 26, 27
and 27 with --mistakes 0.3 (--seed 1000). A step takes 1.1 to 1.5 ms of a CPU.
"""

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ENVIRONMENT = "KinematicShelf3D-o1"
RATE = 10  # control steps a second; KinDER's kinematic tasks have no clock
LIMIT = 300  # steps of an episode
LEVELS = {"base": slice(0, 3), "arm": slice(3, 10), "gripper": slice(10, 11)}
SPEED = {"base": 0.1, "arm": 0.15}  # m and rad a step
SHOULDER, UPPER, FORE, HAND = 0.6796, 0.4208, 0.3143, 0.2874  # m: its height; the lengths; the hand points down
MOUNT = 0.1199  # m from the middle of the base to the arm
PICK = 0.4  # m from the arm to what it picks up
OVER, GAP = 0.04, 0.002  # m above the place before it is lowered, and when it is let go
TABLE = 0.6  # x of the table's middle; what lies behind it is picked up and put down from there
BEHIND = 3.1  # the heading there: at pi it would jump to -pi and back
AROUND = (0.0, 1.3)  # x at the table's corners when driving around it, 1 m to the side


@dataclass(frozen=True)
class Thing:
    """What is carried: where the hand takes it, m from its middle, and where the hand puts it (x, y)."""

    name: str
    above: float
    slot: tuple[float, float]
    aside: float = 0.0


@dataclass(frozen=True)
class Task:
    """Things to carry onto a surface. `turn`: the heading there; None = that of the pick, on this side of the table."""

    things: tuple[Thing, ...]
    surface: float
    travel: float
    ahead: float
    turn: float | None = None


@dataclass
class Move:
    """Where base (x, y, heading) and hand (ahead of the arm, height) go, and whether the gripper is to be closed."""

    base: np.ndarray
    arm: tuple[float, float]
    closed: bool
    part: int
    hold: int = 0


@dataclass
class Slip:
    """One mistake: of which level, and by how much."""

    level: str
    kind: str
    base: float = 0.0
    height: float = 0.0
    aside: float = 0.0
    delay: int = 0


def make(name: str) -> Any:
    import gymnasium  # pyright: ignore[reportMissingImports]
    import kinder  # pyright: ignore[reportMissingImports]

    kinder.register_all_environments()  # without a display those of MuJoCo are left out, which are not asked for here
    return gymnasium.make(f"kinder/{name}-v0", realistic_bg=False, disable_env_checker=True)


def task_of(name: str) -> Task:
    """The task of an environment's name."""
    family, _, count = name.partition("-o")
    numbers = range(int(count or 1))
    shelf = [(2.0 + 0.15 * (n - (len(numbers) - 1) / 2), 2.4) for n in numbers]
    if family == "KinematicShelf3D":
        return Task(tuple(Thing(f"cube{n}", 0.025, shelf[n]) for n in numbers), 0.8265, 0.94, 0.3, np.pi / 2)
    if family == "KinematicCylinderShelf3D":
        return Task(tuple(Thing(f"cylinder{n}", 0.075, shelf[n]) for n in numbers), 0.8265, 1.045, 0.3, np.pi / 2)
    if family == "Transport3D":
        cubes = tuple(Thing(f"cube{n}", 0.025, (TABLE, -0.15 - 0.15 * n)) for n in numbers)
        return Task((Thing("box0", 0.08, (TABLE, 0.345), 0.145), *cubes), 0.4, 0.68, 0.4)
    raise SystemExit(f"{name}: the operator knows KinematicShelf3D, KinematicCylinderShelf3D and Transport3D")


def reach(ahead: float, height: float, aside: float) -> np.ndarray:
    """The arm's joints [7] that hold the hand so far ahead of the arm, so high, turned aside, pointing down."""
    up = height + HAND - SHOULDER
    bend = np.arccos(np.clip((ahead**2 + up**2 - UPPER**2 - FORE**2) / (2 * UPPER * FORE), -1, 1))
    tilt = np.arctan2(ahead, up) - np.arctan2(FORE * np.sin(bend), UPPER + FORE * np.cos(bend))
    return np.array([aside, tilt, -np.pi, -bend, 0, tilt + bend - np.pi, np.pi / 2])


def stand(x: float, y: float, heading: float, ahead: float) -> np.ndarray:
    """Where the base stands [3] when the hand is over (x, y)."""
    away = MOUNT + ahead
    return np.array([x - away * np.cos(heading), y - away * np.sin(heading), heading])


def plan(task: Task, state: Any) -> list[Move]:
    """The moves of an episode that begins in a state of KinDER's: for each thing a pick and a place (a part each)."""
    moves: list[Move] = []
    at = np.zeros(3)
    travel = (task.ahead, task.travel)
    for number, thing in enumerate(task.things):
        x, y, z = state.get_object_pose(thing.name).position
        low, laid = z + thing.above, task.surface + state.get_object_half_extents(thing.name)[2] + thing.above + GAP
        behind = task.turn is None and x > TABLE
        heading = BEHIND if behind else 0.0
        pick = stand(x, y + thing.aside, heading, PICK)
        place = stand(*thing.slot, heading if task.turn is None else task.turn, task.ahead)
        if task.turn is None and behind != (at[0] > TABLE):  # around the table
            side = 1.0 if at[1] > 0 else -1.0
            corners = AROUND if behind else AROUND[::-1]
            moves += [Move(np.array([corner, side, at[2]]), travel, False, 2 * number) for corner in corners]
        for base, ahead, height, lift, closes in ((pick, PICK, low, 0.1, True), (place, task.ahead, laid, OVER, False)):
            part = 2 * number + (not closes)
            down, over = (ahead, height), (ahead, height + lift)
            moves += [Move(base, arm, not closes, part) for arm in (travel, over, down)]
            moves += [Move(base, down, closes, part, hold=2)]
            moves += [Move(base, arm, closes, part) for arm in (over, travel)]
        at = place
    return moves


def slip(rng: np.random.Generator, place: bool) -> Slip:
    """A mistake of a pick or a place."""
    level = rng.choice(list(LEVELS))
    if level == "base":
        return Slip("base", "short", base=rng.uniform(0.15, 0.4) if place else rng.uniform(0.05, 0.15))
    if level == "gripper":
        return Slip("gripper", "late", delay=int(rng.integers(2, 10)))
    if rng.random() < 0.5:
        return Slip("arm", "high", height=rng.uniform(0.03, 0.1))
    return Slip("arm", "aside", aside=rng.uniform(0.2, 0.6) * rng.choice([-1, 1]))


class Operator:
    """Goes through a plan by what it sees. `wrong`: for each step the level that erred, "" where none did, and how."""

    def __init__(self, task: Task, mistakes: float):
        self.task, self.mistakes = task, mistakes

    def begin(self, state: Any, seed: int) -> None:
        rng, parts = np.random.default_rng(seed), range(2 * len(self.task.things))
        self.moves = plan(self.task, state)
        self.slips = {part: slip(rng, place=part % 2 == 1) for part in parts if rng.random() < self.mistakes}
        self.wrong: list[tuple[str, str]] = []
        self.held, self.stuck, self.closed, self.last = 0, 0, False, np.zeros(10)

    def action(self, seen: np.ndarray, move: Move, made: Slip | None) -> tuple[np.ndarray, bool]:
        """The action [11] of a move, with a mistake or without, and whether base and arm have arrived."""
        base, (ahead, height), aside, closed = move.base.copy(), move.arm, 0.0, move.closed
        if made is not None:
            base[:2] -= made.base * np.array([np.cos(base[2]), np.sin(base[2])])
            if height < self.task.travel:
                height, aside = min(height + made.height, self.task.travel), made.aside
            closed = self.closed if made.delay else closed
        way, bend = base - seen[:3], reach(ahead, height, aside) - seen[3:10]
        arrived = bool(np.abs(way).max() < 1e-3 and np.abs(bend).max() < 1e-3)
        way *= min(1.0, SPEED["base"] / max(np.abs(way).max(), 1e-9))
        bend *= min(1.0, SPEED["arm"] / max(np.abs(bend).max(), 1e-9))
        return np.concatenate([way, bend, [-1.0 if closed else 1.0]]).astype(np.float32), arrived

    def act(self, seen: np.ndarray) -> np.ndarray | None:
        """The next action [11]; None when nothing is left to do."""
        if not self.moves:
            return None
        move = self.moves[0]
        made = self.slips.get(move.part)
        right, _ = self.action(seen, move, None)
        done, arrived = self.action(seen, move, made)
        differs = made is not None and np.abs(done - right)[LEVELS[made.level]].max() > 0.01
        self.wrong.append((made.level, made.kind) if made is not None and differs else ("", ""))
        if made is not None and made.delay and self.closed != move.closed:
            made.delay -= 1
        else:
            self.closed = move.closed
        self.stuck = self.stuck + 1 if np.abs(seen[:10] - self.last).max() < 1e-6 and not arrived else 0
        self.last, self.held = seen[:10], self.held + arrived
        if self.held > move.hold or self.stuck > 2:  # what is in the way is not tried forever
            self.moves.pop(0)
            self.held = self.stuck = 0
        return done

    def labels(self) -> list[dict[str, Any]]:
        """The mistakes as label files have them."""
        found: list[dict[str, Any]] = []
        for frame, (level, kind) in enumerate(self.wrong):
            if level and found and found[-1]["end"] == frame and found[-1]["level"] == level:
                found[-1]["end"] = frame + 1
            elif level:
                found.append({"level": level, "start": frame, "end": frame + 1, "kind": kind})
        return found


def hand(seen: np.ndarray) -> np.ndarray:
    """Where the hand is [3], from the base: `reach` the other way round."""
    aside, tilt, bend = seen[3], seen[4], -seen[6]
    ahead = UPPER * np.sin(tilt) + FORE * np.sin(tilt + bend)
    up = UPPER * np.cos(tilt) + FORE * np.cos(tilt + bend)
    return np.array([MOUNT + ahead * np.cos(aside), ahead * np.sin(aside), SHOULDER + up - HAND])


def observed(env: Any, seen: np.ndarray) -> dict[str, np.ndarray]:
    """The base's pose, joint positions and how far the gripper is closed [11]; what KinDER observes beside them; and
    where all things lie as seen from the hand, in units of 0.2 m."""
    state, turn = env.observation_space.devectorize(seen), np.exp(-1j * seen[2])
    rest = [seen[11:], [turn.real, turn.imag], hand(seen)]
    for thing in state.data:
        if thing.name != "robot":
            x, y, z = state.get_object_pose(thing.name).position
            there = (x - seen[0] + 1j * (y - seen[1])) * turn
            rest.append(5 * (np.array([there.real, there.imag, z]) - hand(seen)))
    own = seen[:11].astype(np.float32)
    return {"observation.state": own, "observation.environment_state": np.concatenate(rest).astype(np.float32)}


def episode(env: Any, seed: int, act: Callable[[np.ndarray], np.ndarray | None], begin: Any) -> dict[str, Any]:
    """One episode: what was observed before each action [T,...], the actions [T,11], and whether it succeeded."""
    seen, _ = env.reset(seed=seed)
    begin(env.observation_space.devectorize(seen), seed)
    steps: list[dict[str, np.ndarray]] = []
    success = False
    while not success and len(steps) < LIMIT and (chosen := act(seen)) is not None:
        action = np.clip(chosen, env.action_space.low, env.action_space.high).astype(np.float32)
        steps.append({**observed(env, seen), "action": action})
        seen, _, success, _, _ = env.step(action)
    return {"success": bool(success), **{name: np.stack([step[name] for step in steps]) for name in steps[0]}}


def record(folder: Path, name: str, episodes: int, seed: int, mistakes: float) -> None:
    """Recordings with label files, for `hvd convert`."""
    import h5py

    operator = Operator(task_of(name), mistakes)
    env = make(name)
    folder.mkdir(parents=True, exist_ok=True)
    won = 0
    for number in range(episodes):
        done = episode(env, seed + number, operator.act, operator.begin)
        with h5py.File(folder / f"episode_{number:05d}.hdf5", "w") as file:
            file.attrs["recording_freq"] = RATE
            for level, dims in LEVELS.items():
                file[f"action/{level}"] = done["action"][:, dims]
                file[f"obs/joint_state/{level}/joint_position"] = done["observation.state"][:, dims]
            file["obs/sim/environment_state"] = done["observation.environment_state"]
        labels = {"task": name, "success": done["success"], "mistakes": operator.labels(), "terminal": done["success"]}
        (folder / f"episode_{number:05d}.labels.json").write_text(json.dumps(labels))
        won += done["success"]
    print(f"\n{folder}: {episodes} episodes of {name}, {won} succeeded")


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
                    actions = server.ask({**observed(env, seen), "prompt": name})["actions"]
                    chunk.extend(actions[:execute])
                return chunk.pop(0)

            done = episode(env, seed, act, lambda *_: None)
            ended = {"seed": seed, "success": done["success"], "steps": len(done["action"])}
            print("\n" + json.dumps(ended), flush=True)  # Bullet leaves lines without an end


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--environment", default=ENVIRONMENT)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="write recordings")
    recording.add_argument("folder", type=Path)
    recording.add_argument("--episodes", type=int, default=10)
    recording.add_argument("--seed", type=int, default=0, help="of the first episode")
    recording.add_argument("--mistakes", type=float, default=0.0, help="chance that a pick or a place goes wrong")
    commands.add_parser("play", help="play the episodes that hvd rollouts asks for")
    options = parser.parse_args()
    if options.command == "record":
        record(options.folder, options.environment, options.episodes, options.seed, options.mistakes)
    else:
        play(options.environment)


if __name__ == "__main__":
    main()
