"""Cost of the advantages pass against the policy's training step, per frame, on one device in one run.

    python -m tests.benchmarks.bench_advantages [--config demo] [--steps 30]

needs the complete value run of the experiment (`submit.py --stage value`). Both work on the same batches: the pass is
one forward of the value model, the step is forward, backward and update of pi0. The last line says what computing the
advantages once saves against computing them in every step, as the original does.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

from hvd.experiments import get_config
from hvd.method import flow, policy
from hvd.train import inference, mesh, stage_data, state
from hvd.train import optimizer as optim


def median_s(call: Callable[[], Any], steps: int) -> float:
    """Median time of a call that is waited for, after two that are not counted."""
    times = []
    for _ in range(steps + 2):
        began = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - began)
    return statistics.median(times[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="demo")
    parser.add_argument("--steps", type=int, default=30)
    args = parser.parse_args()
    cfg = get_config(args.config).resolved()
    devices = mesh.start(cfg)
    data = stage_data.open_data(cfg, "policy")
    loader = data.loader(0, devices, {})
    _, batch = next(loader)
    loader.close()
    rows = cfg.policy.batch_size

    value = inference.load_value(cfg, devices=devices)
    flag = devices.flag()
    forward = median_s(lambda: value.evaluate(batch, flag), args.steps)

    graph = policy.make_graph(cfg)
    optimizer = optim.make_optimizer(cfg.policy.optimizer, optim.learning_rate(cfg.policy.lr_schedule))
    init = state.make_init(graph, optimizer, ema=cfg.policy.ema_decay > 0, target=False)
    levels = cfg.levels()

    def loss(trained: state.Tree, frozen: state.Tree) -> jax.Array:
        noise = jax.random.normal(jax.random.key(1), batch["actions"].shape)
        when = flow.sample_time(jax.random.key(2), rows)
        x_t, u = flow.interpolate(noise, batch["actions"], when)
        velocity = graph.module(trained, frozen).velocity(batch["observation"], x_t, when)
        errors = flow.level_errors(velocity, u, batch["action_mask"], levels)
        return flow.policy_loss(errors, batch["weights"], batch["source"], cfg.policy.bc_lambda)[0]

    @jax.jit
    def step(s: state.TrainState) -> state.TrainState:
        return state.advance(s, jax.grad(loss)(s.trained, s.frozen), optimizer, cfg.policy)[0]

    now = jax.jit(init)(jax.random.key(0))
    train = median_s(lambda: step(now), args.steps)

    frames = sum(len(part) for part in data.train.values())
    visits = cfg.policy.num_train_steps * rows
    print(f"{cfg.name}: batches of {rows} rows, {jax.device_count()} {jax.devices()[0].platform} device(s)")
    print(f"{'':34}{'ms a batch':>12}{'us a frame':>12}")
    print(f"{'advantages: value model, forward':34}{forward * 1e3:12.1f}{forward / rows * 1e6:12.0f}")
    print(f"{'policy: forward, backward, update':34}{train * 1e3:12.1f}{train / rows * 1e6:12.0f}")
    print(f"ratio {forward / train:.2f}; the run visits {visits} samples of {frames} frames:")
    print(
        f"advantages once for each frame {frames * forward / rows:.1f} s; in every step {visits * forward / rows:.1f} s"
    )


if __name__ == "__main__":
    main()
