"""A loop for an R1: asks a policy server for chunks and executes them at 10 Hz, here on the simulated robot.

    hvd serve --config demo                                        # in one shell
    python docs/examples/r1_loop.py --task tote --seconds 600      # in another

For a robot of yours, replace SimulatedR1: `observe` and `send` are all that the loop needs, and set its own limits.
"""

import argparse
import time

import numpy as np

from hvd.client import Client, Limits, connect
from hvd.sim.env import Env
from hvd.sim.scene import BASE, CONTROL_DT, GRIPPERS, JOINTS


class SimulatedR1:
    """The simulator as a robot: a control step a tick; what it observes is what the demo's policy was trained on."""

    def __init__(self, task: str, seed: int):
        self.env, self.seed, self.episodes, self.successes = Env(task), seed, 0, 0
        self.env.reset(seed)

    def observe(self) -> dict:
        return {
            "observation.state": self.env.state(),
            "observation.environment_state": self.env.environment_state(),
            "prompt": self.env.task.prompt,
        }

    def send(self, action: np.ndarray) -> bool:
        """Execute one action; whether the episode is over."""
        step = self.env.step(action)
        if step.done:
            self.episodes, self.successes = self.episodes + 1, self.successes + step.success
            self.env.reset(self.seed + self.episodes)
        return step.done

    @property
    def pose(self) -> np.ndarray:
        """The action that holds the robot where it is."""
        held = self.env.as_action(self.env.command)
        held[BASE] = 0
        return held


def limits(env: Env) -> Limits:
    """Joint limits and speeds of the simulated R1; a real one gets those of its data sheet, and a box for its hands."""
    low, high = env.limits[:, 0].copy(), env.limits[:, 1].copy()
    low[GRIPPERS], high[GRIPPERS] = 0, 100
    low[BASE], high[BASE] = -0.6, 0.6  # m/s and rad/s
    speed = np.full(len(low), np.inf)
    speed[JOINTS], speed[GRIPPERS] = 3.0, 400.0  # rad/s, percent a second
    return Limits(low, high, speed)


def main() -> None:
    parser = argparse.ArgumentParser(description="the simulated R1, driven by a policy server in real time")
    parser.add_argument("--url", default="ws://127.0.0.1:8000")
    parser.add_argument("--task", default="tote")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--every", type=int, default=10, help="actions of a chunk before the next one is asked for")
    parser.add_argument("--record", default="", help="keep what is asked and answered in this file, for hvd replay")
    args = parser.parse_args()
    robot, rate = SimulatedR1(args.task, seed=3_000_000), 1 / CONTROL_DT
    ticks, late, missed, limited = 0, 0, 0, 0
    until = time.monotonic() + args.seconds
    with connect(args.url, record=args.record) as server:
        while time.monotonic() < until:
            # One client an episode: no chunk of the last one is executed in the next
            client = Client(
                server.ask,
                server.about,
                policy_rate=rate,
                rate=rate,
                every=args.every,
                limits=limits(robot.env),
                pose=robot.pose,
            )
            over = False
            while not over and time.monotonic() < until:
                over = robot.send(client.next(robot.observe))
                ticks += 1
            client.close()
            late, missed, limited = late + client.late, missed + client.missed, limited + client.limited
    print(f"{ticks} ticks of {CONTROL_DT:g} s: {late} without an action in time, {missed} missed, {limited} limited")
    print(f"{robot.successes} of {robot.episodes} episodes succeeded")


if __name__ == "__main__":
    main()
