"""The value stage, as a user runs it, on a chain whose values are known in closed form."""

import numpy as np
import pytest

from hvd.configs import DataConfig, LrSchedule, ValueConfig
from hvd.data import normalize
from hvd.data.lerobot_writer import Feature, LeRobotWriter
from hvd.method import advantages, value
from hvd.method.table import Advantages
from tests.train import factory

GAMMA, TAU, LENGTH = 0.9, 0.7, 3
BASE = 7  # an action dim of the base level


def write_chain(root, episodes: int) -> None:
    """States 0 -> 1 -> 2; the last base action decides: +1 ends with reward 1, -1 with 0. Other actions are noise."""
    rng = np.random.default_rng(0)
    features = {
        "observation.state": Feature("float32", (LENGTH,)),
        "action": Feature("float32", (21,)),
        "next.reward": Feature("float32", (1,)),
        "terminal": Feature("bool", (1,)),
    }
    with LeRobotWriter(root, fps=10, robot_type="r1", features=features) as writer:
        for episode in range(episodes):
            good = episode % 2 == 0
            action = 0.1 * rng.normal(size=(LENGTH, 21)).astype(np.float32)
            action[:, BASE] = np.where(np.arange(LENGTH) < LENGTH - 1, 0.0, 1.0 if good else -1.0)
            last = np.arange(LENGTH) == LENGTH - 1
            columns = {
                "observation.state": np.eye(LENGTH, dtype=np.float32),
                "action": action,
                "next.reward": (last & good).astype(np.float32),
                "terminal": last,
            }
            writer.add_episode(columns, task="go", extra={"success": good, "quality": "teleop"})


@pytest.mark.slow
def test_values_of_a_chain(tmp_path):
    write_chain(tmp_path / "chain", 16)
    data = DataConfig(repo_id="chain", root=str(tmp_path / "chain"))
    model = factory.model(action_horizon=1, action_patch=1, method="expectile", tau=TAU)
    cfg = factory.experiment(
        tmp_path,
        optimal_data=data,
        suboptimal_data=data,
        model=model,
        value=ValueConfig(
            num_train_steps=400,
            batch_size=24,
            data="mixed",
            gamma=GAMMA,
            target_ema=0.1,
            lr_schedule=LrSchedule(warmup_steps=20, peak_lr=2e-3, decay_steps=400, decay_lr=1e-4),
            save_interval=400,
            val_batches=0,
        ),
    )
    normalize.main(cfg)
    value.main(cfg)
    advantages.main(cfg)

    table = Advantages.read(cfg.advantages_dir)
    frame = table.frame
    v = np.array([table.v[frame == t].mean() for t in range(LENGTH)])
    # at the end Q is the reward, and the tau-expectile of a fair coin over {0, 1} is tau; each earlier step a discount
    expected = TAU * GAMMA ** np.arange(LENGTH - 1, -1, -1.0)
    np.testing.assert_allclose(v, expected, atol=0.06)
    last = frame == LENGTH - 1
    won = table.episode[last] % 2 == 0
    for level in range(3):
        q = table.q[:, level]
        np.testing.assert_allclose(q[last], np.where(won, 1.0, 0.0), atol=0.1)
        np.testing.assert_allclose(table.a[last, level], np.where(won, 1.0, 0.0) - TAU, atol=0.12)
        for t in range(LENGTH - 1):
            np.testing.assert_allclose(q[frame == t], expected[t], atol=0.1)
