"""What weights in 8 bits (hvd serve --weights int8) cost and save, beside the same policy without, by hand.

    python -m tests.benchmarks.bench_int8 [--steps 40]                          # pi0 and pi0.5: memory, latency, error
    python -m tests.benchmarks.bench_int8 --config demo [--rollouts 200]        # a trained policy: success, error

The first is the small shape of bench_train_step with random weights (those of pi0.5's norms, which start as zeros,
too), bfloat16, batch 1, ten flow steps. Memory is of a process for each form, which makes its weights and answers three
requests. Latency and error are of one process that asks both forms in turn. Errors are in normalised actions; "float32"
is the same policy with activations of float32, for comparison.
"""

import argparse
import dataclasses
import json
import resource
import sys
import tempfile
import time

import numpy as np

from hvd.evaluate import policies
from hvd.tables import aligned
from tests.benchmarks import bench_train_step as shapes

CASES = {"pi0": "sample_bf16", "pi0.5": "sample_pi05_bf16"}
REQUESTS = 16  # whose actions are compared
FRAMES = 256  # of the trained policy's data


def made(name: str, dtype: str, int8: bool, depth: int = 4, vocab: int = 16_384):
    """(the model's config, its weights, its compiled answer to (weights, observation, noise))."""
    import jax

    from hvd.models import acting, precision
    from hvd.models.pi0 import Pi0
    from hvd.models.separate import separate
    from hvd.train import host_memory
    from hvd.train.state import Graph

    case = shapes.SHAPE | shapes.CASES[CASES[name]] | {"remat": "none", "dtype": dtype}
    case |= {"vocab_size": vocab} | {part: shapes.SHAPE[part] | {"depth": depth} for part in ("trunk", "expert")}
    model = shapes.config_of(case).model
    graph = Graph(lambda rngs: Pi0(model, rngs), None, precision.inference(model.dtype))

    def moved(path, leaf):
        modulates = all(part in jax.tree_util.keystr(path) for part in ("norm", "Dense_0", "kernel"))
        noise = jax.random.normal(jax.random.key(7), leaf.shape) * 0.5 * leaf.shape[-2] ** -0.5 if modulates else 0
        return (leaf + noise).astype(leaf.dtype)

    params = jax.tree_util.tree_map_with_path(moved, jax.jit(graph.init)(jax.random.key(0)))
    weights = jax.block_until_ready(separate(model, params, int8))
    del params
    host_memory.give_back()
    steps = case["flow_steps"]
    act = jax.jit(lambda weights, seen, noise: acting.sample_actions(model, weights, seen, noise, steps))
    return model, weights, act


def question(model, number: int):
    rng = np.random.default_rng(number)
    seen = shapes.random_observation(model, 1, rng)
    return seen, rng.normal(size=(1, model.action_horizon, model.action_dim)).astype(np.float32)


def memory(name: str, int8: bool, depth: int, vocab: int) -> dict[str, float]:
    """MB of the weights, of the process before it makes them, with them, and after it has answered."""
    import jax
    import psutil

    from hvd.train import host_memory

    rss = psutil.Process().memory_info
    before = rss().rss
    model, weights, act = made(name, "bfloat16", int8, depth, vocab)
    loaded = rss().rss
    compiled = act.lower(weights, *question(model, 0)).compile()
    host_memory.give_back()
    for number in range(3):
        np.asarray(compiled(weights, *question(model, number)))
    found = {"weights": sum(leaf.nbytes for leaf in jax.tree.leaves(weights)), "before": before, "loaded": loaded}
    found |= {"answered": rss().rss, "program": compiled.memory_analysis().temp_size_in_bytes}
    found["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {key: value / 1e6 for key, value in found.items()}


def latency(name: str, steps: int) -> dict[str, float]:
    """Seconds of both forms, asked in turn, and how far their actions are from those of bfloat16."""
    forms = {"full": ("bfloat16", False), "int8": ("bfloat16", True), "float32": ("float32", False)}
    ready = {form: made(name, *how) for form, how in forms.items()}
    asked = [question(ready["full"][0], number) for number in range(REQUESTS)]
    got = {form: np.array([act(weights, *each) for each in asked]) for form, (_, weights, act) in ready.items()}
    found = {"rms": float(np.sqrt(np.mean(got["full"] ** 2)))}
    for form in ("int8", "float32"):
        error = got[form] - got["full"]
        found |= {f"{form} rms": float(np.sqrt(np.mean(error**2))), f"{form} max": float(np.abs(error).max())}
    times: dict[str, list[float]] = {"full": [], "int8": []}
    for i in range(steps):
        for form in times if i % 2 else reversed(times):
            _, weights, act = ready[form]
            begin = time.perf_counter()
            np.asarray(act(weights, *asked[i % REQUESTS]))
            times[form].append(time.perf_counter() - begin)
    for form, seconds in times.items():
        found |= {f"{form} p{q}": float(np.quantile(seconds, q / 100) * 1e3) for q in (50, 95)}
    return found


def narrow(cfg):
    """hvd.evaluate.policies.trained in 8 bits."""
    return policies.trained(cfg, int8=True)


def of_config(name: str, rollouts: int, first_start: int, rest: list[str]) -> None:
    import jax

    from hvd import overrides
    from hvd.evaluate.command import roll_out
    from hvd.serve.observation import default_prompt
    from hvd.train import stage_data
    from hvd.train.inference import load_policy
    from tests.benchmarks import bench_int8  # a worker process finds no function of __main__

    cfg = overrides.experiment(["--config", name, *rest])
    own = dataclasses.replace(cfg.evaluate, num_rollouts=rollouts, seed=first_start, videos=0)
    cfg = dataclasses.replace(cfg, evaluate=own)
    data = stage_data.open_dataset(cfg, "optimal")
    state = data.state[np.linspace(0, len(data.state) - 1, FRAMES).astype(int)]
    actions, sizes = [], []
    for int8 in (False, True):
        policy = load_policy(cfg, int8=int8)
        raw = policy.act(state, {}, [default_prompt(cfg)] * FRAMES, jax.random.key(0))
        actions.append(policy.transform.actions_in(raw, state))
        sizes.append(f"{policy.kept} {policy.weight_bytes / 1e6:.2f} MB")
    error = actions[1] - actions[0]
    rms, size = (float(np.sqrt(np.mean(x**2))) for x in (error, actions[0]))
    print(f"{', '.join(sizes)}: RMS error {rms:.4f}, largest {np.abs(error).max():.4f}, RMS of actions {size:.3f}")
    rows = [["weights", "success"]]
    for label, loader in (("full", policies.trained), ("int8", bench_int8.narrow)):
        with tempfile.TemporaryDirectory() as scratch:
            found = roll_out(cfg, cfg.policy.run_name, loader, {"digest": "", "step": 0}, out=scratch)["success"]
        rows.append([label, f"{found['count']} of {found['n']}, [{found['low']:.2f}, {found['high']:.2f}]"])
        print(*rows[-1], flush=True)
    print("\n".join(aligned(rows)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--families", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--depth", type=int, default=4, help="of both experts, where memory is measured")
    parser.add_argument("--vocab", type=int, default=16_384, help="the same; 257152 = pi0's own")
    parser.add_argument("--config", default="", help="of a trained policy run")
    parser.add_argument("--rollouts", type=int, default=200)
    parser.add_argument("--first_start", type=int, default=4_000_000)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args, rest = parser.parse_known_args()
    if args.config:
        return of_config(args.config, args.rollouts, args.first_start, rest)
    if args.one:
        case = json.loads(args.one)
        print(json.dumps({"memory": memory, "latency": latency}[case.pop("part")](**case)))
        return
    command = [sys.executable, "-m", "tests.benchmarks.bench_int8", "--one"]
    for name in args.families:
        size = {"depth": args.depth, "vocab": args.vocab}
        cases = [{"part": "memory", "name": name, "int8": int8} | size for int8 in (False, True)]
        cases += [{"part": "latency", "name": name, "steps": args.steps}] if args.steps else []
        for case in cases:
            found = {key: round(value, 4) for key, value in shapes.in_process(command, case).items()}
            print(case, found, flush=True)


if __name__ == "__main__":
    main()
